"""ESTIMATES, with no GPU, what one could at best do for each of the benchmark's GPU cases. Nothing here is timed.

Floor time is bytes / bandwidth: once for the bytes that must move, once for those the Triton kernels ask for, as if no
cache served a second read. Occupancy is worked out from what ahead-of-time compilation says of registers and shared
memory. Launches, arithmetic and latency are left out, and so are the small kernels' bytes (statistics, partial sums).
Inputs that already lie in L2 can beat the floor (docs/gpu.md).

Examples:
    python benchmarks/roofline.py                                      # every case, on an H100 SXM: 90 seconds
    python benchmarks/roofline.py --gpu rtx4090 --loss tnkd --dtype fp32 --phase forward+backward
    python benchmarks/roofline.py --bandwidth 2000 --arch 90 --json estimate.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

if __package__ in (None, ""):  # run as a script: find benchmarks and tests
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, FORWARD_BACKWARD, IGNORE_INDEX, LAYOUTS, LOSSES, PHASES, Case, make_cases
from dsct_kernels import triton_common
from dsct_kernels.cafd import triton as cafd
from dsct_kernels.tnkd import triton as tnkd
from tests.aot import Launch, recorded, report, source

NOTE = "ESTIMATE, not a measurement: nothing was run on a GPU"
GPUS = {  # data sheet: GB/s, compute capability
    "a100": ("A100 80GB SXM", 2039, 80),
    "rtx4090": ("RTX 4090", 1008, 89),
    "h100": ("H100 SXM", 3350, 90),
    "h200": ("H200", 4800, 90),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a multiprocessor has room for."""

    shared: int  # bytes
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536


LIMITS = {
    80: Limits(164 * 1024),
    89: Limits(100 * 1024, threads=1536, blocks=24),
    90: Limits(228 * 1024),
    100: Limits(228 * 1024),
    120: Limits(100 * 1024, threads=1536, blocks=24),
}
RESERVED_SHARED = 1024  # the system's own, of every block, from sm_80 on


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def occupancy(registers: int, shared: int, warps: int, arch: int) -> tuple[int, float, str]:
    """Blocks that a multiprocessor holds at once, the share of its threads they are, and what stops at that.

    registers: of a thread; shared: bytes of a block. Registers are given to warps, 256 at a time, by each of the
    multiprocessor's four parts from its own quarter; shared memory to blocks, 128 bytes at a time.
    """
    limits = LIMITS[arch]
    warps_by_registers = 4 * (limits.registers // 4 // round_up(max(1, registers) * 32, 256))
    most = {
        "blocks": limits.blocks,
        "threads": limits.threads // (32 * warps),
        "registers": warps_by_registers // warps,
        "shared": limits.shared // (round_up(shared, 128) + RESERVED_SHARED),
    }
    limit = min(most, key=lambda name: most[name])
    return most[limit], most[limit] * warps * 32 / limits.threads, limit


def launches_of(case: Case) -> list[Launch]:
    """The launches that the Triton backend makes for a case, on tensors without memory."""
    backward = case.phase == FORWARD_BACKWARD

    def empty(shape: tuple[int, ...]) -> Tensor:
        form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        return torch.empty(shape, dtype=DTYPES[case.dtype], device="meta").contiguous(memory_format=form)

    with recorded(tnkd, cafd) as launches:
        if case.logits:
            target = torch.empty((case.logits[0], *case.logits[2:]), dtype=torch.int64, device="meta")
            logits, with_ce = empty(case.logits), case.loss == "dsct"
            ce_weight = 1.0 if with_ce else 0.0
            tnkd.forward(logits, logits, target, None, ce_weight, 1.0, 2.0, 2.0, IGNORE_INDEX, 1, with_ce, backward)
        if case.features:
            features = empty(case.features)
            _, grad_map, stats = cafd.forward(features, features, 1.0, 1.0, 1, backward)
            if backward:
                cafd.map_backward(features, grad_map, stats, 1.0, 1.0)
    return launches


def bytes_of(case: Case, launch: Launch) -> int:
    """Bytes of logits, features, labels and gradients that a launch asks for; 0 for the kernels that touch none."""
    name, size = launch.kernel.__name__, DTYPES[case.dtype].itemsize
    if name in ("count_kernel", "tnkd_kernel"):
        assert case.logits
        logits = size * torch.Size(case.logits).numel()
        labels = torch.int64.itemsize * torch.Size(case.logits).numel() // case.logits[1]
        if name == "count_kernel":
            return labels
        walks = 1 if launch.constants["RESIDENT"] else 2  # too many classes to hold: read again for the gradient
        return 2 * walks * logits + labels + (logits if launch.constants["NEEDS_GRAD"] else 0)
    # both networks: two reads; the student: one, and the gradient's write where there is one
    times = {"row_stats_kernel": 2, "maps_kernel": 2, "row_backward_kernel": 2, "rho_kernel": 1, "write_kernel": 2}
    return times[name] * size * torch.Size(case.features or ()).numel() if name in times else 0


def estimate(case: Case, bandwidth: float, arch: int, seen: dict[Any, Any]) -> dict[str, Any]:
    """Bytes, floor times and kernels of a case. `seen` keeps what was compiled: most cases share kernels."""
    kernels = []
    for launch in launches_of(case):
        key = (source(launch).hash(), launch.warps)
        name = launch.kernel.__name__
        if key not in seen:
            seen[key] = report(name, launch, arch)
        found = seen[key]
        blocks, share, limit = occupancy(found.registers, found.shared, launch.warps, arch)
        kernels.append(
            {
                "kernel": name,
                "programs": launch.programs,
                "warps": launch.warps,
                "registers": found.registers,
                "spills": found.spills,
                "shared": found.shared,
                "blocks": blocks,
                "occupancy": share,
                "limit": limit,
                "bytes": bytes_of(case, launch),
            }
        )
    asked = sum(kernel["bytes"] for kernel in kernels)
    return {
        **dataclasses.asdict(case),
        "floor_bytes": case.floor_bytes,
        "floor_us": case.floor_bytes / bandwidth / 1e3,
        "asked_bytes": asked,
        "asked_us": asked / bandwidth / 1e3,
        "kernels": kernels,
    }


def print_table(head: str, rows: Sequence[Sequence[str]]) -> None:
    columns = head.split("|")
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_estimates(result: dict[str, Any]) -> None:
    """Floor times of every case, then every kernel they launch, each once."""
    print(f"{NOTE}. {result['gpu']}, {result['bandwidth_gb_s']:g} GB/s, sm_{result['arch']}.")
    print("floor: bytes that must move; asked: bytes that the Triton kernels ask for, some of which a cache will serve")
    rows: list[list[str]] = []
    kernels: dict[tuple[str, ...], str] = {}
    for case in result["estimates"]:
        name = [case["loss"], case["shape"], case["layout"], case["dtype"], case["phase"]]
        amounts = [case["floor_bytes"] / 1e6, case["floor_us"], case["asked_bytes"] / 1e6, case["asked_us"]]
        rows.append([*name, *(f"{amount:.1f}" for amount in amounts)])
        for k in case["kernels"]:
            row = [k["kernel"], *(str(k[key]) for key in ("warps", "registers", "spills", "shared", "blocks"))]
            kernels.setdefault((*row, f"{k['occupancy']:.0%}", k["limit"]), " ".join(name))
    print_table("loss|shape|layout|dtype|phase|floor MB|floor us|asked MB|asked us", rows)
    print(f"\n{NOTE}. Occupancy of every kernel above, of sm_{result['arch']}'s threads.")
    head = "kernel|warps|registers|spilt B|shared B|blocks an SM|occupancy|limited by|for instance in"
    print_table(head, sorted([*row, where] for row, where in kernels.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="bandwidth and architecture by name")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="in place of the named GPU's")
    parser.add_argument("--arch", type=int, choices=LIMITS, help="in place of the named GPU's: 90 is sm_90")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--only-shape", nargs="+", metavar="NxCxHxW", help="for dsct also NxKxHxW+NxCxHxW")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--phase", nargs="+", choices=PHASES)
    parser.add_argument("--json", metavar="PATH", type=pathlib.Path, help="write every estimate")
    args = parser.parse_args()
    if args.bandwidth is not None and args.bandwidth <= 0:
        parser.error("--bandwidth must be positive")
    if triton_common.interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")

    name, bandwidth, arch = GPUS[args.gpu]
    if args.bandwidth is not None or args.arch is not None:
        name = "a GPU as given"
    bandwidth, arch = args.bandwidth or bandwidth, args.arch or arch
    cases = make_cases(args.loss, "cuda", False, args.only_shape, args.layout, args.dtype, args.phase)
    seen: dict[Any, Any] = {}
    estimates = [estimate(case, bandwidth, arch, seen) for case in cases]
    result = {"note": NOTE, "gpu": name, "bandwidth_gb_s": bandwidth, "arch": arch, "estimates": estimates}
    print_estimates(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
