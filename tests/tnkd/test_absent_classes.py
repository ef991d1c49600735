"""Classes at -inf, alone or all of them, in either network: loss and gradient against the closed form of the
specification, and what is no number (NaN, +inf) is never hidden by them. Every backend; on the CPU every instruction
set (tests/test_instruction_sets.py)."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsct_kernels import dsct_loss, tnkd_loss
from tests.helpers import pairs, skip_unless_tnkd_serves, strided_copy

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def network(z: list[float], y: int) -> tuple[float, float, list[float]]:
    """b, 1 - b and q (0 at the target; all 0 where every other class is absent) of one pixel, of logits / tau."""
    others = [0.0 if j == y or x == -INF else math.exp(x) for j, x in enumerate(z)]
    target, rest = 0.0 if z[y] == -INF else math.exp(z[y]), sum(others)
    if rest == 0:
        return 1.0, 0.0, others
    return target / (target + rest), rest / (target + rest), [x / rest for x in others]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(0.0 if a == 0 else INF if b == 0 else a * math.log(a / b) for a, b in zip(p, q))


def closed_form(
    student: list[float], teacher: list[float], y: int, alpha: float, beta: float, tau: float, ce_weight: float
) -> tuple[float, list[float]]:
    """Loss and gradient of one pixel. Nothing is to be learned about the other classes from a teacher that has none,
    nor where there is only one of them."""
    b_s, not_s, q_s = network([x / tau for x in student], y)
    b_t, not_t, q_t = network([x / tau for x in teacher], y)
    if sum(q_t) == 0 or len(student) == 2:
        beta = 0.0
    loss = 0.0
    if alpha:
        loss += tau**2 * alpha * divergence([b_t, not_t], [b_s, not_s])
    if beta:
        loss += tau**2 * beta * divergence(q_t, q_s)
    pull = alpha * (b_s - b_t)
    grad = [tau * ((beta - pull) * a - beta * b) for a, b in zip(q_s, q_t)]
    grad[y] = tau * pull
    if ce_weight:
        p, not_p, q_p = network(student, y)
        loss += ce_weight * (INF if p == 0 else -math.log(p))
        grad = [g + ce_weight * not_p * q for g, q in zip(grad, q_p)]
        grad[y] -= ce_weight * not_p
    return loss, grad


def rows(classes: int) -> Iterator[tuple[list[float], bool]]:
    """Logits of one pixel whose label is class 1, and whether any class is there."""
    some = [0.75, 1.5, -0.5, 1.25, 0.25] + [math.sin(j) * 1.5 for j in range(5, classes)]
    some = [round(x * 64) / 64 for x in some[:classes]]  # as float16 and bfloat16 have them
    for target, absent in itertools.product((some[1], -INF), ("none", "one", "but one", "all")):
        row = list(some)
        others = [j for j in range(classes) if j != 1]
        for j in {"none": [], "one": others[:1], "but one": others[1:], "all": others}[absent]:
            row[j] = -INF
        row[1] = target
        yield row, any(x != -INF for x in row)


def batch(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of such rows, as (2, K, P, 3), the teacher's turned a little: no two logits agree by chance."""
    pairs = [
        (s, [x + 0.25 * (j % 3) for j, x in enumerate(t)])
        for (s, alive), (t, _) in itertools.product(rows(classes), rows(classes))
        if alive  # a student without any class has no gradient that anyone could use
    ]
    pairs += pairs[: -len(pairs) % 6]
    student, teacher = (
        torch.tensor([pair[i] for pair in pairs], dtype=dtype).view(2, -1, 3, classes).movedim(3, 1) for i in (0, 1)
    )
    return student.contiguous(), teacher.contiguous(), torch.ones(2, len(pairs) // 6, 3, dtype=torch.uint8)


def slow(backend: str, logits: Tensor) -> bool:
    """Triton's interpreter: what is a choice of the kernel is tested, what only repeats is not."""
    return backend == "triton" and logits.device.type == "cpu"


def check(
    student: Tensor, teacher: Tensor, target: Tensor, labelled: bool, backend: str, layout: str, tau: float,
    alpha: float, beta: float, ce_weight: float,
) -> None:  # fmt: skip
    """Loss and gradient of every pixel, mean and sum: the gradient is that of the pixels, scaled."""
    dtype, pixels = student.dtype, target.numel()
    label = target if labelled else teacher.argmax(1)
    truth = [
        closed_form(s, t, int(y), alpha, beta, tau, ce_weight)
        for s, t, y in zip(
            student.movedim(1, -1).reshape(pixels, -1).tolist(),
            teacher.movedim(1, -1).reshape(pixels, -1).tolist(),
            label.flatten().tolist(),
        )
    ]
    loss = torch.tensor([x for x, _ in truth], dtype=torch.float64)
    grad = torch.tensor([x for _, x in truth], dtype=torch.float64)

    leaf = strided_copy(student, layout).requires_grad_()
    other = strided_copy(teacher, layout)
    reductions = [("none", 1.0), ("mean", 1 / pixels), ("sum", 1.0)]
    if ce_weight:  # dsct_loss has no map
        reductions = reductions[1:]
    for reduction, scale in reductions[: 1 if slow(backend, student) else 3]:
        keywords = dict(alpha=alpha, beta=beta, temperature=tau, reduction=reduction, backend=backend)
        given = target if labelled else None
        if ce_weight:
            only_these = dict(ce_weight=ce_weight, tnkd_weight=1.0, matched_weight=0.0, jaccard_weight=0.0)
            got = dsct_loss(leaf, other, given, **only_these, **keywords).total
        else:
            got = tnkd_loss(leaf, other, given, **keywords)
        (g,) = torch.autograd.grad(got.sum(), leaf)
        what = f"{dtype} {layout} {reduction} tau={tau} alpha={alpha} beta={beta} ce={ce_weight} labels={labelled}"
        wanted = {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            got.detach().double().flatten().cpu(), wanted.flatten(), rtol=tight, atol=tight * max(1, tau**2),
            msg=lambda m, what=what: f"loss {what}: {m}")  # fmt: skip
        flat = g.double().movedim(1, -1).reshape(pixels, -1).cpu()
        rounding = ROUNDING[dtype]
        torch.testing.assert_close(flat, grad * scale, rtol=rounding, atol=4 * ROUNDING[torch.float32] * tau * scale,
                                   msg=lambda m, what=what: f"gradient {what}: {m}")  # fmt: skip


# 5: planes and rows of a few; 20: chunks; 56: a lane is a class in channels_last; 2: no other class to compare with.
@pytest.mark.parametrize("classes", [2, 3, 5, 20, 56])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_absent_classes_follow_the_closed_form(device, backend, classes, dtype, layout):
    problem = [x.to(device) for x in batch(classes, dtype)]
    skip_unless_tnkd_serves(backend, problem[0])
    if slow(backend, problem[0]) and classes != 5 and (dtype != torch.float32 or layout == "sliced"):
        pytest.skip("every dtype and layout with 5 classes, the other counts in float32")
    taus = (2.0,) if backend == "triton" else (0.5, 1.0, 2.0, 3.0)  # Triton has no path of its own for any tau
    for tau in taus:
        for alpha, beta, ce_weight in ((1.0, 2.0, 0.0), (1.0, 2.0, 0.5)):
            check(*problem, True, backend, layout, tau, alpha, beta, ce_weight)


@pytest.mark.parametrize("classes", [2, 5, 56])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0)])
def test_each_term_alone_follows_the_closed_form(device, backend, classes, layout, weights):
    problem = [x.to(device) for x in batch(classes, torch.float32)]
    check(*problem, True, backend, layout, 2.0, *weights, 0.0)


@pytest.mark.parametrize("classes", [2, 5, 20, 56])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
def test_absent_classes_without_labels_follow_the_closed_form(device, backend, classes, layout, tau):
    """A teacher that has one class only is its own label, and certain of it."""
    problem = [x.to(device) for x in batch(classes, torch.float32)]
    check(*problem, False, backend, layout, tau, 1.0, 2.0, 0.0)


@pytest.mark.parametrize("logits", [([0.5, 1.0], [3.0, -INF]), ([0.5, 1.0, 0.25], [3.0, -INF, -INF])], ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_certain_teacher_only_pulls_at_the_target(device, backend, logits, labelled):
    student, teacher = (torch.tensor([x], device=device) for x in logits)
    student.requires_grad_()
    target = torch.tensor([0], device=device) if labelled else None
    loss = tnkd_loss(student, teacher, target, alpha=0.0, beta=2.0, backend=backend)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()
    student.grad = None
    tnkd_loss(student, teacher, target, backend=backend).backward()
    assert student.grad[0, 0] < 0 and abs(float(student.grad.sum())) < 1e-6  # what the target wins the others lose


@pytest.mark.parametrize(
    "poison,classes,layout,weights",
    pairs(
        (NAN, INF),
        (2, 5, 56),
        ("contiguous", "channels_last"),
        ((1.0, 2.0), (0.0, 2.0), (1.0, 0.0), (0.0, 0.0)),
    ),
    ids=str,
)
def test_no_absent_class_and_no_weight_of_zero_hides_what_is_no_number(
    device, backend, poison, classes, layout, weights
):
    """At the target and beside it, in either network, whatever is absent in the other or around it."""
    student, teacher, target = (x.to(device) for x in batch(classes, torch.float32))
    alpha, beta = weights
    places = list(itertools.product((0, 1), (1, 0)))
    for network, klass in places[1:3] if slow(backend, student) else places:
        both = [student.clone(), teacher.clone()]
        both[network][:, klass] = poison
        both[network][0, :, 0] = both[1 - network][0, :, 0] = 0.5  # one row of pixels where all is well
        s, t = (strided_copy(x, layout) for x in both)
        keywords = dict(alpha=alpha, beta=beta, backend=backend)
        per_pixel = tnkd_loss(s, t, target, reduction="none", **keywords)
        bad = torch.ones_like(target, dtype=torch.bool)
        bad[0, 0] = False
        assert torch.equal(per_pixel.isnan(), bad), (network, klass)
        reductions = ("mean", "sum")[: 1 if slow(backend, student) else 2]
        assert all(tnkd_loss(s, t, target, reduction=r, **keywords).isnan() for r in reductions)
        labels = torch.where(bad, 255, target)  # and where it is ignored nothing of it shows
        assert tnkd_loss(s, t, labels, **keywords).abs() < 1e-6


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_infinity_is_no_certain_teacher_without_labels_either(device, backend, network):
    """The teacher's argmax then is the class at +inf."""
    student, teacher, _ = (x.to(device) for x in batch(5, torch.float32))
    (student if network == "student" else teacher)[1, 2, 3, 1] = INF
    per_pixel = tnkd_loss(student, teacher, reduction="none", backend=backend)
    assert per_pixel[1, 3, 1].isnan() and per_pixel.isnan().sum() == 1
