"""TNKD and cross-entropy in plain PyTorch: the formulas as written, and the truth that every kernel is checked against.

Autograd differentiates it; the kernels use the closed forms of docs/derivations.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import values
from ..dtypes import acc_dtype
from ..values import Number
from .objective import MEAN, NONE, Objective
from .upsample import to_labels

INF = float("inf")


def decouple(logits: Tensor, is_target: Tensor, temperature: Number) -> tuple[Tensor, Tensor]:
    """u = z_y - logsumexp_{j != y} z_j, (N, *spatial), and log softmax_{j != y}(z), (N, K, *spatial)."""
    others = logits.masked_fill(is_target, -INF)
    top = others.detach().amax(1, keepdim=True)
    no_others = top == -INF  # every other class absent: the target has all the mass
    top = top.masked_fill(no_others, 0)  # a shift changes nothing, and near 0 the numbers have digits to spare
    z_target = (logits.masked_fill(~is_target, 0).sum(1, keepdim=True) - top) / temperature
    others = (others - top) / temperature
    lse = others.exp().sum(1, keepdim=True).masked_fill(no_others, 1).log()
    # All classes absent is "no other" too. A sum, not a selection: NaN stays, and the target's gradient.
    z_target = z_target.masked_fill(no_others & (z_target == -INF), 0)
    u = z_target + torch.where(no_others, INF, -lse)
    return u.squeeze(1), others - lse


def kl_bernoulli(u_teacher: Tensor, u_student: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(u_teacher)) || Bernoulli(sigmoid(u_student))), with 0 * log 0 = 0."""
    b, not_b = u_teacher.sigmoid(), (-u_teacher).sigmoid()
    hit = torch.where(b == 0, 0, b * (F.logsigmoid(u_teacher) - F.logsigmoid(u_student)))
    miss = torch.where(not_b == 0, 0, not_b * (F.logsigmoid(-u_teacher) - F.logsigmoid(-u_student)))
    return hit + miss


def kl_categorical(log_q_teacher: Tensor, log_q_student: Tensor) -> Tensor:
    """KL(q_teacher || q_student) over dim 1, with 0 * log 0 = 0."""
    q = log_q_teacher.exp()
    return torch.where(q == 0, 0, q * (log_q_teacher - log_q_student)).sum(1)


def tnkd(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, parts) as the op `dsct_kernels::tnkd` returns them (docs/ops.md), differentiable in the student.

    Logits smaller than the labels are upsampled. The teacher None: the student itself, detached.
    """
    student, teacher = to_labels(student_logits, teacher_logits, target, objective.align_corners)
    acc = acc_dtype(student, teacher)
    student, teacher = student.to(acc), teacher.detach().to(acc)
    class_weight, ignore_index, with_ce = objective.class_weight, objective.ignore_index, objective.may_have_ce()
    classes = student.shape[1]
    ce_weight: Number = 0.0 if objective.ce_weight is None else objective.ce_weight
    asked = (ce_weight, objective.tckd_weight, objective.nckd_weight, objective.temperature)
    numbers = values.as_scalars(asked, student.device, acc)
    ce_weight, tckd_weight, nckd_weight = (values.sound(weight) for weight in numbers[:3])
    temperature = values.sound(numbers[3], positive=True)
    if target is None:
        target, ignore_index = teacher.argmax(1), None
    target = target.long()  # an int8 tensor compared with the number 255 would find it equal to -1
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    in_range = (target >= 0) & (target < classes)

    # Whatever stands at an ignored pixel, NaN and inf too, must not reach the arithmetic.
    student = torch.where(valid.unsqueeze(1), student, 0)
    teacher = torch.where(valid.unsqueeze(1), teacher, 0)
    label = torch.where(in_range & valid, target, 0)
    is_target = label.unsqueeze(1) == torch.arange(classes, device=label.device).view(-1, *[1] * (label.dim() - 1))

    u_s, log_q_s = decouple(student, is_target, temperature)
    u_t, log_q_t = decouple(teacher, is_target, temperature)
    tckd = temperature**2 * kl_bernoulli(u_t, u_s)
    nckd = temperature**2 * kl_categorical(log_q_t, log_q_s)
    if objective.coupled:
        others = (-u_t).sigmoid()
        nckd = torch.where(others == 0, 0, others * nckd)
    elif classes == 2:  # one class beside the target: nothing to compare, not even where the student has it at -inf
        nckd = nckd.masked_fill(torch.ones_like(valid), 0)
    ce = -F.logsigmoid(decouple(student, is_target, 1.0)[0]) if with_ce else torch.zeros_like(tckd)
    weight = (
        valid.to(acc)
        if class_weight is None
        else torch.where(class_weight < 0, torch.nan, class_weight).to(acc)[label] * valid
    )
    ce = torch.where(weight == 0, 0, weight * ce)

    # Never hidden: a bad label, and a logit that is NaN or +inf.
    hopeless = ~((student < INF).all(1) & (teacher < INF).all(1) & (in_range | ~valid))
    bad = torch.where(hopeless, torch.nan, 1.0).to(acc)
    tckd, nckd, ce = (torch.where(valid, part, 0) * bad for part in (tckd, nckd, ce))
    if objective.reduction == MEAN:
        count = valid.sum().clamp(min=1)
        weight_sum = weight.sum()
        ce = ce / torch.where(weight_sum == 0, 1, weight_sum)
        tckd, nckd = tckd / count, nckd / count
    if not with_ce:
        ce = torch.zeros_like(ce)
    elif isinstance(ce_weight, Tensor):
        ce = torch.where(ce_weight == 0, 0, ce)  # what takes no part is reported 0

    # A part with weight 0 takes no part. But a NaN shows whatever the weights.
    weighted = [values.weighted(w, part) for w, part in ((ce_weight, ce), (tckd_weight, tckd), (nckd_weight, nckd))]
    loss = weighted[0] + weighted[1] + weighted[2] + torch.where(hopeless, torch.nan, 0.0).to(acc)
    if not loss.requires_grad and student.requires_grad:  # nothing is asked for: 0, still with a (zero) gradient
        loss = loss + student.masked_fill(torch.ones_like(is_target), 0).sum(1)
    parts = torch.stack([part.detach().sum() for part in (ce, tckd, nckd)])
    return (loss if objective.reduction == NONE else loss.sum()), parts
