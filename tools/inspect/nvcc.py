"""Compiles the CUDA sources with nvcc, with no GPU, and reads what ptxas says that each kernel takes.

Needs no CUDA build of torch: the stable ABI's headers are in every torch.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
SOURCES = ("tnkd/cuda/tnkd.cu", "cafd/cuda/cafd.cu")

# As in setup.py.
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--prec-div=false"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers of a thread, static shared memory of a block, and what of a thread's went to memory."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def in_memory(self) -> int:
        return self.stack + self.spill_stores + self.spill_loads


def resources(source: str, arch: int, folder: Path) -> dict[str, Resources]:
    """What every kernel of csrc/`source` takes on sm_`arch`, by symbol."""
    assert NVCC is not None
    include = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", *include, "-c", str(ROOT / "csrc" / source)]
    done = subprocess.run([*command, "-o", str(folder / "kernels.o")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for entry in ENTRY.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        numbers = (int(entry[key]) for key in ("stack", "stores", "loads"))
        found[entry["name"]] = Resources(int(entry["registers"]), int(shared[1]) if shared else 0, *numbers)
    assert found, "no kernel in the report of -Xptxas -v"
    return found


def demangled(symbols: list[str]) -> list[str]:
    """Readable names without their arguments."""
    if not shutil.which("c++filt"):
        return symbols
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"(dsct::cuda::|c10::|void |\(.*)", "", line) for line in out.splitlines()]
