"""Who is timed: the eager reference, the mask-trick formula, torch.compile of the reference, and each backend.

Where logits are smaller than the labels also the kernels on logits that F.interpolate has upsampled, on logits that
were of the labels' size all along, and F.interpolate with F.cross_entropy alone, which who does not distil pays.
"""

from __future__ import annotations

import dataclasses
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    BASELINES,
    BEFOREHAND,
    COMPILE,
    CROSS_ENTROPY,
    EAGER,
    FULL_SIZE,
    IGNORE_INDEX,
    LOWRES,
    MASK_TRICK,
    Inputs,
)
from benchmarks.measure import Loss, Prepared
from dsct_kernels import cafd_loss, dsct_loss, jaccard_loss, kd_loss, matched_cafd_loss, tnkd_loss
from dsct_kernels.cafd.reference import cafd as cafd_reference
from dsct_kernels.cafd.reference import matched_cafd as matched_reference
from dsct_kernels.jaccard.reference import jaccard as jaccard_reference
from dsct_kernels.pool import overlaid
from dsct_kernels.tnkd.objective import Objective
from dsct_kernels.tnkd.reference import tnkd as tnkd_reference

ALPHA, BETA, TEMPERATURE = 1.0, 2.0, 2.0  # tnkd_loss's defaults, stated for the mask-trick form
TNKD = Objective(ALPHA, BETA, TEMPERATURE, IGNORE_INDEX)


def mask_trick_dkd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """DKD per pixel in the form of its authors' release (Zhao et al., 2022), which most repositories carry on.

    One-hot masks, `- 1000 * mask` to drop the target, log(softmax) for the binary part; dense as segmentation
    frameworks do it, the class dimension kept at 1 and ignored pixels masked out of the mean. In the
    logits' own dtype, not numerically safe.
    """
    valid = target != IGNORE_INDEX
    label = torch.where(valid, target, 0).unsqueeze(1)
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter_(1, label, True)
    student_t, teacher_t = student_logits / TEMPERATURE, teacher_logits / TEMPERATURE

    def target_and_rest(p: Tensor) -> Tensor:
        return torch.cat([(p * is_target).sum(1, keepdim=True), (p * ~is_target).sum(1, keepdim=True)], 1)

    log_p_student = target_and_rest(student_t.softmax(1)).log()
    p_teacher = target_and_rest(teacher_t.softmax(1))
    tckd = F.kl_div(log_p_student, p_teacher, reduction="none").sum(1)
    q_teacher = (teacher_t - 1000.0 * is_target).softmax(1)
    log_q_student = (student_t - 1000.0 * is_target).log_softmax(1)
    nckd = F.kl_div(log_q_student, q_teacher, reduction="none").sum(1)
    pixels = TEMPERATURE**2 * (ALPHA * tckd + BETA * nckd)
    return (pixels * valid).sum() / valid.sum()


def kl_div_kd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """KD per pixel as loops write it: F.kl_div of softmax and log_softmax, ignored pixels masked out of the mean."""
    log_p_student = F.log_softmax(student_logits / TEMPERATURE, 1)
    p_teacher = F.softmax(teacher_logits / TEMPERATURE, 1)
    pixels = F.kl_div(log_p_student, p_teacher, reduction="none").sum(1)
    valid = target != IGNORE_INDEX
    return TEMPERATURE**2 * (pixels * valid).sum() / valid.sum()


def align_corners(x: Inputs) -> bool:
    """lowres: 129 columns over 512 are cells of four with a border, as align_corners has them."""
    return _given(x.student_logits).shape[-1] % 2 == 1


def at_labels(logits: Tensor | None, x: Inputs) -> Tensor:
    """lowres: logits at the labels' size."""
    size = _given(x.target).shape[1:]
    return F.interpolate(_given(logits).float(), size=size, mode="bilinear", align_corners=align_corners(x))


def cross_entropy(x: Inputs) -> Tensor:
    """lowres: what training without a teacher takes."""
    return F.cross_entropy(at_labels(x.student_logits, x), _given(x.target), ignore_index=IGNORE_INDEX)


def logit_kernels(loss: str, student: Tensor, teacher: Tensor, x: Inputs, align: bool, backend: str) -> Tensor:
    """The lowres losses, of these logits and the labels of `x`, less what dsct_loss does at the logits' own size."""
    if loss == "lowres-kd":
        how = {"temperature": TEMPERATURE, "ignore_index": IGNORE_INDEX, "align_corners": align, "backend": backend}
        return kd_loss(student, teacher, x.target, **how)
    settings = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE, "align_corners": align, "backend": backend}
    if loss == "lowres-tnkd":
        return tnkd_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, **settings)
    tnkd_weight = 1.0 if loss == "lowres" else 0.0
    parts = {"matched_weight": 0.0, "jaccard_weight": 0.0, "tnkd_weight": tnkd_weight, **settings}
    return dsct_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, **parts).total


def own_size_kernels(x: Inputs) -> Tensor:
    """What dsct_loss does by default at the logits' own size."""
    student, teacher = _given(x.student_logits), _given(x.teacher_logits)
    matched = matched_cafd_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, backend="native")
    return 3 * matched + 3 * jaccard_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, backend="native")


def beforehand(loss: str) -> Loss:
    """The native kernels on logits that F.interpolate has made as large as the labels, as the library once did."""

    def call(x: Inputs) -> Tensor:
        student = at_labels(x.student_logits, x)
        teacher = student.detach() if loss == "lowres-dsct" else at_labels(x.teacher_logits, x)
        total = logit_kernels(loss, student, teacher, x, False, "native")
        return total + own_size_kernels(x) if loss == "lowres-dsct" else total

    return call


def full_size(loss: str) -> Prepared:
    """The native kernels on logits that are as large as the labels from the start: nothing is upsampled."""

    def prepare(x: Inputs) -> Inputs:
        student, teacher = (at_labels(logits, x).detach() for logits in (x.student_logits, x.teacher_logits))
        student.requires_grad_(_given(x.student_logits).requires_grad)
        return dataclasses.replace(x, student_logits=student, teacher_logits=teacher)

    return Prepared(backend_loss(loss, "native"), prepare)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def backend_loss(loss: str, backend: str) -> Loss:
    """The public function under one backend."""

    def tnkd(x: Inputs) -> Tensor:
        return tnkd_loss(
            _given(x.student_logits),
            _given(x.teacher_logits),
            x.target,
            alpha=ALPHA,
            beta=BETA,
            temperature=TEMPERATURE,
            ignore_index=IGNORE_INDEX,
            backend=backend,
        )

    def kd(x: Inputs) -> Tensor:
        how = {"temperature": TEMPERATURE, "ignore_index": IGNORE_INDEX, "backend": backend}
        return kd_loss(_given(x.student_logits), _given(x.teacher_logits), x.target, **how)

    def cafd(x: Inputs) -> Tensor:
        return cafd_loss(_given(x.student_features), _given(x.teacher_features), backend=backend)

    def matched(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        return matched_cafd_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, backend=backend)

    def dsct(x: Inputs) -> Tensor:
        return dsct_loss(
            _given(x.student_logits),
            _given(x.teacher_logits),
            x.target,
            x.student_features,
            x.teacher_features,
            ignore_index=IGNORE_INDEX,
            align_corners=loss == "lowres-dsct" and align_corners(x),
            backend=backend,
        ).total

    def jaccard(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        return jaccard_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, backend=backend)

    def lowres(x: Inputs) -> Tensor:
        return logit_kernels(loss, _given(x.student_logits), _given(x.teacher_logits), x, align_corners(x), backend)

    losses = {"tnkd": tnkd, "kd": kd, "cafd": cafd, "matched": matched, "jaccard": jaccard, "dsct": dsct}
    return {**losses, "lowres": lowres, "lowres-tnkd": lowres, "lowres-dsct": dsct, "lowres-kd": lowres}[loss]


def reference_loss(loss: str) -> Loss:
    """The baseline: the bare reference, without the public function's checks; for kd, F.kl_div.

    For dsct F.cross_entropy plus the reference losses, as a training loop would add them up.
    """

    def tnkd_of(student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return tnkd_reference(student, teacher, target, TNKD)[0]

    def tnkd(x: Inputs) -> Tensor:
        return tnkd_of(_given(x.student_logits), _given(x.teacher_logits), x.target)

    def kd(x: Inputs) -> Tensor:
        return kl_div_kd(_given(x.student_logits), _given(x.teacher_logits), _given(x.target))

    def lowres_kd(x: Inputs) -> Tensor:
        return kl_div_kd(at_labels(x.student_logits, x), at_labels(x.teacher_logits, x), _given(x.target))

    def cafd(x: Inputs) -> Tensor:
        return cafd_reference(_given(x.student_features), _given(x.teacher_features), 1.0, 1.0, 1)

    def maps(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, share = overlaid(
            _given(x.student_logits), _given(x.teacher_logits), x.target, IGNORE_INDEX, "reference"
        )
        return student, teacher, _given(share)

    def matched_of(student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
        return matched_reference(student, teacher, share.unsqueeze(1) > 0, 1.0, 4.0, 1)

    def matched(x: Inputs) -> Tensor:
        return matched_of(*maps(x))

    def jaccard(x: Inputs) -> Tensor:
        return jaccard_reference(*maps(x), 1.0)

    def dsct(x: Inputs) -> Tensor:
        if loss == "lowres-dsct":
            ce = cross_entropy(x)
        else:
            ce = F.cross_entropy(_given(x.student_logits), _given(x.target), ignore_index=IGNORE_INDEX)
        at_own_size = maps(x)
        total = ce + 3 * matched_of(*at_own_size) + 3 * jaccard_reference(*at_own_size, 1.0)
        return total if x.student_features is None else total + cafd(x)

    def lowres(x: Inputs) -> Tensor:
        student = at_labels(x.student_logits, x)
        total = tnkd_of(student, at_labels(x.teacher_logits, x), x.target)
        if loss == "lowres-tnkd":
            return total
        return total + F.cross_entropy(student, _given(x.target), ignore_index=IGNORE_INDEX)

    losses = {"tnkd": tnkd, "kd": kd, "cafd": cafd, "matched": matched, "jaccard": jaccard, "dsct": dsct}
    return {**losses, "lowres": lowres, "lowres-tnkd": lowres, "lowres-dsct": dsct, "lowres-kd": lowres_kd}[loss]


def default_baselines(loss: str) -> tuple[str, ...]:
    """lowres: not the eager reference, which takes seconds a call and is far behind torch.compile."""
    return BASELINES[2:] if loss in LOWRES else BASELINES[:3]


def make_candidates(loss: str, baselines: tuple[str, ...], backends: tuple[str, ...]) -> dict[str, Loss]:
    """Name -> loss of the inputs, fresh for one case: torch.compile then specialises for its shapes."""
    reference = reference_loss(loss)
    candidates: dict[str, Loss] = {}
    if EAGER in baselines:
        candidates[EAGER] = reference
    if MASK_TRICK in baselines and loss == "tnkd":
        candidates[MASK_TRICK] = lambda x: mask_trick_dkd(
            _given(x.student_logits), _given(x.teacher_logits), _given(x.target)
        )
    if COMPILE in baselines:
        torch.compiler.reset()
        candidates[COMPILE] = torch.compile(reference)
    if loss in LOWRES:
        theirs = {BEFOREHAND: beforehand(loss), CROSS_ENTROPY: cross_entropy, FULL_SIZE: full_size(loss)}
        candidates.update({name: theirs[name] for name in theirs if name in baselines})
    candidates.update({backend: backend_loss(loss, backend) for backend in backends})
    return candidates


def auto_backend(loss: str, inputs: Inputs) -> str:
    """The backend that `backend="auto"` stands for with these inputs."""
    from dsct_kernels import backends

    module = {"cafd": "cafd.loss", "matched": "cafd.matched", "jaccard": "jaccard.loss"}.get(loss, "tnkd.loss")
    offered = importlib.import_module(f"dsct_kernels.{module}").BACKENDS
    tensors = [
        x
        for x in (inputs.student_logits, inputs.teacher_logits, inputs.student_features, inputs.teacher_features)
        if x is not None
    ]
    name: str = backends.choose("auto", offered, *tensors).name
    return name
