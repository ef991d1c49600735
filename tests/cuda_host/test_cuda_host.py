"""The CUDA kernels, compiled for the host behind a shim and run without a GPU.

Once with every access checked for its alignment, once under ThreadSanitizer (a missing barrier is a data race), once
under AddressSanitizer (shared memory and tensors are allocations of exactly their size). The last tests break a copy of
the source on purpose, and show that the sanitizers notice.

Looked at instead of a shim of our own: HIP-CPU (header-only, wants HIP syntax and TBB, its fibres hide races from
ThreadSanitizer; no longer maintained), numba's CUDA simulator (Python kernels only), gpuocelot and CuPBoP (compile PTX
or LLVM IR, not packaged). compute-sanitizer needs a GPU.
"""

import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsct_kernels.tnkd import plan
from tools.inspect.cuda_host.harness import ROOT, Case, build, launches, run, run_raw

from .cases import (
    CAFD,
    CAFD_ON_DEVICE,
    LAYOUTS_OF_KERNELS,
    MATCHED,
    MATCHED_LAYOUTS,
    ON_DEVICE,
    PLANES,
    PLANES_SPLIT,
    SMALL_CAFD,
    SMALL_MATCHED,
    SMALL_TNKD,
    SMALL_UPSAMPLED,
    TILES,
    TNKD,
    UPSAMPLED,
    CafdCase,
    MatchedCase,
    TnkdCase,
    UpsampledCase,
    cells_of_ignored,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda_host")


def check_all(driver: Path, folder: Path, cases: list[TnkdCase] | list[CafdCase] | list[MatchedCase]) -> None:
    results = run(driver, [case.case() for case in cases], folder)
    for case, (kernels, got) in zip(cases, results):
        case.check(kernels, got)


@pytest.fixture(scope="session")
def plain(folder: Path) -> Path:
    return build(folder, "plain")


def test_tnkd(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "tnkd", TNKD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_launches_in_planes_are_those_of_tritons_table(plain: Path, folder: Path, dtype: torch.dtype) -> None:
    fewest = 2
    for row in plan.PLANES[:6]:
        lanes, pixels = row.lanes, row.pixels_of_4 if dtype.itemsize == 4 else row.pixels_of_2
        for k in (fewest, row.most_classes):
            case = TnkdCase(PLANES, (1, k, 16, 512), dtype).case()
            case.numbers["multiprocessors"] = 1024  # a block for every tile
            _, kernel = launches(plain, case, folder / "launches")
            assert kernel.threads == (128 if lanes == 1 else 32 * lanes), k
            assert 16 * 512 / kernel.blocks * lanes / kernel.threads == pixels, k
        fewest = row.most_classes + 1


def test_cuda_and_triton_read_one_table_of_planes(tmp_path: Path) -> None:
    for edit in (str, lambda text: text.replace("{20, 1, 2, 1, 1}", "{16, 1, 4, 1, 2}")):
        table = tmp_path / "dsct_kernels/tnkd/planes.inc"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(edit((ROOT / "dsct_kernels/tnkd/planes.inc").read_text()))
        rows = "".join(
            f"static_assert(p[{i}].{name} == {number});\n"
            for i, row in enumerate(plan.read_planes(table))
            for name, number in row._asdict().items()
        )
        source = tmp_path / "rows.cpp"
        source.write_text(f'#include "tnkd/plan.h"\nconstexpr auto& p = dsct::kPlanes;\n{rows}'
                          f"static_assert(sizeof(p) / sizeof(*p) == {len(plan.PLANES)});\n")  # fmt: skip
        command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", str(source)]
        subprocess.run(command, check=True)
        if edit is not str:
            assert plan.read_planes(table) != plan.PLANES


def test_tnkd_of_logits_smaller_than_the_labels(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "upsampled", UPSAMPLED)


def test_cells_that_only_ignored_pixels_touch_have_no_gradient(plain: Path, folder: Path) -> None:
    cases = [UpsampledCase("", (1, k, 6, 8), size=(24, 32), logits=cells_of_ignored) for k in (6, 33)]
    for _, got in run(plain, [case.case() for case in cases], folder / "ignored"):
        assert (got["grad"][..., :2] == 0).all() and (got["grad"][..., 3:] != 0).any()


def test_tnkd_with_its_numbers_in_device_memory(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "on_device", ON_DEVICE)


def test_numbers_in_device_memory_that_the_host_would_refuse_make_the_loss_nan(plain: Path, folder: Path) -> None:
    nan, inf = float("nan"), float("inf")
    good, cases = (0.5, 1.0, 2.0), []
    for kernel, shape, layout in LAYOUTS_OF_KERNELS:
        case = partial(TnkdCase, kernel, shape, layout=layout, on_device="values")
        cases += [case(temperature=t, reduction=r) for t in (0.0, -1.0, nan, inf) for r in (0, 1)]
        for i in range(3):
            cases += [case(weights=(*good[:i], w, *good[i + 1 :]), with_ce=i == 0) for w in (-1.0, nan, inf, -inf)]
    for case, (_, got) in zip(cases, run(plain, [case.case() for case in cases], folder / "refused"), strict=True):
        loss = got["loss_map"] if case.reduction == 0 else got["loss"]
        assert loss.isnan().all(), case


def test_numbers_in_device_memory_give_the_bits_of_numbers_where_no_other_kernel_is_chosen_for_them(
    plain: Path, folder: Path
) -> None:
    cases = [
        TnkdCase(kernel, shape, dtype, layout=layout, temperature=t, with_ce=ce, weighted=ce, on_device=where)
        for kernel, shape, layout in LAYOUTS_OF_KERNELS
        for dtype in (torch.float32, torch.float16)
        for t, ce in ((3.0, True), (0.3, True), (2.0, False))
        for where in ("", "values", "ignore_index", "values ignore_index")
    ]
    results = [got for _, got in run(plain, [case.case() for case in cases], folder / "bits")]
    for case, got, host in zip(cases, results, (r for r in results[::4] for _ in range(4)), strict=True):
        for name, value in got.items():
            assert torch.equal(value, host[name]), (name, case)


def test_cafd(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "cafd", CAFD)


def test_matched_cafd(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "matched", MATCHED)


def test_masked_positions_get_0_whatever_comes_from_upstream(plain: Path, folder: Path) -> None:
    cases = [
        MatchedCase(*at[:2], layout=at[2], masked=0.2, reduction=r, upstream=upstream)
        for at in MATCHED_LAYOUTS[1:4]
        for r, upstream in ((1, float("nan")), (0, float("inf")))
    ]
    for case, (_, got) in zip(cases, run(plain, [c.case() for c in cases], folder / "upstream"), strict=True):
        counts = case.mask.expand_as(got["grad"])
        assert not got["grad"][~counts].any() and not got["grad"][counts].isfinite().any(), case


TEMPERATURES = [(1.0, 1.0), (0.1, 0.5), (3.0, 0.05)]


@pytest.mark.parametrize("channel,spatial", TEMPERATURES)
def test_cafd_with_its_temperatures_in_device_memory(plain: Path, folder: Path, channel: float, spatial: float) -> None:
    """Within the error rule of the reference, and the bits of the temperatures as numbers."""
    cases = [case(channel_temperature=channel, spatial_temperature=spatial) for case in CAFD_ON_DEVICE]
    check_all(plain, folder / "cafd_on_device", cases)
    host = [replace(case, on_device=False) for case in cases]
    results = [run(plain, [case.case() for case in each], folder / "cafd_bits") for each in (cases, host)]
    for case, (_, got), (_, wanted) in zip(cases, *results, strict=True):
        assert all(torch.equal(value, wanted[name]) for name, value in got.items()), case


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_in_device_memory_that_the_host_would_refuse_make_everything_nan(
    plain: Path, folder: Path, bad: float
) -> None:
    cases = [case(channel_temperature=bad) for case in CAFD_ON_DEVICE]
    cases += [case(spatial_temperature=bad, reduction=0) for case in CAFD_ON_DEVICE]
    for kernels, shape, layout in MATCHED_LAYOUTS[1:4]:
        matched = partial(MatchedCase, kernels, shape, layout=layout, on_device=True)
        cases += [matched(temperature=bad), matched(channel_temperature=bad, reduction=0)]
    for case, (_, got) in zip(cases, run(plain, [c.case() for c in cases], folder / "cafd_refused"), strict=True):
        assert got["loss" if "loss" in got else "map"].isnan().all(), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale(plain: Path, folder: Path, dtype: torch.dtype, factor: float) -> None:
    grad = torch.randn(1003).to(dtype)
    case = Case("scale", {"factor": torch.tensor(factor)}, {"grad": grad})
    _, got = run(plain, [case], folder / "scale")[0]
    assert torch.equal(got["grad"], grad * factor)


def test_no_race(folder: Path) -> None:
    """ThreadSanitizer, one thread per CUDA thread."""
    driver = build(folder, "thread")
    check_all(driver, folder / "race_tnkd", SMALL_TNKD)
    check_all(driver, folder / "race_upsampled", SMALL_UPSAMPLED)
    check_all(driver, folder / "race_cafd", SMALL_CAFD)
    check_all(driver, folder / "race_matched", SMALL_MATCHED)


def test_no_overrun(folder: Path) -> None:
    """AddressSanitizer over every case, of those that touch the same memory one."""
    driver = build(folder, "address")
    groups = {
        "tnkd": TNKD,
        "upsampled": UPSAMPLED,
        "on_device": ON_DEVICE,
        "cafd": CAFD + [case() for case in CAFD_ON_DEVICE],
        "matched": MATCHED,
    }
    for name, cases in groups.items():
        check_all(driver, folder / f"overrun_{name}", list({case.addressing(): case for case in cases}.values()))


class NotCopied(TnkdCase):
    def taken(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return student, teacher, target


# What is broken, and what is put in its place: the sanitizer has to find each of them.
PLANTS = {
    "tnkd_kernel: the warps' sums are joined before they are all there": (
        "thread",
        "tnkd/cuda/kernel.cuh",
        """    if constexpr (kSplit) {
      __syncthreads();
""",
        """    if constexpr (kSplit) {
""",
        TnkdCase(PLANES_SPLIT, (1, 41, 10, 20)),
    ),
    "tiles: the gradient leaves before all of it is there": (
        "thread",
        "tnkd/cuda/tiles.cuh",
        """    __syncthreads();
    copy<false>""",
        """    copy<false>""",
        TnkdCase(TILES, (1, 19, 10, 20), layout="channels_last"),
    ),
    "channel_gradient: a channel's sum is read before it is there": (
        "thread",
        "cafd/cuda/backward.cuh",
        "    __syncthreads();\n    sum = sums[0];",
        "    sum = sums[0];",
        CafdCase("rows held", (1, 3, 32, 96)),
    ),
    "planes: lanes beyond the last pixel": (
        "address",
        "tnkd/cuda/logits.cuh",
        "at = inside ? mine : 0;",
        "at = mine;",
        TnkdCase(PLANES, (1, 19, 3, 7)),
    ),
    "tiles: shared memory for the student alone": (
        "address",
        "tnkd/cuda/launch.cuh",
        "(in.student.pitch + in.teacher.pitch) * tile",
        "in.student.pitch * tile",
        TnkdCase(TILES, (1, 6, 3, 7)),
    ),
    "channel_gradient: shared memory for one run too few": (
        "address",
        "cafd/cuda/backward.cuh",
        "kRhoBytes + in.held)",
        "kRhoBytes + in.held - 32)",
        CafdCase("rows held", (1, 3, 32, 96)),
    ),
    "planes that start off 16 bytes": (
        "plain",
        "tnkd/cuda/launch.cuh",
        "return on_16_bytes(data);",
        "return true;",
        NotCopied(PLANES, (1, 6, 4, 8), layout="offset"),
    ),
    "attention_maps: threads' sums are added up before they are all there": (
        "thread",
        "cafd/cuda/forward.cuh",
        "  __syncthreads();\n  const int64_t i = first",
        "  const int64_t i = first",
        CafdCase("rows held", (1, 3, 32, 96)),
    ),
    "maps that start off 16 bytes": (
        "plain",
        "cafd/cuda/features.cuh",
        "stride[0] % vector == 0 && ",
        "",
        CafdCase("any any held", (2, 5, 3, 5), (2, 3, 3, 5)),
    ),
    "matched_sums: threads' sums are joined before they are all there": (
        "thread",
        "cafd/cuda/walk.cuh",
        "    __syncthreads();\n    if (place.row < half",
        "    if (place.row < half",
        SMALL_MATCHED[0],
    ),
    "matched_sums: shared memory for one thread too few": (
        "address",
        "cafd/cuda/matched.cuh",
        "in.plan.threads * sizeof(MatchedSums<float>)",
        "(in.plan.threads - 1) * sizeof(MatchedSums<float>)",
        SMALL_MATCHED[0],
    ),
    "matched CAFD: positions beyond the last": (
        "address",
        "cafd/cuda/features.cuh",
        "word = v < count ?",
        "word = true ?",
        MatchedCase("any any", (2, 5, 13, 7)),
    ),
    "rows that start off 16 bytes": (
        "plain",
        "cafd/cuda/features.cuh",
        "on_16_bytes(data) && ",
        "",
        MatchedCase("any any", (2, 6, 4, 6), layout="offset"),
    ),
}
UPSAMPLED_KERNEL = "tnkd/cuda/upsampled.cuh"
PLANTS |= {
    "upsampled: the gradient's columns are added up before they are all there": (
        "thread",
        UPSAMPLED_KERNEL,
        """        __syncthreads();
        narrow_row(""",
        """        narrow_row(""",
        UpsampledCase("", (1, 6, 2, 9), size=(7, 36)),
    ),
    "upsampled: the next row is written while this one is still read": (
        "thread",
        UPSAMPLED_KERNEL,
        """in.slab(t, left));
        __syncthreads();
""",
        """in.slab(t, left));
""",
        UpsampledCase("", (1, 6, 2, 9), size=(7, 36)),
    ),
    "upsampled: the verdict is read before it is there": (
        "thread",
        UPSAMPLED_KERNEL,
        """        }
        __syncthreads();
        grad = take_verdict""",
        """        }
        grad = take_verdict""",
        UpsampledCase("", (1, 40, 2, 9), size=(7, 36), needs_grad=False),
    ),
    "upsampled: a halo of one row too many": (
        "address",
        UPSAMPLED_KERNEL,
        "tap.last + 1)",
        "tap.last + 2)",
        UpsampledCase("", (1, 6, 2, 2), size=(8, 8)),
    ),
    "upsampled: lanes beyond the last column": (
        "address",
        UPSAMPLED_KERNEL,
        "inside ? column : 0;",
        "column;",
        UpsampledCase("", (1, 6, 2, 2), size=(8, 5), needs_grad=False),
    ),
    "upsampled: shared memory without the targets' logits": (
        "address",
        UPSAMPLED_KERNEL,
        "(in.groups + 2) * in.columns",
        "(in.groups + 1) * in.columns",
        UpsampledCase("", (1, 40, 2, 9), size=(7, 36)),
    ),
}
REPORT = {
    "plain": "misaligned address",
    "thread": "ThreadSanitizer: data race",
    "address": "AddressSanitizer: heap-buffer-overflow",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_harness_can_fail(plant: str, tmp_path: Path) -> None:
    check, name, right, wrong, case = PLANTS[plant]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / name
    assert source.read_text().count(right) == 1, "the source has changed: plant the mistake anew"
    source.write_text(source.read_text().replace(right, wrong))
    op = "CAFD" if name.startswith("cafd/") else "UPSAMPLED" if isinstance(case, UpsampledCase) else "TNKD"
    without = [f"-DWITHOUT_{other}" for other in ("CAFD", "TNKD", "UPSAMPLED") if other != op]
    done = run_raw(build(tmp_path, check, tmp_path / "csrc", without), [case.case()], tmp_path / "cases")
    assert done.returncode != 0 and REPORT[check] in done.stderr, done.stderr[-3000:]
