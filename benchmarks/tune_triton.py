"""Times every launch choice of the Triton kernels on this GPU.

    python benchmarks/tune_triton.py                                       # hours: every candidate compiles
    python benchmarks/tune_triton.py --chosen                              # only what the tables choose
    python benchmarks/tune_triton.py --loss cafd --shape 16,512,64,64 --dtype float32

TNKD: forward and gradient (mean, labels of int64, ignore_index 255). CAFD: forward and backward, one kernel's tile
changed at a time. Buffers are rotated through three times the L2. What wins belongs into
dsct_kernels/tnkd/plan.py or `choose` in dsct_kernels/cafd/triton.py.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

if __package__ in (None, ""):  # run as a script: find benchmarks
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import COPY_BYTES, HOLD_CYCLES_PER_S, cache_bytes
from dsct_kernels.cafd import triton as cafd
from dsct_kernels.tnkd import plan
from dsct_kernels.tnkd import triton as tnkd
from dsct_kernels.tnkd.objective import Objective

SHAPES = {
    "tnkd": [(16, 6, 512, 512), (4, 6, 512, 512), (2, 19, 512, 512), (1, 150, 512, 512), (128, 100, 1, 1)],
    "cafd": [(16, 512, 64, 64), (4, 512, 64, 64), (4, 256, 128, 128), (8, 64, 32, 32)],
}
MOST_SETS = 1024
HOLD_S = 5e-3  # longer than a graph takes to launch
Run = Callable[[int, Any], object]  # the number of the buffer set, the launch


def milliseconds(run: Callable[[int], object], sets: int, repeats: int = 5) -> float:
    """Median over repeats of the GPU's time for one run, all buffer sets in one captured graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(sets)]  # results stay: every run writes to memory of its own
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(HOLD_S * HOLD_CYCLES_PER_S))  # the GPU is held until the graph waits for it
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / sets)
    del kept
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """GB/s, read plus written."""
    a = torch.empty(COPY_BYTES["cuda"] // 4, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * COPY_BYTES["cuda"] / milliseconds(lambda _: b.copy_(a), 4) / 1e6


def sets_for(needed: int, device: torch.device) -> int:
    return max(2, min(MOST_SETS, math.ceil(3 * cache_bytes(device) / needed)))


def tnkd_candidates(num_classes: int, itemsize: int, pixels_adjacent: bool) -> list[plan.Config]:
    """The launches that tuning tries: lanes and warps split over pixels and classes as far as registers hold them."""
    found = []
    for vector in (1, 2, 4, 8):  # values of a tile that a lane holds
        for warps in (1, 2, 4, 8):
            for classes in (1, 2, 4, 8, 16, 32, 64, 128):
                config = plan.Config(32 * warps * vector // classes, classes, warps)
                if (
                    config.pixels >= 1
                    and classes <= plan.next_power_of_2(num_classes)
                    and (vector * itemsize <= 16 or vector == 1 or not pixels_adjacent)
                    and config.held(num_classes) <= 48
                ):
                    found.append(config)
    return found


def cafd_candidates(channels: int, positions: int, itemsize: int, adjacent: bool) -> list[cafd.Config]:
    """The table's choice, and from there one kernel's launch changed at a time."""
    base = cafd.choose(channels, positions, itemsize, adjacent)
    writes = (base.write._replace(unroll=unroll) for unroll in (1, 2, 4, 8))
    found = [base, *(dataclasses.replace(base, write=write) for write in writes)]
    for warps, size, lanes in itertools.product((4, 8), (512, 1024, 2048, 4096), (32, 64, 128, 256, 512, 1024)):
        if lanes > size:
            continue
        shape = (size // lanes, lanes) if adjacent else (lanes, size // lanes)
        tile = cafd.fit(cafd.Tile(*shape, warps), channels, positions, adjacent)
        found.append(dataclasses.replace(base, write=tile))
        for unroll in (1, 2, 4):
            found.append(dataclasses.replace(base, stats=tile._replace(unroll=unroll)))
            found.append(dataclasses.replace(base, maps=tile._replace(unroll=unroll)))
    return list(dict.fromkeys(found))


def tnkd_case(
    shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format, device: torch.device
) -> tuple[int, int, Run, list[Any]]:
    """Bytes that must move, buffer sets, how to run one, and the launches: the table's choice comes first."""
    n, classes, h, w = shape
    needed = 3 * math.prod(shape) * dtype.itemsize + torch.int64.itemsize * n * h * w
    sets = sets_for(needed, device)

    def logits() -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(3).to(dtype).contiguous(memory_format=form)

    data = [(logits(), logits(), torch.randint(0, classes, (n, h, w), device=device)) for _ in range(sets)]
    adjacent = form == torch.contiguous_format and h * w > 1
    packed = Objective(1.0, 2.0, 2.0, ignore_index=255).packed(data[0][2], torch.device("cpu"))
    chosen = tnkd.choose(classes, dtype.itemsize, adjacent, h * w if adjacent else n * h * w)

    def run(i: int, config: plan.Config) -> object:
        return tnkd.forward(*data[i], *packed, True, config)

    return needed, sets, run, [chosen, *tnkd_candidates(classes, dtype.itemsize, adjacent)]


def cafd_case(
    shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format, device: torch.device
) -> tuple[int, int, Run, list[Any]]:
    """The same for CAFD: both networks' features read once, the student's again, its gradient written."""
    _, channels, h, w = shape
    needed = 4 * math.prod(shape) * dtype.itemsize
    sets = sets_for(needed, device)

    def features() -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=form)

    data = [(features(), features()) for _ in range(sets)]
    temperatures = torch.ones(2, dtype=torch.float64)

    def run(i: int, config: cafd.Config) -> object:
        loss, grad_map, stats = cafd.forward(*data[i], temperatures, 1, True, (config, config))
        return loss, cafd.map_backward(data[i][0], grad_map, stats, temperatures, config)

    return needed, sets, run, cafd_candidates(channels, h * w, dtype.itemsize, form == torch.contiguous_format)


def tune(loss: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, copy: float, top: int, all_: bool,
         device: str = "cuda") -> None:  # fmt: skip
    form = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    make = tnkd_case if loss == "tnkd" else cafd_case
    needed, sets, run, configs = make(shape, dtype, form, torch.device(device))
    results = []
    for config in dict.fromkeys(configs if all_ else configs[:1]):
        try:
            results.append((milliseconds(lambda i, config=config: run(i, config), sets), config))  # type: ignore[misc]
        except Exception as error:
            print("   ", config, type(error).__name__, str(error)[:80])
    print(f"{loss} {shape} {dtype} {layout}: {needed / 1e6:.0f} MB, floor {needed / copy / 1e3:.1f} us")
    of_table = [result for result in results if result[1] == configs[0]]
    for ms, config in dict.fromkeys(sorted(results, key=lambda r: r[0])[:top] + of_table):
        mark = "  <- table" if config == configs[0] else ""
        print(f"    {ms * 1e3:8.1f} us  {needed / ms / 1e6 / copy:6.1%} of copy  {config}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=list(SHAPES), action="append")
    parser.add_argument("--shape", metavar="N,C,H,W", help="instead of the usual ones")
    parser.add_argument("--top", type=int, default=6, help="how many of the fastest are printed")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], action="append")
    parser.add_argument("--chosen", action="store_true", help="time only what the tables choose")
    args = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    for loss in args.loss or SHAPES:
        shapes = [tuple(int(x) for x in args.shape.split(","))] if args.shape else SHAPES[loss]
        dtypes = [getattr(torch, name) for name in args.dtype or ("float32", "bfloat16")]
        for of in itertools.product(shapes, dtypes, args.layout or ("contiguous", "channels_last")):
            tune(loss, *of, copy, args.top, not args.chosen)


if __name__ == "__main__":
    main()
