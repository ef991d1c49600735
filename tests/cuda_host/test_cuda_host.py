"""The CUDA kernels, compiled for the host behind a shim and run without a GPU.

Once plainly, once under ThreadSanitizer (a missing barrier is a data race), once under AddressSanitizer (shared memory
and tensors are allocations of exactly their size). The last tests break a copy of the source on purpose, and show that
the sanitizers notice.

Looked at instead of a shim of our own: HIP-CPU (header-only, wants HIP syntax and TBB, its fibres hide races from
ThreadSanitizer; no longer maintained), numba's CUDA simulator (Python kernels only), gpuocelot and CuPBoP (compile PTX
or LLVM IR, not packaged). compute-sanitizer needs a GPU.
"""

import shutil
from pathlib import Path

import pytest
import torch

from .cases import CAFD, TNKD, CafdCase, TnkdCase
from .harness import Case, build, run

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
