"""What DSCT is compared with: published distillation losses in plain PyTorch, each as its paper states it.

Every function takes student logits or features and the teacher's, and returns one number, the mean over the batch.
Where a loss is published on the logits' own resolution, it is computed there.
"""

import torch
import torch.nn.functional as F

IGNORE = 255


def at_labels(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Logits (N, K, h, w) at the resolution of the labels (N, H, W): (N, K, H, W)."""
    if logits.shape[-2:] == target.shape[-2:]:
        return logits.float()
    return F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)


def same_size(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps (N, C, h, w) at the smaller height and the smaller width of the two, by averages over cells."""
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return tuple(
        m.float() if m.shape[-2:] == size else F.adaptive_avg_pool2d(m.float(), size) for m in (student, teacher)
    )  # type: ignore[return-value]


def shares(target: torch.Tensor, classes: int, size: tuple[int, int]) -> torch.Tensor:
    """(N, K, h, w): how much of each cell the labels (N, H, W) give to each class; ignored pixels give to none."""
    known = torch.where(target == IGNORE, classes, target).long()
    one_hot = F.one_hot(known, classes + 1)[..., :classes].movedim(-1, 1).float()
    return F.adaptive_avg_pool2d(one_hot, size)


def kd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Hinton et al. 2015 (arXiv 1503.02531) at every pixel: tau^2 KL(softmax(z^T / tau) || softmax(z^S / tau))."""
    log_s = F.log_softmax(at_labels(student, target) / temperature, 1)
    log_t = F.log_softmax(at_labels(teacher, target) / temperature, 1)
    per_pixel = (log_t.exp() * (log_t - log_s)).sum(1)
    valid = target != IGNORE
    return temperature**2 * (per_pixel * valid).sum() / valid.sum().clamp(min=1)


def dkd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> torch.Tensor:
    """Zhao et al. 2022 (arXiv 2203.08679) per pixel, with the authors' own mask: logits - 1000 at the target."""
    valid = target != IGNORE
    mask = F.one_hot(torch.where(valid, target, 0).long(), student.shape[1]).movedim(-1, 1).float()
    z_s, z_t = at_labels(student, target) / temperature, at_labels(teacher, target) / temperature
    b_s, b_t = ((z.softmax(1) * mask).sum(1) for z in (z_s, z_t))
    pairs = ((b_t, b_s), (1 - b_t, 1 - b_s))
    tckd = sum(t * (t.clamp(min=1e-12).log() - s.clamp(min=1e-12).log()) for t, s in pairs)
    log_s, log_t = ((z - 1000 * mask).log_softmax(1) for z in (z_s, z_t))
    nckd = (log_t.exp() * (log_t - log_s)).sum(1)
    per_pixel = alpha * tckd + beta * nckd
    return temperature**2 * (per_pixel * valid).sum() / valid.sum().clamp(min=1)


def cwd(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 4.0) -> torch.Tensor:
    """Shu et al. 2021 (arXiv 2011.13256): (tau^2 / C) sum_c KL(phi(z^T_c) || phi(z^S_c)), phi a softmax over positions.

    On logits or on features, at the maps' own resolution. Student and teacher must have the same channels: for features
    the paper puts a learnt 1 x 1 convolution after the student's.
    """
    s, t = (m.flatten(2) / temperature for m in same_size(student, teacher))
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def at(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Zagoruyko & Komodakis 2017 (arXiv 1612.03928): the mean over positions of (Q^S / |Q^S| - Q^T / |Q^T|)^2, where
    Q = sum_c F_c^2 as a vector, summed over stages. The authors' code halves its weight beta (1000) and adds it.
    """
    total = torch.zeros((), device=student[0].device)
    for pair in zip(student, teacher, strict=True):
        q_s, q_t = (F.normalize(m.square().sum(1).flatten(1), dim=1) for m in same_size(*pair))
        total = total + (q_s - q_t).square().mean()
    return total


def uniform(student: list[torch.Tensor], *, epsilon: float = 1e-6) -> torch.Tensor:
    """CAFD against a flat map, a control without a teacher: KL(uniform || A^S), the mean over samples and stages."""
    from dsct_kernels import channel_attention_map

    total = torch.zeros((), device=student[0].device)
    for features in student:
        a = channel_attention_map(features).flatten(1)
        positions = a.shape[1]
        log_a = ((1 - epsilon) * a + epsilon / positions).log()
        total = total - (log_a.mean(1) + torch.tensor(float(positions)).log()).mean()
    return total / len(student)


def jaccard_labels(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2023 (arXiv 2302.05666), JML1 against the labels, a control without a teacher: 1 - IoU per class over
    the batch, IoU = (s - d) / (s + d), s = sum_i (p_i + y_i), d = sum_i |p_i - y_i|, y the labels' shares of a cell;
    the mean over the classes that are labelled in more than half a cell."""
    y = shares(target, student.shape[1], (student.shape[-2], student.shape[-1]))
    p = student.float().softmax(1) * y.sum(1, keepdim=True)
    both, apart = (p + y).sum((0, 2, 3)), (p - y).abs().sum((0, 2, 3))
    there = y.sum((0, 2, 3)) > 0.5
    return ((1 - (both - apart) / (both + apart).clamp(min=1e-6)) * there).sum() / there.sum().clamp(min=1)
