"""What `import dsct_kernels` costs on top of `import torch`: in processes of their own, since imports happen once."""

import os
import subprocess
import sys

import pytest
import torch

import dsct_kernels
from dsct_kernels import backends

MOST_SECONDS = 0.05  # of CPU time, from bytecode; 0.035 measured, torch itself takes 1.5, torch._dynamo as much again
LATE = {"torch._dynamo", "torch._inductor", "torch._functorch", "torch.distributed.tensor", "triton", "sympy", "mpmath"}

IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import dsct_kernels
spent = time.process_time() - start
"""
USE = """
from dsct_kernels import dsct_loss
x, f = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
dsct_loss(x, x.detach() + 1, torch.zeros(2, 8, 8, dtype=torch.uint8), f, f.detach() + 1).total.backward()
"""
REPORT = "print(spent, *sorted(set(sys.modules) - before))"


def brought(script: str, **environment: str) -> tuple[float, list[str]]:
    """CPU seconds of the import, and the modules that `script` brought into the process beyond torch's own."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stdout.split()
    assert "dsct_kernels.tnkd.loss" in modules
    return float(seconds), modules


def strangers(modules: list[str]) -> set[str]:
    """Those that are neither ours, nor Python's, nor a small part of torch."""
    known = {*sys.stdlib_module_names, "dsct_kernels", "torch"}
    late = {m for m in modules if any(m == name or m.startswith(f"{name}.") for name in LATE)}
    return late | {m for m in modules if m.partition(".")[0] not in known}


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("use", ["", USE], ids=["import", "first eager step"])
def test_neither_the_import_nor_an_eager_step_brings_in_the_compiler(use, interpret):
    _, modules = brought(IMPORT + use + REPORT, TRITON_INTERPRET=interpret, DSCT_KERNELS_BACKEND="auto")
    assert not strangers(modules), f"{len(strangers(modules))} modules, {sorted(strangers(modules))[:20]}"


def test_the_check_itself_finds_torch_compiler_and_other_packages():
    modules = [
        "torch._dynamo.utils",
        "triton",
        "torch.nn",
        "json",
        "yaml.loader",
        "torch._dynamodb",
        "dsct_kernels.dsct",
    ]
    assert strangers(modules) == {"torch._dynamo.utils", "triton", "yaml.loader"}


def test_the_import_takes_a_blink_on_top_of_torch():
    seconds: list[float] = []  # the first, which may have to compile the sources, counts as little as any other
    while len(seconds) < 6 and (len(seconds) < 2 or min(seconds) >= MOST_SECONDS):
        seconds.append(brought(IMPORT + REPORT, PYTHONDONTWRITEBYTECODE="")[0])
    assert min(seconds) < MOST_SECONDS, f"{seconds} s of CPU time"


def test_our_mark_of_constant_functions_is_the_one_that_torch_sets():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert backends.constant_when_compiled(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_what_is_asked_of_the_gpu_is_asked_once_and_never_traced(monkeypatch):
    """The answers come from files and drivers, which nobody can trace: fullgraph=True would fail on either function."""
    asked = []

    def untraceable(*_):
        asked.append(os.stat(dsct_kernels.__file__).st_size)  # a graph break, were it traced
        return {"cuda_archs": "9.0"}

    def traced(x):
        untraceable()
        return x

    def step(x):
        return x + 1 if backends._why_not_native_cuda(7) is None else x

    monkeypatch.setattr(backends, "build_info", untraceable)
    monkeypatch.setattr(backends, "_cuda_answers", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(traced, fullgraph=True, backend="eager")(torch.ones(2))
    asked.clear()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert len(asked) == 1
