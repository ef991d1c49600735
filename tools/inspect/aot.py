"""Compiles Triton kernels ahead of time, with no GPU, and reads what the machine code does.

A launch is taken down as it would be made (`recorded`) and compiled, for an architecture, with the signature that
Triton's launcher gives it; `report` reads registers, spills, shared memory and the width of every global
access from the cubin.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from dsct_kernels.triton_common import FP_FUSION, WARPS

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have


@dataclass
class Launch:
    kernel: Any
    programs: int
    warps: int
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def argument(self, name: str) -> Any:
        return self.args[self.kernel.arg_names.index(name)]


@contextmanager
def recorded(*modules: Any, multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Launches made through these modules' `launch` are listed instead of run, as for a GPU of so many multiprocessors
    (an H100's)."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, warps: int, *args: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, programs, warps, args, constants))

    def most_programs(tensor: Any, warps: int) -> int:
        return multiprocessors * WARPS // warps

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "launch", record))
            if hasattr(module, "most_programs"):
                stack.enter_context(patch.object(module, "most_programs", most_programs))
        yield launches


def specialised(launch: Launch) -> dict[str, tuple[str, Any]]:
    """What Triton's launcher compiles for: of each parameter the type, and its value if constexpr, "D" if 16 | it."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    parameters, of_each, _ = bind(*launch.args, **launch.constants, num_warps=launch.warps)
    return dict(zip(parameters, of_each, strict=True))


def source(launch: Launch) -> ASTSource:
    """The kernel with all that a launch fixes at compile time, members of tuples included."""
    found = specialised(launch)
    types = {name: type_ for name, (type_, _) in found.items()}
    values = [value for _, value in found.values()]

    def at(path: tuple[int, ...]) -> Any:
        return get_iterable_path(values, path)

    constants = {path: at(path) for path in find_paths_if(list(types.values()), lambda _, type_: type_ == "constexpr")}
    divisible = find_paths_if(values, lambda _, value: isinstance(value, str) and "D" in value)
    return ASTSource(launch.kernel, types, constants, {path: [["tt.divisibility", 16]] for path in divisible})


@dataclass
class Report:
    name: str
    arch: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int
    loads: dict[int, int] = field(default_factory=dict)  # bytes -> instructions
    stores: dict[int, int] = field(default_factory=dict)
    instructions: int = 0  # without the padding behind the end
    loops: list[int] = field(default_factory=list)  # the instructions of each loop
    spilt_in_loops: int = 0  # instructions that store or load what was spilt, again and again
    sass: str = field(default="", repr=False)

    def issued(self, trips: float) -> float:
        """Instructions of a warp whose loop, the only one, is taken so often."""
        (loop,) = self.loops
        return self.instructions + (trips - 1) * loop

    def walked(self, launch: Launch) -> float:
        """Instructions of a warp of TNKD's march_kernel, whose loops are one in the other: over strips, their rows of
        intervals, and the rows of labels in these. In the innermost two each network fetches a row of cells: one for
        each row of intervals, and one more for each strip."""
        strips = launch.argument("items") / launch.programs
        intervals = strips * (launch.constants["M"].rows + 1)
        lines = strips / launch.argument("strips") * launch.argument("height")
        *fetches, line, interval, strip = sorted(self.loops)
        assert len(fetches) == 2, "the machine code was not understood"
        once = self.instructions - strip + strips * (strip - interval)
        return once + intervals * (interval - line + sum(fetches)) + lines * (line - sum(fetches))

    def row(self) -> str:
        def widths(counts: dict[int, int]) -> str:
            return " ".join(f"{bytes_}Bx{count}" for bytes_, count in sorted(counts.items(), reverse=True)) or "-"

        return (
            f"{self.name:<44} sm_{self.arch:<4} {self.registers:>4} registers {self.spills:>4} B spilt "
            f"{self.shared:>6} B shared  {self.instructions:>5} instructions  loads {widths(self.loads)}  "
            f"stores {widths(self.stores)}"
        )


WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def report(name: str, launch: Launch, arch: int) -> Report:
    """Compile for sm_`arch` and read the machine code."""
    options = {"num_warps": launch.warps, "enable_fp_fusion": FP_FUSION}
    compiled = compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    result = Report(name, arch, found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, sass=sass)
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        match = re.search(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if not match or "." in line.strip()[:1] or match.group(1) == "NOP":
            continue
        opcodes.append(match.group(1))
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], len(opcodes)) < len(opcodes) - 1:  # to itself: the trap behind the end
            loop = opcodes[labels[branch[1]] :]
            result.loops.append(len(loop))
            result.spilt_in_loops += sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in loop)
    result.instructions = len(opcodes)
    for opcode in opcodes:
        kind = opcode.split(".")[0]
        if kind in ("LDG", "STG"):
            width = WIDTH.search(opcode)
            counts = result.loads if kind == "LDG" else result.stores
            bytes_ = BYTES[width.group(1)] if width else 4
            counts[bytes_] = counts.get(bytes_, 0) + 1
    return result
