"""How it is timed: interleaved repeats on CPU and CUDA, peak extra memory, copy bandwidth."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import FORWARD_BACKWARD, Case, Inputs, make_inputs

Loss = Callable[[Inputs], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A loss that is called on inputs of its own, made from the case's beforehand, untimed."""

    loss: Loss
    prepare: Callable[[Inputs], Inputs]

    def __call__(self, inputs: Inputs) -> Tensor:
        return self.loss(inputs)


MIN_SAMPLE_S = {"cpu": 1e-3, "cuda": 5e-3}  # shorter calls are repeated inside one sample up to this time
MIN_SAMPLES, MIN_SAMPLES_SLOW, SLOW_S = 7, 3, 0.5  # a candidate slower than SLOW_S gets fewer
MAX_SAMPLES = 60
SETTLE_BELOW_S = 0.02  # faster ones get one untimed call before each sample: caches and threads are theirs again
MAX_CALLS = {"cpu": 5000, "cuda": 32}  # calls in one sample; on a GPU all must fit its launch queue
FIRST_HOLD_S, MAX_HOLD_S = 1e-3, 0.1  # how long a GPU is held while the calls of a sample are queued
HOLD_CYCLES_PER_S = 2e9  # no slower than a GPU's clock, so that a hold lasts at least as long as it says
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


@dataclasses.dataclass
class Timing:
    """Quantiles of one candidate's samples; a sample is the mean of `calls` calls."""

    samples: int
    calls: int
    min: float  # milliseconds per call, as all that follow
    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    max: float

    @staticmethod
    def of(seconds: Sequence[float], calls: int) -> Timing:
        ordered = sorted(second * 1e3 for second in seconds)

        def quantile(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

        return Timing(len(ordered), calls, *(quantile(share) for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)))


@dataclasses.dataclass
class Queued:
    """One sample on a GPU, seconds per call."""

    device_s: float
    host_s: float  # what the host took to queue it
    whole: bool  # the last call was queued before the first one started: the GPU never waited for the host


def fill_queue(attempt: Callable[[int, float], Queued], calls: int) -> tuple[int, float]:
    """Calls per sample, and seconds to hold the GPU meanwhile, with which a sample is queued whole.

    Fewer calls where they overflow the launch queue. (1, 0) for a candidate that waits for the GPU by itself.
    """
    hold = FIRST_HOLD_S
    while True:
        got = attempt(calls, hold)
        if got.whole:
            return calls, min(2 * hold, MAX_HOLD_S)
        if hold < MAX_HOLD_S:
            hold = min(max(2 * hold, 2 * got.host_s * calls), MAX_HOLD_S)
        elif calls > 1:
            calls, hold = calls // 2, FIRST_HOLD_S
        else:
            return 1, 0.0


class Bench:
    """One case on one device: its inputs, and the ways to run a loss on them."""

    def __init__(self, case: Case, device: torch.device, upstream: float = 1.0):
        self.case, self.device = case, device
        self._upstream_value, self._upstream = upstream, dict[torch.dtype, Tensor]()
        self.host_ms: dict[str, float] = {}  # GPU: median of what a call takes the host
        self.queued: dict[str, bool] = {}  # GPU: every sample was queued whole
        self.failed: dict[str, Exception] = {}  # what broke off while it was timed
        self.inputs = [make_inputs(case, device)]
        if device.type == "cuda":  # rotate over buffers bigger than L2, so that no call finds its input there
            cache = cache_bytes(device)
            copies = max(1, math.ceil(3 * cache / self.inputs[0].nbytes))
            self.inputs += [make_inputs(case, device, seed) for seed in range(1, copies)]
        self._prepared: dict[Prepared, list[Inputs]] = {}
        # gradients live as long as the rotation, or the allocator would hand out one L2-resident block each time
        self._kept: collections.deque[Any] = collections.deque(maxlen=len(self.inputs))
        self._turn = 0

    def call(self, loss: Loss) -> Any:
        """Forward, or forward and backward: what is timed."""
        inputs = self._inputs_of(loss)[self._turn % len(self.inputs)]
        self._turn += 1
        if self.case.phase == FORWARD_BACKWARD:
            value = loss(inputs)
            return torch.autograd.grad(value, inputs.differentiable, self._gradient_of(value))
        with torch.no_grad():
            return loss(inputs)

    def _inputs_of(self, loss: Loss) -> list[Inputs]:
        if not isinstance(loss, Prepared):
            return self.inputs
        if loss not in self._prepared:
            self._prepared[loss] = [loss.prepare(inputs) for inputs in self.inputs]
        return self._prepared[loss]

    def _gradient_of(self, value: Tensor) -> Tensor | None:
        """The upstream gradient; on a GPU made once, as filling it anew is one more kernel in every call."""
        if self.device.type == "cpu" and self._upstream_value == 1.0:
            return None
        if value.dtype not in self._upstream:
            self._upstream[value.dtype] = torch.full_like(value, self._upstream_value, requires_grad=False)
        return self._upstream[value.dtype]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first_call(self, loss: Loss) -> float:
        """Seconds of the first call, compilation and all."""
        self.synchronize()
        start = time.perf_counter()
        self.call(loss)
        self.synchronize()
        return time.perf_counter() - start

    def sample(self, function: Callable[[], Any], calls: int, settle: bool = False) -> float:
        """Seconds per call, over `calls` calls in a row."""
        if self.device.type == "cpu":
            if settle:
                function()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        return self.sample_queued(function, calls, hold_s=0.0).device_s

    def sample_queued(self, function: Callable[[], Any], calls: int, hold_s: float) -> Queued:
        """A sample on a GPU, which is held until the calls are queued: else fast kernels would wait for the host.

        One untimed call goes before, so that what the allocator has to fetch, it fetches outside the sample.
        """
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._kept.append(function())
        if hold_s:
            torch.cuda._sleep(int(hold_s * HOLD_CYCLES_PER_S))
        start_event.record()
        start = time.perf_counter()
        for _ in range(calls):
            self._kept.append(function())
        host_s = time.perf_counter() - start
        end_event.record()
        whole = not start_event.query()
        end_event.synchronize()
        self._kept.clear()
        return Queued(start_event.elapsed_time(end_event) / 1e3 / calls, host_s / calls, whole)

    def time_interleaved(self, losses: dict[str, Loss], budget_s: float) -> dict[str, Timing]:
        """Time all candidates, their samples interleaved, so that a noisy minute hurts all alike.

        Includes a plain copy under the name "copy": the bandwidth of this very minute. A candidate that fails
        goes to `failed`, and the others are timed all the same.
        """
        source = torch.zeros(COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        source, target = source.view(torch.float32), torch.ones_like(source).view(torch.float32)

        def bind(loss: Loss) -> Callable[[], Any]:
            return lambda: self.call(loss)

        functions: dict[str, Callable[[], Any]] = {name: bind(loss) for name, loss in losses.items()}
        functions["copy"] = lambda: target.copy_(source)

        calls, wanted, settle, hold = {}, {}, {}, {}
        for name, function in functions.items():
            try:
                seconds = self._warm_up(function)
                least = MIN_SAMPLE_S[self.device.type]
                calls[name] = min(MAX_CALLS[self.device.type], max(1, math.ceil(least / seconds)))
                if self.device.type == "cuda":
                    attempt = functools.partial(self.sample_queued, function)
                    calls[name], hold[name] = fill_queue(attempt, calls[name])
            except Exception as error:
                self._fail(name, error)
                continue
            settle[name] = seconds < SETTLE_BELOW_S
            per_sample = (calls[name] + settle[name]) * seconds + hold.get(name, 0.0)
            fewest = MIN_SAMPLES if seconds < SLOW_S else MIN_SAMPLES_SLOW
            wanted[name] = min(MAX_SAMPLES, max(fewest, int(budget_s / len(functions) / per_sample)))
        samples: dict[str, list[float]] = {name: [] for name in wanted}
        on_host: dict[str, list[float]] = {name: [] for name in hold}
        self.queued = dict.fromkeys(hold, True)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in interleave(wanted):
                if name in self.failed:
                    continue
                try:
                    if name in hold:
                        queued = self.sample_queued(functions[name], calls[name], hold[name])
                        samples[name].append(queued.device_s)
                        on_host[name].append(queued.host_s)
                        self.queued[name] &= queued.whole
                    else:
                        samples[name].append(self.sample(functions[name], calls[name], settle[name]))
                except Exception as error:
                    self._fail(name, error)
        finally:
            if collecting:
                gc.enable()
        self.host_ms = {name: Timing.of(took, 1).median for name, took in on_host.items() if took}
        done = {name: seconds for name, seconds in samples.items() if name not in self.failed}
        return {name: Timing.of(seconds, calls[name]) for name, seconds in done.items()}

    def _fail(self, name: str, error: Exception) -> None:
        """Note it, and let go of what the failed call held; without the copy nothing can be told."""
        self._kept.clear()
        if name == "copy":
            raise error
        self.failed[name] = error.with_traceback(None)  # whose frames hold the call's tensors

    def _warm_up(self, function: Callable[[], Any], least_s: float = 0.05) -> float:
        """Run until `least_s` has passed, at least twice unless one call takes SLOW_S; seconds of a warm call."""
        spent, seconds, runs = 0.0, 0.0, 0
        while spent < least_s or (runs < 2 and spent < SLOW_S):
            self.synchronize()
            seconds = self.sample(function, calls=max(1, min(20, runs)))
            spent += seconds * max(1, min(20, runs))
            runs += 1
        return max(seconds, 1e-7)

    def extra_memory(self, loss: Loss) -> int:
        """Peak bytes allocated during one warm call over what was there before it."""
        if self.device.type == "cuda":
            self.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.call(loss)
            self.synchronize()
            return torch.cuda.max_memory_allocated(self.device) - before
        return cpu_peak_bytes(lambda: self.call(loss))


class OthersLoad:
    """Share of the CPUs that other processes (and other virtual machines) took meanwhile; None where unknown.

    What makes a run worth repeating: a busy neighbour slows threads that wait for each other most.
    """

    share: float | None = None

    def __enter__(self) -> OthersLoad:
        self._before = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._clock()
        if self._before and after:
            busy, total, own = (now - then for now, then in zip(after, self._before))
            self.share = max(0.0, (busy - own) / total) if total else None

    @staticmethod
    def _clock() -> tuple[float, float, float] | None:
        """Seconds over all CPUs: busy, in all, and this process's own."""
        try:
            with open("/proc/stat") as file:
                ticks = [int(field) for field in file.readline().split()[1:9]]
            per_second = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / per_second, sum(ticks) / per_second, time.process_time()


def interleave(wanted: dict[str, int]) -> list[str]:
    """Spread each name's number of turns evenly over the whole run: {"a": 3, "b": 1} -> a, b, a, a or the like."""
    turns = [((turn + 0.5) / count, name) for name, count in wanted.items() for turn in range(count)]
    return [name for _, name in sorted(turns)]


def cpu_peak_bytes(function: Callable[[], Any]) -> int:
    """Peak of torch's CPU allocations during a call, less the start: running sum over the profiler's memory events.

    Exact and repeatable, unlike the resident set. What a kernel mallocs behind torch's back is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
        del kept
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    finally:
        os.unlink(path)
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    running = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        running += event["args"]["Bytes"]
        peak = max(peak, running)
    return peak


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (GPU: L2); 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def copy_gb_s(timing: Timing, device: str) -> float:
    """Copy bandwidth, bytes read plus bytes written."""
    return 2 * COPY_BYTES[device] / timing.median / 1e6
