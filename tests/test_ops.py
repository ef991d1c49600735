"""torch.library.opcheck on every registered op: schema, fake kernel, autograd registration, torch.compile's tracing."""

import pytest
import torch

from dsct_kernels import backends
from dsct_kernels.cafd import matched_op
from dsct_kernels.cafd import op as cafd_op
from dsct_kernels.dtypes import acc_dtype
from dsct_kernels.jaccard import op as jaccard_op
from dsct_kernels.tnkd import op as tnkd_op
from tests.helpers import pairs, skip_unless_tnkd_serves, strided_copy
from tests.oracle import features, problem

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
VALUES = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
TEMPERATURES = torch.tensor([1.0, 0.5], dtype=torch.float64)


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize(
    "name,signature",
    [
        ("tnkd", tnkd_op.SIGNATURE),
        *cafd_op.SIGNATURES.items(),
        *matched_op.SIGNATURES.items(),
        *jaccard_op.SIGNATURES.items(),
    ],
)
def test_every_backend_has_the_signature_of_the_native_op(name, signature):
    """Triton's is a text in Python, since it registers without a native build; that of csrc/ops.cpp is what it says."""
    native, triton = (getattr(torch.ops.dsct_kernels, f"{name}{suffix}").default for suffix in ("", "_triton"))
    assert native._schema == torch._C.parse_schema(f"dsct_kernels::{name}{signature}")
    assert str(triton._schema) == str(native._schema).replace(f"::{name}(", f"::{name}_triton(")


def test_the_upsampling_op_takes_one_argument_more_than_tnkd():
    if backends.NATIVE_MISSING is not None:
        pytest.skip(backends.NATIVE_MISSING)
    wanted = tnkd_op.SIGNATURE.replace("bool needs_grad", "bool align_corners, bool needs_grad")
    assert torch.ops.dsct_kernels.tnkd_upsampled.default._schema == torch._C.parse_schema(
        f"dsct_kernels::tnkd_upsampled{wanted}"
    )


def op(name: str, backend: str, *tensors: torch.Tensor):
    if backend == "triton":
        skip_unless_tnkd_serves(backend, *tensors)
    if backend == "reference":
        pytest.skip("plain PyTorch, no op of its own")
    suffix = "_triton" if backend == "triton" else ""
    return getattr(torch.ops.dsct_kernels, name + suffix).default


@pytest.mark.parametrize(
    "dtype,reduction,needs_grad",
    pairs((torch.float32, torch.float16, torch.float64), (0, 1, 2), (True, False)),
    ids=str,
)
def test_tnkd_and_kd(device, backend, dtype, reduction, needs_grad):
    student, teacher, target = problem(device, dtype=dtype)
    target[0, 0] = 255
    acc = acc_dtype(student)
    weight = torch.rand(5, dtype=acc, device=device)
    for layout, labels, class_weight in (
        ("contiguous", target, None),
        ("channels_last", target.to(torch.uint8), weight),
    ):
        logits = strided_copy(student, layout).requires_grad_(needs_grad)
        arguments = (logits, teacher, labels, class_weight, VALUES, torch.tensor(255), False, reduction, needs_grad)
        torch.library.opcheck(op("tnkd", backend, student), arguments, test_utils=CHECKS)
    for coupled in (False, True):
        without_ce = (logits, teacher, labels, None, VALUES[1:], torch.tensor(255), coupled, reduction, needs_grad)
        torch.library.opcheck(op("tnkd", backend), without_ce, test_utils=CHECKS)


@pytest.mark.parametrize(
    "dtype,reduction,needs_grad",
    pairs((torch.float32, torch.bfloat16, torch.float64), (0, 1), (True, False)),
    ids=str,
)
def test_cafd(device, backend, dtype, reduction, needs_grad):
    student, teacher = features(device, dtype=dtype)
    teacher = teacher[:, :3, :4] if (device, backend) == ("cpu", "native") else teacher[:, :3]  # elsewhere of one size
    for layout in ("contiguous", "channels_last"):
        leaf = strided_copy(student, layout).requires_grad_(needs_grad)
        arguments = (leaf, teacher, TEMPERATURES, reduction, needs_grad)
        torch.library.opcheck(op("cafd", backend, student), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attention_map(device, backend, dtype):
    x = features(device, dtype=dtype)[0]
    torch.library.opcheck(
        op("attention_map", backend, x), (x.clone().requires_grad_(), TEMPERATURES), test_utils=CHECKS
    )
    attention, stats = op("attention_map", backend)(x, TEMPERATURES)
    arguments = (x, torch.randn_like(attention), stats, TEMPERATURES)
    torch.library.opcheck(op("attention_map_backward", backend), arguments, test_utils=CHECKS)
