#!/usr/bin/env bash
# Make the passwords that docker/compose.yaml wants, where there are none yet: in docker/secrets, which git ignores.
set -euo pipefail
cd "$(dirname "$0")"

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# The directory keeps others out; the containers' users, who are nobody here, get the files alone.
mkdir -p secrets
chmod 700 secrets
for name in broker_password cache_password grafana_password; do
    [ -s "secrets/$name" ] || random >"secrets/$name"
done
[ -s secrets/flower_auth ] || echo "cortex:$(random)" >secrets/flower_auth
chmod 444 secrets/*
