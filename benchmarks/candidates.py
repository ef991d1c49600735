"""Who is timed: the eager reference, the mask-trick formula, torch.compile of the reference, the kernel on logits that
were upsampled beforehand, and each backend."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import IGNORE_INDEX, Inputs
from benchmarks.measure import Loss
from dsct_kernels import cafd_loss, dsct_loss, jaccard_loss, matched_cafd_loss, tnkd_loss
from dsct_kernels.cafd.reference import cafd as cafd_reference
from dsct_kernels.cafd.reference import matched_cafd as matched_reference
from dsct_kernels.jaccard.reference import jaccard as jaccard_reference
from dsct_kernels.pool import labelled
from dsct_kernels.tnkd.reference import tnkd as tnkd_reference

EAGER, MASK_TRICK, COMPILE, BEFOREHAND = "eager", "mask-trick", "compile", "beforehand"
BASELINES = (EAGER, MASK_TRICK, COMPILE, BEFOREHAND)
BACKENDS = ("native", "triton")
ALPHA, BETA, TEMPERATURE = 1.0, 2.0, 2.0  # tnkd_loss's defaults, stated for the mask-trick form


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


def align_corners(x: Inputs) -> bool:
    """lowres: 129 columns over 512 are cells of four with a border, as align_corners has them."""
    return _given(x.student_logits).shape[-1] % 2 == 1


def upsampled(x: Inputs) -> tuple[Tensor, Tensor]:
    """lowres: both logits at the labels' size."""
    size, align = _given(x.target).shape[1:], align_corners(x)
    student, teacher = (
        F.interpolate(_given(logits).float(), size=size, mode="bilinear", align_corners=align)
        for logits in (x.student_logits, x.teacher_logits)
    )
    return student, teacher


def tnkd_and_ce(student: Tensor, teacher: Tensor, target: Tensor, align: bool, backend: str) -> Tensor:
    return dsct_loss(
        student,
        teacher,
        target,
        matched_weight=0.0,
        jaccard_weight=0.0,
        tnkd_weight=1.0,
        alpha=ALPHA,
        beta=BETA,
        temperature=TEMPERATURE,
        ignore_index=IGNORE_INDEX,
        align_corners=align,
        backend=backend,
    ).total


def beforehand(x: Inputs) -> Tensor:
    """The native kernel on logits that F.interpolate has made as large as the labels."""
    return tnkd_and_ce(*upsampled(x), _given(x.target), False, "native")


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
            backend=backend,
        ).total

    def jaccard(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        return jaccard_loss(student, teacher, x.target, ignore_index=IGNORE_INDEX, backend=backend)

    def lowres(x: Inputs) -> Tensor:
        student, teacher, target = _given(x.student_logits), _given(x.teacher_logits), _given(x.target)
        return tnkd_and_ce(student, teacher, target, align_corners(x), backend)

    losses = {"tnkd": tnkd, "cafd": cafd, "matched": matched, "jaccard": jaccard, "dsct": dsct, "lowres": lowres}
    return losses[loss]


def reference_loss(loss: str) -> Loss:
    """The baseline: the bare reference, without the public function's checks.

    For dsct F.cross_entropy plus the reference losses, as a training loop would add them up.
    """

    def tnkd(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        mean, with_ce = 1, False
        return tnkd_reference(
            student, teacher, x.target, None, 0.0, ALPHA, BETA, TEMPERATURE, IGNORE_INDEX, mean, with_ce
        )[0]

    def cafd(x: Inputs) -> Tensor:
        return cafd_reference(_given(x.student_features), _given(x.teacher_features), 1.0, 1.0, 1)

    def matched(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        mask = (_given(x.target) != IGNORE_INDEX).unsqueeze(1)
        return matched_reference(student, teacher, mask, 1.0, 4.0, 1)

    def jaccard(x: Inputs) -> Tensor:
        student, teacher = _given(x.student_logits), _given(x.teacher_logits)
        acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        share = labelled(_given(x.target), IGNORE_INDEX, list(student.shape[2:]), acc)
        return jaccard_reference(student, teacher, share, 1.0)

    def dsct(x: Inputs) -> Tensor:
        ce = F.cross_entropy(_given(x.student_logits), _given(x.target), ignore_index=IGNORE_INDEX)
        total = ce + 3 * matched(x) + 3 * jaccard(x)
        return total if x.student_features is None else total + cafd(x)

    def lowres(x: Inputs) -> Tensor:
        student, teacher = upsampled(x)
        ce = F.cross_entropy(student, _given(x.target), ignore_index=IGNORE_INDEX)
        settings = (None, 0.0, ALPHA, BETA, TEMPERATURE, IGNORE_INDEX, 1, False)
        return ce + tnkd_reference(student, teacher, x.target, *settings)[0]

    losses = {"tnkd": tnkd, "cafd": cafd, "matched": matched, "jaccard": jaccard, "dsct": dsct, "lowres": lowres}
    return losses[loss]


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
    if BEFOREHAND in baselines and loss == "lowres":
        candidates[BEFOREHAND] = beforehand
    candidates.update({backend: backend_loss(loss, backend) for backend in backends})
    return candidates


def auto_backend(loss: str, inputs: Inputs) -> str:
    """The backend that `backend="auto"` stands for with these inputs."""
    from dsct_kernels import backends

    folder = {"matched": "cafd", "dsct": "tnkd", "lowres": "tnkd"}.get(loss, loss)
    prefix = "matched_" if loss == "matched" else ""
    reference, native = (
        importlib.import_module(f"dsct_kernels.{folder}.{name}") for name in ("reference", f"{prefix}native")
    )
    triton = None if loss in ("matched", "jaccard") else importlib.import_module(f"dsct_kernels.{folder}.triton")
    tensors = [
        x
        for x in (inputs.student_logits, inputs.teacher_logits, inputs.student_features, inputs.teacher_features)
        if x is not None
    ]
    return (
        backends.choose("auto", reference, native, triton, *tensors)
        .__name__.rsplit(".", 1)[-1]
        .removeprefix("matched_")
    )
