#!/usr/bin/env bash
# Whether docker/compose.yaml is a compose file, and whether it is what queues.yaml makes of it. `docker compose` does
# the first without an engine; where it is not installed, that is said. COMPOSE names another command for it.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/python -m deploy.generate --check
read -ra compose <<<"${COMPOSE:-docker compose}"
if ! "${compose[@]}" version >/dev/null 2>&1; then
    echo "docker/compose.yaml: not checked by docker compose, which is not here (COMPOSE names another command)"
    exit 0
fi
every=(--profile small --profile full --profile prod --profile dev --profile monitoring)
"${compose[@]}" -f docker/compose.yaml "${every[@]}" config --quiet
"${compose[@]}" -f docker/compose.yaml -f docker/compose.gpu.yaml "${every[@]}" config --quiet
echo "docker/compose.yaml: as docker compose wants it"
