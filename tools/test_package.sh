#!/usr/bin/env bash
# Builds the sdist, builds one wheel from it against TORCH_BUILD, installs that wheel in a new environment under
# TORCH_RUN, and passes the tests from a folder that is not the repository.
#   tools/test_package.sh PYTHON TORCH_BUILD TORCH_RUN [pytest arguments]
set -euo pipefail
python=$1 torch_build=$2 torch_run=$3
shift 3
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Not pip's own folder: wheels built here must not be found again by a later build.
export PIP_DISABLE_PIP_VERSION_CHECK=1

new_environment() { # NAME TORCH
    "$python" -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet --upgrade pip "setuptools>=77" wheel build
    "$work/$1/bin/pip" install --quiet "$2" pybind11 ninja numpy
}

new_environment build "$torch_build"
(cd "$repo" && "$work/build/bin/python" -m build --sdist --no-isolation --outdir "$work/dist" . >"$work/sdist.log")
(cd "$work" && DSCT_KERNELS_BUILD=native "$work/build/bin/pip" wheel --quiet --no-build-isolation --no-deps \
    --wheel-dir "$work/dist" "$work"/dist/*.tar.gz)
ls -l "$work"/dist

[ "$torch_run" = "$torch_build" ] && mv "$work/build" "$work/moved" # nothing of the build may be needed at run time
new_environment run "$torch_run"
wheel=("$work"/dist/*.whl)
"$work/run/bin/pip" install --quiet "${wheel[0]}[train,bench,test]" "$torch_run"
mkdir "$work/elsewhere"
cp -r "$repo/tests" "$work/elsewhere/"
cp "$repo/pyproject.toml" "$work/elsewhere/" # pytest's options
cd "$work/elsewhere"
"$work/run/bin/python" -m dsct_kernels
"$work/run/bin/python" -m pytest "$@"
