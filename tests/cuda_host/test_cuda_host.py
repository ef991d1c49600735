"""The CUDA kernels, compiled for the host behind a shim and run without a GPU.

Once with every access checked for its alignment, once under ThreadSanitizer (a missing barrier is a data race), once
under AddressSanitizer (shared memory and tensors are allocations of exactly their size). The last tests break a copy of
the source on purpose, and show that the sanitizers notice.

Looked at instead of a shim of our own: HIP-CPU (header-only, wants HIP syntax and TBB, its fibres hide races from
ThreadSanitizer; no longer maintained), numba's CUDA simulator (Python kernels only), gpuocelot and CuPBoP (compile PTX
or LLVM IR, not packaged). compute-sanitizer needs a GPU.
"""

import shutil
from pathlib import Path

import pytest
import torch

from .cases import ANY, CAFD, SMALL_CAFD, SMALL_TNKD, STAGED, TNKD, CafdCase, TnkdCase
from .harness import ROOT, Case, build, run, run_raw

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda_host")


def check_all(driver: Path, folder: Path, cases: list[TnkdCase] | list[CafdCase]) -> None:
    results = run(driver, [case.case() for case in cases], folder)
    for case, (kernels, got) in zip(cases, results):
        case.check(kernels, got)


@pytest.fixture(scope="session")
def plain(folder: Path) -> Path:
    return build(folder, "plain")


def test_tnkd(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "tnkd", TNKD)


def test_cafd(plain: Path, folder: Path) -> None:
    check_all(plain, folder / "cafd", CAFD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale(plain: Path, folder: Path, dtype: torch.dtype, factor: float) -> None:
    grad = torch.randn(1003).to(dtype)
    case = Case("scale", {"factor": torch.tensor(factor)}, {"grad": grad})
    if dtype == torch.float64:
        case.tensors["factor"] = torch.tensor(factor, dtype=torch.float64)
    _, got = run(plain, [case], folder / "scale")[0]
    assert torch.equal(got["grad"], grad * factor)


def test_no_race(folder: Path) -> None:
    """ThreadSanitizer, one thread per CUDA thread."""
    driver = build(folder, "thread")
    check_all(driver, folder / "race_tnkd", SMALL_TNKD)
    check_all(driver, folder / "race_cafd", SMALL_CAFD)


def test_no_overrun(folder: Path) -> None:
    """AddressSanitizer over every case."""
    driver = build(folder, "address")
    check_all(driver, folder / "overrun_tnkd", TNKD)
    check_all(driver, folder / "overrun_cafd", CAFD)


# What is broken, and what is put in its place: the sanitizer has to find each of them.
TNKD_FILE, CAFD_FILE = "tnkd/tnkd_kernels.cuh", "cafd/cafd_kernels.cuh"
PLANTS = {
    "staged: sums are judged before they are all there": (
        "thread",
        TNKD_FILE,
        """    __syncthreads();

    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const int y = y_tile[p];""",
        """
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const int y = y_tile[p];""",
        TnkdCase(STAGED, (1, 19, 10, 20)),
    ),
    "row_backward: the warps' sums are read before they are all there": (
        "thread",
        CAFD_FILE,
        "warps[warp] = rho;\n  __syncthreads();",
        "warps[warp] = rho;",
        CafdCase("rows rows", (1, 3, 32, 96)),
    ),
    "any_layout: one pixel too many": (
        "address",
        TNKD_FILE,
        "pixel < in.pixels;",
        "pixel <= in.pixels;",
        TnkdCase(ANY, (1, 6, 3, 7), layout="sliced"),
    ),
    "row_backward: shared memory for one warp too few": (
        "address",
        CAFD_FILE,
        "kCafdWarps * sizeof(A), stream",
        "(kCafdWarps - 1) * sizeof(A), stream",
        CafdCase("rows rows", (1, 3, 32, 96)),
    ),
    "maps that start off 16 bytes": (
        "plain",
        CAFD_FILE,
        "net.maps = {workspace, plan.shares",
        "net.maps = {workspace + 1, plan.shares",
        CafdCase("rows rows", (1, 3, 32, 96)),
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
    without = "-DWITHOUT_CAFD" if name == TNKD_FILE else "-DWITHOUT_TNKD"
    done = run_raw(build(tmp_path, check, tmp_path / "csrc", [without]), [case.case()], tmp_path / "cases")
    assert done.returncode != 0 and REPORT[check] in done.stderr, done.stderr[-3000:]
