#!/usr/bin/env bash
# Builds sdist and wheel against TORCH_BUILD (build_wheel.sh), installs that wheel in a new environment under TORCH_RUN,
# and passes the tests of the sdist from a folder that is not the repository and holds no dsct_kernels.
#   tools/test_package.sh PYTHON TORCH_BUILD TORCH_RUN [pytest arguments]
set -euo pipefail
python=$1 torch_build=$2 torch_run=$3
shift 3
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH # nothing of the repository by the back door

new_environment() { # NAME TORCH MORE...
    "$python" -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet --upgrade pip
    "$work/$1/bin/pip" install --quiet "${@:2}"
}

"$repo/tools/build_wheel.sh" "$python" "$torch_build" "$work/dist"
sdist=("$work"/dist/*.tar.gz)
wheel=("$work"/dist/*.whl)

echo "== the wheel alone under $torch_run: the losses need torch and nothing else"
new_environment run "$torch_run"
"$work/run/bin/pip" install --quiet "${wheel[0]}"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/run/bin/pip" list 2>/dev/null | tail -n +3 | awk '{ printf "%s %s, ", $1, $2 } END { print "" }'
"$work/run/bin/python" -m dsct_kernels
"$work/run/bin/python" -m dsct_kernels --check
"$work/run/bin/python" -W error::UserWarning:dsct_kernels - <<'PY'
import torch

import dsct_kernels
from dsct_kernels import backends

assert backends.NATIVE_MISSING is None, backends.NATIVE_MISSING
assert "site-packages" in dsct_kernels.__file__, dsct_kernels.__file__
logits, features = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 9, 4, 4, requires_grad=True)
losses = dsct_kernels.dsct_loss(
    logits, torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 8, 8)), features, torch.randn(2, 5, 8, 8), backend="native"
)
losses.total.backward()
print({name: round(value.item(), 4) for name, value in losses._asdict().items()})
PY

echo "== the tests of the sdist, with the extras"
"$work/run/bin/pip" install --quiet "${wheel[0]}[train,bench,test]" "$torch_run"
tar -xzf "${sdist[0]}" --strip-components=1 --wildcards "*/tests" "*/benchmarks" "*/csrc" "*/docs" "*/examples" "*/tools" \
    "*/pyproject.toml" "*/mkdocs.yml" "*/CHANGELOG.md" "*/setup.py" "*/README.md" "*/LICENSE"
"$work/run/bin/python" -m pytest "$@"
