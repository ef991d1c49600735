"""The DSCT objective: cross-entropy, CAFD of the logits and of features, Jaccard and TNKD, joined.

Cross-entropy shares TNKD's pass over the logits.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, values
from .cafd.loss import Features, cafd_loss
from .cafd.matched import BACKENDS as MATCHED_BACKENDS
from .cafd.matched import of_maps as matched_of_maps
from .dtypes import acc_dtype
from .jaccard.loss import BACKENDS as JACCARD_BACKENDS
from .jaccard.loss import of_maps as jaccard_of_maps
from .module import LossModule, keywords_of
from .pool import overlaid
from .tnkd.loss import logit_loss
from .tnkd.objective import Objective
from .values import DEFAULT_IGNORE_INDEX, IgnoreIndex, Number, Temperature, Weight, label_value, positive, weight

TotalReduction = Literal["mean", "sum"]
NO_MAP = "reduction: expected 'mean' or 'sum', got 'none': a map and a vector do not add up"


class DSCTLosses(NamedTuple):
    """`total` to call backward on, and its parts, detached, for the log.

    total = ce_weight * ce + matched_weight * matched + jaccard_weight * jaccard
    + tnkd_weight * (alpha * tckd + beta * nckd) + cafd_weight * cafd; tckd, nckd and matched carry tau^2.
    """

    total: Tensor
    ce: Tensor
    tckd: Tensor
    nckd: Tensor
    cafd: Tensor
    matched: Tensor
    jaccard: Tensor

    def log(self) -> dict[str, float]:
        """The parts as plain numbers, without `total`, for a logger or JSON. Waits for the device, once."""
        parts = self._asdict()
        del parts["total"]
        return dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))

    def loss_dict(self) -> dict[str, Tensor]:
        """For a loop that adds up whatever has "loss" in its name and logs the rest, as mmengine's `parse_losses`: only
        `loss_dsct`, the total, counts. Of `_asdict()` such a loop finds nothing to add up, and with "loss" before every
        name it counts the parts beside their total.
        """
        parts = self._asdict()
        return {"loss_dsct": parts.pop("total"), **parts}


def dsct_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    student_features: Features | None = None,
    teacher_features: Features | None = None,
    *,
    ce_weight: Weight = 1.0,
    matched_weight: Weight = 3.0,
    jaccard_weight: Weight = 3.0,
    tnkd_weight: Weight = 0.0,
    cafd_weight: Weight = 1.0,
    class_weight: Tensor | None = None,
    matched_temperature: Temperature = 4.0,
    alpha: Weight = 1.0,
    beta: Weight = 0.5,
    temperature: Temperature = 1.0,
    ignore_index: IgnoreIndex = DEFAULT_IGNORE_INDEX,
    channel_temperature: Temperature = 1.0,
    spatial_temperature: Temperature = 1.0,
    align_corners: bool = False,
    reduction: TotalReduction = "mean",
    num_items: Number | None = None,
    backend: str = "auto",
) -> DSCTLosses:
    r"""The whole objective: cross-entropy, and what the student learns from the teacher.

    .. math:: L = w_{CE} CE + w_m CAFD_{matched} + w_J Jaccard + w_{TNKD} TNKD + w_{CAFD} CAFD

    The default weights are those that won on real tiles (README, "Does it help?"): of the logits, where each class is
    (matched CAFD) and how much of it there is (Jaccard), at their own resolution. TNKD per pixel added nothing to them
    there and has weight 0. Features take part where they are given.

    Args:
        student_logits, teacher_logits, target: as for `tnkd_loss`. With target None, cross-entropy too learns from the
            teacher's argmax.
        student_features, teacher_features: as for `cafd_loss`; both None leaves CAFD of features out.
        ce_weight, matched_weight, jaccard_weight, tnkd_weight, cafd_weight: >= 0; numbers or 0-d tensors that may
            change at every step, as alpha, beta and the temperatures may (see `tnkd_loss`). Cross-entropy of weight 0
            is reported 0, always; every other part where the number is known beforehand, and then it is not computed:
            not in a compiled graph, which serves every value
            (but the CPU's kernel leaves TNKD out there, too).
        class_weight: (K,) weights of the cross-entropy, with the semantics of `F.cross_entropy`, or None.
        matched_temperature: the temperature of `matched_cafd_loss`, whose channel_temperature is the one below.
        align_corners: how logits smaller than the labels are upsampled for CE and TNKD, as in `F.interpolate`.
        reduction: "mean" or "sum", of every part but Jaccard, which is one ratio of the batch either way; "none" is
            refused, since a map and a vector do not add up.
        num_items: as for `tnkd_loss`, of TNKD and of cross-entropy, whose sum, weighted by class_weight, is divided by
            it (not by the sum of the weights). Matched CAFD and CAFD, means over samples, and Jaccard are as without
            it: over several micro-batches their weights are for the caller to divide.
        alpha, beta, temperature, ignore_index: as for `tnkd_loss`; cross-entropy is taken at temperature 1 over the
            same valid pixels. No valid pixel: 0 (where `F.cross_entropy` gives NaN).
        channel_temperature, spatial_temperature: as for `cafd_loss`.
        backend: as for all; a part that the named backend has no kernel for goes through the reference.

    Returns:
        DSCTLosses: total, differentiable; ce, tckd, nckd, cafd, matched, jaccard, detached.

    Raises:
        TypeError, ValueError, RuntimeError: as for the losses.

    Example:
        >>> import torch
        >>> from dsct_kernels import dsct_loss
        >>> student = torch.randn(2, 6, 32, 32, requires_grad=True)
        >>> losses = dsct_loss(student, torch.randn(2, 6, 32, 32), torch.randint(0, 6, (2, 128, 128)))
        >>> losses.total.backward()
        >>> bool(torch.allclose(losses.total, losses.ce + 3 * losses.matched + 3 * losses.jaccard))
        True
    """
    ce_weight, tnkd_weight = weight("ce_weight", ce_weight), weight("tnkd_weight", tnkd_weight)
    cafd_weight, alpha, beta = weight("cafd_weight", cafd_weight), weight("alpha", alpha), weight("beta", beta)
    matched_weight, jaccard_weight = weight("matched_weight", matched_weight), weight("jaccard_weight", jaccard_weight)
    matched_temperature = positive("matched_temperature", matched_temperature)
    channel_temperature = positive("channel_temperature", channel_temperature)
    if reduction == "none":
        raise ValueError(NO_MAP)
    if (student_features is None) != (teacher_features is None):
        missing = "student_features" if student_features is None else "teacher_features"
        raise ValueError(f"{missing}: expected features, as the other network's were given, got None")
    items = checks.num_items(num_items, reduction)
    checks.logits(student_logits, teacher_logits, target)
    if class_weight is not None:
        checks.class_weights(class_weight, student_logits)
        class_weight = class_weight.detach().to(acc_dtype(student_logits, teacher_logits)).contiguous()
        if class_weight.device.type != "cpu":  # where nobody looks at them, a negative one makes the loss NaN
            class_weight = torch.where(class_weight < 0, torch.nan, class_weight)
    objective = Objective(
        tckd_weight=tnkd_weight * alpha,
        nckd_weight=tnkd_weight * beta,
        temperature=positive("temperature", temperature),
        ignore_index=label_value("ignore_index", ignore_index),
        reduction=checks.reduction(reduction),
        align_corners=align_corners,
        ce_weight=ce_weight,
        class_weight=class_weight,
    )
    checks.ignore_index_is_no_class(ignore_index, student_logits.shape[1], target)
    untaught = values.known_zero(tnkd_weight)  # then the teacher is there for its argmax alone
    teacher = None if untaught and target is not None else teacher_logits
    total, parts = logit_loss(student_logits, teacher, target, objective, backend, items)
    ce, tckd, nckd = parts.unbind()
    cafd = matched = jaccard = torch.zeros_like(ce)
    if untaught:
        tckd = nckd = cafd
    with_matched, with_jaccard = not values.known_zero(matched_weight), not values.known_zero(jaccard_weight)
    if with_matched or with_jaccard:
        maps = overlaid(student_logits, teacher_logits, target, ignore_index, backend)
    if with_matched:
        where = backends.else_reference(backend, MATCHED_BACKENDS, student_logits)
        matched = matched_of_maps(*maps, matched_temperature, channel_temperature, reduction, where)
        total = total + _weighted(matched_weight, matched)
    if with_jaccard:
        where = backends.else_reference(backend, JACCARD_BACKENDS, student_logits)
        jaccard = jaccard_of_maps(*maps, 1.0, where)
        total = total + _weighted(jaccard_weight, jaccard)
    if student_features is not None and teacher_features is not None and not values.known_zero(cafd_weight):
        cafd = cafd_loss(
            student_features,
            teacher_features,
            channel_temperature=channel_temperature,
            spatial_temperature=spatial_temperature,
            reduction=reduction,
            backend=backend,
        )
        total = total + _weighted(cafd_weight, cafd)
    return DSCTLosses(total, ce, tckd, nckd, cafd.detach(), matched.detach(), jaccard.detach())


def _weighted(part_weight: Number, part: Tensor) -> Tensor:
    (part_weight,) = values.as_scalars((part_weight,), part.device, part.dtype)
    return values.weighted(values.sound(part_weight), part)


class DSCTLoss(LossModule):
    """`dsct_loss` as a module: the keywords are given once; `class_weight` is a buffer and moves with the module.

    Example:
        >>> import torch
        >>> from dsct_kernels import DSCTLoss
        >>> criterion = DSCTLoss(tnkd_weight=0.5, class_weight=torch.ones(6))
        >>> logits = torch.randn(2, 6, 8, 8, requires_grad=True)
        >>> criterion(logits, torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 8, 8))).total.backward()
    """

    class_weight: Tensor | None

    @keywords_of(dsct_loss)
    def __init__(self, *, class_weight: Tensor | None, **keywords: Any) -> None:
        super().__init__(**keywords)
        if self.reduction == "none":
            raise ValueError(NO_MAP)
        if class_weight is not None:
            checks.tensor("class_weight", class_weight, checks.FLOATS)
            checks.no_negative_class_weight(class_weight)
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
        *,
        num_items: Number | None = None,
    ) -> DSCTLosses:
        """The losses; shapes, and num_items, which changes at every step, as for `dsct_loss`."""
        return dsct_loss(
            student_logits,
            teacher_logits,
            target,
            student_features,
            teacher_features,
            num_items=num_items,
            **self.keywords(),
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        weights = "" if self.class_weight is None else f", class_weight=Tensor({len(self.class_weight)},)"
        return super().extra_repr() + weights
