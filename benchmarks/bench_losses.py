"""Times the losses against eager PyTorch, the mask-trick DKD formula and torch.compile.

Examples:
    python benchmarks/bench_losses.py                                   # everything, about 25 minutes on 2 cores
    python benchmarks/bench_losses.py --quick                           # about two minutes
    python benchmarks/bench_losses.py --loss lowres --layout contiguous --check     # a few minutes
    python benchmarks/bench_losses.py --device cuda --json out.json --chart out.png
    python benchmarks/bench_losses.py --loss tnkd --only-shape 4x6x512x512 --dtype fp32 --layout contiguous
    python benchmarks/bench_losses.py --read out.json --markdown --dtype fp32   # docs/speed.md's table
    python benchmarks/bench_losses.py --read out.json --check           # the required ratios, exit code 1 on a miss
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shlex
import sys
import tempfile
import time
import traceback
from typing import Any

if __package__ in (None, ""):  # run as a script: find benchmarks, and dsct_kernels where it isn't installed
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts allocations, else chats on stderr

import torch

from benchmarks import report
from benchmarks.candidates import auto_backend, default_baselines, make_candidates
from benchmarks.cases import (
    BACKENDS,
    BASELINES,
    DTYPES,
    FORWARD_BACKWARD,
    LAYOUTS,
    LOSSES,
    PHASES,
    Case,
    make_cases,
    parse_shape,
)
from benchmarks.check import check
from benchmarks.machine import describe
from benchmarks.measure import Bench, OthersLoad, copy_gb_s

BUDGET_S, BUDGET_QUICK_S = 2.5, 1.5
SETTINGS = {
    "cpu": {
        "copy": "torch copy_ of 128 MiB into a resident tensor, all threads, ordinary (not streaming) stores",
        "memory": "torch's CPU allocations as its profiler sees them, without what a kernel mallocs for itself",
    },
    "cuda": {
        "copy": "torch copy_ of 1 GiB into a resident tensor",
        "memory": "torch.cuda.max_memory_allocated",
        "timing": "CUDA events around calls that were all queued before the first one started: ms is the GPU's time, "
        "host_ms what a call takes the host",
    },
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is timed")
    what.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    what.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    what.add_argument("--quick", action="store_true", help="fewer shapes, fp32, contiguous, forward+backward only")
    what.add_argument("--only-shape", nargs="+", metavar="NxCxHxW", help="as the tables spell them")
    what.add_argument("--layout", nargs="+", choices=LAYOUTS)
    what.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    what.add_argument("--phase", nargs="+", choices=PHASES)
    what.add_argument("--backends", nargs="*", choices=BACKENDS, help="default: all that are usable")
    what.add_argument("--baselines", nargs="*", choices=BASELINES, help="default: all that fit")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, help="CPU threads, default: torch's")
    how.add_argument("--budget", type=float, metavar="S", help="seconds of timing per case and phase, roughly")
    how.add_argument("--upstream", type=float, default=1.0, help="gradient that comes into the loss (default 1)")
    how.add_argument("--one-process", action="store_true", help="CPU: all cases in this process, one after the other")
    how.add_argument("--cold", action="store_true", help="empty caches for Inductor and Triton: honest first calls")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write every measurement")
    out.add_argument("--append", action="store_true", help="keep what the JSON file holds of other cases")
    out.add_argument(
        "--read", type=pathlib.Path, metavar="JSON", help="time nothing; of a file, take what the options above name"
    )
    out.add_argument("--chart", type=pathlib.Path, metavar="PNG", help="draw the ratios; several losses: PNG-LOSS")
    out.add_argument("--markdown", action="store_true", help="print the table of docs/speed.md")
    out.add_argument("--check", action="store_true", help="hold it against the required ratios; exit code 1 on a miss")
    options = parser.parse_args(arguments)
    for shape in options.only_shape or []:
        try:
            parse_shape(shape)
        except ValueError as error:
            parser.error(f"--only-shape: {error}")
    if options.append and not options.json:
        parser.error("--append needs --json")
    if options.device == "cuda" and not options.read and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    return options


def reason(case: Case, error: Exception) -> str:
    """Why something was not timed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory at {case.shape} {case.dtype}"
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def gpu_answers(device: torch.device) -> bool:
    """False once a kernel's fault has cost this process its GPU: nothing can be timed from then on."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def measure_alone(case: Case, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """measure_case in a process of its own, so that no case inherits another's heap.

    What malloc keeps from the cases before decides whether a fresh tensor has to be paged in: it makes torch.compile's
    CAFD at 4x512x64x64 three times as fast.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(measure_case, case, device, options).result()


def measure_case(case: Case, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All candidates at one case: first call, interleaved timing, memory."""
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(case, device, options.upstream)
    backends = options.backends
    if backends is None:  # Triton on a CPU is its interpreter: not something to time
        backends = [name for name in BACKENDS if device.type == "cuda" or name != "triton"]
    baselines = default_baselines(case.loss) if options.baselines is None else tuple(options.baselines)
    candidates = make_candidates(case.loss, baselines, tuple(backends))
    common = {
        **dataclasses.asdict(case),
        "device": device.type,
        "auto": auto_backend(case.loss, bench.inputs[0]),
        "floor_bytes": case.floor_bytes,
        "student_bytes": case.student_bytes,
    }
    measured: dict[str, dict[str, Any]] = {}
    usable = {}
    for name, loss in candidates.items():
        kind = "baseline" if name in BASELINES else "backend"
        measured[name] = {**common, "candidate": name, "kind": kind}
        try:
            measured[name]["first_call_s"] = bench.first_call(loss)
            usable[name] = loss
        except Exception as error:  # a backend that is not built or not usable says why
            measured[name]["reason"] = reason(case, error)
    budget = options.budget or (BUDGET_QUICK_S if options.quick else BUDGET_S)
    with OthersLoad() as others:
        timings = bench.time_interleaved(usable, budget)
    for name, error in bench.failed.items():
        measured[name]["reason"] = reason(case, error)
        del usable[name]
    bandwidth = copy_gb_s(timings["copy"], device.type)
    for name, entry in measured.items():
        entry["copy_gb_s"] = bandwidth
        entry["others_load"] = others.share
        if name in usable:
            entry["ms"] = dataclasses.asdict(timings[name])
            if device.type == "cuda":
                entry |= {"host_ms": bench.host_ms[name], "queued": bench.queued[name]}
            if case.phase == FORWARD_BACKWARD:
                entry["extra_bytes"] = bench.extra_memory(usable[name])
    return list(measured.values())


def in_one_line(case: Case, measured: list[dict[str, Any]]) -> str:
    parts = [f"{entry['candidate']} {entry['ms']['median']:.3f}" for entry in measured if "ms" in entry]
    share = measured[0].get("others_load")
    load = "" if share is None else f", {share:.0%} of the CPUs taken by others"
    return (
        f"{' '.join(dataclasses.astuple(case))}: {', '.join(parts)} ms, copy {measured[0]['copy_gb_s']:.1f} GB/s{load}"
    )


def write(result: report.Result, path: pathlib.Path) -> None:
    """Whole or not at all: a run that is cut off leaves the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def run(options: argparse.Namespace, say: Any) -> report.Result:
    if options.threads:
        torch.set_num_threads(options.threads)  # what the result says of the machine
    if options.cold:
        caches = tempfile.TemporaryDirectory(prefix="bench_losses_")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(caches.name, "inductor")
        os.environ["TRITON_CACHE_DIR"] = os.path.join(caches.name, "triton")
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    together = options.one_process or device.type == "cuda"
    result: report.Result = {
        "machine": describe(device),
        "settings": {
            **SETTINGS[device.type],
            "command": shlex.join(["python", "benchmarks/bench_losses.py", *sys.argv[1:]]),
            "caches": "empty before the run" if options.cold else "as they were",
            "upstream": options.upstream,
            "processes": "one for all cases" if together else "one for each case",
        },
        "measurements": [],
    }
    if options.append and options.json.exists():
        before = json.loads(options.json.read_text())
        for key in ("device", "name") if device.type == "cuda" else ("device",):
            there, here = before["machine"][key], result["machine"][key]
            if there != here:
                sys.exit(f"--append: {options.json} is of {key} {there}, this is {here}")
        result["measurements"] = before["measurements"]
    cases = make_cases(
        options.loss, options.device, options.quick, options.only_shape, options.layout, options.dtype, options.phase
    )
    if not cases:
        sys.exit("no case left to time: the shapes named fit none of the losses named")
    start = time.perf_counter()
    for case in cases:
        key = dataclasses.astuple(case)
        try:
            new = (measure_case if together else measure_alone)(case, device, options)
            say(in_one_line(case, new))
        except Exception as error:  # the other cases are worth having; the exit code tells
            traceback.print_exc()
            new = []
            result.setdefault("failed", []).append({"case": " ".join(key), "reason": reason(case, error)})
        lost = device.type == "cuda" and not gpu_answers(device)
        if lost:
            result.setdefault("failed", []).append({"case": "all that follow", "reason": "the GPU no longer answers"})
        kept = [m for m in result["measurements"] if tuple(m[name] for name in report.KEY) != key]
        result["measurements"] = kept + new
        if options.json:  # after each case: a run that is cut off leaves what it has
            result["settings"]["seconds"] = round(time.perf_counter() - start, 1)
            write(result, options.json)
        if lost:
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next case finds the memory whole
    say(f"{len(cases)} cases in {time.perf_counter() - start:.0f} s")
    return result


def select(result: report.Result, options: argparse.Namespace) -> report.Result:
    """Of a result that was read, the cases that the options name; all where they name none."""
    wanted = {
        "loss": options.loss,
        "shape": options.only_shape,
        "layout": options.layout,
        "dtype": options.dtype,
        "phase": options.phase,
    }
    kept = [m for m in result["measurements"] if all(not names or m[key] in names for key, names in wanted.items())]
    if not kept:
        sys.exit(f"{options.read}: holds none of the cases named")
    return {**result, "measurements": kept}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 220)
    if options.read:
        result = select(json.loads(options.read.read_text()), options)
    else:
        progress = Console(stderr=True)
        result = run(options, lambda text: progress.print(text, markup=False, highlight=False, soft_wrap=True))
        if not options.json:
            progress.print("nothing is kept of this run: --json PATH writes all of it, for --read", markup=False)
    failed = result.get("failed", [])
    for failure in failed:
        console.print(f"failed: {failure['case']}: {failure['reason']}", style="bold red", markup=False)
    if not result["measurements"]:
        return 1
    if options.markdown:
        print(report.markdown(result))
    elif not options.check or not options.read:
        report.print_tables(result, console)
    if options.chart:
        for path in report.draw_charts(result, options.chart):
            console.print(f"drawn: {path}", markup=False)
    if options.check:
        verdicts = check(result)
        for verdict in verdicts:
            console.print(str(verdict), style=None if verdict.passed else "bold red", markup=False, highlight=False)
        missed = sum(not verdict.passed for verdict in verdicts)
        console.print(f"{len(verdicts) - missed} of {len(verdicts)} required figures reached", markup=False)
        return 1 if missed or failed or not verdicts else 0
    return 1 if failed and not options.read else 0


if __name__ == "__main__":
    sys.exit(main())
