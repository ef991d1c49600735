"""A teacher at work: which of its features are compared with the student's, its precision, and what it costs."""

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dsct_kernels.taps import FeatureTap

from .config import Loss
from .files import DataError
from .models import Maps, Output, at_strides, dtype_of, feature_maps, forward

if TYPE_CHECKING:
    from .run import Run

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Pair(NamedTuple):
    """Features that are compared: of the student and of the teacher, each as `forward` takes them, and in words."""

    student: Sequence[int] | FeatureTap
    teacher: Sequence[int] | FeatureTap
    says: list[str]  # a line for each two
    labels: list[str]  # in short

    def remove(self) -> None:
        for side in (self.student, self.teacher):
            if isinstance(side, FeatureTap):
                side.remove()


@torch.no_grad()
def pair(
    student: nn.Module, teacher: nn.Module, images: torch.Tensor, strides: Sequence[int] = (), taps: Sequence[str] = ()
) -> Pair:
    """Which features of two networks are compared. images (1, bands, H, W), all zeros: to see shapes.

    strides: at these, the deepest map of each network. taps, in place of them: ("auto",), the deepest pair of maps of
    equal stride, or without a common stride the pair whose strides are nearest; or "student.module=teacher.module"
    each, which puts a `FeatureTap` on both networks, for `remove` to take off.

    Raises ValueError for a name that is no module, or of one that emits no map; DataError for a network without maps.
    """
    networks = (student, teacher)
    with _evaluating(*networks):
        if taps and tuple(taps) != (AUTO,):
            return _by_name(networks, images, [one.split("=", 1) for one in taps])
        if not strides and not taps:
            return Pair((), (), [], [])
        maps = [feature_maps(network, images) for network in networks]
        sides = [tuple(strides)] * 2
        if taps:
            have = [[stride_of(one, images) for _, one in own] for own in maps]
            sides = [(stride,) for stride in nearest_strides(*have)]
        found = [at_strides(net, own, images, side) for net, own, side in zip(networks, maps, sides)]
    labels = [f"stride {stride_of(one, images)}" for _, one in found[0]]
    return Pair(sides[0], sides[1], _says(found, images), labels)


def _by_name(networks: tuple[nn.Module, nn.Module], images: torch.Tensor, taps: Sequence[Sequence[str]]) -> Pair:
    names = [[one[side].strip() for one in taps] for side in (0, 1)]
    asked = [FeatureTap(network, names[side], detach=side == 1) for side, network in enumerate(networks)]
    try:
        maps = [forward(network, images, tap).features for network, tap in zip(networks, asked)]
    except Exception:
        for tap in asked:
            tap.remove()
        raise
    return Pair(asked[0], asked[1], _says([list(zip(*one)) for one in zip(names, maps)], images), names[0])


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for network, training in zip(networks, before):
            network.train(training)


def _says(found: Sequence[Maps], images: torch.Tensor) -> list[str]:
    return [
        f"compared: student {mine} {_words(one, images)}, teacher {its} {_words(other, images)}"
        for (mine, one), (its, other) in zip(found[0], found[1], strict=True)
    ]


def stride_of(feature: torch.Tensor, images: torch.Tensor) -> int:
    return max(1, round(images.shape[-1] / feature.shape[-1]))


def _words(feature: torch.Tensor, images: torch.Tensor) -> str:
    return f"{tuple(feature.shape)} at stride {stride_of(feature, images)}"


def nearest_strides(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int]:
    """The pair of strides whose ratio is nearest to 1, of several such the largest.

    >>> from dsct_kernels.distill.teacher import nearest_strides
    >>> nearest_strides([4, 8, 16, 32], [2, 4, 8])
    (8, 8)
    >>> nearest_strides([4, 8, 16, 32], [14])
    (16, 14)
    """
    pairs = {(s, t) for s in student for t in teacher}
    if not pairs:
        raise DataError("no hidden state of one of the networks is a feature map, so CAFD has nothing to match")
    return min(pairs, key=lambda one: (max(one) / min(one), -min(one)))


class Clock:
    """Times on the device, without waiting for it: CUDA events, or this process's clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Between two times, once the device has come by the second."""
        if not self.cuda:
            return 1000 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))


class Teacher:
    """A network that only answers: in eval mode, in a precision of its own, under `inference_mode`, and timed.

    network: as `models.forward` takes it; it is set to eval, and its parameters to requires_grad=False.
    student: the network that learns from it, before it is prepared for training. `asks` is what to ask of its features
        (`models.forward`), and `says` a line for each pair that is compared.
    images: (1, bands, H, W), all zeros; strides, taps: as of `pair`, which features are compared.
    dtype: "auto" is that of its weights: half precision as it is, float32 under `autocast`, the run's own. Or
        "float32", "bfloat16" or "float16": a copy of the network is cast to it once.
    compiled: run it through `torch.compile`.
    calls: how often it is asked in a training step.

    What it returns are ordinary tensors, copied out of inference mode (logits and maps: little beside the network),
    since autograd saves no inference tensor and some losses save what they read of the teacher.
    """

    KEPT = 512  # steps whose times are kept

    def __init__(
        self,
        network: nn.Module,
        student: nn.Module,
        images: torch.Tensor,
        strides: Sequence[int] = (),
        taps: Sequence[str] = (),
        *,
        dtype: str = "auto",
        compiled: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        calls: int = 1,
    ):
        network.eval().requires_grad_(False)
        if dtype != "auto" and dtype_of(network) != DTYPES[dtype]:
            exact = {name: value for name, value in network.named_buffers() if name.startswith("pixel_")}
            network = copy.deepcopy(network).to(DTYPES[dtype])
            for name, value in exact.items():  # the normalisation stays as it was
                network.register_buffer(name, value, persistent=False)
        own = dtype != "auto" or dtype_of(network) != torch.float32
        self.autocast = nullcontext if own else autocast
        self.pair = pair(student, network, images, strides, taps)
        self.asks, self.says = self.pair.student, self.pair.says
        if compiled:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # else taps of a later arm would not be seen
            network = torch.compile(network)  # type: ignore[assignment]
        self.network, self.calls, self.clock = network, calls, Clock(images.device)
        self.times: deque[tuple[Any, Any]] = deque(maxlen=self.KEPT * calls)

    @classmethod
    def of(cls, run: "Run", loss: Loss, network: nn.Module, student: nn.Module) -> "Teacher":
        """As a run sets it up, which says what is compared."""
        cfg, acc = run.cfg, run.accelerator
        images = torch.zeros(1, len(run.normalisation.mean), cfg.crop, cfg.crop, device=acc.device)
        how: dict[str, Any] = {"dtype": cfg.teacher_dtype, "compiled": cfg.compile_teacher, "autocast": acc.autocast,
                               "calls": cfg.accumulate}  # fmt: skip
        found = cls(network, student, images, loss.compared, loss.tapped, **how)
        for line in found.says:
            run.log.say(line)
        return found

    def __call__(self, images: torch.Tensor) -> Output:
        """Logits and features of images (N, bands, H, W) in 0..1."""
        start = self.clock.now()
        with self.autocast(), torch.inference_mode():
            out = forward(self.network, images, self.pair.teacher)
        out = Output(out.logits.clone(), [feature.clone() for feature in out.features])
        self.times.append((start, self.clock.now()))
        return out

    def cost(self) -> dict[str, float]:
        """`teacher_ms`, the time that a step spends on it, and `teacher_share`, which part of the step this is: medians
        over the last steps. Empty before two steps are done."""
        starts = [start for start, _ in self.times]
        spent = [self.clock.ms(*one) for one in self.times]
        firsts = range(0, len(starts) - self.calls, self.calls)
        if not firsts:
            return {}
        ms = median(sum(spent[i : i + self.calls]) for i in firsts)
        step = median(self.clock.ms(starts[i], starts[i + self.calls]) for i in firsts)
        return {"teacher_ms": round(ms, 3), "teacher_share": round(ms / step, 4)}

    def close(self) -> dict[str, float]:
        """Take the taps off both networks; returns what it cost."""
        self.pair.remove()
        return self.cost()
