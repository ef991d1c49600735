"""Compiles the CUDA kernels with nvcc where there is one, and reads its resource report.

Needs no GPU and no CUDA build of torch: the stable ABI's headers are in every torch. A spill or a stack frame fails: an
array that was meant for registers has gone to memory.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")

# As in setup.py.
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--prec-div=false"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def demangled(names: list[str]) -> list[str]:
    """Readable names without their arguments."""
    if not shutil.which("c++filt"):
        return names
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"(dsct::cuda::|c10::|void |\(.*)", "", line) for line in out.splitlines()]


@pytest.mark.parametrize("source", ["tnkd/tnkd_cuda.cu", "cafd/cafd_cuda.cu"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_kernels_stay_in_registers(source: str, arch: str, tmp_path: Path) -> None:
    include = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [NVCC, *FLAGS, f"-arch={arch}", "-Xptxas", "-v", *include, "-c", str(ROOT / "csrc" / source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    entries = list(ENTRY.finditer(done.stderr))
    assert entries, "no kernel in the report of -Xptxas -v"
    rows = sorted(zip(demangled([e["name"] for e in entries]), entries), key=lambda row: row[0])
    print(f"\n{source} on {arch}: registers, stack frame, spill stores, spill loads (bytes)")
    for name, e in rows:
        print(f"  {int(e['registers']):4d} {int(e['stack']):4d} {int(e['stores']):4d} {int(e['loads']):4d}  {name}")
    in_memory = [name for name, e in rows if int(e["stack"]) + int(e["stores"]) + int(e["loads"]) > 0]
    assert not in_memory, f"a spill or a stack frame in {in_memory}"
