"""The gradient of upsampling that adds in a fixed order: what a GPU runs, here on the CPU as well."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsct_kernels import tnkd_loss
from dsct_kernels.tnkd import upsample
from tests.conftest import DEVICES
from tests.helpers import assert_as_good_as_reference, relative_error

devices = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)


def fixed_order(x, size, function=upsample.FixedOrderBothModes):
    return function.apply(x, *size)


def problem(small, size, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=torch.float64, device=device).to(dtype).requires_grad_()
    return x, torch.randn(2, 3, *size, dtype=torch.float64, device=device).to(dtype)


@devices
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_size_has_the_gradient_of_interpolate(device, data):
    """Every output that an input has a part in is among its taps, whatever the ratio and the border."""
    small = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), label="size")
    size = [n + data.draw(st.integers(0, 5 * n), label="more") for n in small]
    for dtype in (torch.float64, torch.float32):  # which round a ratio differently, and with it where a tap begins
        x, g = problem(small, size, dtype, device)
        (got,) = torch.autograd.grad(fixed_order(x, size), x, g)
        (own,) = torch.autograd.grad(upsample.bilinear(x, *size), x, g)
        leaf = x.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(upsample.bilinear(leaf, *size), leaf, g.double())
        assert relative_error(got, own) < (1e-14 if dtype == torch.float64 else 1e-6)
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    total = lambda x, size: fixed_order(x, size, upsample.FixedOrder).square().sum()  # noqa: E731
    compiled = torch.compile(total, fullgraph=True, dynamic=dynamic)
    for small, size in [((3, 4), (7, 8)), ((5, 6), (9, 24))][: 1 + dynamic]:
        x, _ = problem(small, size)
        grads = [torch.autograd.grad(run(x, size), x)[0] for run in (compiled, total)]
        torch.testing.assert_close(*grads)
