"""Maps of two sizes brought together: what is ignored has no part in an average, whatever it holds."""

import pytest
import torch
import torch.nn.functional as F

from dsct_kernels import backends, dsct_loss, jaccard_loss, matched_cafd_loss
from dsct_kernels.pool import averaged, labelled

LOSSES = {
    "matched": matched_cafd_loss,
    "jaccard": jaccard_loss,
    "dsct": lambda *arguments, **keywords: dsct_loss(*arguments, **keywords).total,
}


def test_an_average_weighs_a_position_by_the_share_of_its_labels_that_counts():
    maps = torch.tensor([[[[1.0, 2.0, 5.0, torch.nan], [3.0, 4.0, 7.0, 9.0]]]])
    target = torch.zeros(1, 4, 8)
    target[0, :2, 6:] = 255  # the NaN
    target[0, 2:, 7:] = 255  # half of the 9
    target = target.long()
    assert labelled(target, 255, [2, 4], torch.float32).tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0.5]]]
    got = averaged(maps, [1, 2], torch.float32, target, 255)
    assert got.flatten().tolist() == pytest.approx([2.5, (5 + 7 + 0.5 * 9) / 2.5])
    nothing = averaged(maps, [1, 2], torch.float32, torch.full_like(target, 255), 255)
    assert not nothing.any()


def test_with_every_label_it_is_torchs_average():
    maps = torch.randn(2, 3, 9, 14)
    target = torch.zeros(2, 20, 30, dtype=torch.uint8)
    torch.testing.assert_close(averaged(maps, [4, 5], torch.float32, target, 255), F.adaptive_avg_pool2d(maps, (4, 5)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [0.0, 1e4, torch.nan, torch.inf])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_ignored_pixels_of_the_larger_network_change_nothing_and_learn_nothing(name, value, backend, compiled):
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (2, 16, 16), generator=generator)
    target[:, 5:9, 3:12] = 255
    gone = (target == 255).unsqueeze(1).expand(2, 4, 16, 16)
    student, teacher = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 4, 4, 8, generator=generator)
    loss = LOSSES[name]
    call = lambda s: loss(s, teacher, target, backend=backend)  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for held in (0.5, value):
        leaf = torch.where(gone, held, student).requires_grad_()
        out = call(leaf)
        out.backward()
        assert leaf.grad is not None and not leaf.grad[gone].any() and leaf.grad[~gone].any()
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize("labels", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [(12, 20), (3, 5), (5, 7), (1, 1), (12, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_share_of_labels_is_torchs_average_of_those_that_count(labels, size, dtype):
    target = torch.randint(0, 4, (3, 12, 20), generator=torch.Generator().manual_seed(0)).to(labels)
    crop = torch.randint(0, 4, (3, 24, 50), generator=torch.Generator().manual_seed(1)).to(labels)[:, 3:15, 5:45:2]
    for values in (target, target.mT.contiguous().mT, crop, target[:0]):
        for ignored in (2, 255, -1, 2**40):
            want = F.adaptive_avg_pool2d((values.long() != ignored).to(dtype), size)
            got = labelled(values, ignored, list(size), dtype)
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got, want)


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
def test_the_op_of_the_labels_share():
    op, target = torch.ops.dsct_kernels.labelled, torch.zeros(2, 400, 300, dtype=torch.uint8)
    target[:, ::3, ::7] = 255  # large enough for several tasks
    torch.library.opcheck(op.default, (target, 255, 100, 60, False))
    want = F.adaptive_avg_pool2d((target != 255).double(), (100, 60))
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2, 5):
            torch.set_num_threads(torch_threads)
            torch.testing.assert_close(op(target, 255, 100, 60, True), want)
    finally:
        torch.set_num_threads(threads)
    for wrong, message in (
        (torch.zeros(2, 3, 3), "dtype uint8"),
        (target[0], r"\(N, H, W\)"),
        (target[:, :0], "cells"),
    ):
        with pytest.raises(ValueError, match=f"target: .*{message}"):
            op(wrong, 255, 2, 2, False)


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize("by_environment", [False, True])
def test_the_reference_is_plain_pytorch_here_too(monkeypatch, by_environment):
    def op(*arguments):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(torch.ops.dsct_kernels, "labelled", op)
    logits, target = torch.randn(2, 4, 4, 8), torch.randint(0, 4, (2, 16, 16))
    if by_environment:
        monkeypatch.setenv("DSCT_KERNELS_BACKEND", "reference")
    for loss in LOSSES.values():
        loss(logits, torch.randn(2, 4, 2, 4), target, backend="auto" if by_environment else "reference")
    monkeypatch.delenv("DSCT_KERNELS_BACKEND", raising=False)
    with pytest.raises(AssertionError, match="a kernel was called"):
        jaccard_loss(logits, logits, target)
