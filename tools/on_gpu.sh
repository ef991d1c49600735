#!/usr/bin/env bash
# What to run first on a machine with an NVIDIA GPU: one step after the other, each of ten minutes at most, none stopped
# by another's failure. Results as JSON in benchmarks/results/gpu-STEP.json, what was printed in gpu-logs/STEP.log.
#   tools/on_gpu.sh                   every step
#   tools/on_gpu.sh build tests ...   these: build tests memcheck racecheck replays overlap tune-tnkd tune-cafd
#                                     table-tnkd table-cafd table-dsct
# PYTHON: one with a CUDA build of torch, triton and the test extra (default: .venv/bin/python). An nvcc on the PATH.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=benchmarks/results
mkdir -p gpu-logs "$results"

# compute-sanitizer multiplies a test's time: one of each way through the logits and the features.
few="test_tnkd_layouts or test_tnkd_edges or test_tnkd_mixed or test_cafd_edges or test_attention_map"
table() { # LOSS
    "$python" benchmarks/bench_losses.py --device cuda --cold --loss "$1" --json "$results/gpu-table-$1.json" --check
}
sanitizer() { # TOOL
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        "$python" -m pytest -q -x tests/test_cuda.py -k "$few"
}
step() {
    case $1 in
    build) DSCT_KERNELS_BUILD=native "$python" -m pip install --no-build-isolation --no-deps -e . ;;
    tests) "$python" -m pytest -q -m gpu ;;
    memcheck | racecheck) sanitizer "$1" ;;
    replays) "$python" benchmarks/replays.py --json "$results/gpu-replays.json" ;;
    overlap) # programmatic dependent launch, off unless asked for
        DSCT_KERNELS_OVERLAP=1 "$python" benchmarks/replays.py --backends native --json "$results/gpu-overlap.json" &&
            DSCT_KERNELS_OVERLAP=1 "$python" benchmarks/bench_losses.py --device cuda --quick --loss tnkd cafd \
                --backends native --baselines --json "$results/gpu-overlap-table.json"
        ;;
    tune-tnkd | tune-cafd) "$python" benchmarks/tune_triton.py --loss "${1#tune-}" ;;
    table-*) table "${1#table-}" ;;
    *) echo "no step $1: see the head of $0" && return 2 ;;
    esac
}
if [[ ${1-} == --step ]]; then
    step "$2"
    exit
fi

[[ $# -gt 0 ]] || set -- build tests memcheck racecheck replays overlap tune-tnkd tune-cafd table-tnkd table-cafd table-dsct
failed=()
for name in "$@"; do
    echo "== $name"
    SECONDS=0
    timeout 600 "$0" --step "$name" >"gpu-logs/$name.log" 2>&1
    code=$?
    tail -n 3 "gpu-logs/$name.log"
    echo "== $name: exit code $code after $SECONDS s"
    [[ $code -eq 0 ]] || failed+=("$name")
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" && exit 1; }
