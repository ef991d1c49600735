"""What is asked of the logits: one record, from the public functions through the backends to the ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import values
from ..values import Number

NONE, MEAN, SUM = 0, 1, 2  # reduction, as checks.reduction returns it


class Objective(NamedTuple):
    """The loss of a pixel is ce_weight * CE + temperature^2 * (tckd_weight * TCKD + nckd_weight * NCKD).

    coupled: (1 - b^T) NCKD takes NCKD's place, b^T being the teacher's target probability. With equal weights this is
    plain KD, the KL of the whole softmax.

    Everything is checked already.
    """

    tckd_weight: Number
    nckd_weight: Number
    temperature: Number
    ignore_index: int | Tensor | None = None
    reduction: int = MEAN
    align_corners: bool = False  # how logits smaller than the labels are upsampled
    # None: no cross-entropy, in a compiled graph too. With a weight of 0, which may be known only when the op runs, it
    # takes no part, and is reported 0.
    ce_weight: Number | None = None
    class_weight: Tensor | None = None  # (K,) in the acc dtype, contiguous
    coupled: bool = False

    def divided_by(self, items: Number) -> "Objective":
        """As a sum, of weights that are divided by `items`: it costs no pass over the gradient, and no kernel knows."""

        def share(weight: Number) -> Number:
            return weight if values.known_zero(weight) else weight / items

        return self._replace(
            tckd_weight=share(self.tckd_weight),
            nckd_weight=share(self.nckd_weight),
            ce_weight=None if self.ce_weight is None else share(self.ce_weight),
            reduction=SUM,
        )

    def may_have_ce(self) -> bool:
        """Whether cross-entropy takes part, or may do: nobody knows a weight on a GPU, or in a traced call."""
        return self.ce_weight is not None and not values.known_zero(self.ce_weight)

    def packed(
        self, target: Tensor | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor, Tensor | None, bool, int]:
        """The ops' arguments behind `target`: class_weight, values, ignore_index, coupled, reduction."""
        numbers: tuple[Number, ...] = (self.tckd_weight, self.nckd_weight, self.temperature)
        if self.ce_weight is not None:
            numbers = (self.ce_weight, *numbers)
        ignored = values.packed_index(self.ignore_index, device) if target is not None else None
        return self.class_weight, values.packed(numbers, device), ignored, self.coupled, self.reduction
