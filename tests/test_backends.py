"""Which backend serves, and what is said where one does not: in processes of their own, since imports decide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsct_kernels import __main__ as report
from dsct_kernels import backends, triton_common
from dsct_kernels.backends import Backend, choose, else_reference
from dsct_kernels.tnkd import native

ROOT = Path(__file__).resolve().parents[1]
PURE = "import sys; sys.modules['dsct_kernels._C'] = None; "  # as installed without a compiler
CALL = (
    "import torch; from dsct_kernels import tnkd_loss; x = torch.randn(2, 3, 4, 4); print(tnkd_loss(x, x + 1).item())"
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_without_the_native_build_the_reference_serves_and_says_so():
    done = run("-c", PURE + CALL)
    assert done.returncode == 0, done.stderr
    assert "the native kernels are not built into this installation" in done.stderr
    asked = run("-c", PURE + CALL.replace("x + 1", "x, backend='native'"))
    assert asked.returncode != 0 and "RuntimeError: backend='native' cannot serve this call" in asked.stderr


def test_the_report_stands_whatever_the_environment_names():
    for name, said in (
        ("reference", "reference  usable, chosen by auto"),
        ("foo", "expected one of auto"),
        ("", "usable"),
    ):
        done = run("-m", "dsct_kernels", DSCT_KERNELS_BACKEND=name)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert "at most 4 kernels for tnkd, 7 for each stage of cafd, 3 for matched, 3 for jaccard" in done.stdout


def test_the_report_says_which_calls_are_fused():
    tnkd = {b.name: b for b in report.LOSSES["tnkd"]}
    for name, device, fused in (
        ("native", "cpu", "fused"),
        ("native", "cuda", "fused up to 320 classes"),
        ("triton", "cuda", "fused up to 1024 classes"),
    ):
        assert report.how(tnkd[name], device) == f"{fused}, and so are logits smaller than the labels"
    for loss, offered in report.LOSSES.items():
        assert report.how(offered[0], "cpu") == "plain PyTorch, not fused"
        if loss not in ("tnkd", "kd"):
            assert {report.how(b, "cpu") for b in offered[1:]} == {"fused"}
    done = run("-m", "dsct_kernels", DSCT_KERNELS_BACKEND="auto")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    told = {tuple(words[:2]) for words in lines if words[2] in ("usable,", "usable:", "not")}
    assert told >= {(loss, b.name) for loss, offered in report.LOSSES.items() for b in offered}
    if backends.NATIVE_MISSING is None:
        assert "native     usable, chosen by auto: fused, and so are logits smaller than the labels" in done.stdout


def offered(native: str | None = None, triton: str | None = None) -> tuple[Backend, ...]:
    reasons = (("reference", None), ("native", native), ("triton", triton))
    return tuple(Backend(name, lambda *_, reason=reason: reason) for name, reason in reasons)


@pytest.mark.parametrize(
    "device,native,triton,serves",
    [
        ("cpu", None, None, "native"),
        ("cpu", "no compiler", None, "reference"),  # Triton never unasked on a CPU
        ("meta", None, None, "native"),
        ("meta", "no CUDA", None, "triton"),
        ("meta", "no CUDA", "too old", "reference"),
    ],
)
def test_auto_takes_the_first_that_can_serve(monkeypatch, device, native, triton, serves):
    monkeypatch.delenv("DSCT_KERNELS_BACKEND", raising=False)
    x = torch.empty(1, device=device)
    assert choose("auto", offered(native, triton), x).name == serves
    for name, reason in (("native", native), ("triton", triton)):
        monkeypatch.setenv("DSCT_KERNELS_BACKEND", name)
        for asked in (name, "auto"):
            if reason is None:
                assert choose(asked, offered(native, triton), x).name == name
            else:
                with pytest.raises(RuntimeError, match=f"^backend='{name}' cannot serve this call: {reason}$"):
                    choose(asked, offered(native, triton), x)


def test_a_backend_that_a_loss_does_not_have(monkeypatch):
    monkeypatch.delenv("DSCT_KERNELS_BACKEND", raising=False)
    x, two = torch.empty(1), offered("out of order")[:2]
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve this call: this loss has no Triton kernels"):
        choose("triton", two, x)
    # as a part of an objective
    assert [else_reference(name, two, x) for name in ("auto", "reference", "native", "triton")] == [
        "auto", "reference", "reference", "reference"
    ]  # fmt: skip
    assert else_reference("native", offered()[:2], x) == "native"
    monkeypatch.setenv("DSCT_KERNELS_BACKEND", "triton")
    assert else_reference("auto", two, x) == "reference"
    for serve in (choose, else_reference):
        with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'cuda'"):
            serve("cuda", two, x)


def test_the_environment_names_the_default_backend():
    refused = run("-c", CALL, DSCT_KERNELS_BACKEND="foo")
    assert (
        "ValueError: DSCT_KERNELS_BACKEND: expected one of auto, reference, native, triton, got 'foo'" in refused.stderr
    )
    for name in ("reference", ""):
        assert run("-c", CALL, DSCT_KERNELS_BACKEND=name).returncode == 0


@pytest.mark.parametrize("archs", ["Hopper", "8.0;", "Ampere 12.0+PTX"])
def test_architectures_by_name_or_left_empty_are_no_match(archs):
    assert backends._why_not_arch(archs, (7, 5)) == f"the native kernels were built for CUDA {archs}, this GPU is 7.5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be launched on")
def test_a_triton_that_cannot_launch_says_so(monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert str(triton_common._look("cuda", 0)).startswith("Triton cannot launch kernels here")


def test_what_the_cuda_kernels_of_tnkd_leave_to_others_has_a_reason():
    half, wide = torch.empty(1, 6, 2, 2, dtype=torch.float16), torch.empty(1, 6, 2, 2, dtype=torch.float64)
    most = native.MOST_CLASSES_ON_CUDA
    assert native.why_not_cuda(half) is native.why_not_cuda(half, half.float()) is None
    assert native.why_not_cuda(torch.empty(2, most)) is None
    assert "not float64" in (native.why_not_cuda(half, wide) or ""), "the teacher counts too"
    assert f"up to {most} classes, not {most + 1}" in (native.why_not_cuda(torch.empty(2, most + 1)) or "")
    kernel = (ROOT / "csrc/tnkd/cuda/kernel.cuh").read_text()
    assert most == 320 and "kMostWarps = 16;" in kernel, "16 warps of 20 classes each"
