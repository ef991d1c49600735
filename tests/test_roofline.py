"""The estimates' arithmetic: occupancy worked out by hand, bytes against the sizes of tensors. Nothing is compiled."""

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import cases, roofline


@pytest.mark.parametrize(
    "registers,shared,warps,arch,expected",
    [
        (32, 0, 4, 90, (16, 1.0, "threads")),  # 2048 / 128
        (32, 0, 1, 90, (32, 0.5, "blocks")),  # 32 blocks of 32 threads
        (32, 0, 1, 120, (24, 0.5, "blocks")),  # 24 x 32 of 1536
        (128, 0, 4, 80, (4, 0.25, "registers")),  # 65536 / (128 x 128)
        (130, 0, 4, 90, (3, 0.1875, "registers")),  # 136 x 32 a warp: 3 in each quarter of 16384, 12 warps
        (32, 48 * 1024, 8, 90, (4, 0.5, "shared")),  # 228 / (48 + 1) KiB
        (32, 48 * 1024, 8, 80, (3, 0.375, "shared")),  # 164 / 49
        (32, 48 * 1024, 8, 89, (2, 1 / 3, "shared")),  # 100 / 49; 512 of 1536
    ],
)
def test_occupancy(registers, shared, warps, arch, expected):
    assert roofline.occupancy(registers, shared, warps, arch) == expected


def asked(case):
    launches = roofline.launches_of(case)
    return {launch.kernel.__name__: roofline.bytes_of(case, launch) for launch in launches}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_bytes_are_the_tensors(layout):
    logits, labels = torch.empty(2, 6, 32, 32), torch.empty(2, 32, 32, dtype=torch.int64)
    case = cases.Case("tnkd", "2x6x32x32", layout, "fp32", cases.FORWARD_BACKWARD)
    found = asked(case)
    # student, teacher, gradient
    assert found == {
        "count_kernel": labels.nbytes,
        "tnkd_kernel": 3 * logits.nbytes + labels.nbytes,
        "finish_kernel": 0,
    }
    assert sum(found.values()) == case.floor_bytes + labels.nbytes  # the labels are counted first

    features = torch.empty(2, 64, 16, 16, dtype=torch.bfloat16)
    case = cases.Case("cafd", "2x64x16x16", layout, "bf16", cases.FORWARD_BACKWARD)
    again = 1 if layout == "channels_last" else 0  # one read more where the positions are not adjacent
    # student and teacher twice; the student and its gradient
    assert (
        sum(asked(case).values()) == (6 + again) * features.nbytes == case.floor_bytes + (2 + again) * features.nbytes
    )
    forward = cases.Case("cafd", "2x64x16x16", layout, "bf16", cases.FORWARD)
    assert sum(asked(forward).values()) == 4 * features.nbytes


def test_logits_that_do_not_fit_in_registers_are_read_twice():
    case = cases.Case("tnkd", "1x150x32x32", "contiguous", "fp32", cases.FORWARD_BACKWARD)
    assert asked(case)["tnkd_kernel"] == 5 * 4 * 150 * 32 * 32 + 8 * 32 * 32
