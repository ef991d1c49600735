"""`python -m dsct_kernels --check`: what it says where all is well, and that no planted mistake gets past it."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from dsct_kernels import __main__ as report
from dsct_kernels import backends, selftest
from dsct_kernels.cafd import loss as cafd
from dsct_kernels.cafd import matched
from dsct_kernels.jaccard import loss as jaccard
from dsct_kernels.tnkd import loss as tnkd

COMMAND = [sys.executable, "-m", "dsct_kernels", "--check"]
needs_native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


@needs_native
def test_every_kernel_of_this_machine_passes_with_a_line_each():
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  cpu")]
    assert [line[:3] for line in lines] == [["cpu", "native", loss.name] for loss in selftest.LOSSES]
    assert all(0 < float(line[3]) <= 1 and line[4] == "ok" for line in lines)
    assert f"cpu: {report.cpu_model()}" in done.stdout and "FAILED" not in done.stdout


def test_without_a_kernel_nothing_has_passed():
    pure = "import runpy, sys; sys.modules['dsct_kernels._C'] = None; sys.argv[1:] = ['--check']; "
    pure += "runpy.run_module('dsct_kernels', run_name='__main__')"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", pure], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "no kernel is usable here" in done.stdout, done.stdout + done.stderr


def off(which, by):
    """A kernel whose loss or gradient is wrong."""

    def plant(kernel):
        def wrong(*arguments):
            loss, *rest = result if isinstance(result := kernel(*arguments), tuple) else (result,)
            loss = by(loss) if which == "loss" else loss
            if which == "gradient" and loss.requires_grad:
                loss.register_hook(by)
            return (loss, *rest) if rest else loss

        return wrong

    return plant


def broken(kernel):
    def raises(*arguments):
        raise RuntimeError("no such instruction")

    return raises


MISTAKES = {
    "loss": off("loss", lambda x: x + 5e-5 * x.detach()),  # of the whole objective it is a part
    "gradient": off("gradient", lambda x: x * (1 + 5e-5)),
    "NaN": off("loss", lambda x: x * float("nan")),
    "raises": broken,
}


@needs_native
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(
    "name,module,field",
    [
        ("tnkd", tnkd, "tnkd"),
        ("low-resolution", tnkd, "tnkd"),
        ("cafd", cafd, "cafd"),
        ("matched", matched, "matched_cafd"),
        ("jaccard", jaccard, "jaccard"),
        ("dsct", tnkd, "tnkd"),
    ],
)
def test_a_planted_mistake_in_the_fifth_digit_fails(name, module, field, mistake, monkeypatch, capsys):
    reference, native, *rest = module.BACKENDS
    planted = dataclasses.replace(native, **{field: MISTAKES[mistake](getattr(native, field))})
    monkeypatch.setattr(module, "BACKENDS", (reference, planted, *rest))
    monkeypatch.setattr(selftest, "LOSSES", [loss for loss in selftest.LOSSES if loss.name == name])
    monkeypatch.setattr(selftest, "CASES", [case for case in selftest.CASES if case[1] == torch.float32][:1])
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "0 of 1 passed" in said
    assert {"raises": "no such instruction", "NaN": "nan"}.get(mistake, mistake) in said


@needs_native
def test_cases_that_a_backend_refuses_are_not_asked_of_it(monkeypatch, capsys):
    """As the CUDA kernels of TNKD refuse float64."""
    reference, native, *rest = tnkd.BACKENDS

    def why_not(*tensors):
        return "not float64" if any(x.dtype == torch.float64 for x in tensors) else native.why_not(*tensors)

    monkeypatch.setattr(tnkd, "BACKENDS", (reference, dataclasses.replace(native, why_not=why_not), *rest))
    monkeypatch.setattr(selftest, "LOSSES", [loss for loss in selftest.LOSSES if loss.name == "tnkd"])
    wanted = [next(case for case in selftest.CASES if case[1] == dtype) for dtype in (torch.float32, torch.float64)]
    monkeypatch.setattr(selftest, "CASES", wanted)
    assert report.main(["--check"]) == 0
    assert "1 of 1 passed" in capsys.readouterr().out
