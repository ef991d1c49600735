"""The Triton kernels of TNKD: every launch choice, strides that do not merge, the helpers.

On CPU under Triton's interpreter, on `cuda` where there is a GPU. Shapes are tiny: the interpreter takes milliseconds
for each operation of a program. What all backends share is tested in tests/test_losses.py and tests/test_edge_cases.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tune_triton import tnkd_candidates
from dsct_kernels import tnkd_loss, triton_common
from dsct_kernels.tnkd import plan, reference, triton
from dsct_kernels.tnkd.objective import Objective
from dsct_kernels.tnkd.plan import Config
from tests.conftest import DEVICES
from tests.helpers import LAYOUTS, check_no_wait_a_side_stream_and_a_graph, pairs, strided_copy
from tests.oracle import assert_as_good_as_reference, check_tnkd, learnt, problem, relative_error

WHY_NOT = triton.why_not(torch.zeros(1, device=DEVICES[-1]))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def asked(weight: Tensor | None, ce: float | None, tckd: float, nckd: float, temperature: float,
          ignore_index: int | None, reduction: int) -> Objective:  # fmt: skip
    return Objective(tckd, nckd, temperature, ignore_index, reduction, ce_weight=ce, class_weight=weight)


def op(student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, ce: float | None, tckd: float,
       nckd: float, temperature: float, ignore_index: int | None, reduction: int, *rest: object,
       **options: object):  # fmt: skip
    """The op, of plain numbers; `rest`: needs_grad and, to replace the table's choice, the launch."""
    objective = asked(weight, ce, tckd, nckd, temperature, ignore_index, reduction)
    packed = objective.packed(torch.empty(0), torch.device("cpu"))
    return triton.forward(student, teacher, target, *packed, *rest, **options)


def truth(dtype: torch.dtype, student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None,
          *rest: object):  # fmt: skip
    """(loss, parts, gradient) of the reference, computed in dtype."""
    objective = asked(None if weight is None else weight.to(dtype), *rest)
    return learnt(lambda s: reference.tnkd(s, teacher.to(dtype), target, objective), student.to(dtype))


def check(student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None = None,
          numbers: tuple[float | None, ...] = (0.7, 1.0, 2.0, 1.5), ignore_index: int | None = 255, reduction: int = 1,
          config: Config | None = None) -> None:  # fmt: skip
    """The op itself, with this launch, by the error rule; and the same without a gradient, and with its numbers read
    by the kernels."""
    arguments = (student, teacher, target, weight, *numbers, ignore_index, reduction)
    loss, parts, grad, scale = op(*arguments, True, config)
    own = truth(torch.promote_types(student.dtype, torch.float32), *arguments)
    exact = truth(torch.float64, *arguments)
    assert_as_good_as_reference(loss, own[0], exact[0], "loss")
    assert_as_good_as_reference(parts, own[1], exact[1], "parts")
    product = grad.to(scale.dtype) * scale
    assert_as_good_as_reference(product.to(student.dtype), own[2].to(student.dtype), exact[2], "gradient")
    alone = op(*arguments, False, config, by_pointer=True)
    for got, same in ((alone[0], loss), (alone[1], parts)):
        torch.testing.assert_close(got, same, rtol=0, atol=0, equal_nan=True)


ALONE = (None, 1.0, 2.0, 1.5)  # the numbers of TNKD without cross-entropy


@pytest.mark.parametrize(
    "dtype,numbers,ignore_index",
    pairs(
        (torch.float32, torch.float16, torch.bfloat16),
        ((0.7, 1.0, 2.0, 1.0), (0.3, 0.5, 0.0, 0.01), (None, 1.0, 2.0, 2.0)),
        (255, 0, -100, 2**40, None),
    ),
    ids=str,
)
def test_numbers_that_the_kernels_read_give_the_bits_of_numbers_among_their_arguments(
    device, dtype, numbers, ignore_index
):
    student, teacher, target = problem(device, (2, 5, 3, 4), dtype)
    if ignore_index is not None:
        target[:, 1] = ignore_index
    weight = torch.rand(5, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for layout, config in (("contiguous", None), ("channels_last", CONFIGS[4])):
        rest = (strided_copy(student, layout), strided_copy(teacher, layout), target, weight, *numbers, ignore_index)
        for reduction in (0, 1, 2):
            either = (op(*rest, reduction, True, config, by_pointer=by_pointer) for by_pointer in (False, True))
            assert all(torch.equal(a, b) for a, b in zip(*either, strict=True))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -1.0, 0.0])
def test_numbers_that_nobody_could_refuse_make_every_loss_nan(device, reduction, which, bad):
    student, teacher, target = problem(device, (1, 4, 2, 3))
    target[0, 0, 0] = 255
    numbers = [0.7, 1.0, 2.0, 1.5]
    numbers[which] = bad
    loss = op(student, teacher, target, None, *numbers, 255, reduction, False, by_pointer=True)[0]
    if bad == 0 and which != 3:  # a weight may be 0
        assert loss.isfinite().all()
    else:
        assert loss.isnan().all()


def test_a_weight_that_turns_out_to_be_0_takes_no_part(device):
    """0 * inf is 0: neither the infinite cross-entropy nor the infinite divergence shows."""
    student, teacher, target = problem(device, (1, 4, 2, 3))
    student[0, int(target[0, 0, 0]), 0, 0] = float("-inf")
    for reduction in (0, 1, 2):
        rest = (None, 0.0, 0.0, 2.0, 1.5, 255, reduction, False)
        loss, parts, *_ = op(student, teacher, target, *rest, by_pointer=True)
        assert loss.isfinite().all() and parts[0] == 0
        for same, got in zip((loss, parts), op(student, teacher, target, *rest)):  # whose host sees the 0
            torch.testing.assert_close(got, same)
        assert op(student, teacher, target, None, 0.7, *rest[2:], by_pointer=True)[0].isinf().any()


# One class a chunk; chunks that end within the classes and after them; one chunk; more than the tensor.
CONFIGS = [Config(16, 1, 1), Config(16, 2, 1), Config(8, 4, 2), Config(16, 8, 1), Config(32, 2, 4)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape,layout", [((2, 5, 4, 4), "contiguous"), ((1, 6, 3, 7), "channels_last")], ids=str)
def test_every_launch_gives_the_same_numbers(device, config, shape, layout):
    """16 pixels fill the tiles exactly (no mask for pixels), 21 do not."""
    student, teacher, target = problem(device, shape)
    student, teacher = strided_copy(student, layout), strided_copy(teacher, layout)
    target[0, 0, :2] = 255
    weight = torch.rand(shape[1], device=device) + 0.5
    check(student, teacher, target, weight, config=config)
    check(student, teacher, target, config=config, reduction=0, numbers=ALONE)
    check(student, teacher, None, config=config, reduction=2, numbers=ALONE)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=str)
def test_edge_cases_hold_whoever_holds_the_classes(device, config):
    """What the table would not choose at this size, too: absent classes, infinite loss, no-data, ties, huge logits."""
    student, teacher, target = problem(device, (1, 5, 3, 6))
    student[0, :, 0, 0] = float("nan")
    target[0, 0, 0] = 255
    student[0, 2, 0, 1] = teacher[0, 2, 0, 1] = float("-inf")
    student[0, 3, 0, 2] = teacher[0, 3, 0, 2] = float("-inf")
    target[0, 0, 2] = 3
    student[0, :, 1] *= 3000
    teacher[0, :, 1] *= 3000
    check(student, teacher, target, config=config)
    check(student, teacher, target, config=config, reduction=0)
    teacher[0, 1], teacher[0, 3] = teacher[0].amax(0), teacher[0].amax(0)
    student[0, :, 0] = 1.0
    check(student, teacher, None, config=config)
    student[0, (target[0, 2, 0] + 1) % 5, 2, 0] = float("-inf")  # the teacher has mass there
    loss, _, grad, _ = op(
        student, teacher, target, None, None, 1.0, 1.0, 2.0, 255, 2, True, config
    )  # fmt: skip
    assert loss == float("inf") and grad.isfinite().all()
    target[0, 2, 5] = 5
    _, _, grad, _ = op(student, teacher, target, None, None, 1.0, 1.0, 2.0, 255, 2, True, config)
    assert grad[0, :, 2, 5].isnan().all() and grad[0, :, 2, :5].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_dtypes_and_reductions(device, dtype, reduction):
    student, teacher, target = problem(device, (2, 7, 3, 5), dtype)
    target[:, 1] = 255
    weight = torch.rand(7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    check(student, teacher, target.to(torch.int16), weight, reduction=reduction)


def test_float16_keeps_a_power_of_two_out_of_the_gradient(device):
    student, teacher, target = problem(device, (2, 4, 3, 5), torch.float16)
    target[0, 0] = 255
    arguments = (teacher, target, None, 0.3, 1.0, 2.0, 2.0, 255)
    mean, total = (op(student, *arguments, r, True) for r in (1, 2))
    for _, _, grad, scale in (mean, total):
        assert math.log2(scale.item()).is_integer()  # nothing rounds twice
        assert 2**10 < grad.abs().max() < 2**15
    torch.testing.assert_close(mean[2].float() * mean[3] * 25, total[2].float() * total[3], rtol=2e-3, atol=1e-6)
    folded = op(student.float(), *arguments, 1, True)
    assert folded[3] == 1
    torch.testing.assert_close(mean[2].float() * mean[3], folded[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("scale,temperature", [(1e-4, 0.01), (0.1, 20.0), (1e4, 1.0)])
def test_small_float16_gradients_survive_until_they_are_scaled(device, reduction, scale, temperature):
    """Below 6e-5 float16 runs out of digits, and a GradScaler multiplies only after the gradient was stored."""
    student, teacher, target = problem(device, (2, 7, 3, 5), torch.float16, scale=scale)
    target[:, 1] = 255
    rare = torch.full((7,), 1e-6, device=device)  # a mean's weights add up to little beside the count
    rare[int(target[0, 0, 0])] = 40.0
    for weight, tckd, nckd, ce in ((None, 0.5, 0.0, None), (None, 1e-6, 2e-6, None), (rare, 1, 2, 1e-3),
                                   (rare, 1, 2, 1e4)):  # fmt: skip
        rest = (student, teacher, target, weight, ce, tckd, nckd, temperature, 255, reduction)
        *_, exact = truth(torch.float64, *rest)
        *_, grad, outside = op(*rest, True)
        assert grad.isfinite().all()
        assert relative_error(grad.to(outside.dtype) * outside, exact) < 2**-11  # one rounding


@pytest.mark.parametrize("reduction", [1, 2])
def test_float16_without_anything_to_scale(device, reduction):
    """Nothing valid, no term asked for, a weight that is not finite: no bound, and no 0 / 0."""
    student, teacher, target = problem(device, (1, 4, 3, 5), torch.float16)
    none = op(student, teacher, torch.full_like(target, 255), None, 1.0, 1.0, 2.0, 2.0, 255, reduction,
              True)  # fmt: skip
    nothing = op(student, teacher, target, None, 0.0, 0.0, 0.0, 2.0, 255, reduction, True)
    for _, _, grad, scale in (none, nothing):
        assert (grad == 0).all() and scale.isfinite() and scale > 0
    infinite = torch.tensor([1.0, 1.0, 1.0, float("inf")], device=device)
    target.clamp_(max=2)
    *_, grad, scale = op(student, teacher, target, infinite, 1.0, 1.0, 2.0, 2.0, 255, reduction, True)
    assert grad.isfinite().all() and scale == 1


def test_strides_that_do_not_merge(device):
    """Cropped, flipped in order, expanded, with five dimensions: read in place; with six that do not merge: copied."""
    student, teacher, target = problem(device, (2, 4, 3, 4, 2))
    check(student[:, :, :, 1:3], teacher[:, :, :, 1:3], target[:, :, 1:3])
    check(student.permute(0, 1, 4, 2, 3), teacher.permute(0, 1, 4, 2, 3), target.permute(0, 3, 1, 2))
    check(student, teacher[:1].expand(2, -1, -1, -1, -1), target[:, :, :1].expand(-1, -1, 4, -1))
    big, other, labels = problem(device, (2, 3, 3, 3, 3, 3))
    cut = (slice(None), slice(None), *[slice(2)] * 4)
    check(big[cut], other[cut], labels[cut[1:]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_written(device, layout):
    """Memory that torch.empty hands out is filled with NaN here: what a kernel forgets to write shows."""
    student, teacher, target = problem(device, (2, 5, 3, 6))
    student, target = strided_copy(student, layout), target.clone()
    target[1, 2] = 255
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in (0, 1, 2):
            results = op(student, teacher, target, None, 1.0, 1.0, 1.0, 1.0, 255, reduction, True)
            assert all(result.isfinite().all() for result in results)
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_property(device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4), label="shape"))
    shape = (shape[0], shape[1] + 1, *shape[2:])
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0, 3000.0]), label="scale")
    student, teacher, target = problem(device, shape, dtype, data.draw(st.integers(0, 99), label="seed"), scale)
    ignore_index = data.draw(st.sampled_from([0, -1, 255, None]), label="ignore_index")
    if ignore_index is not None:
        share = data.draw(st.floats(0, 1), label="share ignored")
        target[torch.rand(target.shape, device=device) < share] = ignore_index
    check_tnkd(
        strided_copy(student, data.draw(st.sampled_from(LAYOUTS), label="layout")),
        teacher,
        target,
        "triton",
        ignore_index=ignore_index,
        alpha=data.draw(st.sampled_from([0.0, 1.0, 3.0]), label="alpha"),
        beta=data.draw(st.sampled_from([0.0, 1.0, 8.0]), label="beta"),
        temperature=data.draw(st.sampled_from([0.01, 1.0, 2.0, 20.0]), label="temperature"),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_in_place(device, dtype):
    """Any dense layout, a length that no block divides; a factor of 1 leaves the very bits, NaN's too."""
    grad = torch.randn(2, 3, 5, 7, device=device).to(dtype).to(memory_format=torch.channels_last)
    before = grad.clone()
    factor = torch.tensor(0.37, dtype=torch.promote_types(dtype, torch.float32), device=device)
    triton.scale_in_place(grad, factor)
    assert torch.equal(grad, (before.to(factor.dtype) * factor).to(dtype))
    kept = before.clone()
    kept[0, 0, 0, 0] = float("nan")
    triton.scale_in_place(kept, torch.ones_like(factor))
    assert kept[0, 0, 0, 0].isnan() and torch.equal(kept.flatten()[1:], before.flatten()[1:])
    triton.scale_in_place(grad[:0], factor)


def test_layouts_are_copied_only_where_they_have_gaps():
    """What is written comes back in the strides that were promised."""
    planes, last = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5, 3).movedim(-1, 1)
    assert [triton_common.channels_last(x) for x in (planes, last, planes[:, :1], torch.rand(7, 3))] == [0, 1, 0, 1]
    for x, copied in ((planes, False), (last, False), (planes[..., 1:], True), (last[:, 1:], True), (last.mT, True)):
        side = triton_common.channels_last(x)
        out = triton_common.dense(x, side)
        assert out.is_contiguous() and (out.data_ptr() != x.data_ptr()) == copied
        grad = torch.empty_strided(x.shape, x.stride())
        written = triton_common.dense(grad, side).copy_(out)
        assert torch.equal(triton_common.settled(grad, written, side), x) and grad.stride() == x.stride()
    with pytest.raises(ValueError, match="16 or 32 bits"):
        triton_common.dense(planes.double(), False)


@pytest.mark.parametrize("with_ce", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
def test_the_plan_never_leaves_its_limits_and_tuning_tries_it(with_ce, adjacent):
    """Tiles are powers of two, and no larger than rows and registers allow, for every K, dtype and layout."""
    for classes in range(2, triton.MOST_CLASSES + 1):
        for itemsize in (2, 4):
            config = plan.choose(classes, itemsize, adjacent, 4096, with_ce)
            assert config in tnkd_candidates(classes, itemsize, adjacent), (classes, config)
            for inner in (1, 17, 4096):
                config = plan.choose(classes, itemsize, adjacent, inner, with_ce)
                assert config.pixels.bit_count() == config.classes.bit_count() == config.warps.bit_count() == 1
                assert config.held(classes) <= 48, (classes, itemsize, config)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_class_weights_without_labels(device, reduction):
    """A mean over the weights needs the labels beforehand: the op says so, and the loss takes them."""
    student, teacher, _ = problem(device, (2, 5, 3, 4))
    weight = torch.rand(5, device=device)
    if reduction != 1:
        return check(student, teacher, None, weight, reduction=reduction)
    with pytest.raises(ValueError, match="target: expected labels"):
        check(student, teacher, None, weight)
    numbers = (0.7, 1.0, 2.0, 1.5)
    loss, _ = triton.tnkd(student, teacher, None, asked(weight, *numbers, 255, 1))
    exact, _, _ = truth(torch.float64, student, teacher, None, weight, *numbers, 255, 1)
    torch.testing.assert_close(loss, exact.float())


def test_why_not(monkeypatch):
    cpu = torch.zeros(1)
    monkeypatch.setattr(triton_common, "interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in str(triton_common._look("cpu", None))
    assert "not on meta" in str(triton_common._look("meta", None))
    monkeypatch.setattr(triton_common, "interpreted", lambda: True)
    assert triton_common._look("cpu", None) is None
    monkeypatch.setattr(triton_common, "OLDEST", (99, 0))
    assert "too old" in str(triton_common._look("cpu", None))
    monkeypatch.setattr(triton_common.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(triton_common._look("cpu", None))
    monkeypatch.setitem(triton_common._answers, ("cpu", None), "the reason")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve this call: the reason"):
        tnkd_loss(cpu.view(1, 1).expand(1, 2), cpu.view(1, 1).expand(1, 2), backend="triton")
    many = cpu.view(1, 1).expand(1, 1025)
    with pytest.raises(ValueError, match="student: expected at most 1024 classes, got 1025"):
        op(many, many, None, None, None, 1.0, 1.0, 1.0, 255, 1, False)


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_host_sync_graph_capture_and_side_stream():
    student, teacher, target = problem("cuda", (2, 6, 64, 64))
    target[0, :5] = 255
    student.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = tnkd_loss(student, teacher, target, backend="triton")
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    check_no_wait_a_side_stream_and_a_graph(step, student)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled(layout):
    student, teacher, target = problem("cuda", (2, 6, 32, 32))
    student = strided_copy(student, layout).requires_grad_()
    loss = torch.compile(lambda s: 2 * tnkd_loss(s, teacher, target, backend="triton"), fullgraph=True)
    (got,) = torch.autograd.grad(loss(student), student)
    (expected,) = torch.autograd.grad(2 * tnkd_loss(student, teacher, target, backend="triton"), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 6, 19, 21, 60, 150, 171, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_sizes(classes, layout, dtype):
    student, teacher, target = problem("cuda", (2, classes, 67, 130 if classes < 200 else 3), dtype)
    target[0, :5] = 255
    weight = torch.rand(classes, device="cuda")
    s, t = strided_copy(student, layout), strided_copy(teacher, layout)
    check(s, t, target, weight)
    check(s, t, target.to(torch.uint8), numbers=ALONE, reduction=0)
    check(s, t, None, numbers=ALONE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 5, 30_000, 16_384), (150_000, 150, 10, 10)], ids=str)
def test_more_than_2_to_the_31_elements(shape):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("30 GB of free GPU memory needed")
    student = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    teacher = torch.empty_like(student).normal_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), dtype=torch.uint8, device="cuda")
    _, _, grad, _ = op(student, teacher, target, None, None, 1.0, 2.0, 2.0, 255, 2, True)
    last = (slice(-1, None), slice(None), slice(-3, None))
    part = (student[last], teacher[last], target[-1:, -3:])
    small = op(*part, None, None, 1.0, 2.0, 2.0, 255, 2, True)
    torch.testing.assert_close(grad[last], small[2])


@pytest.mark.skipif(not triton_common.interpreted(), reason="replaces what the interpreter does")
def test_the_last_of_more_than_2_to_the_31_pixels(device, monkeypatch):
    """One dimension where classes lie side by side: only the last programs run, and only their memory is touched."""
    from triton import language as tl
    from triton.runtime import interpreter

    pixels = 2**31 + 100
    try:  # pages are handed out when they are written
        logits, target = torch.empty((pixels, 2), dtype=torch.float16), torch.empty(pixels, dtype=torch.uint8)
    except RuntimeError as error:
        pytest.skip(f"no address space for 11 GB: {error}")
    torch.manual_seed(0)
    logits[-300:], target[-300:] = torch.randn(300, 2), torch.randint(0, 2, (300,))
    launches = []
    monkeypatch.setattr(triton, "launch", lambda *args, **constants: launches.append((args, constants)))
    op(logits, logits, target, None, 1.0, 1.0, 2.0, 2.0, 255, 1, False)
    (count, count_constants), (walk, constants), _ = launches
    assert walk[1] == 2, "as many programs as the interpreter has"

    last = -1

    def program_id(self, axis):
        return interpreter.TensorHandle(np.array([last], dtype=np.int32), tl.int32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program_id)
    kernel, _, warps, *rest = walk
    sizes = dict(zip(kernel.arg_names, rest, strict=False))
    last = sizes["tiles"] - 1  # the last of all tiles, by a program that would go on from there
    assert last == (pixels - 1) // constants["V"].pixels > 2**21
    partial = torch.zeros(3 + last)
    rest[kernel.arg_names.index("partial")] = partial
    triton_common.launch(kernel, 1, warps, *rest, **constants)
    tile = pixels - last * constants["V"].pixels
    end = logits[-tile:].double()
    exact = reference.tnkd(end, end, target[-tile:], asked(None, 1.0, 1.0, 2.0, 2.0, 255, 2))[1]
    assert partial[last + 2] == pytest.approx(exact[0].item(), rel=1e-6)

    kernel, _, warps, labels, class_weight, _, *rest = count
    last = (pixels - 1) // count_constants["BLOCK"]  # a program's walk that starts with the last block
    counts = torch.zeros(last + 1)
    triton_common.launch(kernel, 1, warps, labels, class_weight, counts, *rest, **count_constants)
    assert last > 2**18 and counts[-1] == pixels - last * count_constants["BLOCK"]
