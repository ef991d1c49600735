"""Times every launch choice of the Triton kernels on this GPU: python benchmarks/tune_triton.py [--shape N,K,H,W]

Forward and gradient of TNKD (mean, labels of int64 and ignore_index 255), buffers rotated through more than L2. The
launch table in dsct_kernels/tnkd/triton.py holds what won.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from dsct_kernels.tnkd import triton as tnkd

SHAPES = [(16, 6, 512, 512), (4, 6, 512, 512), (2, 19, 512, 512), (1, 150, 512, 512), (128, 100, 1, 1)]


def milliseconds(run: Callable[[int], object], sets: int, repeats: int = 5) -> float:
    """Median over repeats of the time of one run, all buffer sets in one captured graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(sets)]  # results stay: every run writes to memory of its own
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / sets)
    del kept
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    a = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / milliseconds(lambda _: b.copy_(a), 4) / 1e6


def tune(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, copy: float, top: int, all_: bool) -> None:
    n, classes, h, w = shape
    size = n * classes * h * w * dtype.itemsize
    needed = 3 * size + 8 * n * h * w
    sets = max(2, min(16, 300_000_000 // needed + 1))
    form = torch.contiguous_format if layout == "contiguous" else torch.channels_last

    def logits() -> torch.Tensor:
        return torch.randn(shape, device="cuda").mul_(3).to(dtype).contiguous(memory_format=form)

    data = [(logits(), logits(), torch.randint(0, classes, (n, h, w), device="cuda")) for _ in range(sets)]
    adjacent = layout == "contiguous" and h * w > 1
    chosen = tnkd.choose(classes, dtype.itemsize, adjacent, h * w if adjacent else n * h * w)
    results = []
    for config in dict.fromkeys([chosen] + (tnkd.candidates(classes, dtype.itemsize, adjacent) if all_ else [])):

        def run(i: int, config: tnkd.Config = config) -> object:
            return tnkd.forward(*data[i], None, 0.0, 1.0, 2.0, 2.0, 255, 1, False, True, config)

        try:
            results.append((milliseconds(run, sets), config))
        except Exception as error:
            print("   ", config, type(error).__name__, str(error)[:80])
    print(f"{shape} {dtype} {layout}: {needed / 1e6:.0f} MB, floor {needed / copy / 1e3:.1f} us")
    for ms, config in sorted(results, key=lambda r: r[0])[:top] + results[:1]:
        mark = "  <- table" if config == chosen else ""
        print(f"    {ms * 1e3:8.1f} us  {needed / ms / 1e6 / copy:6.1%} of copy  {config}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="N,K,H,W instead of the usual five")
    parser.add_argument("--top", type=int, default=6)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], action="append")
    parser.add_argument("--chosen", action="store_true", help="time only what the table chooses")
    args = parser.parse_args()
    shapes = [tuple(int(x) for x in args.shape.split(","))] if args.shape else SHAPES
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    for shape in shapes:
        for name in args.dtype or ("float32", "bfloat16"):
            for layout in args.layout or ("contiguous", "channels_last"):
                tune(shape, getattr(torch, name), layout, copy, args.top, not args.chosen)


if __name__ == "__main__":
    main()
