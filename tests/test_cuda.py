"""The CUDA kernels on a real GPU, through torch.ops and the public functions, against the float64 reference."""

from functools import partial

import pytest
import torch
from torch import Tensor

import dsct_kernels
from dsct_kernels import backends
from dsct_kernels.cafd import native as cafd_native
from dsct_kernels.cafd import reference as cafd_reference
from dsct_kernels.cafd import triton as cafd_triton
from dsct_kernels.tnkd import native as tnkd_native
from dsct_kernels.tnkd import reference as tnkd_reference
from dsct_kernels.tnkd import triton as tnkd_triton
from dsct_kernels.tnkd.objective import Objective
from tests.helpers import LAYOUTS, strided_copy
from tests.oracle import assert_as_good_as_reference, assert_cafd_as_good_as_reference, learnt


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    return backends.why_not_native(torch.empty(0, device="cuda"))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_skip() is not None, reason=why_skip() or "")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of 16 and 32 bits
HALF_ULP = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
DEVICE = "cuda"


def asked(weight: Tensor | None, ce: float | None, tckd: float, nckd: float, temperature: float,
          ignore_index: int | None, reduction: int) -> Objective:  # fmt: skip
    return Objective(tckd, nckd, temperature, ignore_index, reduction, ce_weight=ce, class_weight=weight)


def run_tnkd(student: Tensor, teacher: Tensor, target: Tensor | None,
             *rest: object) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return learnt(lambda s: tnkd_native.tnkd(s, teacher, target, asked(*rest)), student)


def tnkd_truth(dtype: torch.dtype, student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None,
               *rest: object) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    objective = asked(None if weight is None else weight.to(dtype), *rest)
    return learnt(lambda s: tnkd_reference.tnkd(s, teacher.to(dtype), target, objective), student.to(dtype))


def check_tnkd(student: Tensor, teacher: Tensor, *rest: object) -> None:
    got = run_tnkd(student, teacher, *rest)
    truth = tnkd_truth(torch.float64, student, teacher, *rest)
    own = tnkd_truth(torch.promote_types(student.dtype, torch.float32), student, teacher, *rest)
    what = f"{tuple(student.shape)} {student.dtype} {student.stride()}"
    assert_as_good_as_reference(got[0], own[0], truth[0], f"loss {what}")
    assert_as_good_as_reference(got[1], own[1], truth[1], f"parts {what}")
    assert got[2].dtype == student.dtype
    extra = HALF_ULP.get(student.dtype, 1e-6)
    assert_as_good_as_reference(got[2], own[2].to(student.dtype), truth[2], f"gradient {what}", extra)


def make_tnkd(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", label: torch.dtype = torch.uint8,
              scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    torch.manual_seed(0)
    n, k, *space = shape
    student, teacher = (strided_copy((torch.randn(shape, device=DEVICE) * scale).to(dtype), layout) for _ in range(2))
    target = torch.randint(0, min(k, 127), (n, *space), device=DEVICE)
    target = torch.where(torch.rand(target.shape, device=DEVICE) < 0.1, 100 if label == torch.int8 else 255, target)
    return student, teacher, target.to(label)


WEIGHTS = (0.7, 1.0, 2.0, 2.0)  # cross-entropy, TCKD, NCKD, temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 6, 8, 19, 24, 150])
def test_tnkd_layouts(dtype: torch.dtype, layout: str, classes: int) -> None:
    student, teacher, target = make_tnkd((2, classes, 24, 40), dtype, layout)
    check_tnkd(student, teacher, target, None, *WEIGHTS, 255, 1)


@pytest.mark.parametrize(
    "shape", [(3, 5), (1, 3, 1, 1), (2, 7, 33, 47), (2, 9, 5, 6, 8), (2, 304, 8, 8), (1, 320, 16, 16)]
)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_tnkd_shapes(shape: tuple[int, ...], reduction: int) -> None:
    student, teacher, target = make_tnkd(shape, torch.float32)
    check_tnkd(student, teacher, target, None, *WEIGHTS, 255, reduction)


@pytest.mark.parametrize("label", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("classes", [6, 19])
def test_tnkd_labels_and_class_weights(label: torch.dtype, classes: int) -> None:
    student, teacher, target = make_tnkd((2, classes, 64, 64), torch.bfloat16, label=label)
    weight = torch.rand(classes, device=DEVICE) + 0.5
    check_tnkd(student, teacher, target, weight, *WEIGHTS, 100 if label == torch.int8 else 255, 1)
    check_tnkd(student, teacher, None, None, *WEIGHTS, None, 1)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tnkd_magnitudes(dtype: torch.dtype, temperature: float) -> None:
    for classes in (6, 19):
        student, teacher, target = make_tnkd((1, classes, 16, 16), dtype, scale=1e4)
        check_tnkd(student, teacher, target, None, 0.7, 1.0, 2.0, temperature, 255, 1)


@pytest.mark.parametrize("classes", [6, 19, 21])
def test_tnkd_edges(classes: int) -> None:
    student, teacher, target = make_tnkd((2, classes, 16, 16), torch.float32)
    ignored = (target == 255).unsqueeze(1).expand_as(student)
    student[ignored], teacher[ignored] = float("nan"), float("inf")
    student[:, 1] = teacher[:, 1] = -float("inf")
    check_tnkd(student, teacher, target, None, *WEIGHTS, 255, 1)
    loss, _, grad = run_tnkd(student, teacher, torch.full_like(target, 255), None, *WEIGHTS, 255, 1)
    assert loss == 0 and (grad == 0).all()
    target[0, 0, 0] = 200
    loss, _, grad = run_tnkd(student, teacher, target, None, *WEIGHTS, 255, 1)
    assert loss.isnan() and grad[0, :, 0, 0].isnan().all()
    assert grad.isnan().sum() == classes, "only the pixel with the bad label"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 6, 11, 19, 33, 150])
@pytest.mark.parametrize("sizes", [((33, 40), (66, 20), (132, 160)), ((9, 300), (17, 128), (33, 600))], ids=str)
def test_tnkd_of_logits_smaller_than_the_labels(
    dtype: torch.dtype, classes: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    student_size, teacher_size, size = sizes
    student, _, _ = make_tnkd((2, classes, *student_size), dtype)
    _, teacher, _ = make_tnkd((2, classes, *teacher_size), torch.bfloat16)
    _, _, target = make_tnkd((2, classes, *size), dtype)
    weight = torch.rand(classes, device=DEVICE) + 0.5
    for labels, class_weight in ((target, None), (target, weight), (None, None), (None, weight)):
        check_tnkd(student, teacher, labels, class_weight, *WEIGHTS, 255, 1)
    call = (student, teacher, target, weight, *WEIGHTS, 255, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = run_tnkd(*call)
    if classes > 2 and size == (132, 160):  # at a quarter, not of the labels' size; with two classes and wide rows more
        assert torch.cuda.max_memory_allocated() - before < 2 * classes * 132 * 160 * student.element_size()
    assert all(torch.equal(a, b) for a, b in zip(first, run_tnkd(*call), strict=True))


def test_tnkd_mixed() -> None:
    student, teacher, target = make_tnkd((2, 6, 32, 32), torch.bfloat16)
    check_tnkd(student, strided_copy(teacher.float(), "channels_last"), target, None, *WEIGHTS, 255, 1)
    across = target.transpose(1, 2).contiguous().transpose(1, 2)
    check_tnkd(student.float(), teacher, across, None, None, *WEIGHTS[1:], 255, 0)
    check_tnkd(student, teacher, target, None, 0.0, *WEIGHTS[1:], 255, 1)
    empty = student[:0]
    loss, _, grad = run_tnkd(empty, teacher[:0], target[:0], None, *WEIGHTS, 255, 1)
    assert loss == 0 and grad.shape == empty.shape


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_scale(dtype: torch.dtype) -> None:
    grad = torch.randn(100_003, device=DEVICE).to(dtype)
    factor = torch.tensor(0.25, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    scaled = grad.clone()
    torch.ops.dsct_kernels.scale_(scaled, torch.ones_like(factor))
    assert torch.equal(scaled, grad)
    torch.ops.dsct_kernels.scale_(scaled, factor)
    assert torch.equal(scaled, grad * 0.25)


def check_cafd(
    student: Tensor, teacher: Tensor, channel_t: float = 1.0, spatial_t: float = 1.0, reduction: int = 1
) -> None:
    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = teacher.to(dtype)
        return learnt(lambda s: cafd_reference.cafd(s, wide, channel_t, spatial_t, reduction), student.to(dtype))

    got = learnt(lambda s: cafd_native.cafd(s, teacher, channel_t, spatial_t, reduction), student)
    truth, own = reference(torch.float64), reference(torch.promote_types(student.dtype, torch.float32))
    what = f"{tuple(student.shape)} {student.dtype} {student.stride()} from {tuple(teacher.shape)}"
    own = own[0], own[1].to(student.dtype)
    extra = HALF_ULP.get(student.dtype, 1e-6)
    assert_cafd_as_good_as_reference(got, own, truth, student, teacher, what, channel_t, spatial_t, reduction, extra)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 24, 16, 16), (1, 64, 64, 64), (3, 16, 7, 9), (2, 512, 8, 8), (1, 8, 96, 160), (1, 5, 8, 8)]
)
def test_cafd(dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    n, c, h, w = shape
    student = strided_copy(torch.randn(shape, device=DEVICE).to(dtype), layout)
    teacher = strided_copy(torch.randn(n, 2 * c, h, w, device=DEVICE).to(dtype), "channels_last")
    check_cafd(student, teacher)
    check_cafd(student, teacher[:, :, : h // 2, : w - 1], 0.5, 2.0, reduction=0)


def test_cafd_edges() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 8, 16, 16, device=DEVICE)
    check_cafd(features * 1e4, features.flip(1) * 1e4, 0.1, 0.01)
    check_cafd(features[:, :1], features)
    zero = torch.zeros_like(features).requires_grad_()
    loss = dsct_kernels.cafd_loss(zero, features, backend="native")
    loss.backward()
    assert loss.isfinite() and zero.grad.isfinite().all()
    assert dsct_kernels.cafd_loss(features, features, backend="native").abs() < 1e-6
    assert dsct_kernels.cafd_loss(features[:0], features[:0], backend="native") == 0
    features[0, 0, 0, 0] = float("nan")
    assert dsct_kernels.cafd_loss(features, features.flip(1), backend="native").isnan()


def run_matched(backend: str, student: Tensor, teacher: Tensor, target: Tensor, tau_c: float | None,
                upstream: float) -> tuple[Tensor, ...]:  # fmt: skip
    keywords = {"channel_temperature": tau_c, "temperature": 2.0, "backend": backend}
    loss_of = partial(dsct_kernels.matched_cafd_loss, teacher_logits=teacher, target=target, **keywords)
    return learnt(loss_of, student, lambda loss: torch.full_like(loss, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 128, 128), (2, 19, 33, 31), (1, 150, 32, 32), (3, 4, 1, 1)])
def test_matched_cafd(dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int]) -> None:
    """Masked, the teacher of another layout too, both forms of weights."""
    torch.manual_seed(0)
    plain = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    target = (torch.rand(shape[0], *shape[2:], device=DEVICE) < 0.2) * 255
    for teacher_layout, tau_c, upstream in ((layout, 1.0, 1.0), ("channels_last", None, 65536.0)):
        student, teacher = strided_copy(plain[0], layout), strided_copy(plain[1], teacher_layout)
        rest = target, tau_c, upstream
        got, again = (run_matched("native", student, teacher, *rest) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(got, again))
        own = run_matched("reference", student, teacher, *rest)
        truth = run_matched("reference", student.double(), teacher.double(), *rest)
        assert_as_good_as_reference(got[0], own[0], truth[0], f"loss {shape} {dtype} {layout}", 2e-6, 2e-6)
        extra = HALF_ULP.get(dtype, 2e-6)
        assert_as_good_as_reference(got[1], own[1], truth[1], f"gradient {shape} {dtype} {layout}", extra)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_map(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layout in LAYOUTS:
        features = strided_copy(torch.randn(2, 40, 12, 20, device=DEVICE).to(dtype), layout)
        got = dsct_kernels.channel_attention_map(features, backend="native")
        truth = cafd_reference.attention_map(features.double(), 1.0, 1.0)
        assert_as_good_as_reference(got, cafd_reference.attention_map(features, 1.0, 1.0), truth, layout)


class Step:
    """Forward and backward of the losses over fixed tensors."""

    def __init__(self) -> None:
        self.student, self.teacher, self.target = make_tnkd((2, 19, 64, 64), torch.float32)
        self.features = torch.randn(2, 64, 32, 32, device=DEVICE)
        self.teacher_features = strided_copy(torch.randn(2, 96, 32, 32, device=DEVICE), "channels_last")
        self.student.requires_grad_()
        self.features.requires_grad_()
        self.factor = torch.tensor(0.5, device=DEVICE)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        loss = dsct_kernels.tnkd_loss(self.student, self.teacher, self.target, backend="native")
        loss = loss + dsct_kernels.cafd_loss(self.features, self.teacher_features, backend="native")
        loss = loss + dsct_kernels.matched_cafd_loss(self.student, self.teacher, self.target, backend="native")
        return loss, *torch.autograd.grad(loss * self.factor, (self.student, self.features))


def test_no_host_sync() -> None:
    step = Step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_default_objective_in_triton_asks_nothing_of_the_host_and_gives_the_same_bits(layout: str) -> None:
    student, teacher = (strided_copy(torch.randn(2, 6, 64, 64, device=DEVICE), layout) for _ in range(2))
    target = torch.randint(0, 6, (2, 64, 64), device=DEVICE, dtype=torch.uint8)
    target[0, :9] = 255
    student.requires_grad_()

    def step(backend: str = "triton") -> tuple[Tensor, ...]:
        total = dsct_kernels.dsct_loss(student, teacher, target, backend=backend).total
        return total, *torch.autograd.grad(total * 0.5, student)

    first = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    torch.testing.assert_close(first, step("reference"), rtol=1e-4, atol=1e-6)


def test_bitwise_repeatable_and_on_a_side_stream() -> None:
    step = Step()
    first = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = step()
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(first, again):
        assert torch.equal(a, b)


def test_cuda_graph() -> None:
    step = Step()
    expected = [x.detach().clone() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for x in captured:
            x.detach().fill_(float("nan"))
        graph.replay()
        for got, want in zip(captured, expected):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numbers_on_the_gpu_are_read_there_and_a_graph_follows_them(
    backend: str, layout: str, dtype: torch.dtype
) -> None:
    """Weights, temperatures and ignore_index as tensors beside the logits: no host sync, and a captured graph takes the
    values that they have when it is replayed."""
    x = torch.empty(0, device=DEVICE)
    if backend == "triton" and (tnkd_triton.why_not(x) or cafd_triton.why_not(x)):  # which also registers their ops
        pytest.skip("Triton cannot launch kernels here")
    ending = "_triton" if backend == "triton" else ""
    tnkd, cafd, map_backward = (
        getattr(torch.ops.dsct_kernels, name + ending) for name in ("tnkd", "cafd", "attention_map_backward")
    )
    student, teacher, target = make_tnkd((2, 6, 24, 40), dtype, layout)
    features = strided_copy(torch.randn(2, 16, 24, 40, device=DEVICE), layout)
    weight = torch.rand(6, device=DEVICE)

    def step(values: Tensor, ignore_index: Tensor, temperatures: Tensor) -> list[Tensor]:
        loss, parts, grad, scale = tnkd(student, teacher, target, weight, values, ignore_index, 1, True, True)
        cafd_loss, grad_map, stats = cafd(features, features.flip(1), temperatures, 1, True)
        return [loss, parts, grad.float() * scale, cafd_loss, map_backward(features, grad_map, stats, temperatures)]

    def numbers(device: str, values: tuple[float, ...], index: int, temperatures: tuple[float, float]) -> list[Tensor]:
        return [torch.tensor(values, dtype=torch.float64, device=device), torch.tensor(index, device=device),
                torch.tensor(temperatures, dtype=torch.float64, device=device)]  # fmt: skip

    first, second = ((0.7, 1.0, 2.0, 1.5), 255, (0.5, 2.0)), ((0.0, 0.5, 1.0, 3.0), 0, (1.5, 0.7))
    held = numbers(DEVICE, *first)
    step(*held)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(*held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*held)
    for given in (first, second, first):
        for to, now in zip(held, numbers(DEVICE, *given), strict=True):
            to.copy_(now)
        graph.replay()
        for got, want in zip(captured, step(*numbers("cpu", *given)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(again, captured, strict=True))
    held[0][3] = 0.0  # which the host would refuse
    assert step(*held)[0].isnan()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    step = Step()
    first = step()
    for name in ("student", "teacher", "target", "features", "teacher_features", "factor"):
        x = getattr(step, name)
        setattr(step, name, x.detach().to("cuda:1").requires_grad_(x.requires_grad))
    second = step()
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second):
        assert torch.equal(a, b.to("cuda:0"))


def test_more_than_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    shape = (65, 8, 2048, 2048)  # 2.2e9 elements a tensor
    student = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    target = torch.randint(0, 8, (65, 2048, 2048), device=DEVICE, dtype=torch.uint8)
    loss = dsct_kernels.tnkd_loss(student, teacher, target, reduction="sum", backend="native")
    loss.backward()
    last = student.detach()[-1:].clone().requires_grad_()
    dsct_kernels.tnkd_loss(last, teacher[-1:], target[-1:], reduction="sum", backend="native").backward()
    assert torch.equal(student.grad[-1:], last.grad)
