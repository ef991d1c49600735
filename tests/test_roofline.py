"""The estimates' arithmetic: occupancy worked out by hand, bytes against the sizes of tensors, no kernel compiled."""

import math
import shutil

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import cases, roofline
from tools.inspect import nvcc
from tools.inspect.cuda_host import harness


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


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("loss", "cell"), [("matched", 1), ("jaccard", 4)])
def test_maps_are_read_once_forward_and_once_backward(loss, cell, layout):
    case = cases.Case(loss, "2x6x32x32", layout, "fp32", cases.FORWARD_BACKWARD)
    assert sum(asked(case).values()) == case.floor_bytes + 2 * cell * 2 * 32 * 32  # what torch made of the labels
    launches = roofline.launches_of(case)
    assert len(launches) == 3 and all(roofline.trips_of(x) for x in launches)
    joined = cases.Case("dsct", "2x6x32x32", layout, "fp32", cases.FORWARD_BACKWARD)
    assert len(roofline.launches_of(joined)) == 3 + 3 + 3
    assert [call.op for call in roofline.native_cases(case)] == (["matched"] if loss == "matched" else [])
    assert [call.op for call in roofline.native_cases(joined)] == ["tnkd", "matched"]


def test_issue_time_counts_every_warp_of_what_is_known():
    known = roofline.Kernel("tnkd_kernel", 1000, 2, 128, 0, 0, 0, None, 500)
    small = roofline.Kernel("finish_kernel", 1, 8, 32, 0, 0, 0)
    assert roofline.issue_us([known, small], 1e5) == 10  # 500 x 2 x 1000
    assert roofline.issue_us([small], 1e5) is None


def test_what_is_expected_of_memory_instructions_and_the_tail():
    streams = roofline.Kernel("tnkd_kernel", 1000, 2, 128, 0, 0, 10**9, None, 500)  # 334 us at 3 TB/s; 13 us of issue
    computes = roofline.Kernel("tnkd_kernel", 10**5, 2, 128, 0, 0, 10**6, None, 500)  # 0.3 us; 1333 us
    tail = roofline.Kernel("finish_kernel", 1, 8, 32, 0, 0, 0, None, 100, trips=3)
    found = roofline.expected_us([streams, computes, tail], 3000 / roofline.COPY, 1e5)
    one, other = (1e6 / 3000, 1e6 / 0.75e5), (1e3 / 3000, 1e8 / 0.75e5)
    assert found == pytest.approx(math.hypot(*one) + math.hypot(*other) + 3 + 3 * roofline.LAUNCH_US)
    unknown = roofline.Kernel("maps_kernel", 1, 8, 32, 0, 0, 0)
    assert roofline.expected_us([streams, unknown], 3000, 1e5) is None


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("classes,layout", [(19, "contiguous"), (150, "channels_last")])
def test_the_programs_share_out_the_tiles_and_leave_few_sums(classes, layout, multiprocessors):
    case = cases.Case("tnkd", f"16x{classes}x512x512", layout, "bf16", cases.FORWARD_BACKWARD)
    count, walk, finish = roofline.launches_of(case, multiprocessors)
    trips = [roofline.trips_of(launch) for launch in (count, walk, finish)]
    assert trips[0] * count.programs * count.constants["BLOCK"] == 16 * 512 * 512
    assert trips[1] * walk.programs * walk.constants["V"].pixels == 16 * 512 * 512
    assert walk.programs == multiprocessors * 64 == finish.argument("num_programs")
    assert trips[2] == (1 if multiprocessors == 1 else 3)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("c++filt")), reason="needs g++ and c++filt")
def test_native_launches_are_the_plans_of_the_cuda_sources(tmp_path):
    driver = harness.build(tmp_path, "list")

    def listed(*names: str) -> list[tuple[str, int, int, int, int]]:
        case = cases.Case(*names, cases.FORWARD_BACKWARD)
        found = []
        for call in roofline.native_cases(case):
            call.numbers |= {"multiprocessors": 132, "shared_bytes": 227 * 1024}
            launches = harness.launches(driver, call, tmp_path / "case")
            for launch, name in zip(launches, nvcc.demangled([x.kernel for x in launches]), strict=True):
                asked = roofline.native_bytes_of(case, name)
                found.append((name.split("<")[0], launch.blocks, launch.threads, launch.shared, asked))
        return found

    size, labels = 2 * 4 * 6 * 512 * 512, 8 * 4 * 512 * 512
    encode, whole = listed("tnkd", "4x6x512x512", "contiguous", "bf16")
    assert encode[0] == "encode_labels" and encode[-1] == labels + labels // 8
    assert whole[:3] == ("tnkd_kernel", 132 * 4, 128) and whole[-1] == 3 * size + labels // 8
    size = 4 * 16 * 150 * 512 * 512  # 2.5 GB: nothing is allocated
    _, split = listed("tnkd", "16x150x512x512", "channels_last", "fp32")  # 8 warps a pixel, 16 a multiprocessor
    assert split[:3] == ("tnkd_kernel", 132 * 2, 256) and split[-1] == 3 * size + 2 * 16 * 512 * 512
    assert split[3] > 2 * 32 * 600, "a tile of 32 pixels of either network"
    size = 4 * 4 * 512 * 64 * 64
    rows = listed("cafd", "4x512x64x64", "contiguous", "fp32")
    once = {"channel_weights": 0, "compare_maps": 0, "map_products": 0}  # next to nothing
    twice = {"channel_stats": 2 * size, "attention_maps": 2 * size}
    assert {row[0]: row[-1] for row in rows} == twice | once | {"channel_gradient": 2 * size}
    assert rows[-1][3] == 4 * 64 * 64 + 4 * 256, "a row of each block, and a number for each thread"
    columns = {row[0]: row[-1] for row in listed("cafd", "4x512x64x64", "channels_last", "fp32")}
    assert columns == twice | once | {"channel_rho": size, "channel_gradient": 2 * size}
    *_, rho, long = listed("cafd", "1x8x256x256", "contiguous", "fp32")  # a row takes more than half of a block's room
    assert (rho[0], long[0], long[3]) == ("channel_rho", "channel_gradient", 4 * 256)
    size, cells = 4 * 4 * 6 * 128 * 128, 4 * 128 * 128
    for layout in cases.LAYOUTS:  # the mask of its labels, of 8 bytes each, is made first
        asked = {row[0]: row[-1] for row in listed("matched", "4x6x128x128", layout, "fp32")}
        assert asked == {"matched_sums": 2 * size + 9 * cells, "matched_weights": 0,
                         "matched_gradient": 3 * size + cells}  # fmt: skip
