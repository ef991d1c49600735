"""Compiles the CUDA sources with nvcc, with no GPU, and reads what ptxas says that each kernel takes.

Needs no CUDA build of torch: the stable ABI's headers are in every torch. The instructions of TNKD's kernel are counted
in machine code whose branches on the call are decided (DSCT_KNOWN in csrc/tnkd/cuda/kernel.cuh), so that it has one
path: labels that are classes, no class weights, no map, a gradient; cross-entropy at temperature 2, or none.
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


KNOWN = """
#define DSCT_KNOWN(in, terms, y, warps, inside)                                                              \\
  in.loss_map = nullptr, in.class_weight = nullptr, terms.with_ce = {ce}, terms.two_classes = false;             \\
  terms.coupled = false, terms.temperature = 2;                                                                \\
  if (kSplit) warps = 8;                                                                                       \\
  __builtin_assume(in.grad.data != nullptr), __builtin_assume(inside);                                         \\
  for (int v = 0; v < kPixels; ++v) __builtin_assume(y[v] >= 0);
#include "tnkd/cuda/kernel.cuh"
namespace dsct::cuda {{
"""
INSTANCE = "template __global__ void tnkd_kernel<Planes<{t}, {t}, {pixels}>, {classes}, {split}>"
ARGUMENTS = "(Logits, Terms<float>, Workspace, Result<float>);\n"
# K: classes of a thread, pixels of a thread in fp32 and bf16, warps that share a pixel: launch.cuh's plan.
VARIANTS = {6: (6, 4, 4, 1), 19: (20, 1, 2, 1), 150: (20, 1, 2, 8)}


def instructions_per_pixel(arch: int, folder: Path, ce: bool) -> dict[tuple[int, str], float]:
    """Thread instructions of tnkd_kernel for a pixel in planes, by K and dtype: fp32, bf16."""
    assert NVCC is not None
    source = KNOWN.format(ce=str(ce).lower())
    keys = []
    for k, (classes, fp32, bf16, warps) in VARIANTS.items():
        for dtype, type_, pixels in (("fp32", "float", fp32), ("bf16", "BFloat16", bf16)):
            split = str(warps > 1).lower()
            source += INSTANCE.format(t=type_, pixels=pixels, classes=classes, split=split) + ARGUMENTS
            keys.append((k, dtype, pixels, warps, f"Planes<{type_}, {type_}, {pixels}>, {classes}, {split}>"))
    (folder / "known.cu").write_text(source + "}\n")
    include = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", *include, "-cubin", str(folder / "known.cu")]
    subprocess.run([*command, "-o", str(folder / "known.cubin")], capture_output=True, timeout=600, check=True)
    codes = machine_code(folder / "known.cubin")
    named = dict(zip(demangled(list(codes)), codes.values(), strict=True))
    return {
        (k, dtype): per_pixel(next(code for name, code in named.items() if variant in name), pixels, warps)
        for k, dtype, pixels, warps, variant in keys
    }


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """The instructions of every kernel, by symbol; labels stand among them, with their colon."""
    from tools.inspect.aot import BIN

    sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    codes: dict[str, list[str]] = {}
    for line in sass.splitlines():
        if kernel := re.match(r"\.text\.(\S+):", line):
            code = codes.setdefault(kernel[1], [])
        elif label := re.match(r"\.L_\w+:", line):
            code.append(label[0])
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", line):
            code.append(instruction[1])
    return codes


def per_pixel(code: list[str], pixels: int, warps: int) -> float:
    """Thread instructions for a pixel in the loop over tiles, the one with the most stores that is a loop of its own.

    Where warps share a pixel, what stands between the two barriers is done by one of them.
    """
    at = {line: i for i, line in enumerate(code) if line.endswith(":")}
    branches = [(i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for i, line in enumerate(code)]
    loops = [(at[b[1] + ":"], i) for i, b in branches if b and at[b[1] + ":"] < i]
    # What the last block does comes behind, and adds up with atomics.
    tiles = [(a, b) for a, b in loops if not any("ATOM" in line for line in code[a:b])]
    first, last = max(tiles, key=lambda loop: loop[1] - loop[0])
    assert not [loop for loop in tiles if first < loop[0] and loop[1] < last], "a loop whose turns nobody counts"
    body = [line for line in code[first : last + 1] if not line.endswith(":")]
    if warps == 1:
        return len(body) / pixels
    barriers = [i for i, line in enumerate(body) if "BAR.SYNC" in line]
    assert len(barriers) == 2
    judging = barriers[1] - barriers[0] - 1
    return (warps * (len(body) - judging) + judging) / pixels


def demangled(symbols: list[str]) -> list[str]:
    """Readable names without their arguments."""
    if not shutil.which("c++filt"):
        return symbols
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"(dsct::cuda::|c10::|void |\(.*)", "", line) for line in out.splitlines()]
