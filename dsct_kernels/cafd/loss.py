"""CAFD, channel-weighted attention-guided feature distillation: the public functions and the module."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import backends, checks, values
from ..checks import Reduction
from ..module import LossModule, keywords_of
from ..values import Number, Temperature
from . import native, reference, triton


@dataclass(frozen=True)
class CAFDBackend(backends.Backend):
    cafd: Callable[[Tensor, Tensor, Number, Number, int], Tensor]
    attention_map: Callable[[Tensor, Number, Number], Tensor]


BACKENDS = (
    CAFDBackend("reference", backends.always, reference.cafd, reference.attention_map),
    CAFDBackend("native", native.why_not, native.cafd, native.attention_map),
    CAFDBackend("triton", triton.why_not, triton.cafd, triton.attention_map),
)

Features = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


def cafd_loss(
    student_features: Features,
    teacher_features: Features,
    *,
    channel_temperature: Temperature = 1.0,
    spatial_temperature: Temperature = 1.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Channel-weighted attention-guided feature distillation.

    Each network's features become one attention map over positions i, :math:`A_i = \sum_c w_c P_{c,i}` (see
    `channel_attention_map`), and the loss of a sample is :math:`KL(\tilde A^T \| \tilde A^S)` with
    :math:`\tilde A_i = (1 - \epsilon) A_i + \epsilon / \text{positions}`, :math:`\epsilon = 10^{-6}`. The channels are
    condensed before anything is compared, so the networks may differ in C and no adapter is needed. Maps that differ
    in H x W are average-pooled (adaptively) to the smaller H and W. After CWD (Shu et al., ICCV 2021, arXiv
    2011.13256) and attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928); the formula is this project's.

    Args:
        student_features: (N, C, H, W), or an iterable of them, one per stage, or a mapping (two mappings of the same
            keys go together by key); float16, bfloat16, float32 or float64, any strides. Transformer tokens (N, L, C)
            fit as ``tokens.transpose(1, 2).unflatten(2, (H, W))``, read in place.
        teacher_features: the same N and number of stages; may differ in C, H, W, dtype and strides. Gets no gradient.
        channel_temperature: > 0, divides the channels' relative strength before its softmax. Both temperatures are
            numbers or 0-d tensors, and may change at every step (see `tnkd_loss`).
        spatial_temperature: > 0, divides the features before the softmax over positions.
        reduction: "mean" over the batch, "sum", or "none" for (N,). Stages are averaged.
        backend: "auto", "reference", "native" or "triton"; DSCT_KERNELS_BACKEND sets what "auto" means.

    Returns:
        The loss, float32 (float64 where an input is float64). Its gradient has the student's dtype. N = 0: 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the named backend cannot serve the call (it says why), or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from dsct_kernels import cafd_loss
        >>> student = torch.randn(2, 64, 32, 32, requires_grad=True)
        >>> teacher = torch.randn(2, 256, 16, 16)
        >>> cafd_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([2, 64, 32, 32])
    """
    temperatures = _temperatures(channel_temperature, spatial_temperature)
    reduce = checks.reduction(reduction)
    _same_keys(student_features, teacher_features)
    students = _stages("student_features", student_features)
    order = list(student_features) if isinstance(student_features, Mapping) else None
    teachers = _stages("teacher_features", teacher_features, order)
    if len(students) != len(teachers):
        stages = f"{len(students)} stages as in student_features"
        raise ValueError(f"teacher_features: expected {stages}, got {len(teachers)}")
    for i, (s, t) in enumerate(zip(students, teachers)):
        if s.shape[0] != t.shape[0] or s.shape[0] != students[0].shape[0]:
            raise ValueError(
                f"teacher_features: expected the batch size of student_features in every stage, got {tuple(t.shape)} "
                f"beside {tuple(s.shape)} in stage {i}"
            )
        checks.same_device("teacher_features", t, "student_features", s)
    losses = [_choose(backend, s, t).cafd(s, t.detach(), *temperatures, reduce) for s, t in zip(students, teachers)]
    return losses[0] if len(losses) == 1 else sum(losses[1:], start=losses[0]) / len(losses)


def channel_attention_map(
    features: Tensor,
    *,
    channel_temperature: Temperature = 1.0,
    spatial_temperature: Temperature = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""The attention map that CAFD compares: where the channels look, each weighted by how strongly it speaks.

    .. math::
        P_{c,i} = \text{softmax}_i(F_{c,i} / \tau_s), \quad g_c = \text{mean}_i |F_{c,i}|, \quad
        r_c = g_c / \text{mean}_c\, g_c, \quad w = \text{softmax}_c(r / \tau_c), \quad A_i = \sum_c w_c P_{c,i}

    Args:
        features: (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        channel_temperature: > 0.
        spatial_temperature: > 0.
        backend: as for `cafd_loss`.

    Returns:
        A, (N, H, W), float32 (float64 for float64), each sample's sum is 1; differentiable in `features`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `cafd_loss`.

    Example:
        >>> import torch
        >>> from dsct_kernels import channel_attention_map
        >>> channel_attention_map(torch.zeros(1, 8, 2, 2))
        tensor([[[0.2500, 0.2500],
                 [0.2500, 0.2500]]])
    """
    temperatures = _temperatures(channel_temperature, spatial_temperature)
    checks.features("features", features)
    return _choose(backend, features).attention_map(features, *temperatures)


def _temperatures(channel_temperature: Number, spatial_temperature: Number) -> tuple[Number, Number]:
    return (
        values.positive("channel_temperature", channel_temperature),
        values.positive("spatial_temperature", spatial_temperature),
    )


def _same_keys(student_features: Features, teacher_features: Features) -> None:
    """Two mappings go together by their keys, in whatever order they come."""
    if isinstance(student_features, Mapping) and isinstance(teacher_features, Mapping):
        ours, theirs = set(student_features), set(teacher_features)
        if ours != theirs:
            raise ValueError(
                f"teacher_features: expected the keys of student_features, {sorted(map(str, ours))}, "
                f"got {sorted(map(str, theirs))}"
            )
    elif isinstance(student_features, Mapping) or isinstance(teacher_features, Mapping):
        one = "student_features" if isinstance(student_features, Mapping) else "teacher_features"
        raise TypeError(f"{one}: got a mapping beside features without keys; expected both to be mappings, or neither")


def _stages(name: str, features: Features, order: Iterable[str] | None = None) -> list[Tensor]:
    if isinstance(features, Tensor):
        checks.features(name, features)
        return [features]
    if isinstance(features, Mapping):
        stages = {key: features[key] for key in (features if order is None else order)}
        for key, stage in stages.items():
            checks.features(f"{name}[{key!r}]", stage)
    elif isinstance(features, Iterable) and not isinstance(features, (str, bytes)):
        stages = dict(enumerate(features))
        for i, stage in stages.items():
            checks.features(f"{name}[{i}]", stage)
    else:
        raise TypeError(
            f"{name}: expected a Tensor, an iterable of Tensors or a mapping to Tensors, got {type(features).__name__}"
        )
    if not stages:
        raise ValueError(f"{name}: expected at least one stage, got an empty {type(features).__name__}")
    return list(stages.values())


def _choose(backend: str, *tensors: Tensor) -> CAFDBackend:
    return backends.choose(backend, BACKENDS, *tensors)


class CAFDLoss(LossModule):
    """`cafd_loss` as a module: the keywords are given once. It has no parameters.

    Example:
        >>> import torch
        >>> from dsct_kernels import CAFDLoss
        >>> CAFDLoss(reduction="none")(torch.randn(3, 4, 8, 8), torch.randn(3, 16, 8, 8)).shape
        torch.Size([3])
    """

    @keywords_of(cafd_loss)
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """The loss; shapes as for `cafd_loss`."""
        return cafd_loss(student_features, teacher_features, **self.keywords())

    if TYPE_CHECKING:
        __call__ = forward
