"""The Triton kernels of the soft Jaccard loss: the error rule, tiles of every kind, every edge.

On CPU under Triton's interpreter, on `cuda` where there is a GPU. Shapes are tiny: the interpreter takes a tenth of a
second a call. The formula itself is tested in test_jaccard.py.
"""

import pytest
import torch
from torch import Tensor

from dsct_kernels import jaccard_loss
from dsct_kernels.jaccard import triton
from dsct_kernels.tnkd.plan import MOST_CLASSES, Config
from tests.conftest import DEVICES
from tests.helpers import LAYOUTS, pairs, strided_copy
from tests.jaccard.test_jaccard import by_hand, compare, labels, logits, run

WHY_NOT = triton.why_not(torch.zeros(1, device=DEVICES[-1]))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def both(device: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    student, teacher = (logits(*shape, dtype=dtype, scale=scale, seed=seed) for seed in (0, 2))
    return student.to(device), teacher.to(device)


def tau(number: float = 1.5) -> Tensor:
    return torch.tensor([number], dtype=torch.float64)


SHAPES = [(2, 6, 5, 7), (1, 19, 3, 3), (7, 3), (2, 2, 2, 3, 2), (1, 40, 2, 2)]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "labelled", "temperature"),
    pairs(SHAPES, FLOATS, LAYOUTS, (False, True), (0.5, 2.0)),
    ids=str,
)
def test_the_error_rule(device, shape, dtype, layout, labelled, temperature):
    student, teacher = both(device, *shape, dtype=dtype)
    target = labels(shape[0], *shape[2:], classes=2).to(device) if labelled else None
    compare(student, teacher, target, layout, temperature, "triton")


def test_magnitudes_mixed_dtypes_and_equal_networks(device):
    student, teacher = both(device, 2, 6, 4, 5, scale=5e3)
    compare(student, teacher.half(), labels(2, 4, 5).to(device), temperature=0.01, backend="triton")
    student, teacher = both(device, 2, 6, 4, 5)
    compare(strided_copy(student, "channels_last"), teacher.bfloat16(), None, backend="triton")
    many = both(device, 2, 2, 2, 2, 2, 2)  # of which no two dimensions merge: copied
    compare(*many, labels(2, 2, 2, 2, 2, classes=2).to(device), "sliced", backend="triton")
    for layout in LAYOUTS[:2]:
        loss, grad = run(strided_copy(student, layout), student, backend="triton", temperature=1.7)
        assert loss == 0 and not grad.any()


# Tiles that end within and after the pixels and the classes, walked in one step and in several.
@pytest.mark.parametrize("config", [Config(16, 2, 1), Config(2, 8, 1), Config(64, 1, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_every_launch_gives_the_same_numbers_and_the_same_bits_twice(device, config, layout):
    """Also with the temperature read by the kernels."""
    student, teacher = (strided_copy(x, layout) for x in both(device, 2, 5, 3, 7))
    share = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)).to(device)
    share[0, 1] = 0
    results = []
    for by_pointer in (False, True):
        at = tau().to(device)
        loss, coefficients = triton.forward(student, teacher, share, at, config, by_pointer)
        grad = triton.backward(student, teacher, share, at, coefficients, config, by_pointer)
        results.append((loss, coefficients, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    want = by_hand(student.cpu(), teacher.cpu(), share.cpu(), 1.5)
    for got, truth in zip((loss, grad), want):
        torch.testing.assert_close(got.double().cpu(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cells_that_do_not_count_contribute_exactly_nothing(device, layout):
    student, teacher = both(device, 2, 6, 3, 6)
    target = labels(2, 3, 6).to(device)
    ignored = (target == 255).unsqueeze(1)
    want = run(student, teacher, target, "triton")
    for garbage in (NAN, INF, -INF):
        dirty = [strided_copy(torch.where(ignored, garbage, x), layout) for x in (student, teacher)]
        got = run(*dirty, target, "triton")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
        assert not got[1].masked_select(ignored).any()
    leaf = dirty[0].detach().requires_grad_()
    loss = jaccard_loss(leaf, dirty[1], target, backend="triton")
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, NAN))
    assert not grad.masked_select(ignored).any() and grad.masked_select(~ignored).isnan().all()


def test_nan_inf_and_absent_classes(device):
    student, teacher = both(device, 1, 3, 3, 4)
    student[:, 1], teacher[:, 1] = -INF, -INF
    student[0, 0, 0, :2] = -INF
    got = run(student, teacher, backend="triton")
    for a, b in zip(got, by_hand(student.cpu(), teacher.cpu()), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-7)
    for which, garbage in ((0, NAN), (1, INF), (0, -INF)):  # the last: every class, no distribution
        pair = [student.clone(), teacher.clone()]
        pair[which][0, :, 2, 3] = garbage
        assert run(*pair, backend="triton")[0].isnan()
    unseen = [x - torch.tensor([0, 0, 200.0], device=device).view(3, 1, 1) for x in both(device, 1, 3, 3, 4)]
    unseen[0][0, 2, 0, 0] = NAN
    assert run(*unseen, backend="triton")[0].isnan(), "in a class that does not count"


def test_nothing_that_counts(device):
    for shape in ((2, 6, 3, 4), (0, 6, 3, 4)):
        student = torch.full(shape, NAN, device=device)
        loss, grad = run(student, student, torch.full((shape[0], 3, 4), 255, device=device), "triton")
        assert loss == 0 and not grad.any() and grad.shape == shape
    one = torch.zeros(1, 3, 1, 1, device=device)  # no class has half a cell
    assert run(one, one + torch.arange(3, device=device).view(3, 1, 1) * 0.1, backend="triton")[0] == 0


def test_more_classes_than_registers_hold_are_the_references(device):
    x = torch.zeros(1, MOST_CLASSES + 1, device=device)
    with pytest.raises(RuntimeError, match="holds every class of a pixel in registers, 1024 at most, got 1025"):
        jaccard_loss(x, x, backend="triton")
    if device == "cuda":
        assert jaccard_loss(x, x) == 0


@pytest.mark.parametrize("bad", [NAN, INF, -1.0, 0.0])
def test_a_temperature_that_nobody_could_refuse_makes_the_loss_nan(device, bad):
    student, teacher = both(device, 2, 3, 2, 2)
    assert triton.forward(student, teacher, None, tau(bad).to(device), None, True)[0].isnan()


def test_halves_keep_their_digits_and_everything_is_written(device):
    """Small gradients, multiplied by a GradScaler's factor before they are rounded; and memory that torch.empty hands
    out is filled with NaN here, so that what a kernel forgets to write shows."""
    student, teacher = both(device, 1, 3, 24, 24, dtype=torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        leaf = student.detach().requires_grad_()
        (got,) = torch.autograd.grad(jaccard_loss(leaf, teacher, backend="triton") * 2.0**16, leaf)
    finally:
        torch.use_deterministic_algorithms(False)
    truth = run(student.double(), teacher.double(), backend="reference")[1] * 2.0**16
    assert (got.double() - truth).norm() / truth.norm() < 2**-11


def test_opcheck(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.dsct_kernels
    student, teacher = both(device, 2, 3, 2, 3)
    share = torch.rand(2, 2, 3).to(device)
    leaf = strided_copy(student, "channels_last").requires_grad_()
    torch.library.opcheck(ops.jaccard_triton.default, (leaf, teacher, share, tau()), test_utils=checks)
    coefficients = ops.jaccard_triton(student, teacher, None, tau())[1]
    backward = (student, teacher, None, tau(), coefficients)
    torch.library.opcheck(ops.jaccard_backward_triton.default, backward, test_utils=checks)
