"""What the test files share beside the oracle: strided copies, forbidden pages, the kernels' other instruction sets."""

import contextlib
import ctypes
import itertools
import mmap
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsct_kernels import backends
from dsct_kernels.tnkd import native, triton

ROOT = pathlib.Path(__file__).resolve().parents[1]
ISAS = ("default", "avx2", "avx512")


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of the product of the axes as few as it takes for every two values of two axes to meet. The same every time.

    What breaks by a value or by two together is found, at a fraction of the product's cost; three together are not.
    """
    left = {(i, a, j, b) for i, j in itertools.combinations(range(len(axes)), 2)
            for a in range(len(axes[i])) for b in range(len(axes[j]))}  # fmt: skip

    def met(at: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, at[i], j, at[j]) for i, j in itertools.combinations(range(len(axes)), 2)} & left

    chosen = []
    while left:
        best = max(itertools.product(*(range(len(axis)) for axis in axes)), key=lambda at: len(met(at)))
        left -= met(best)
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return chosen


# Run by a process of its own: half of the tests of each file whose names hold what is chosen, drawn by their names.
RUN_CHOSEN = """
import ast, sys, zlib, pytest
class Half:
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % 2 == int(sys.argv[2])]
for file, chosen in ast.literal_eval(sys.argv[1]).items():
    if code := pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, file], [Half()]):
        sys.exit(code)
"""


def skip_unless_tnkd_serves(backend: str, *logits: Tensor) -> None:
    """Ends a test here whose logits the backend does not serve, for its own reason: float64 on CUDA, say."""
    reason = {"native": native.why_not, "triton": triton.why_not}.get(backend, backends.always)(*logits)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run_again_with(isa: str, chosen: dict[str, str]) -> None:
    """Half of the tests of each file whose names hold what is chosen, in a process of their own, with the kernels of
    `isa`; the next set gets the other half: they are one source."""
    info = backends.build_info()
    if os.environ.get("DSCT_KERNELS_CPU"):
        pytest.skip("already in such a process")
    if isa not in info["cpu_isas"]:  # type: ignore[operator]
        pytest.skip(f"{isa} is not built in")
    if ISAS.index(isa) >= ISAS.index(str(info["cpu_isa"])):
        pytest.skip(f"this run is {info['cpu_isa']} already, or the machine has no {isa}")
    command = [sys.executable, "-c", RUN_CHOSEN, repr(chosen), str(ISAS.index(isa) % 2)]
    environment = {**os.environ, "DSCT_KERNELS_CPU": isa}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def before_a_forbidden_page(x: Tensor) -> Tensor:
    """A copy that ends where a page ends, and the next one must not be touched: who does ends the process. Linux."""
    bytes = x.numel() * x.element_size()
    room = -(-bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - bytes)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def check_nothing_is_read_past_the_end(
    run: Callable[[Tensor, Tensor], Sequence[Tensor]], student: Tensor, teacher: Tensor
) -> None:
    """Logits that end where a page ends give what they give elsewhere: a crash of the test is its failure."""
    at_the_end = run(before_a_forbidden_page(student), before_a_forbidden_page(teacher))
    for a, b in zip(at_the_end, run(student, teacher), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it whatever waits for a GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_wait_a_side_stream_and_a_graph(step: Callable[[], Sequence[Tensor]], student: Tensor) -> None:
    """A step on a GPU, loss and gradient: it never waits, gives the same on another stream, and a graph captures it."""
    expected = step()
    with waiting_is_an_error():
        again = step()
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(aside, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def strided_copy(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout: contiguous, channels_last, sliced, transposed."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":  # class or channel fastest, for any number of dimensions
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # not dense: every second element of a larger buffer, with an offset
        big = x.new_full([2 * s + 1 for s in x.shape], float("nan") if x.is_floating_point() else 99)
        view = big[tuple(slice(1, 1 + 2 * s, 2) for s in x.shape)]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
