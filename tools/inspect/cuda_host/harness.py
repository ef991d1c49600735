"""Builds the CUDA kernels for the host (driver.cpp behind shim.h) and runs cases through them.

A case is a folder with `case.txt` and the raw storage of every tensor; the driver writes the storage of what comes out
beside it. Executables rather than a library: ThreadSanitizer and AddressSanitizer cannot be loaded into Python.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = {
    # alignment: a GPU stops at a 16-byte access that does not start on 16 bytes, an x86 goes on
    "plain": ["-O1", "-D_GLIBCXX_ASSERTIONS", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"],
    "thread": ["-O0", "-g1", "-fsanitize=thread", "-DSHIM_THREADS"],
    "address": ["-O0", "-g1", "-fsanitize=address"],
    "list": ["-O0"],  # for `launches`: as little compiling as will do
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build(folder: Path, check: str, csrc: Path = ROOT / "csrc", more: Sequence[str] = ()) -> Path:
    """The driver, compiled against the kernels in `csrc` with the sanitizer of `check`."""
    out = folder / f"driver_{check}"
    include = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{csrc}", f"-I{ROOT}", f"-I{HERE}"]
    command = ["g++", "-std=c++20", "-DDSCT_HOST_SHIM", "-pthread", "-rdynamic", "-w", *FLAGS[check], *more, *include]
    done = subprocess.run([*command, str(HERE / "driver.cpp"), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@dataclass
class Case:
    """One call of an op: its tensors, where outputs are given as empty tensors of the wanted shape and strides.

    For `launches` they may be on the meta device, of any size.
    """

    op: str
    tensors: dict[str, Tensor]
    outputs: dict[str, Tensor]
    numbers: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        lines = [f"op {self.op}", "number multiprocessors 2"]
        lines += [f"number {name} {float(value)!r}" for name, value in self.numbers.items()]
        for name, tensor in {**self.tensors, **self.outputs}.items():
            shape = " ".join(map(str, [*tensor.shape, *tensor.stride()]))
            size = tensor.untyped_storage().nbytes()
            line = f"tensor {name} {dtype_name(tensor.dtype)} {size} {tensor.storage_offset()} {tensor.dim()} {shape}"
            if tensor.device.type != "meta" and (name in self.tensors or self.op == "scale"):
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                (folder / name).write_bytes(whole.numpy().tobytes())  # bytes(storage) goes through Python, one by one
                line += f" {name}"
            lines.append(line)
        (folder / "case.txt").write_text("\n".join(lines) + "\n")
        return folder / "case.txt"

    def read(self, folder: Path) -> dict[str, Tensor]:
        results = {}
        for name, tensor in self.outputs.items():
            raw = bytearray((folder / f"out_{name}").read_bytes())
            flat = torch.frombuffer(raw, dtype=tensor.dtype) if raw else tensor.new_empty(0)
            results[name] = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return results


def run(driver: Path, cases: list[Case], folder: Path) -> list[tuple[str, dict[str, Tensor]]]:
    """Runs the cases in one process: which kernels served each, and what came out. Fails on any report."""
    output = run_raw(driver, cases, folder)
    assert output.returncode == 0, (output.stderr[-6000:], output.stdout[-1000:])
    names = output.stdout.splitlines()
    assert len(names) == len(cases)
    served = enumerate(zip(names, cases, strict=True))
    return [(name, {} if name == "none" else case.read(folder / str(i))) for i, (name, case) in served]


def run_raw(driver: Path, cases: list[Case], folder: Path) -> subprocess.CompletedProcess[str]:
    """The same, whatever the driver and its sanitizer had to say."""
    shutil.rmtree(folder, ignore_errors=True)
    paths = [str(case.write(folder / str(i))) for i, case in enumerate(cases)]
    env = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    return subprocess.run([str(driver), *paths], capture_output=True, text=True, env=env, timeout=600)


@dataclass(frozen=True)
class Launch:
    kernel: str  # its symbol, which is nvcc's too
    blocks: int
    threads: int
    shared: int  # bytes asked for at launch


def launches(driver: Path, case: Case, folder: Path) -> list[Launch]:
    """What would be launched for a case, given the device's `multiprocessors` and `shared_bytes` as its numbers."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(driver), "--list", str(case.write(folder))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("launch ")]
    return [Launch(kernel, *(int(number) for number in numbers)) for kernel, *numbers in rows]
