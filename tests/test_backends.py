"""Which backend serves, and what is said where one does not: in processes of their own, since imports decide."""

import os
import subprocess
import sys

import pytest
import torch

from dsct_kernels import backends, triton_common

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
        assert "at most 4 kernels for tnkd, 8 for each stage of cafd" in done.stdout


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
