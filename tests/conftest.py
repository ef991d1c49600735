"""Where the tests run: on `cuda` where there is a GPU, else on CPU with Triton's kernels under its interpreter."""

import gc
import importlib.util
import os

import hypothesis
import pytest
import torch

# Before anything imports triton: its decorators read this once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CI draws the same examples every time; elsewhere every run looks at new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        from tests.interpreter import compute_bfloat16_as_a_gpu_does

        compute_bfloat16_as_a_gpu_does()


def marks_on(device: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if device == "cuda" else []


def backends_on(device: str) -> list[str]:
    """The backends that serve tensors of this device here."""
    from dsct_kernels.tnkd import native, triton

    x = torch.zeros(1, 2, device=device)
    return ["reference", *(name for name, m in (("native", native), ("triton", triton)) if m.why_not(x) is None)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` and `backend` runs for every pair that can serve a call here, on cuda marked gpu.

    One that takes `device` alone, and does not say which: on a GPU where there is one, else on the CPU.
    """
    if {"device", "backend"} <= set(metafunc.fixturenames):
        pairs = [pytest.param(d, b, id=f"{d}-{b}", marks=marks_on(d)) for d in DEVICES for b in backends_on(d)]
        metafunc.parametrize("device,backend", pairs)
    elif "device" in metafunc.fixturenames and not any(
        "device" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("device", [pytest.param(DEVICES[-1], marks=marks_on(DEVICES[-1]))])


# What takes longest, begun first, so that no worker ends alone with one of them. With --dist loadgroup, what shares
# something dear to make (a compiled driver, a trained network) goes to one worker, that it is made once.
LONGEST = (
    "test_no_overrun",
    "test_in_a_process_of_its_own",
    "tnkd/cuda/tnkd.cu]",
    "test_every_instruction_set",
    "test_kernels_stay_in_registers",
    "test_no_race",
    "test_compiles_whole",
    "test_the_harness_can_fail",
    "tests/test_setup.py",
    "tests/test_bench.py",
)
SHARED_FIXTURES = {
    "plain": "the host's driver",
    "of_two": "two processes",
    "on_torchvision": "torchvision",
    "out": "a comparison",
    "finished": "a run",
    "in_the_student": "a run cut",
    "reported": "a report",
    "exported": "an export",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shared = [group for name, group in SHARED_FIXTURES.items() if name in getattr(item, "fixturenames", ())]
        if shared:
            item.add_marker(pytest.mark.xdist_group(shared[0]))
    places = range(len(LONGEST))
    items.sort(key=lambda item: next((i for i in places if LONGEST[i] in item.nodeid), len(LONGEST)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: looking through it whenever garbage is collected, as the
    trainer does after every network, took a third of the trainer's tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """A test of every pair of device and backend has nothing to look at where the pair refuses float64 for its own
    reason, before any op is called: the CUDA kernels do. What a test does not name, "auto" or an op, must not refuse.
    """
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    try:
        return (yield)
    except RuntimeError as error:
        named = f"backend={params.get('backend')!r} cannot serve this call: the CUDA kernels read "
        if params.get("device") == "cuda" and str(error).startswith(named) and str(error).endswith("not float64"):
            pytest.skip(str(error))
        raise
