"""The gradient of upsampling that adds in a fixed order: what a GPU runs, here on the CPU as well."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import tnkd_loss
from dsct_kernels.tnkd import upsample
from tests.conftest import DEVICES
from tests.oracle import assert_as_good_as_reference, relative_error

INF = float("inf")
devices = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)


def fixed_order(x, size, align_corners=False):
    return upsample.FixedOrder.apply(x, *size, align_corners)


def problem(small, size, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=torch.float64, device=device).to(dtype).requires_grad_()
    return x, torch.randn(2, 3, *size, dtype=torch.float64, device=device).to(dtype)


@devices
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_size_has_the_values_and_the_gradient_of_interpolate(device, data):
    """Every output that an input has a part in is among its taps, whatever the ratio and the border."""
    small = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), label="size")
    size = [n + data.draw(st.integers(0, 5 * n), label="more") for n in small]
    for dtype in (torch.float64, torch.float32):  # which round a ratio differently, and with it where a tap begins
        x, g = problem(small, size, dtype, device)
        align = data.draw(st.booleans(), label="align_corners")
        interpolate = lambda x: F.interpolate(x, size=size, mode="bilinear", align_corners=align)  # noqa: B023, E731
        (got,) = torch.autograd.grad(fixed_order(x, size, align), x, g)
        (own,) = torch.autograd.grad(interpolate(x), x, g)
        leaf = x.detach().double().requires_grad_()
        truth_map = interpolate(leaf)
        (truth,) = torch.autograd.grad(truth_map, leaf, g.double())
        walked = x.detach()
        for dim in (-2, -1):
            walked = upsample.lerp(walked, dim, size[dim], align)  # what serves where a logit is not finite
        assert relative_error(walked, truth_map) < (1e-14 if dtype == torch.float64 else 1e-6)
        # own rounds its weights to float32, where ours are taken in float64
        assert relative_error(got, own) < (1e-14 if dtype == torch.float64 else 4e-6)
        assert_as_good_as_reference(got, own, truth, f"{small} to {size}", 1e-6 if dtype == torch.float32 else 1e-14)


@devices
def test_repeats_bit_for_bit(device):
    """Through the public loss: on a GPU interpolate's own gradient is not the same twice."""
    x, _ = problem((64, 48), (256, 200), torch.float32, device)
    target = torch.randint(0, 3, (2, 256, 200), device=device)
    first, *others = (torch.autograd.grad(tnkd_loss(x, x.flip(0), target), x)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_every_derivative_there_is():
    x, _ = problem((3, 4), (7, 8))
    assert torch.autograd.gradcheck(lambda x: fixed_order(x, (7, 8)), x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fixed_order(x, (7, 8)), x)
    total = lambda x: fixed_order(x, (7, 8)).square().sum()  # noqa: E731
    x = x.detach()
    each = torch.func.vmap(torch.func.grad(total))(x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(each, torch.func.grad(total)(x))


def test_compiles_once_for_all_sizes():
    x, _ = problem((3, 4), (7, 8))
    frames = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    total = lambda x, y: tnkd_loss(x, x.flip(0) * 2, y, align_corners=True)  # noqa: E731
    compiled = torch.compile(total, fullgraph=True, backend=frames, dynamic=True)
    for small, size in [((3, 4), (7, 8)), ((5, 6), (9, 24)), ((8, 5), (31, 17)), ((4, 4), (64, 5)), ((9, 7), (10, 70))]:
        x, _ = problem(small, size)
        y = torch.randint(0, 3, (2, *size))
        grads = [torch.autograd.grad(run(x, y), x)[0] for run in (compiled, total)]
        torch.testing.assert_close(*grads)
    assert frames.frame_count <= 2


CERTAIN = torch.tensor([3.0, -INF, -INF, -INF])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "small,size", [((1, 1), (2, 2)), ((2, 1), (5, 3)), ((3, 4), (3, 9)), ((2, 2), (7, 8))], ids=str
)
def test_a_class_absent_everywhere_stays_absent_when_upsampled(device, backend, align_corners, small, size):
    logits = CERTAIN.view(1, 4, 1, 1).expand(1, 4, *small).contiguous().to(device).requires_grad_()
    target = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    loss = tnkd_loss(logits, logits.detach(), target, align_corners=align_corners, backend=backend)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_tap_of_weight_0_takes_no_part(align_corners):
    """A row of three cells, the first at -inf: absent in every output that it has a part in, present in the others."""
    row = torch.tensor([-INF, 1.0, 2.0], dtype=torch.float64)
    up = upsample.upsample(row.view(1, 1, 1, 3), [1, 9], align_corners)[0, 0, 0]
    ones = F.interpolate(torch.eye(3).double()[:, None], size=9, mode="linear", align_corners=align_corners)[:, 0]
    assert torch.equal(up == -INF, ones[0] > 0) and not up.isnan().any()
    kept = ones[0] == 0
    assert torch.allclose(up[kept], (ones[1] * 1.0 + ones[2] * 2.0)[kept])


def test_a_nan_that_a_valid_pixel_touches_shows_and_one_that_it_does_not_touch_does_not():
    logits = torch.randn(1, 3, 2, 8)
    logits[0, 1, :, 7] = float("nan")
    target = torch.zeros(1, 4, 16, dtype=torch.long)
    assert tnkd_loss(logits, logits.flip(1).nan_to_num(), target).isnan()
    target[..., 12:] = 255
    leaf = logits.clone().requires_grad_()
    loss = tnkd_loss(leaf, logits.flip(1).nan_to_num(), target)
    loss.backward()
    assert loss.isfinite() and leaf.grad[..., :7].isfinite().all() and not leaf.grad[..., 7].any()
