"""Replays one captured training step of TNKD and CAFD many times and counts those that are not bitwise the first.

python benchmarks/replays.py                  # 10,000 of each backend; exit code 1 where any differs
python benchmarks/replays.py --replays 100 --json replays.json
"""

import argparse
import json
import pathlib
import sys

if __package__ in (None, ""):  # run as a script: find dsct_kernels where it isn't installed
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from dsct_kernels import dsct_loss

# K; dtypes of student and teacher; layout: every way that csrc/tnkd/cuda has through the logits.
CASES = [
    (6, torch.float32, torch.float32, torch.contiguous_format),
    (19, torch.bfloat16, torch.bfloat16, torch.contiguous_format),
    (19, torch.float32, torch.bfloat16, torch.contiguous_format),
    (150, torch.float16, torch.float16, torch.contiguous_format),
    (19, torch.float32, torch.float32, torch.channels_last),
    (150, torch.bfloat16, torch.bfloat16, torch.channels_last),
]


def differing(backend: str, case: tuple[int, torch.dtype, torch.dtype, torch.memory_format], replays: int) -> int:
    """How many of the replays give another loss or gradient than the first."""
    classes, student_dtype, teacher_dtype, layout = case
    torch.manual_seed(0)

    def make(channels: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(2, channels, size, size, device="cuda").to(dtype, memory_format=layout)

    student, teacher = make(classes, 128, student_dtype), make(classes, 128, teacher_dtype)
    features, teacher_features = make(64, 32, student_dtype), make(96, 32, teacher_dtype)
    target = torch.randint(0, classes, (2, 128, 128), device="cuda", dtype=torch.uint8)
    leaves = [student.requires_grad_(), features.requires_grad_()]

    def step() -> list[Tensor]:
        loss = dsct_loss(student, teacher, target, features, teacher_features, backend=backend).total
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is loaded and compiled at a first call cannot be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    first = [x.clone() for x in results]
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        for x in results:
            x.fill_(float("nan"))
        graph.replay()
        same = torch.stack([(x == y).all() for x, y in zip(results, first, strict=True)]).all()
        count += ~same
    return int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--backends", nargs="+", choices=("native", "triton"), default=("native", "triton"))
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here")
    rows = []
    for backend in options.backends:
        for case in CASES:
            count = differing(backend, case, options.replays)
            rows.append({"backend": backend, "case": [str(x) for x in case], "differing": count})
            print(f"{backend} {' '.join(map(str, case))}: {count} of {options.replays} differ", flush=True)
    if options.json:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "replays": options.replays,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(row["differing"] for row in rows))


if __name__ == "__main__":
    main()
