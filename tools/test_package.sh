#!/usr/bin/env bash
# Builds sdist and wheel against TORCH_BUILD (build_wheel.sh), installs that wheel in a new environment under each of
# TORCHES in turn, and passes the tests of the sdist from a folder that is not the repository and holds no dsct_kernels.
#   tools/test_package.sh PYTHON TORCH_BUILD "TORCH TORCH..." EXTRAS [pytest arguments]
set -euo pipefail
python=$1 torch_build=$2 torches=$3 extras=$4
shift 4
tests=("$@")
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH # nothing of the repository by the back door

passes_under() { # TORCH
    local torch=$1
    echo "== the wheel alone under $torch: the losses need torch and nothing else"
    "$python" -m venv --clear "$work/run"
    "$work/run/bin/pip" install --quiet --upgrade pip
    "$work/run/bin/pip" install --quiet "$torch"
    "$work/run/bin/pip" install --quiet "${wheel[0]}"
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

    echo "== the tests of the sdist under $torch, with the extras $extras"
    "$work/run/bin/pip" install --quiet "${wheel[0]}[$extras]" "$torch"
    "$work/run/bin/python" -m pytest "${tests[@]}"
}

"$repo/tools/build_wheel.sh" "$python" "$torch_build" "$work/dist"
sdist=("$work"/dist/*.tar.gz)
wheel=("$work"/dist/*.whl)
mkdir "$work/elsewhere"
cd "$work/elsewhere"
tar -xzf "${sdist[0]}" --strip-components=1 --wildcards "*/tests" "*/benchmarks" "*/csrc" "*/docs" "*/examples" "*/tools" \
    "*/pyproject.toml" "*/mkdocs.yml" "*/CHANGELOG.md" "*/setup.py" "*/README.md" "*/LICENSE"
for torch in $torches; do
    passes_under "$torch"
done
