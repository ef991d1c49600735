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
INCLUDE = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT}"]

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
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", *INCLUDE, "-c", str(ROOT / "csrc" / source)]
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
  in.student.type = in.teacher.type = in.grad.type = FloatType::{type};                                        \\
  if (kSplit) warps = 8;                                                                                       \\
  __builtin_assume(in.grad.data != nullptr), __builtin_assume(inside);                                         \\
  for (int v = 0; v < kPixels; ++v) __builtin_assume(y[v] >= 0);
#include "tnkd/cuda/kernel.cuh"
namespace dsct::cuda {{
"""
INSTANCE = "template __global__ void tnkd_kernel<Planes<{size}, {size}, {pixels}>, {classes}, {split}>"
ARGUMENTS = "(Logits);\n"
# K: classes of a thread, pixels of a thread in fp32 and bf16, warps that share a pixel: launch.cuh's plan.
VARIANTS = {6: (6, 4, 4, 1), 19: (20, 1, 2, 1), 150: (20, 1, 2, 8)}


def instructions_per_pixel(arch: int, folder: Path, ce: bool) -> dict[tuple[int, str], float]:
    """Thread instructions of tnkd_kernel for a pixel in planes, by K and dtype: fp32, bf16."""
    assert NVCC is not None
    found = {}
    for dtype, type_, size in (("fp32", "kF32", 4), ("bf16", "kBF16", 2)):
        source, cubin = folder / "known.cu", folder / "known.cubin"
        text, variants = KNOWN.format(ce=str(ce).lower(), type=type_), {}
        for k, (classes, fp32, bf16, warps) in VARIANTS.items():
            pixels = fp32 if dtype == "fp32" else bf16
            text += INSTANCE.format(size=size, pixels=pixels, classes=classes, split=str(warps > 1).lower()) + ARGUMENTS
            variants[f"Planes<{size}, {size}, {pixels}>, {classes}, {str(warps > 1).lower()}>"] = k, pixels, warps
        source.write_text(text + "}\n")
        command = [NVCC, *FLAGS, f"-arch=sm_{arch}", *INCLUDE, "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, capture_output=True, timeout=600, check=True)
        codes = machine_code(cubin)
        named = dict(zip(demangled(list(codes)), codes.values(), strict=True))
        for variant, (k, pixels, warps) in variants.items():
            found[k, dtype] = per_pixel(next(code for name, code in named.items() if variant in name), pixels, warps)
    return found


KNOWN_UPSAMPLED = """
#define DSCT_KNOWN_CALL(class_weight, terms, groups)                                                            \\
  class_weight = nullptr, terms.with_ce = {ce}, terms.two_classes = false, terms.coupled = false;               \\
  terms.temperature = 2;                                                                                        \\
  if (kSplit) groups = {groups};
#define DSCT_KNOWN_LABEL(y) __builtin_assume(y >= 0);
#define DSCT_KNOWN_TYPE(dtype) dtype = FloatType::{type};
#include "tnkd/cuda/upsampled.cuh"
template __global__ void dsct::cuda::tnkd_upsampled_kernel<{classes}, {split}>(const __grid_constant__ Upsampled);
"""
RATIO = 4  # label rows, and columns, of a row of logits
# K: classes of a thread, groups that share a pixel, columns of a tile: upsampled_launch.cuh's plan.
UPSAMPLED = {6: (6, 1, 128), 19: (19, 1, 128), 150: (19, 8, 32)}


def upsampled_instructions_per_pixel(arch: int, folder: Path, ce: bool) -> dict[tuple[int, str], float]:
    """Thread instructions of tnkd_upsampled_kernel for a pixel, by K and dtype, of logits at a RATIO-th of the labels'
    size; what is done once a tile is left out."""
    assert NVCC is not None
    found = {}
    for k, (classes, groups, columns) in UPSAMPLED.items():
        for dtype, type_ in (("fp32", "kF32"), ("bf16", "kBF16")):
            call = {"type": type_, "ce": str(ce).lower(), "groups": groups, "classes": classes}
            source, cubin = folder / "upsampled.cu", folder / "upsampled.cubin"
            source.write_text(KNOWN_UPSAMPLED.format(split=str(groups > 1).lower(), **call))
            command = [NVCC, *FLAGS, f"-arch=sm_{arch}", *INCLUDE, "-cubin", str(source), "-o", str(cubin)]
            subprocess.run(command, capture_output=True, timeout=600, check=True)
            code = next(code for name, code in machine_code(cubin).items() if "tnkd_upsampled" in name)
            found[k, dtype] = per_upsampled_pixel(code, min(k, classes), groups, columns)
    return found


def per_upsampled_pixel(code: list[str], classes: int, groups: int, columns: int) -> float:
    """The loop over label rows, and the loops in it by their trips: once a RATIO rows the gradient leaves (a loop with
    barriers) and each network's next row comes in (a loop over two slots, of which one is filled)."""
    at = {line: i for i, line in enumerate(code) if line.endswith(":")}
    found = [(i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for i, line in enumerate(code)]
    branches = [(i, at[branch[1] + ":"]) for i, branch in found if branch]
    loops = sorted((to, i) for i, to in branches if to < i)

    def children(loop: tuple[int, int]) -> list[tuple[int, int]]:
        inside = [x for x in loops if loop[0] <= x[0] and x[1] <= loop[1] and x != loop]
        return [x for x in inside if not any(y[0] <= x[0] and x[1] <= y[1] and y != x for y in inside)]

    def size(first: int, last: int) -> int:
        return sum(not line.endswith(":") for line in code[first : last + 1])

    def own(loop: tuple[int, int]) -> int:
        return size(*loop) - sum(size(*x) for x in children(loop))

    def skipped(first: int, last: int) -> int:  # by the first branch forward
        return next(size(i + 1, to) for i, to in branches if first < i < to <= last + 1)

    tiles = max((x for x in loops if not any("ATOM" in line for line in code[x[0] : x[1]])), key=lambda x: x[1] - x[0])
    rows = max(children(tiles), key=lambda x: x[1] - x[0])
    leaves, loads = children(rows)
    (items,) = children(leaves)
    (taps,) = children(items)
    per_item = own(items) + 2 * RATIO * size(*taps)
    seldom = own(leaves) + -(-classes // 4) * (columns / RATIO + 2) / columns * per_item
    seldom += 2 * (own(loads) + sum(classes // 4 * size(*batch) for batch in children(loads)))  # of either network
    straight = own(rows)
    if groups == 1:
        return straight + seldom / RATIO
    barriers = [i for i in range(leaves[1], rows[1]) if "BAR.SYNC" in code[i]]
    assert len(barriers) == 2
    judging = skipped(*barriers)
    return groups * (straight - judging + seldom / RATIO) + judging * 32 / columns


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
    # What the last block does comes behind, and adds up with atomics.
    tiles = [(a, b) for a, b in loops_of(code) if not any("ATOM" in line for line in code[a:b])]
    first, last = max(tiles, key=lambda loop: loop[1] - loop[0])
    assert not [loop for loop in tiles if first < loop[0] and loop[1] < last], "a loop whose turns nobody counts"
    body = [line for line in code[first : last + 1] if not line.endswith(":")]
    if warps == 1:
        return len(body) / pixels
    barriers = [i for i, line in enumerate(body) if "BAR.SYNC" in line]
    assert len(barriers) == 2
    judging = barriers[1] - barriers[0] - 1
    return (warps * (len(body) - judging) + judging) / pixels


def instructions_per_label(arch: int, folder: Path) -> float:
    """Thread instructions of encode_labels for a label of 64 bits, at most: all paths of the longest loop that reads
    eight of them, 16 bytes at a time."""
    assert NVCC is not None
    source, cubin = folder / "labels.cu", folder / "labels.cubin"
    source.write_text('#include "tnkd/cuda/labels.cuh"\n')
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", *INCLUDE, "-cubin", str(source), "-o", str(cubin)]
    subprocess.run(command, capture_output=True, timeout=600, check=True)
    (code,) = machine_code(cubin).values()
    bodies = [[line for line in code[a : b + 1] if not line.endswith(":")] for a, b in loops_of(code)]
    return max(len(body) for body in bodies if sum("LDG.E.128" in line for line in body) == 4) / 8


def loops_of(code: list[str]) -> list[tuple[int, int]]:
    """From a label to the branch back to it."""
    at = {line: i for i, line in enumerate(code) if line.endswith(":")}
    branches = [(i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for i, line in enumerate(code)]
    return [(at[b[1] + ":"], i) for i, b in branches if b and at[b[1] + ":"] < i]


def demangled(symbols: list[str]) -> list[str]:
    """Readable names without their arguments."""
    if not shutil.which("c++filt"):
        return symbols
    out = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"(dsct::cuda::|c10::|void |\(.*)", "", line) for line in out.splitlines()]
