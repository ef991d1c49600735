"""What breaks in the usual formulas, and does not here: one test for each row of docs/failures.md, on every backend.

A test shows both: the usual formula gives what is reported of it, ours what is right.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsct_kernels import dsct_loss, matched_cafd_loss, tnkd_loss

INF, NAN = math.inf, math.nan
PAGE = Path(__file__).resolve().parents[1] / "docs" / "failures.md"


def usual_nckd(student: Tensor, teacher: Tensor, target: Tensor, shift: float = 1000.0) -> Tensor:
    """NCKD as it is usually written: the target is pushed out of the softmax by a large constant."""
    pushed = shift * F.one_hot(target, student.shape[1])
    return F.kl_div((student - pushed).log_softmax(1), (teacher - pushed).softmax(1), reduction="batchmean")


def usual_tckd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """TCKD as it is usually written: the log of sums of probabilities."""

    def binary(logits: Tensor) -> Tensor:
        p, hot = logits.softmax(1), F.one_hot(target, logits.shape[1])
        return torch.stack([(p * hot).sum(1), (p * (1 - hot)).sum(1)], 1)

    return F.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")


def usual_cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CWD as it is usually written: all summed, then divided."""
    s, t = (x.flatten(2).flatten(0, 1) / temperature for x in (student, teacher))
    apart = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum()
    return apart * temperature**2 / len(s)


def leaf(rows: list, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)


def test_two_classes_have_no_nckd(device, backend):
    student, teacher = leaf([[800.0, -800.0]], device=device), torch.tensor([[1.0, -1.0]], device=device)
    target = torch.tensor([0], device=device)
    assert usual_nckd(student, teacher, target) > 500
    loss = tnkd_loss(student, teacher, target, alpha=0.0, beta=1.0, backend=backend)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_logits_beyond_the_mask_keep_their_nckd(device, backend):
    student = leaf([[2000.0, 1.0, 2.0, 3.0]], device=device)
    teacher, target = torch.tensor([[2000.0, 3.0, 2.0, 1.0]], device=device), torch.tensor([0], device=device)
    assert usual_nckd(student, teacher, target) == 0
    others = F.kl_div(student[:, 1:].log_softmax(1), teacher[:, 1:].softmax(1), reduction="batchmean")
    assert others > 1
    torch.testing.assert_close(tnkd_loss(student, teacher, target, alpha=0.0, beta=1.0, backend=backend), others)


@pytest.mark.parametrize("dtype,margin", [(torch.float32, 110.0), (torch.float16, 18.0)])
def test_a_certain_network_leaves_no_nan(device, backend, dtype, margin):
    target = torch.tensor([0], device=device)
    student, teacher = leaf([[margin, 0.0, 0.0]], dtype, device), leaf([[margin - 1, 0.0, 0.0]], dtype, device).detach()
    usual = usual_tckd(student, teacher, target)
    usual.backward()
    assert not (usual.isfinite() and student.grad.isfinite().all())
    student.grad = None
    loss = tnkd_loss(student, teacher, target, backend=backend)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and student.grad.isfinite().all()


def test_an_ignored_pixel_takes_no_part(device, backend):
    student, teacher = torch.randn(2, 5, 4, 4, device=device), torch.randn(2, 5, 4, 4, device=device)
    target = torch.randint(0, 5, (2, 4, 4), device=device)
    target[:, :2] = 255
    changed = student.clone()
    changed[:, :, :2] += torch.randn(5, 1, 1, device=device)

    def usual(x: Tensor) -> Tensor:
        return F.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    assert not torch.allclose(usual(student), usual(changed))
    one, other = (tnkd_loss(x, teacher, target, backend=backend) for x in (student, changed))
    assert one == other


def test_a_batch_without_a_label_is_0(device, backend):
    student, teacher = leaf([[1.0, 2.0, 3.0]], device=device), torch.randn(1, 3, device=device)
    target = torch.tensor([255], device=device)
    assert F.cross_entropy(student, target, ignore_index=255).isnan()
    for loss in (
        tnkd_loss(student, teacher, target, backend=backend),
        dsct_loss(student, teacher, target, tnkd_weight=1.0, backend=backend).total,
    ):
        student.grad = None
        loss.backward()
        assert loss == 0 and (student.grad == 0).all()


def test_nan_at_an_ignored_pixel_stays_there(device, backend):
    student = leaf([[1.0, 2.0, 3.0], [NAN, NAN, NAN]], device=device)
    teacher, target = torch.randn(2, 3, device=device), torch.tensor([1, 255], device=device)
    each = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    assert (each * (target != 255)).sum().isnan()  # a mask multiplied in
    each.masked_fill(target == 255, 0).sum().backward()  # the value is mended, its gradient is not
    assert student.grad[1].isnan().any()
    student.grad = None
    loss = tnkd_loss(student, teacher, target, backend=backend)
    loss.backward()
    assert loss.isfinite() and student.grad[0].abs().sum() > 0 and (student.grad[1] == 0).all()


def test_the_mean_knows_neither_the_size_of_the_map_nor_the_number_of_classes(device, backend):
    pixel_s, pixel_t = torch.randn(1, 5, 1, 1, device=device), torch.randn(1, 5, 1, 1, device=device)
    apart = F.kl_div(pixel_s.log_softmax(1), pixel_t.softmax(1), reduction="sum")
    for size in (2, 8):
        s, t = pixel_s.expand(1, 5, size, size), pixel_t.expand(1, 5, size, size)
        usual = [F.kl_div(s.log_softmax(1), t.softmax(1), reduction=r) for r in ("batchmean", "mean")]
        torch.testing.assert_close(usual[0], apart * size**2)
        torch.testing.assert_close(usual[1], apart / 5)
        one = tnkd_loss(pixel_s, pixel_t, backend=backend)
        torch.testing.assert_close(tnkd_loss(s, t, backend=backend), one)


def test_a_reduction_is_obeyed_or_refused(device, backend):
    student, teacher = torch.randn(2, 5, 4, 4, device=device), torch.randn(2, 5, 4, 4, device=device)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        usual = F.kl_div(student.log_softmax(1), teacher.softmax(1), size_average=False, reduction="none")
    assert usual.dim() == 0  # the old argument wins: a sum
    each = tnkd_loss(student, teacher, reduction="none", backend=backend)
    assert each.shape == (2, 4, 4)
    torch.testing.assert_close(tnkd_loss(student, teacher, reduction="sum", backend=backend), each.sum())
    with pytest.raises(ValueError, match=r"reduction: expected .*'batchmean'"):
        tnkd_loss(student, teacher, reduction="batchmean", backend=backend)


def test_the_teacher_is_a_constant(device, backend):
    probabilities = leaf([[1.0, 0.0]], device=device)
    F.kl_div(leaf([[0.0, -700.0]], device=device), probabilities, reduction="batchmean").backward()
    assert not probabilities.grad.isfinite().all()
    student, teacher = leaf([[0.0, 1.0]], device=device), leaf([[0.0, -800.0]], device=device)
    tnkd_loss(student, teacher, backend=backend).backward()
    assert teacher.grad is None and student.grad.isfinite().all()


def test_a_class_absent_in_both_networks_is_absent(device, backend):
    student = leaf([[1.0, 2.0, 3.0, -INF]], device=device)
    teacher, target = torch.tensor([[3.0, 1.0, 0.5, -INF]], device=device), torch.tensor([0], device=device)
    usual = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    assert usual.isnan()  # 0 * (-inf + inf)
    loss = tnkd_loss(student, teacher, target, backend=backend)
    loss.backward()
    without = tnkd_loss(student[:, :3], teacher[:, :3], target, backend=backend)
    torch.testing.assert_close(loss, without)
    assert student.grad.isfinite().all() and student.grad[0, 3] == 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_channels_in_half_precision_do_not_overflow(backend):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (30 * torch.randn(2, 150, 16, 16, generator=generator) for _ in range(2))
    assert usual_cwd(student.half(), teacher.half(), 4.0).isinf()
    half = matched_cafd_loss(student.half(), teacher.half(), channel_temperature=None, backend=backend)
    wide = matched_cafd_loss(
        student.half().double(), teacher.half().double(), channel_temperature=None, backend="reference"
    )
    torch.testing.assert_close(half.double(), wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_channels_that_are_absent_leave_no_nan(backend):
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    student[:, :, 0], teacher[:, :, 0] = -INF, -INF
    assert usual_cwd(student, teacher, 4.0).isnan()
    student.requires_grad_()
    loss = matched_cafd_loss(student, teacher, channel_temperature=None, backend=backend)
    loss.backward()
    rest = matched_cafd_loss(student[:, :, 1:], teacher[:, :, 1:], channel_temperature=None, backend=backend)
    torch.testing.assert_close(loss, rest)
    assert student.grad.isfinite().all()


def test_a_label_that_is_no_class_is_named(device, backend):
    student, target = torch.randn(1, 3, 4, 4, device=device), torch.zeros(1, 4, 4, dtype=torch.int64, device=device)
    target[0, 2, 3] = 254
    if device == "cpu":
        with pytest.raises(IndexError, match="Target 254 is out of bounds"):  # on a GPU: an illegal access, or nothing
            F.cross_entropy(student, target, ignore_index=255)
        with pytest.raises(ValueError, match=r"target: .*254.*\(0, 2, 3\)"):
            tnkd_loss(student, student, target, backend=backend)
    else:
        assert tnkd_loss(student, student, target, backend=backend).isnan()


def test_every_row_of_the_page_is_a_test_and_every_test_a_row():
    rows = re.findall(r"`(test_\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    here = [name for name in globals() if name.startswith("test_") and "row_of_the_page" not in name]
    assert sorted(rows) == sorted(here)
