"""Losses of our own that were tried against the published ones; `docs/results.md` says how each fared.

All read logits at their own resolution (N, K, h, w). i runs over positions, c over classes; the teacher is a constant.
"""

import torch
import torch.nn.functional as F

from dsct_kernels import tnkd_loss
from dsct_kernels.cafd.reference import channel_weights

from .rivals import IGNORE, at_labels, same_size, shares


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def over_positions(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta_in: float = 1.0,
    beta_out: float = 1.0,
    temperature: float = 4.0,
    weights: str = "flat",
    rows: str = "logits",
) -> torch.Tensor:
    """TNKD with positions in the part of classes: for class c its labelled positions are the target.

    P_c = softmax over positions of a row; b_c its mass where the label is c; per class and sample
    alpha KL(Bern(b^T) || Bern(b^S)) + beta_in KL(in^T || in^S) + beta_out KL(out^T || out^S), the mean over classes.
    A cell that the labels split has that share of its mass on each side; ignored pixels have none.
    rows: "logits", or "log_probabilities" (log_softmax over classes first).
    weights: "flat", "cafd" (the teacher's channel weights), "present" (classes whose labels are in the sample).
    """
    one_of("weights", weights, ("flat", "cafd", "present"))
    one_of("rows", rows, ("logits", "log_probabilities"))
    s, t = same_size(student, teacher)
    if rows == "log_probabilities":
        s, t = s.log_softmax(1), t.log_softmax(1)
    inside = shares(target, s.shape[1], (s.shape[-2], s.shape[-1]))
    outside = inside.sum(1, keepdim=True) - inside
    parts = []
    for share in (inside, outside):
        log_share = share.flatten(2).clamp(min=1e-12).log()
        some = share.flatten(2) > 0
        rows_s = (s.flatten(2) / temperature + log_share).masked_fill(~some, -1e30)
        rows_t = (t.flatten(2) / temperature + log_share).masked_fill(~some, -1e30)
        any_ = some.any(-1)
        mass_s, mass_t = rows_s.logsumexp(-1), rows_t.logsumexp(-1)
        log_s, log_t = rows_s - mass_s[..., None], rows_t - mass_t[..., None]
        kl = (log_t.exp() * (log_t - log_s) * some).sum(-1) * any_
        parts.append((kl, mass_s, mass_t, any_))
    (kl_in, in_s, in_t, has_in), (kl_out, out_s, out_t, has_out) = parts
    both = has_in & has_out
    u_s, u_t = torch.where(both, in_s - out_s, 0), torch.where(both, in_t - out_t, 0)
    tc = u_t.sigmoid() * (F.logsigmoid(u_t) - F.logsigmoid(u_s)) + (-u_t).sigmoid() * (
        F.logsigmoid(-u_t) - F.logsigmoid(-u_s)
    )
    per_class = alpha * tc + beta_in * kl_in + beta_out * kl_out
    if weights == "cafd":
        w = channel_weights(t.abs().mean((2, 3)), 1.0)
    elif weights == "present":
        w = has_in.float() / has_in.sum(1, keepdim=True).clamp(min=1)
    else:
        w = torch.full_like(per_class, 1 / per_class.shape[1])
    return temperature**2 * (w * per_class).sum(1).mean()


def rows_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 4.0,
    rows: str = "log_probabilities",
    over: str = "sample",
    weights: str = "flat",
    power: float = 0.5,
) -> torch.Tensor:
    """CWD with other rows: log-probabilities instead of logits ("log_probabilities"), or rows standardised over
    positions ("standard"); distributions over the whole batch's positions (over="batch"); classes weighted by the
    teacher's mean probability to a power (weights="mass")."""
    one_of("rows", rows, ("logits", "log_probabilities", "standard"))
    one_of("over", over, ("sample", "batch"))
    one_of("weights", weights, ("flat", "mass"))
    s, t = same_size(student, teacher)
    p = t.softmax(1)
    if rows == "log_probabilities":
        s, t = s.log_softmax(1), t.log_softmax(1)
    s, t = s.flatten(2), t.flatten(2)
    if rows == "standard":
        s, t = ((m - m.mean(-1, keepdim=True)) / m.std(-1, keepdim=True).clamp(min=1e-3) for m in (s, t))
    mass = p.flatten(2).mean(-1)
    if over == "batch":
        s, t = (m.movedim(1, 0).flatten(1)[None] for m in (s, t))
        mass = mass.mean(0, keepdim=True)
    log_s, log_t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    w = torch.ones_like(kl) if weights == "flat" else mass**power
    return temperature**2 * (w / w.sum(1, keepdim=True) * kl).sum(1).mean()


def balanced_kd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    frequency: torch.Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    power: float = 0.5,
    confidence: float = 0.0,
) -> torch.Tensor:
    """TNKD per pixel at the labels' resolution, its mean weighted by the label's class, 1 / frequency^power, and by the
    teacher's probability of the label to the power `confidence`."""
    valid = target != IGNORE
    y = torch.where(valid, target, 0).long()[:, None]
    z_s, z_t = at_labels(student, target) / temperature, at_labels(teacher, target) / temperature
    log_s, log_t = z_s.log_softmax(1), z_t.log_softmax(1)
    hot = torch.zeros_like(z_s, dtype=torch.bool).scatter_(1, y, True)
    (own_s, own_t) = (z.gather(1, y)[:, 0] for z in (log_s, log_t))
    rest_s, rest_t = (z.masked_fill(hot, -1e30).logsumexp(1) for z in (log_s, log_t))
    tc = own_t.exp() * (own_t - own_s) + rest_t.exp() * (rest_t - rest_s)
    q_s, q_t = log_s - rest_s[:, None], log_t - rest_t[:, None]
    nc = (q_t.exp() * (q_t - q_s)).masked_fill(hot, 0).sum(1)
    w = frequency.clamp(min=1e-6).pow(-power)[y[:, 0]] * valid
    if confidence:
        w = w * own_t.exp() ** confidence
    return temperature**2 * (w * (alpha * tc + beta * nc)).sum() / w.sum().clamp(min=1e-6)


def affinity(
    student: list[torch.Tensor], teacher: list[torch.Tensor], *, temperature: float = 0.2, attention: float = 0.0
) -> torch.Tensor:
    """Features whose channels do not correspond, compared by what resembles what: for each position i the distribution
    softmax_j(cos(F_i, F_j) / tau) over positions, channels standardised first; KL(teacher || student), the mean over i
    (attention=0) or weighted by the teacher's attention map (attention=1)."""
    from dsct_kernels import channel_attention_map

    total = torch.zeros((), device=student[0].device)
    for pair in zip(student, teacher, strict=True):
        rows = []
        s, t = same_size(*pair)
        for m in (s, t):
            x = m.flatten(2)
            x = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True).clamp(min=1e-3)
            x = F.normalize(x, dim=1)
            rows.append((x.transpose(1, 2) @ x / temperature).log_softmax(-1))
        log_s, log_t = rows
        kl = (log_t.exp() * (log_t - log_s)).sum(-1)
        a = channel_attention_map(t).flatten(1) if attention else torch.full_like(kl, 1 / kl.shape[1])
        total = total + (a * kl).sum(1).mean()
    return total / len(student)


def centred(
    student: torch.Tensor, teacher: torch.Tensor, *, positions: float = 1.0, classes: float = 0.0, softness: float = 1.0
) -> torch.Tensor:
    """Half the mean square of the difference of the logits, less its mean over positions per class (what CWD is as its
    temperature grows), over classes per pixel (what KD is as its temperature grows), or both. softness below 1 weighs
    a position by softmax(teacher row * (1 - softness)) instead of alike."""
    s, t = same_size(student, teacher)
    d = (s - t).flatten(2)
    w = (t.flatten(2) * (1 - softness)).softmax(-1)
    if classes:
        d = d - d.mean(1, keepdim=True)
    if positions:
        d = d - (w * d).sum(-1, keepdim=True)
    return 0.5 * (w * d.square()).sum(-1).mean()


def local(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 4.0,
    windows: float = 4.0,
    mass: float = 0.0,
    between: float = 0.0,
) -> torch.Tensor:
    """CWD decoupled by windows x windows squares of the map: the divergence within each, and `between` times that of
    the squares' masses. Squares weigh alike (mass=0) or as much as the teacher's row has in them (mass=1); mass=1 and
    between=1 is CWD itself."""
    s, t = same_size(student, teacher)
    g = int(windows)
    if s.shape[-2] % g or s.shape[-1] % g:
        raise ValueError(f"windows: expected a divisor of the map's {s.shape[-2]} x {s.shape[-1]}, got {windows}")
    rows_s, rows_t = (
        m.unflatten(2, (g, -1)).unflatten(4, (g, -1)).transpose(3, 4).flatten(4).flatten(2, 3) / temperature
        for m in (s, t)
    )
    log_s, log_t = rows_s.log_softmax(-1), rows_t.log_softmax(-1)
    within = (log_t.exp() * (log_t - log_s)).sum(-1)  # (N, K, squares)
    b_s, b_t = rows_s.logsumexp(-1).log_softmax(-1), rows_t.logsumexp(-1).log_softmax(-1)
    weight = b_t.exp() if mass else torch.full_like(b_t, 1 / g**2)
    kl = (weight * within).sum(-1) + between * (b_t.exp() * (b_t - b_s)).sum(-1)
    return temperature**2 * kl.mean()


def regress(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    frequency: torch.Tensor,
    *,
    fix: float = 0.0,
    agree: float = 0.0,
    balance: float = 0.0,
    centre: str = "positions",
    common: float = 1.0,
) -> torch.Tensor:
    """Half the mean square of the logits' difference, centred over the labelled positions per class ("positions"), over
    classes per position ("classes"), both ("both") or not at all ("no"). fix: where the teacher's logit of the label is
    not above all others by so much, it is raised until it is. agree=1: only where the teacher says the label. balance:
    positions weigh 1 / frequency^balance of their label. common: weight of what all classes share at a position,
    the mean over classes, which a softmax over classes cannot see."""
    one_of("centre", centre, ("positions", "classes", "both", "no"))
    s, t = same_size(student, teacher)
    share = shares(target, s.shape[1], (s.shape[-2], s.shape[-1]))
    most, y = share.max(1, keepdim=True)
    known = (share.sum(1) > 0.5).float()
    if fix:
        others = t.scatter(1, y, -1e30).amax(1, keepdim=True)
        own = t.gather(1, y)
        sure = (most > 0.5) & (own < others + fix)
        t = t.scatter(1, y, torch.where(sure, others + fix, own))
    w = known * frequency.clamp(min=1e-6).pow(-balance)[y[:, 0]]
    if agree:
        w = w * (t.argmax(1) == y[:, 0])
    w = (w / w.mean((1, 2), keepdim=True).clamp(min=1e-6))[:, None] / w[0].numel()
    d = s - t
    if centre in ("classes", "both"):
        d = d - d.mean(1, keepdim=True)
    if common != 1:
        d = d + (common**0.5 - 1) * d.mean(1, keepdim=True)
    if centre in ("positions", "both"):
        d = d - (w * d).sum((2, 3), keepdim=True)
    return 0.5 * (w * d.square()).sum((2, 3)).mean()


def aligned(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    backend: str = "auto",
) -> torch.Tensor:
    """TNKD per pixel of a student whose classes are shifted, each by one number per sample, to the teacher's mean over
    the labelled cells: how much of a class the crop has is left to the cross-entropy, where it is is taught."""
    s, t = same_size(student, teacher)
    w = shares(target, s.shape[1], (s.shape[-2], s.shape[-1])).sum(1, keepdim=True)
    w = w / w.sum((2, 3), keepdim=True).clamp(min=1e-6)
    s = s - (w * (s - t)).sum((2, 3), keepdim=True)
    return tnkd_loss(
        s, t, target, alpha=alpha, beta=beta, temperature=temperature, ignore_index=IGNORE, backend=backend
    )
