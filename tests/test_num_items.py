"""num_items: what a mean is divided by in place of the number of valid pixels of the call."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import DSCTLoss, TNKDLoss, backends, dsct_loss, tnkd_loss
from dsct_kernels.dtypes import acc_dtype
from tests.helpers import pairs, skip_unless_tnkd_serves

WEIGHT = torch.tensor([1.0, 0.5, 3.0, 0.0, 2.0])
LOGITS_ALONE: dict[str, Any] = {"matched_weight": 0, "jaccard_weight": 0, "tnkd_weight": 0.7}
KINDS = {
    "int": int,
    "float": float,
    "numpy": np.int64,
    "int tensor": torch.tensor,
    "float tensor": lambda x: torch.tensor(float(x)),
}


def problem(device: str = "cpu", samples: int = 4, small: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Samples with 0%, 30%, 60% and 90% of their pixels ignored."""
    g = torch.Generator().manual_seed(0)
    size = (4, 6) if small else (8, 12)
    student, teacher = (torch.randn(samples, 5, *size, generator=g) for _ in range(2))
    target = torch.randint(0, 5, (samples, 8, 12), generator=g)
    share = torch.arange(samples).view(-1, 1, 1) * 0.3
    target[torch.rand(target.shape, generator=g) < share] = 255
    return student.to(device).requires_grad_(), teacher.to(device), target.to(device)


def objective(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
    return dsct_loss(student, teacher, target, **LOGITS_ALONE, **options).total


@pytest.mark.parametrize("kind,loss,small", pairs(tuple(KINDS), (tnkd_loss, objective), (False, True)))
def test_micro_batches_of_unequal_counts_add_up_to_the_whole_batch(device, backend, kind, loss, small):
    if backend == "triton" and device == "cpu" and kind != "float tensor":
        pytest.skip("the interpreter is slow, and what a number comes in is seen before any backend")
    student, teacher, target = problem(device, small=small)
    want = torch.autograd.grad(loss(student, teacher, target, backend=backend), student)[0]
    items = KINDS[kind](int((target != 255).sum()))
    total = torch.zeros((), device=device)
    for part in ([0], [1, 2], [3]):
        one = loss(student[part], teacher[part], target[part], num_items=items, backend=backend)
        one.backward()
        total = total + one.detach()
    torch.testing.assert_close(student.grad, want, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(total, loss(student, teacher, target, backend=backend).detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_sum_divided_in_loss_parts_and_gradient(device, backend, dtype):
    student, teacher, target = problem(device)
    student = student.detach().to(dtype).requires_grad_()
    skip_unless_tnkd_serves(backend, student)
    acc = acc_dtype(student)
    options = dict(LOGITS_ALONE, class_weight=WEIGHT.to(device, acc), backend=backend)
    summed = dsct_loss(student, teacher, target, reduction="sum", **options)
    divided = dsct_loss(student, teacher, target, num_items=1e6, **options)
    for a, b in zip(divided, summed, strict=True):
        torch.testing.assert_close(a * 1e6, b, rtol=2e-6, atol=1e-30)
    # float16 has no digits there, but under a GradScaler, which is why the division comes last
    upstream = torch.tensor(2.0**16, device=device)
    (got,) = torch.autograd.grad(divided.total, student, upstream)
    (want,) = torch.autograd.grad(summed.total, student)
    want, rounding = want.double() * (2.0**16 / 1e6), 2 * torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=1e-7 * float(want.abs().max()))


def test_with_class_weights_it_is_cross_entropys_weighted_sum_divided():
    student, teacher, target = problem()
    got = dsct_loss(student, teacher, target, class_weight=WEIGHT, num_items=100).ce
    want = F.cross_entropy(student.detach(), target, WEIGHT, ignore_index=255, reduction="sum") / 100
    torch.testing.assert_close(got, want)


def test_the_parts_that_are_no_means_over_pixels_are_as_without_it():
    student, teacher, target = problem()
    features = torch.rand(4, 3, 8, 8), torch.rand(4, 7, 4, 4)
    plain = dsct_loss(student, teacher, target, *features)
    given = dsct_loss(student, teacher, target, *features, num_items=10.0)
    for name in ("matched", "jaccard", "cafd"):
        assert torch.equal(getattr(given, name), getattr(plain, name)) and getattr(given, name) > 0
    torch.testing.assert_close(given.ce * 10, plain.ce * int((target != 255).sum()))
    torch.testing.assert_close(given.total - given.ce, plain.total - plain.ce)


def test_a_module_takes_it_at_every_call():
    student, teacher, target = problem()
    for items in (10, 20.0, torch.tensor(30)):
        assert torch.equal(
            TNKDLoss(beta=2.0)(student, teacher, target, num_items=items),
            tnkd_loss(student, teacher, target, beta=2.0, num_items=items),
        )


def test_where_nothing_counts_anywhere_the_loss_and_its_gradient_are_0(device, backend):
    student, teacher, target = problem(device)
    for none in (0, torch.tensor(0, device=device)):
        loss = objective(student, teacher, torch.full_like(target, 255), num_items=none, backend=backend)
        loss.backward()
        assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("options,error,match", [
    ({"num_items": -1}, ValueError, "num_items: expected a finite number >= 0, got -1"),
    ({"num_items": float("nan")}, ValueError, "num_items: expected a finite number >= 0, got nan"),
    ({"num_items": "7"}, TypeError, "num_items: expected a number, got str"),
    ({"num_items": torch.ones(2)}, TypeError, "num_items: expected a number or a 0-d tensor"),
    ({"num_items": 7, "reduction": "sum"}, ValueError, "num_items: expected None, .* got reduction='sum'"),
])  # fmt: skip
def test_what_is_no_number_of_items_is_refused_by_name(options, error, match):
    student, teacher, target = problem()
    for loss in (tnkd_loss, dsct_loss):
        with pytest.raises(error, match=match):
            loss(student, teacher, target, **options)
    with pytest.raises(ValueError, match=r"num_items: expected None, .* got reduction='none'"):
        tnkd_loss(student, teacher, target, num_items=7, reduction="none")


@pytest.mark.parametrize("name,dtype,module,as_tensor", [
    ("native", torch.float32, False, False),
    ("native", torch.float32, False, True),
    ("native", torch.float16, True, False),
    ("native", torch.float16, False, True),
    ("reference", torch.float32, False, True),
])  # fmt: skip
def test_one_graph_serves_every_number(name, dtype, module, as_tensor):
    if name == "native" and backends.NATIVE_MISSING is not None:
        pytest.skip(backends.NATIVE_MISSING)
    student, teacher, target = problem()
    student = student.detach().to(dtype).requires_grad_()
    criterion = DSCTLoss(**LOGITS_ALONE, backend=name)

    def step(items):
        if module:
            return criterion(student, teacher, target, num_items=items).total
        return objective(student, teacher, target, num_items=items, backend=name)

    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=frames, fullgraph=True)
    counts = []
    for i in range(5):
        items = 40 + 7 * i
        got = compiled(torch.tensor(items) if as_tensor else items)
        want = step(items)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
        gradients = [torch.autograd.grad(x, student)[0] for x in (got, want)]
        torch.testing.assert_close(*gradients, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)
        counts.append(frames.frame_count)
    assert len(set(counts)) <= (1 if as_tensor else 2)  # of a plain number the first is taken for a constant


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
def test_it_costs_no_pass_over_the_gradient():
    """Backward hands over the gradient that forward wrote: the division is in the weights already."""
    student, teacher, target = problem()
    loss = tnkd_loss(student, teacher, target, num_items=100)
    written = loss.grad_fn.saved_tensors[0]
    before, version = written.clone(), written._version
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.data_ptr() == written.data_ptr() and grad._version == version and torch.equal(grad, before)


def test_on_a_device_that_is_not_the_cpu_nothing_waits_for_the_number():
    """Meta tensors have no numbers to read: who asks for one fails."""
    student, teacher, target = (x.detach().to("meta") for x in problem())
    items = torch.tensor(7, device="meta")
    loss = dsct_loss(student.requires_grad_(), teacher, target, num_items=items, **LOGITS_ALONE).total
    loss.backward()
    assert student.grad.shape == student.shape
