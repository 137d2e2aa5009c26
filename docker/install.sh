#!/bin/sh
# Install the locked packages that /opt/cortex does not have yet: into it, and into /layers/NAME as a layer of an image.
# install-layer NAME [--keep-tests] [--with PACKAGE] [--wheel FILE] [options of pip...]
set -eu

name=$1
shift
lock=/locks/$name.lock
layer=/layers/$name
keep_tests= with= wheel=
while [ $# -gt 0 ]; do
    case $1 in
        --keep-tests) keep_tests=1 ;;
        --with) shift; with=$1 ;;
        --wheel) shift; wheel=$1 ;;
        *) break ;;
    esac
    shift
done

# Dependencies are in the lock: none is looked for. What is installed already, by an earlier layer, is left out.
pip_install() {
    python3 -m pip --python /opt/cortex/bin/python install --disable-pip-version-check --root-user-action=ignore \
        --quiet --no-deps --no-compile --prefix "$layer" "$@"
}

if [ -n "$wheel" ]; then
    pip_install --no-index "$wheel"
else
    pip_install --require-hashes --only-binary :all: --find-links /wheels -r "$lock" "$@"
fi
# A package that no index has, where the folder of wheels has it.
if [ -n "$with" ] && ls /wheels/"$with"-*.whl >/dev/null 2>&1; then
    pip_install --no-index /wheels/"$with"-*.whl
fi

site=$(echo "$layer"/lib/python3*/site-packages)
if [ -z "$keep_tests" ]; then
    find "$site" -name '*.dist-info' -prune -o -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
    # What only a compiler reads, and torch's own test programs.
    rm -rf "$site"/torch/include "$site"/torch/share
    if [ -d "$site"/torch/bin ]; then
        find "$site"/torch/bin -mindepth 1 ! -name torch_shm_manager -delete
        # A fifth of torch's largest library is names for debuggers.
        strip --strip-unneeded "$site"/torch/lib/*.so
    fi
    find "$site" -type f \( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \) -delete
fi

# The root file system is read-only: compiled now or at every start. The dates of files decide nothing, so that one
# source makes one layer.
/opt/cortex/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$layer" -p /opt/cortex "$site" || true
find "$layer" -exec touch -h -d @0 {} +
cp -a "$layer"/. /opt/cortex/
