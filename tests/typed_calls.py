"""What a type checker makes of calls of the losses: mypy reads it (pyproject.toml) and nothing runs it.

A line that has to be refused carries an `ignore`, which mypy in turn refuses where there is nothing to ignore.
"""

from torch import Tensor
from typing_extensions import assert_type

from dsct_kernels import (
    CAFDLoss,
    DSCTLoss,
    DSCTLosses,
    JaccardLoss,
    KDLoss,
    MatchedCAFDLoss,
    TNKDLoss,
    cafd_loss,
    dsct_loss,
    matched_cafd_loss,
    tnkd_loss,
)


def modules(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    assert_type(TNKDLoss()(student, teacher, target), Tensor)
    assert_type(JaccardLoss()(student, teacher), Tensor)
    assert_type(MatchedCAFDLoss()(student, teacher, target), Tensor)
    assert_type(CAFDLoss()([student], (teacher,)), Tensor)
    losses = DSCTLoss()(student, teacher, target, {"stage": student}, {"stage": teacher})
    assert_type(losses, DSCTLosses)
    assert_type(losses.log(), dict[str, float])
    TNKDLoss()(student)  # type: ignore[call-arg]
    CAFDLoss()(student, 1.0)  # type: ignore[arg-type]
    DSCTLoss()(student, teacher, target, stage=student)  # type: ignore[call-arg]


def reductions(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    tnkd_loss(student, teacher, reduction="none")
    tnkd_loss(student, teacher, reduction="avg")  # type: ignore[arg-type]
    cafd_loss(student, teacher, reduction="avg")  # type: ignore[arg-type]
    matched_cafd_loss(student, teacher, reduction="avg")  # type: ignore[arg-type]
    dsct_loss(student, teacher, target, reduction="none")  # type: ignore[arg-type]
    TNKDLoss(reduction="avg")  # type: ignore[arg-type]
    CAFDLoss(reduction="avg")  # type: ignore[arg-type]
    MatchedCAFDLoss(reduction="avg")  # type: ignore[arg-type]
    DSCTLoss(reduction="none")  # type: ignore[arg-type]


def keywords(weight: Tensor) -> None:
    criterion = DSCTLoss(class_weight=weight, alpha=weight[0], temperature=2, ignore_index=None, align_corners=True)
    criterion.temperature = 0.5 * criterion.temperature
    assert_type(criterion.class_weight, Tensor | None)
    MatchedCAFDLoss(channel_temperature=None)
    CAFDLoss(channel_temperature=None)  # type: ignore[arg-type]
    KDLoss(alpha=1.0)  # type: ignore[call-arg]
    JaccardLoss(temperature="high")  # type: ignore[arg-type]
    DSCTLoss(weight)  # type: ignore[call-arg]
