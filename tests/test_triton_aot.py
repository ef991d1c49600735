"""The Triton kernels compiled for sm_80, sm_90 and sm_100 with no GPU: registers, spills, shared memory, access widths.

`python -m pytest tests/test_triton_aot.py -s` prints the table. On the contiguous path every load of features and every
store of their gradient has to be 16 bytes wide, of logits as wide as the plan has it; numbers of which there is one a
channel or a program are not. TNKD's instructions a pixel are held to bars.

A process whose kernels are interpreted cannot compile them: there, one test runs this file in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

from dsct_kernels import triton_common
from dsct_kernels.cafd import matched_triton as matched
from dsct_kernels.cafd import triton as cafd
from dsct_kernels.jaccard import triton as jaccard
from dsct_kernels.tnkd import triton as tnkd
from dsct_kernels.tnkd import triton_upsampled as upsampled
from tools.inspect.aot import BIN, SHARED_LIMIT, Launch, Report, recorded, report, specialised

pytestmark = pytest.mark.skipif(not (BIN / "nvdisasm").exists(), reason="this Triton brings no NVIDIA tools")
# Thread instructions a pixel of 16 x K x 512 x 512, on 132 multiprocessors: bars, by classes, layout, dtype, with_ce.
MOST_INSTRUCTIONS = {
    (19, "contiguous", torch.bfloat16, False): 800,
    (19, "contiguous", torch.bfloat16, True): 940,
    (19, "contiguous", torch.float32, False): 810,
    (19, "contiguous", torch.float32, True): 960,
    (150, "contiguous", torch.bfloat16, False): 6850,
    (150, "contiguous", torch.bfloat16, True): 9000,
    (150, "contiguous", torch.float32, False): 7050,
    (150, "contiguous", torch.float32, True): 8350,
    (6, "contiguous", torch.bfloat16, False): 355,
    (6, "contiguous", torch.float32, True): 425,
    (6, "channels_last", torch.bfloat16, True): 460,
    (6, "channels_last", torch.float32, False): 350,
    (19, "channels_last", torch.bfloat16, False): 970,
    (19, "channels_last", torch.float32, True): 960,
    (150, "channels_last", torch.bfloat16, True): 7410,
    (150, "channels_last", torch.float32, False): 6050,
    # the most classes of a row of the plan, in the fewest registers
    (32, "channels_last", torch.bfloat16, True): 1330,
    (40, "contiguous", torch.bfloat16, True): 2280,
    (320, "channels_last", torch.bfloat16, True): 14300,
    (320, "contiguous", torch.bfloat16, False): 14600,
    (1024, "channels_last", torch.bfloat16, True): 53000,
    (1024, "contiguous", torch.bfloat16, True): 64400,
}
TNKD_CASES = list(MOST_INSTRUCTIONS)
# The same of labels 16 x 512 x 512 and logits of a quarter of that, by classes, dtype, with_ce; and bytes spilt. They
# take long to compile: docs/gpu.md has the others.
MOST_UPSAMPLED = {
    (6, torch.float32, False): (450, 0),
    (6, torch.bfloat16, True): (555, 0),
    (19, torch.bfloat16, True): (1190, 0),
    (150, torch.float32, True): (10700, 0),
}
CAFD_CASES = [
    (dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in ("contiguous", "channels_last")
]
# The same of matched CAFD and Jaccard, 16 x K x 128 x 128 with ignored cells, a logit and a pixel: forward, backward.
MOST_OF_MAPS = {
    ("matched", 6, "contiguous", torch.float32): (56, 33),
    ("matched", 6, "channels_last", torch.bfloat16): (87, 51),
    ("matched", 150, "contiguous", torch.bfloat16): (40, 36),
    ("matched", 150, "channels_last", torch.float32): (40, 42),
    ("jaccard", 6, "contiguous", torch.bfloat16): (190, 222),
    ("jaccard", 19, "channels_last", torch.bfloat16): (630, 770),
    ("jaccard", 150, "contiguous", torch.bfloat16): (5200, 6850),
    ("jaccard", 150, "channels_last", torch.float32): (4000, 4600),
}
CHIPS = [90, 80, 100]
# The ops' numbers: the weights of cross-entropy, TCKD and NCKD and the temperature, ignore_index, CAFD's temperatures.
NUMBERS, INDEX = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64), torch.tensor(255)
TEMPERATURES = torch.ones(2, dtype=torch.float64)
compiled = pytest.mark.skipif(triton_common.interpreted(), reason="run by test_in_a_process_of_its_own")


@pytest.mark.skipif(not triton_common.interpreted(), reason="this process can compile")
@pytest.mark.parametrize("chosen", ["test_tnkd and sm90", "not (test_tnkd and sm90)"])  # halves, for two workers
def test_in_a_process_of_its_own(chosen):
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-k",
        chosen,
        str(Path(__file__)),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> Tensor:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device).contiguous(memory_format=form)


def vectors(launch: Launch, values: int, itemsize: int) -> int:
    """16-byte accesses of a thread for so many values of a program."""
    return values * itemsize // (16 * 32 * launch.warps)


def per_pixel(result: Report, launch: Launch) -> float:
    """Thread instructions a pixel of tnkd_kernel, the programs' beginnings and ends included."""
    pixels = launch.argument("target").numel()
    return result.issued(launch.argument("tiles") / launch.programs) * launch.programs * launch.warps * 32 / pixels


def check(result: Report) -> None:
    print(result.row())
    assert result.registers > 0 and result.loads and result.stores, "the machine code was not understood"
    once = 8 if result.loops and not result.spilt_in_loops else 0  # a number kept over a loop, written and read once
    assert result.spills <= once, "registers are spilt to memory"
    assert result.shared <= SHARED_LIMIT[result.arch], "more shared memory than the chip has"


def tnkd_launches(
    classes: int, dtype: torch.dtype, layout: str, with_ce: bool, by_pointer: bool = False, coupled: bool = False
) -> dict[str, Launch]:
    logits = laid_out((16, classes, 512, 512), dtype, layout, "meta")
    labels = torch.empty(16, 512, 512, dtype=torch.int64, device="meta")
    with recorded(tnkd) as launches:
        numbers = NUMBERS if with_ce else NUMBERS[1:]
        tnkd.forward(logits, logits, labels, None, numbers, INDEX, coupled, 1, True, by_pointer=by_pointer)
    return {launch.kernel.__name__: launch for launch in launches}


def upsampled_launches(
    samples: int, classes: int, cells: int, labels: int, dtype: torch.dtype, with_ce: bool, weight: Tensor | None = None
) -> dict[str, Launch]:
    logits = torch.empty(samples, classes, cells, cells, dtype=dtype, device="meta")
    target = torch.empty(samples, labels, labels, dtype=torch.int64, device="meta")
    with recorded(tnkd, upsampled) as launches:
        numbers = NUMBERS if with_ce else NUMBERS[1:]
        upsampled.forward(logits, logits, target, weight, numbers, INDEX, False, 1, False, True, by_pointer=False)
    return {launch.kernel.__name__: launch for launch in launches}


@compiled
@pytest.mark.parametrize("classes,dtype,with_ce", MOST_UPSAMPLED, ids=str)
def test_tnkd_of_smaller_logits(classes, dtype, with_ce):
    """Instructions a pixel of the labels, from machine code and trip counts; each row of cells is fetched once."""
    launches = upsampled_launches(16, classes, 128, 512, dtype, with_ce)
    walk = launches["march_kernel"]
    result = report(f"march {classes} {str(dtype)[6:]}{' ce' if with_ce else ''}", walk, 90)
    print(result.row())
    instructions = result.walked(walk) * walk.programs * walk.warps * 32 / (16 * 512**2)
    most, spilt = MOST_UPSAMPLED[classes, dtype, with_ce]
    print(f"{instructions:>44.0f} of {most} thread instructions a pixel")
    assert instructions <= most and result.spills <= spilt
    assert set(result.loads) <= {dtype.itemsize, 8}, "logits and labels are all that is loaded"
    lane = walk.constants["V"].pixels * walk.constants["V"].classes // (32 * walk.warps)
    assert result.loads[dtype.itemsize] == 2 * 2 * walk.constants["V"].chunks * lane  # two networks, two cells
    if classes == 6:
        for name, launch in launches.items():
            if name != "march_kernel":
                check(report(name, launch, 90))


def on_chips(cases: list[tuple[object, ...]]) -> list[object]:
    """Everything for sm_90; for the others what has to be wide."""
    wide = [case for case in cases if "contiguous" in case and True not in case and case[0] != 320]
    chosen = [(90, *case) for case in cases] + [(chip, *case) for chip in CHIPS[1:] for case in wide]
    return [pytest.param(*case, id="-".join(map(str, (f"sm{case[0]}", *case[1:])))) for case in chosen]


@compiled
@pytest.mark.parametrize("chip,classes,layout,dtype,with_ce", on_chips(TNKD_CASES))
def test_tnkd(chip, classes, layout, dtype, with_ce):
    launch = tnkd_launches(classes, dtype, layout, with_ce)["tnkd_kernel"]
    sizes = launch.constants["V"]
    result = report(f"tnkd {classes} {str(dtype)[6:]} {layout}{' ce' if with_ce else ''}", launch, chip)
    check(result)
    instructions, most = per_pixel(result, launch), MOST_INSTRUCTIONS[classes, layout, dtype, with_ce]
    print(f"{instructions:>44.0f} of {most} thread instructions a pixel")
    assert chip != 90 or instructions <= most
    if layout != "contiguous":
        return
    # both networks: as many bytes as the plan gives a lane; each lane has the labels of its own pixels, and wider are
    # only these and the counts that the first kernel left; 4 bytes: the sums of this program
    width = sizes.classes * sizes.pixels * dtype.itemsize // (32 * launch.warps)
    others = tnkd.COUNT_PROGRAMS // (32 * launch.warps) if width == 4 else 0
    labels = 8 * width // dtype.itemsize  # bytes
    others += -(-labels // 16) if width == min(16, labels) else 0
    assert result.loads[width] == 2 * sizes.chunks + others and set(result.loads) <= {width, 4, 8, 16}
    sums = 3 if with_ce else 2
    assert result.stores[width] == sizes.chunks + (sums if width == 4 else 0) and set(result.stores) <= {width, 4}


@compiled
@pytest.mark.parametrize("classes,layout", [(6, "contiguous"), (150, "contiguous"), (19, "channels_last")])
@pytest.mark.parametrize("dtype,with_ce", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_tnkd_with_its_numbers_in_device_memory(classes, layout, dtype, with_ce):
    """The kernels that read their numbers themselves: no spill, and every access of a logit as wide as without."""
    either = (tnkd_launches(classes, dtype, layout, with_ce, by_pointer) for by_pointer in (False, True))
    for launch, pointed in zip(*(launches.values() for launches in either), strict=True):
        name = launch.kernel.__name__
        known, read = report(name, launch, 90), report(f"{name} by pointer", pointed, 90)
        check(read)
        assert read.loads.get(4) == known.loads.get(4) and read.stores == known.stores


@compiled
@pytest.mark.parametrize("classes,layout,dtype", [(6, "contiguous", torch.float32), (150, "contiguous", torch.bfloat16),
                                                  (19, "channels_last", torch.float32)], ids=str)  # fmt: skip
def test_plain_kd_takes_no_more_than_tnkd(classes, layout, dtype):
    """No spill, and the same accesses."""
    alone, coupled = (
        tnkd_launches(classes, dtype, layout, False, coupled=kind)["tnkd_kernel"] for kind in (False, True)
    )
    of_tnkd, of_kd = report("tnkd", alone, 90), report("kd", coupled, 90)
    check(of_kd)
    assert of_kd.loads == of_tnkd.loads and of_kd.stores == of_tnkd.stores


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cafd_with_its_temperatures_in_device_memory(layout):
    features = laid_out((2, 256, 64, 64), torch.float32, layout)
    for_each = []
    for by_pointer in (False, True):
        with recorded(cafd) as launches:
            _, grad_map, stats = cafd.forward(features, features, TEMPERATURES, 1, True, None, by_pointer)
            cafd.map_backward(features, grad_map, stats, TEMPERATURES, None, by_pointer)
        for_each.append(launches)
    for launch, pointed in zip(*for_each, strict=True):
        name = launch.kernel.__name__
        known, read = report(name, launch, 90), report(f"{name} by pointer", pointed, 90)
        check(read)
        assert read.loads.get(16) == known.loads.get(16) and read.stores == known.stores


@compiled
@pytest.mark.parametrize("chip", CHIPS)
def test_tnkd_small_kernels(chip):
    launches = tnkd_launches(6, torch.float32, "contiguous", False)
    for name in ("count_kernel", "finish_kernel"):
        result = report(name, launches[name], chip)
        check(result)
        if name == "count_kernel":
            assert set(result.loads) == {16}, "labels are read 16 bytes at a time"
    with recorded(tnkd) as scale:
        tnkd.scale_in_place(torch.empty(2**20, dtype=torch.bfloat16), torch.ones(()))
    result = report("scale_kernel", scale[0], chip)
    check(result)
    assert set(result.stores) == {16} and result.loads == {4: 1, 16: result.stores[16]}


@compiled
@pytest.mark.parametrize("chip,dtype,layout", on_chips(CAFD_CASES))
def test_cafd(chip, dtype, layout):
    features = laid_out((2, 256, 64, 64), dtype, layout)
    with recorded(cafd) as launches:
        _, grad_map, stats = cafd.forward(features, features, TEMPERATURES, 1, True)
        cafd.map_backward(features, grad_map, stats, TEMPERATURES)
    for launch in launches:
        name, sizes = launch.kernel.__name__, launch.constants
        result = report(f"{name} {str(dtype)[6:]} {layout}", launch, chip)
        check(result)
        if name in ("row_stats_kernel", "maps_kernel", "rho_kernel", "write_kernel"):
            assert set(result.loads) <= {16, 4}, "narrow loads of features"  # 4: a number of stats
        if name in ("row_stats_kernel", "maps_kernel"):  # one code path a network
            tiles = sizes["TILE_S"], sizes["TILE_T"]
            held = [tile.channels * tile.positions * tile.unroll for tile in tiles]
            assert result.loads[16] >= sum(vectors(launch, values, dtype.itemsize) for values in held)
        if name == "row_stats_kernel":
            assert set(result.loads) == {16}
        if name == "write_kernel":
            tile = sizes["TILE"].channels * sizes["TILE"].positions
            assert set(result.stores) == {16}, "narrow stores of the gradient"
            assert result.loads[16] >= vectors(launch, tile, dtype.itemsize) == result.stores[16]
    names = {launch.kernel.__name__ for launch in launches}
    assert len(launches) == len(names) == (6 if layout == "contiguous" else 7)


def map_launches(loss: str, student: Tensor, teacher: Tensor, masked: bool = True) -> list[Launch]:
    """The launches of matched CAFD or of Jaccard, forward and backward; reduction mean."""
    samples, _, *size = student.shape
    device = student.device
    module = matched if loss == "matched" else jaccard
    with recorded(module) as launches:
        if loss == "matched":
            mask = torch.empty(samples, 1, *size, dtype=torch.bool, device=device) if masked else None
            value, stats = matched.forward(student, teacher, mask, TEMPERATURES, False, 1, by_pointer=False)
            matched.backward(student, teacher, mask, stats, TEMPERATURES, value, 1, by_pointer=False)
        else:
            wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
            share = torch.empty(samples, *size, dtype=wide, device=device) if masked else None
            _, coefficients = jaccard.forward(student, teacher, share, TEMPERATURES[:1], by_pointer=False)
            jaccard.backward(student, teacher, share, TEMPERATURES[:1], coefficients, by_pointer=False)
    return launches


def per_element(result: Report, launch: Launch, student: Tensor) -> float:
    """Thread instructions of a launch, a logit of matched CAFD's maps or a pixel of Jaccard's."""
    issued, per = float(result.instructions), student.numel()
    if "tiles" in launch.kernel.arg_names:
        issued, per = result.issued(launch.argument("tiles") / launch.programs), per // student.shape[1]
    elif result.loops:
        issued = result.issued(launch.argument("steps"))
    return issued * launch.programs * launch.warps * 32 / per


@compiled
@pytest.mark.parametrize(("loss", "classes", "layout", "dtype"), MOST_OF_MAPS, ids=str)
def test_matched_and_jaccard(loss, classes, layout, dtype):
    student = laid_out((16, classes, 128, 128), dtype, layout, "meta")
    counted = []
    for launch in map_launches(loss, student, student):
        name = launch.kernel.__name__
        result = report(f"{name} {classes} {str(dtype)[6:]} {layout}", launch, 90)
        check(result)
        if name in ("matched_join_kernel", "jaccard_finish_kernel"):
            continue
        counted.append(per_element(result, launch, student))
        print(f"{counted[-1]:>44.0f} thread instructions")
        if loss == "matched" and layout == "contiguous":  # a lane's values, of both networks
            width = 16 if name == "matched_write_kernel" else 4 * dtype.itemsize
            values = launch.constants["TILE"].positions * launch.constants["TILE"].unroll // (32 * launch.warps)
            assert result.loads[width] >= 2 * values * dtype.itemsize // width
    bars = MOST_OF_MAPS[loss, classes, layout, dtype]
    assert all(count <= most for count, most in zip(counted, bars, strict=True)), (counted, bars)


@compiled
@pytest.mark.parametrize("chip", CHIPS[1:])
@pytest.mark.parametrize("loss", ["matched", "jaccard"])
def test_matched_and_jaccard_on_other_chips(loss, chip):
    student = laid_out((16, 19, 128, 128), torch.bfloat16, "contiguous", "meta")
    for launch in map_launches(loss, student, laid_out(student.shape, torch.float32, "channels_last", "meta")):
        check(report(launch.kernel.__name__, launch, chip))


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_ce", [False, True])
def test_another_batch_size_compiles_nothing(layout, with_ce):
    """Batches of 1, of a multiple of 16, of an odd number: Triton would make a kernel of its own for each of them.

    H x W = 3 x 128: whole tiles at every batch, and no more than that.
    """

    def variants(samples: int) -> set[tuple[object, ...]]:
        logits = laid_out((samples, 6, 8, 48), torch.float32, layout)
        features = laid_out((samples, 24, 24, 32), torch.float32, layout)
        labels = torch.empty(samples, 8, 48, dtype=torch.int64)
        weight = torch.empty(6) if with_ce else None
        with recorded(tnkd, cafd) as launches:
            numbers = NUMBERS if with_ce else NUMBERS[1:]
            tnkd.forward(logits, logits, labels, weight, numbers, INDEX, False, 1, True)
            _, grad_map, stats = cafd.forward(features, features, TEMPERATURES, 1, True)
            cafd.map_backward(features, grad_map, stats, TEMPERATURES)
            tnkd.scale_in_place(logits, torch.ones(()))
        launches += map_launches("matched", logits, logits) + map_launches("jaccard", logits, logits)
        small = upsampled_launches(samples, 6, 8, 32, torch.float32, with_ce, weight)
        launches += small.values()
        return {(x.kernel.__name__, x.warps, *specialised(x).items()) for x in launches}

    once = variants(4)
    for samples in (1, 2, 3, 15, 16, 17, 32, 200):
        assert variants(samples) == once, [
            (a[0], [(p, q) for p, q in zip(a[1:], b[1:], strict=True) if p != q])
            for a, b in zip(sorted(variants(samples), key=str), sorted(once, key=str), strict=True)
        ]


@compiled
def test_the_report_sees_spills_and_narrow_loads():
    """What the tests above look for is there when it should be: too many registers asked of a thread, an odd width."""
    launch = tnkd_launches(150, torch.float32, "contiguous", True)["tnkd_kernel"]
    wide = launch.constants["V"]._replace(pixels=64)
    crowded = Launch(launch.kernel, launch.programs, 1, launch.args, {**launch.constants, "V": wide})
    report_ = report("crowded", crowded, 90)
    assert report_.spills > 0 and report_.spilt_in_loops > 0
    with pytest.raises(AssertionError, match="spilt"):
        check(report_)
    odd = laid_out((2, 6, 9, 7), torch.bfloat16, "contiguous")  # whose lanes hold 8 bytes of even rows
    with recorded(tnkd) as launches:
        tnkd.forward(odd, odd, torch.empty(2, 9, 7, dtype=torch.int64), None, NUMBERS[1:], None, False, 1, True)
    assert 2 in report("odd width", launches[0], 90).loads
