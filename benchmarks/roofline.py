"""ESTIMATES, with no GPU, what one could at best do for each of the benchmark's GPU cases. No kernel is run or timed.

Floor time is bytes / bandwidth: once for the bytes that must move, once for those a backend's kernels ask for, as if no
cache served a second read. Issue time is what the instructions of all kernels but CAFD's of features take, Triton's
with loops by the number of their trips, CUDA's of TNKD's labels and planes (tools/inspect/nvcc.py), where each of a
multiprocessor's four schedulers issues one in every cycle. At most: the share of the bandwidth that floor is of the
longer of asked and issue. The tail is the one program that adds TNKD's partial sums in Triton, trip after trip. From
these the share of a copy's bandwidth that is to be expected, where the instructions of all kernels are known: each
kernel takes as long as the root of two squares, since neither hides the other wholly: its bytes at COPY of the data
sheet's bandwidth, its instructions at ISSUED of the schedulers' rate; and LAUNCH_US more. All of that is assumed.
Occupancy is worked out from what ahead-of-time compilation (Triton's, and nvcc where there is one) says of registers
and shared memory. Inputs that already lie in L2 can beat the floor (docs/gpu.md). The one thing measured is how long
Triton's compiler takes here,
without its cache: a first call on a GPU waits as long.

Examples:
    python benchmarks/roofline.py                               # every case, on an H100 SXM: minutes
    python benchmarks/roofline.py --gpu rtx4090 --loss tnkd --dtype fp32 --phase forward+backward
    python benchmarks/roofline.py --backend native              # the CUDA C++ kernels only; needs nvcc and g++
    python benchmarks/roofline.py --bandwidth 2000 --arch 90 --json estimate.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

if __package__ in (None, ""):  # run as a script: find benchmarks and tools
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor

from benchmarks.cases import (
    DTYPES,
    FORWARD_BACKWARD,
    IGNORE_INDEX,
    LAYOUTS,
    LOWRES,
    PHASES,
    SHAPES_CUDA,
    Case,
    make_cases,
)
from dsct_kernels import triton_common
from dsct_kernels.cafd import matched_triton as matched
from dsct_kernels.cafd import triton as cafd
from dsct_kernels.jaccard import triton as jaccard
from dsct_kernels.tnkd import triton as tnkd
from dsct_kernels.tnkd import triton_upsampled as upsampled
from dsct_kernels.tnkd.objective import Objective
from tools.inspect import nvcc
from tools.inspect.aot import Launch, Report, recorded, report, source
from tools.inspect.cuda_host import harness

NOTE = "ESTIMATE, not a measurement: nothing was run on a GPU"
BACKENDS = ("native", "triton")
LOSSES = ("tnkd", "cafd", "matched", "jaccard", "dsct", "lowres-tnkd", "lowres")  # those with kernels for a GPU
GPUS = {  # data sheet: GB/s, compute capability, multiprocessors; highest clock in GHz
    "a100": ("A100 80GB SXM", 2039, 80, 108, 1.41),
    "rtx4090": ("RTX 4090", 1008, 89, 128, 2.52),
    "h100": ("H100 SXM", 3350, 90, 132, 1.98),
    "h200": ("H200", 4800, 90, 132, 1.98),
}
SCHEDULERS = 4  # of a multiprocessor
COPY = 0.89  # of a data sheet's bandwidth, what an H100 copied with (docs/gpu.md)
ISSUED = 0.75  # of the schedulers' cycles at the highest clock, what a kernel with few warps is taken to use
LAUNCH_US = 2.0  # from one kernel's end to the next one's first bytes
TRIP_US = 1.0  # of the one program that adds partial sums: a read of memory that nothing hides


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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of a case, by either backend."""

    name: str
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    bytes: int  # of logits, features, labels and gradients that it asks for; 0 for the kernels that touch none
    compile_s: float | None = None
    instructions: float | None = None  # of a warp, where the trips of its loop are known
    trips: int = 0  # one after the other, of a kernel of one program


def empty(shape: tuple[int, ...], case: Case) -> Tensor:
    """A tensor without memory."""
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=DTYPES[case.dtype], device="meta").contiguous(memory_format=form)


def sizes_of(case: Case) -> tuple[int, int, int]:
    """Bytes of one network's logits, of the labels, of one network's features."""
    size = DTYPES[case.dtype].itemsize
    logits = size * torch.Size(case.logits).numel() if case.logits else 0
    labels = torch.int64.itemsize * torch.Size(case.labels).numel() if case.labels else 0
    return logits, labels, size * torch.Size(case.features).numel() if case.features else 0


# ------------------------------------------------------------------------------------------------------------- triton


def launches_of(case: Case, multiprocessors: int = 132) -> list[Launch]:
    """The launches that the Triton backend makes for a case."""
    backward = case.phase == FORWARD_BACKWARD
    with recorded(tnkd, upsampled, cafd, matched, jaccard, multiprocessors=multiprocessors) as launches:
        if case.logits and case.labels and case.teacher_logits and case.loss not in ("matched", "jaccard"):
            target = torch.empty(case.labels, dtype=torch.int64, device="meta")
            logits = empty(case.logits, case), empty(case.teacher_logits, case)
            with_ce = case.loss in ("dsct", "lowres")
            objective = Objective(1.0, 2.0, 2.0, IGNORE_INDEX, ce_weight=1.0 if with_ce else None)
            packed = objective.packed(target, torch.device("cpu"))
            if case.lowres:
                upsampled.forward(*logits, target, *packed, False, backward, by_pointer=False)
            else:
                tnkd.forward(*logits, target, *packed, backward, by_pointer=False)
        temperatures = torch.ones(2, dtype=torch.float64)
        if case.logits and case.loss in ("matched", "jaccard", "dsct"):
            logits = empty(case.logits, case)
            share = torch.empty((case.logits[0], *case.logits[2:]), device="meta")
            mask = share.unsqueeze(1) > 0
            if case.loss != "jaccard":
                loss, stats = matched.forward(logits, logits, mask, temperatures, False, 1, by_pointer=False)
                if backward:
                    matched.backward(logits, logits, mask, stats, temperatures, loss, 1, by_pointer=False)
            if case.loss != "matched":
                _, coefficients = jaccard.forward(logits, logits, share, temperatures[:1], by_pointer=False)
                if backward:
                    jaccard.backward(logits, logits, share, temperatures[:1], coefficients, by_pointer=False)
        if case.features:
            features = empty(case.features, case)
            _, grad_map, stats = cafd.forward(features, features, temperatures, 1, backward, by_pointer=False)
            if backward:
                cafd.map_backward(features, grad_map, stats, temperatures, by_pointer=False)
    return launches


def bytes_of(case: Case, launch: Launch) -> int:
    name = launch.kernel.__name__
    logits, labels, features = sizes_of(case)
    if name == "count_kernel":
        return labels
    if name == "tnkd_kernel":
        return 2 * logits + labels + (logits if launch.argument("grad") is not None else 0)
    cells = labels // torch.int64.itemsize  # a mask's byte or a share's four, which torch makes of the labels
    made = 0 if case.loss == "dsct" else labels
    maps = {
        "matched_part_kernel": 2 * logits + made + cells,
        "matched_write_kernel": 3 * logits + cells,
        "jaccard_sums_kernel": 2 * logits + made + 4 * cells,
        "jaccard_write_kernel": 3 * logits + 4 * cells,
    }
    if name in maps:
        return maps[name]
    made_of_rows = launch.argument("slab") if name in ("march_kernel", "collect_kernel") else None
    slab = 0 if made_of_rows is None else int(made_of_rows.nbytes)
    if name == "march_kernel":  # both networks, and the slab
        teacher = DTYPES[case.dtype].itemsize * torch.Size(case.teacher_logits or ()).numel()
        return logits + teacher + labels + slab
    if name == "collect_kernel":
        return slab + (logits if slab else 0)
    # both networks: two reads; the student: one, and the gradient's write where there is one
    times = {"row_stats_kernel": 2, "maps_kernel": 2, "rho_kernel": 1, "write_kernel": 2}
    return times.get(name, 0) * features


def trips_of(launch: Launch) -> float | None:
    """How often a program takes its loop, on average; None for CAFD's kernels."""
    name = launch.kernel.__name__
    if name in ("tnkd_kernel", "jaccard_sums_kernel", "jaccard_write_kernel"):
        return float(launch.argument("tiles") / launch.programs)
    if name == "count_kernel":
        return float(-(-launch.argument("target").numel() // launch.constants["BLOCK"]) / launch.programs)
    if name == "finish_kernel":
        return float(-(-launch.argument("num_programs") // launch.constants["BLOCK"]))
    if name == "matched_part_kernel":
        return float(launch.argument("steps"))
    if name in ("matched_join_kernel", "matched_write_kernel", "jaccard_finish_kernel"):
        return 1.0  # no loop, or a few trips of it at most
    return None


def issued(r: Report, launch: Launch) -> float | None:
    """Instructions of a warp, on average, of TNKD's kernels; None for the others."""
    if r.name == "march_kernel":
        return r.walked(launch)
    if r.name == "collect_kernel" and len(r.loops) == 2:  # over the cells, and, of the first program, over the sums
        cells, sums = r.loops
        return r.instructions - cells - sums + launch.argument("items") / launch.programs * cells
    trips = trips_of(launch)
    if trips == 1:
        return float(r.instructions)
    return r.issued(trips) if trips is not None and len(r.loops) == 1 else None


class Triton:
    def __init__(self, arch: int, multiprocessors: int) -> None:
        self.arch = arch
        self.multiprocessors = multiprocessors
        self.seen: dict[Any, Any] = {}  # what was compiled: most cases share kernels

    def kernels(self, case: Case) -> list[Kernel]:
        found = []
        for launch in launches_of(case, self.multiprocessors):
            name, key = launch.kernel.__name__, (source(launch).hash(), launch.warps)
            if key not in self.seen:
                start = time.perf_counter()
                with triton.knobs.compilation.scope():
                    triton.knobs.compilation.always_compile = True
                    self.seen[key] = report(name, launch, self.arch), time.perf_counter() - start
            r, seconds = self.seen[key]
            asked = bytes_of(case, launch)
            tail = round(trips_of(launch) or 0) if launch.programs == 1 else 0
            sizes = launch.programs, launch.warps, r.registers, r.spills, r.shared
            found.append(Kernel(name, *sizes, asked, seconds, issued(r, launch), tail))
        return found


# ------------------------------------------------------------------------------------------------------------- native


def native_cases(case: Case) -> list[harness.Case]:
    """The calls of the CUDA ops for a case, on tensors without memory."""
    backward = case.phase == FORWARD_BACKWARD

    def number() -> Tensor:
        return torch.empty((), device="meta")

    cases = []
    if case.logits and case.loss not in ("matched", "jaccard"):  # of the latter there is no CUDA kernel
        with_ce = case.loss == "dsct"
        target = torch.empty((case.logits[0], *case.logits[2:]), dtype=torch.int64, device="meta")
        outputs = {"loss": number(), "parts": torch.empty(3, device="meta"), "grad_scale": number()}
        outputs |= {"grad": empty(case.logits, case)} if backward else {}
        numbers = {"ce_weight": float(with_ce), "tckd_weight": 1.0, "nckd_weight": 2.0, "temperature": 2.0}
        numbers |= {"ignore_index": IGNORE_INDEX, "reduction": 1, "with_ce": with_ce, "coupled": False}
        tensors = {"student": empty(case.logits, case), "teacher": empty(case.logits, case), "target": target}
        cases.append(harness.Case("tnkd", tensors, outputs, numbers))
    if case.logits and case.loss in ("matched", "dsct"):
        n, _, h, w = case.logits
        mask = torch.empty(n, 1, h, w, dtype=torch.bool, device="meta")
        tensors = {"student": empty(case.logits, case), "teacher": empty(case.logits, case), "mask": mask}
        outputs = {"loss": number()} | ({"grad": empty(case.logits, case)} if backward else {})
        numbers = {"channel_temperature": 1.0, "spatial_temperature": 4.0, "uniform": False, "reduction": 1}
        cases.append(harness.Case("matched", tensors | {"upstream": number()}, outputs, numbers))
    if case.features:
        n, _, h, w = case.features
        outputs = {"loss": number(), "grad_map": torch.empty(n, h, w, device="meta")}
        outputs |= {"grad": empty(case.features, case)} if backward else {}
        numbers = {"channel_temperature": 1.0, "spatial_temperature": 1.0, "reduction": 1}
        tensors = {"student": empty(case.features, case), "teacher": empty(case.features, case)}
        cases.append(harness.Case("cafd", tensors, outputs, numbers))
    return cases


def native_bytes_of(case: Case, name: str) -> int:
    """`name`: with its template arguments."""
    logits, labels, features = sizes_of(case)
    kernel = name.split("<")[0]
    codes = labels // 8 * (1 if case.logits and case.logits[1] <= 20 else 2)
    if kernel == "encode_labels":
        return labels + codes
    if kernel == "tnkd_kernel":  # each logit once
        return (3 if case.phase == FORWARD_BACKWARD else 2) * logits + codes
    cells = labels // torch.int64.itemsize  # a mask's bytes, which torch makes of the labels
    if kernel == "matched_sums":
        return 2 * logits + cells + (0 if case.loss == "dsct" else labels)
    if kernel == "matched_gradient":
        return 3 * logits + cells
    # both networks: two reads; the student: one, and the gradient's write where there is one
    times = {"channel_stats": 2, "attention_maps": 2, "channel_rho": 1, "channel_gradient": 2}
    return times.get(kernel, 0) * features


class Native:
    """The CUDA sources: their own launch plans, which a host build of them lists, and nvcc's report of each kernel."""

    def __init__(self, arch: int, multiprocessors: int, folder: pathlib.Path) -> None:
        self.folder = folder
        self.device = {"multiprocessors": multiprocessors, "shared_bytes": LIMITS[arch].shared - RESERVED_SHARED}
        self.driver = harness.build(folder, "list")
        self.resources = {k: r for name in nvcc.SOURCES for k, r in nvcc.resources(name, arch, folder).items()}
        self.names = dict(zip(self.resources, nvcc.demangled(list(self.resources)), strict=True))
        self.per_pixel = {ce: nvcc.instructions_per_pixel(arch, folder, ce) for ce in (False, True)}
        self.per_label = nvcc.instructions_per_label(arch, folder)

    @staticmethod
    def why_not() -> str | None:
        missing = [tool for tool in ("nvcc", "g++", "c++filt") if shutil.which(tool) is None]
        return f"no {' and no '.join(missing)} on the PATH" if missing else None

    def kernels(self, case: Case) -> list[Kernel]:
        found = []
        for call in native_cases(case):
            call.numbers |= self.device
            for launch in harness.launches(self.driver, call, self.folder / "case"):
                r, name = self.resources[launch.kernel], self.names[launch.kernel]
                shared = r.shared + launch.shared
                asked = native_bytes_of(case, name)
                found.append(Kernel(name, launch.blocks, launch.threads // 32, r.registers, r.in_memory, shared, asked,
                                    instructions=self.instructions(case, name, launch)))  # fmt: skip
        return found

    def instructions(self, case: Case, name: str, launch: harness.Launch) -> int | None:
        """Of a warp of the launch, on average, where they are counted: labels; planes, forward and backward."""
        if name == "encode_labels":
            return round(self.per_label * sizes_of(case)[1] / torch.int64.itemsize / (launch.blocks * launch.threads))
        key = case.logits and (case.logits[1], "bf16" if case.dtype == "fp16" else case.dtype)
        counts = self.per_pixel[case.loss == "dsct"]
        if not name.startswith("tnkd_kernel<Planes") or case.phase != FORWARD_BACKWARD or key not in counts:
            return None
        pixels = torch.Size(case.logits).numel() // case.logits[1]
        return round(counts[key] * pixels / (launch.blocks * launch.threads))


# ----------------------------------------------------------------------------------------------------------- estimates


def issue_us(kernels: Sequence[Kernel], per_us: float) -> float | None:
    """Microseconds to issue the instructions of the kernels that are known, at so many a microsecond."""
    known = [k.instructions * k.warps * k.programs for k in kernels if k.instructions is not None]
    return sum(known) / per_us if known else None


def expected_us(kernels: Sequence[Kernel], bandwidth: float, per_us: float) -> float | None:
    """Microseconds of the kernels, one after the other; None where one's instructions are not known."""
    total = 0.0
    for k in kernels:
        if k.instructions is None:
            return None
        issue = k.instructions * k.warps * k.programs / (ISSUED * per_us)
        total += LAUNCH_US + max(math.hypot(k.bytes / (COPY * bandwidth * 1e3), issue), k.trips * TRIP_US)
    return total


def estimate(
    case: Case, backend: str, kernels: Sequence[Kernel], bandwidth: float, arch: int, per_us: float
) -> dict[str, Any]:
    """Bytes, floor times and kernels of a case; per_us: instructions that the GPU issues in a microsecond."""
    rows = []
    for kernel in kernels:
        blocks, share, limit = occupancy(kernel.registers, kernel.shared, kernel.warps, arch)
        rows.append({**dataclasses.asdict(kernel), "blocks": blocks, "occupancy": share, "limit": limit})
    asked = sum(kernel.bytes for kernel in kernels)
    issue, expected = issue_us(kernels, per_us), expected_us(kernels, bandwidth, per_us)
    return {
        **dataclasses.asdict(case),
        "backend": backend,
        "floor_bytes": case.floor_bytes,
        "floor_us": case.floor_bytes / bandwidth / 1e3,
        "asked_bytes": asked,
        "asked_us": asked / bandwidth / 1e3,
        "issue_us": issue,
        "share_at_most": case.floor_bytes / bandwidth / 1e3 / max(asked / bandwidth / 1e3, issue or 0),
        "tail_us": sum(kernel.trips for kernel in kernels) * TRIP_US,
        "expected_us": expected,
        "of_copy": case.floor_bytes / (COPY * bandwidth * 1e3) / expected if expected else None,
        "kernels": rows,
    }


def print_table(head: str, rows: Sequence[Sequence[str]]) -> None:
    columns = head.split("|")
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_estimates(result: dict[str, Any]) -> None:
    """Floor times of every case, then every kernel they launch, each once."""
    print(f"{NOTE}. {result['gpu']}, {result['bandwidth_gb_s']:g} GB/s, sm_{result['arch']}.")
    print("floor: bytes that must move; asked: bytes that the kernels ask for, some of which a cache will serve")
    print("issue: instructions (of CUDA, TNKD's labels and planes; none of CAFD of features), none waiting for another")
    print("at most: the share of the bandwidth that floor is of the longer of asked and issue")
    print("tail: the sum of Triton's partial sums")
    print("expected: see --help; of copy: the bytes that must move, as a share of what a copy would move in that time")
    rows: list[list[str]] = []
    kernels: dict[tuple[str, ...], str] = {}
    for case in result["estimates"]:
        name = [case["loss"], case["shape"], case["layout"], case["dtype"], case["phase"]]
        amounts = [case["floor_bytes"] / 1e6, case["floor_us"], case["asked_bytes"] / 1e6, case["asked_us"]]
        known = [case["issue_us"], case["tail_us"] or None, case["expected_us"]]
        issue, tail, expected = ("-" if amount is None else f"{amount:.1f}" for amount in known)
        most, share = f"{case['share_at_most']:.0%}", "-" if case["of_copy"] is None else f"{case['of_copy']:.0%}"
        cells = [*(f"{amount:.1f}" for amount in amounts), issue, most, tail, expected, share]
        rows.append([*name, case["backend"], *cells])
        for k in case["kernels"]:
            row = [k["name"], *(str(k[key]) for key in ("warps", "registers", "spills", "shared", "blocks"))]
            seconds = "-" if k["compile_s"] is None else f"{k['compile_s']:.1f}"
            kernels.setdefault((case["backend"], *row, f"{k['occupancy']:.0%}", k["limit"], seconds), " ".join(name))
    head = "loss|shape|layout|dtype|phase|backend|floor MB|floor us|asked MB|asked us|issue us|at most|tail us"
    print_table(f"{head}|expected us|of copy", rows)
    print(f"\n{NOTE}. Occupancy of every kernel above, of sm_{result['arch']}'s threads.")
    head = "backend|kernel|warps|registers|spilt B|shared B|blocks an SM|occupancy|limited by|compile s|for instance"
    print_table(head, sorted([*row, where] for row, where in kernels.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="bandwidth and architecture by name")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="in place of the named GPU's")
    parser.add_argument("--arch", type=int, choices=LIMITS, help="in place of the named GPU's: 90 is sm_90")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: both, native where nvcc and g++ are")
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

    backends = args.backend or BACKENDS
    if "native" in backends and (reason := Native.why_not()) is not None:
        if args.backend:
            parser.error(f"--backend native: {reason}")
        print(f"the native kernels are left out: {reason}", file=sys.stderr)
        backends = ("triton",)
    name, bandwidth, arch, multiprocessors, clock = GPUS[args.gpu]
    per_us = multiprocessors * SCHEDULERS * clock * 1e3
    if args.bandwidth is not None or args.arch is not None:
        name = "a GPU as given"
    bandwidth, arch = args.bandwidth or bandwidth, args.arch or arch
    chosen = args.layout, args.dtype, args.phase
    cases = make_cases([x for x in args.loss if x not in LOWRES], "cuda", False, args.only_shape, *chosen)
    chosen = args.layout or ["contiguous"], args.dtype or ["fp32", "bf16"], args.phase
    cases += make_cases(
        [x for x in args.loss if x in LOWRES], "cuda", False, args.only_shape or SHAPES_CUDA["lowres"], *chosen
    )
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            (
                backend,
                Triton(arch, multiprocessors)
                if backend == "triton"
                else Native(arch, multiprocessors, pathlib.Path(folder)),
            )
            for backend in backends
        ]
        estimates = [
            estimate(case, backend, found, bandwidth, arch, per_us)
            for case in cases
            for backend, kernels in sources
            if (backend == "triton" or not case.lowres) and (found := kernels.kernels(case))
        ]
    result = {"note": NOTE, "gpu": name, "bandwidth_gb_s": bandwidth, "arch": arch, "estimates": estimates}
    print_estimates(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
