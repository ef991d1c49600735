"""The Triton kernels of CAFD: every launch choice, splits, both backward paths.

On CPU under Triton's interpreter, on `cuda` where there is a GPU. Shapes are tiny: the interpreter takes milliseconds
for each operation of a program. What all backends share is tested in tests/test_losses.py and tests/test_edge_cases.py.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsct_kernels import cafd_loss, channel_attention_map
from dsct_kernels.cafd import reference, triton
from dsct_kernels.cafd.triton import Config, Tile
from tests.conftest import DEVICES
from tests.helpers import LAYOUTS, check_no_wait_a_side_stream_and_a_graph, strided_copy, waiting_is_an_error
from tests.oracle import assert_as_good_as_reference, check_cafd, features

WHY_NOT = triton.why_not(torch.zeros(1, device=DEVICES[-1]))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def temperatures(channel: float = 1.0, spatial: float = 1.0) -> Tensor:
    """As the ops take them."""
    return torch.tensor([channel, spatial], dtype=torch.float64)


def check(student: Tensor, teacher: Tensor, config: Config, channel_t: float = 0.7, spatial_t: float = 1.3) -> None:
    """Loss, map and both gradients of the ops with this launch, by the error rule; the bits of the map's backward with
    the temperatures read by the kernels."""
    t = temperatures(channel_t, spatial_t)
    loss, grad_map, stats = triton.forward(student, teacher, t, 1, True, (config, config))
    grad = triton.map_backward(student, grad_map, stats, t, config)
    attention, stats = triton.map_forward(student, t, config)
    pull = torch.randn(attention.shape, generator=torch.Generator().manual_seed(3)).to(attention)
    map_grad = triton.map_backward(student, pull, stats, t, config)
    assert torch.equal(map_grad, triton.map_backward(student, pull, stats, t, config, by_pointer=True))
    expected = []
    for dtype in (torch.promote_types(student.dtype, torch.float32), torch.float64):
        leaf = student.detach().to(dtype).requires_grad_()
        value = reference.cafd(leaf, teacher.to(dtype), channel_t, spatial_t, 1)
        a = reference.attention_map(leaf, channel_t, spatial_t)
        gradients = torch.autograd.grad(value, leaf)[0], torch.autograd.grad(a, leaf, pull.to(dtype))[0]
        expected.append((value.detach(), a.detach(), *gradients))
    names = ("loss", "map", "gradient of the loss", "gradient of the map")
    for name, got, own, truth in zip(names, (loss, attention, grad, map_grad), *expected, strict=True):
        own = own.to(got.dtype)
        assert_as_good_as_reference(got, own, truth, name)


# Tiles that fill the tensor, that end within and after it, walked in one step and in several.
CONFIGS = [
    Config(Tile(1, 16, 1, 2), Tile(4, 16, 1, 2), Tile(2, 16, 1)),
    Config(Tile(2, 4, 1, 1), Tile(2, 4, 1, 1), Tile(4, 8, 2)),
    Config(Tile(8, 16, 2, 4), Tile(8, 2, 1, 4), Tile(1, 64, 4)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["rows", "small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_launch_gives_the_same_numbers(device, config, layout):
    student, teacher = features(device, (2, 5, 3, 7))
    check(strided_copy(student, layout), strided_copy(teacher[:, :3], layout), config)


def test_the_two_backward_paths_agree(device, monkeypatch):
    """Rows too long for one program take three launches; they are forced here onto a short one."""
    student, teacher = features(device, (2, 6, 4, 4))
    arguments = (student, *triton.forward(student, teacher, temperatures(), 1, True)[1:], temperatures())
    row_by_row = triton.map_backward(*arguments)
    monkeypatch.setattr(triton, "LONGEST_ROW", 8)
    by_tiles = triton.map_backward(*arguments)
    torch.testing.assert_close(row_by_row, by_tiles, rtol=1e-5, atol=1e-9)
    assert not torch.equal(row_by_row, torch.zeros_like(row_by_row))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("numbers", [(1.0, 1.0), (0.1, 3.0), (5.0, 0.03)], ids=str)
def test_temperatures_that_the_kernels_read_give_the_bits_of_numbers_among_their_arguments(
    device, layout, numbers, monkeypatch
):
    student, teacher = features(device, (2, 5, 3, 7))[0], features(device, (2, 4, 3, 7))[1]
    student, t = strided_copy(student, layout), temperatures(*numbers)
    for longest in (triton.LONGEST_ROW, 8):  # the backward row by row, and by tiles
        monkeypatch.setattr(triton, "LONGEST_ROW", longest)
        results = []
        for by_pointer in (False, True):
            loss, grad_map, stats = triton.forward(student, teacher, t, 1, True, None, by_pointer)
            attention, _ = triton.map_forward(student, t, None, by_pointer)
            grad = triton.map_backward(student, grad_map, stats, t, None, by_pointer)
            results.append((loss, grad_map, stats, attention, grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_temperatures_that_nobody_could_refuse_make_everything_nan(device, which, bad):
    student, teacher = features(device, (2, 5, 3, 7))
    t = temperatures()
    t[which] = bad
    assert triton.forward(student, teacher, t, 0, False, None, True)[0].isnan().all()
    assert triton.map_forward(student, t, None, True)[0].isnan().all()


@pytest.mark.parametrize("programs", [1, 64])
def test_splits_of_the_positions(device, programs, monkeypatch):
    """One split, and more than there are tiles for: partial sums with different maxima come together."""
    monkeypatch.setattr(triton, "ENOUGH_PROGRAMS", programs)
    student, teacher = features(device, (1, 2, 9, 5), scale=40.0)
    config = Config(Tile(2, 8, 1), Tile(2, 8, 1), Tile(2, 64, 1))
    assert triton.Network(student, config).splits == (1 if programs == 1 else 6)
    check(student, teacher, config)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(device, dtype, layout):
    student, teacher = features(device, (2, 6, 4, 5), dtype)
    check(strided_copy(student, layout), strided_copy(teacher, layout), CONFIGS[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_written(device, layout):
    """Memory that torch.empty hands out is filled with NaN here: what a kernel forgets to write shows."""
    student, teacher = features(device, (2, 5, 3, 7))
    student = strided_copy(student, layout)
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in (0, 1, 2):
            results = triton.forward(student, teacher[:, :4], temperatures(), reduction, True)
            assert all(result.isfinite().all() for result in results)
        assert triton.map_backward(student, results[1], results[2], temperatures()).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_op_takes_maps_of_one_size(device):
    """Others, cafd_loss pools outside of the kernels."""
    student, teacher = features(device, (2, 5, 3, 7))
    with pytest.raises(ValueError, match=r"teacher: expected maps of \(3, 7\), got \(2, 7\)"):
        triton.forward(student, teacher[:, :, 1:], temperatures(), 1, True)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_property(device, data):
    size = st.integers(1, 6)
    n, height, width = data.draw(st.tuples(st.integers(1, 2), size, size), label="N, H, W")
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0, 3000.0]), label="scale")
    seed = data.draw(st.integers(0, 99), label="seed")
    student = features(device, (n, data.draw(size, label="C student"), height, width), dtype, seed, scale)[0]
    teacher_size = (height, width)
    if data.draw(st.booleans(), label="other size"):
        teacher_size = data.draw(st.tuples(size, size), label="teacher H, W")
    teacher = features(device, (n, data.draw(size, label="C teacher"), *teacher_size), dtype, seed + 1, scale)[0]
    check_cafd(
        strided_copy(student, data.draw(st.sampled_from(LAYOUTS), label="layout")),
        teacher,
        "triton",
        channel_temperature=data.draw(st.sampled_from([0.1, 1.0, 5.0]), label="channel_temperature"),
        spatial_temperature=data.draw(st.sampled_from([0.1, 1.0, 5.0]), label="spatial_temperature"),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
    )


def test_the_table_never_leaves_its_limits():
    """Tiles are powers of two with at least a warp's worth of values where the tensor has them."""
    for channels in (1, 3, 64, 96, 512, 2048):
        for positions in (1, 49, 1024, 16384, 65536):
            for itemsize in (2, 4, 8):
                for adjacent in (True, False):
                    config = triton.choose(channels, positions, itemsize, adjacent)
                    for tile in (config.stats, config.maps, config.write):
                        assert tile.channels.bit_count() == tile.positions.bit_count() == tile.warps.bit_count() == 1
                        most = triton.LONGEST_ROW if tile is config.write else 4096
                        assert tile.channels * tile.positions <= most


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_host_sync_graph_capture_and_side_stream(layout):
    student, teacher = features("cuda", (2, 64, 32, 32))
    student, teacher = strided_copy(student, layout).requires_grad_(), strided_copy(teacher, layout)

    def step() -> tuple[Tensor, Tensor]:
        loss = cafd_loss(student, teacher, backend="triton")
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    check_no_wait_a_side_stream_and_a_graph(step, student)
    with waiting_is_an_error():
        cafd_loss(student, teacher[:, :, ::2], backend="triton").backward()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled(layout):
    student, teacher = features("cuda", (2, 64, 32, 32))
    student = strided_copy(student, layout).requires_grad_()

    def loss(s: Tensor) -> Tensor:
        return 2 * cafd_loss(s, teacher, backend="triton") + channel_attention_map(s, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(loss(student), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 96, 128, 128), (3, 300, 33, 65), (1, 2048, 16, 16), (1, 3, 200, 300)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_sizes(shape, layout, dtype):
    student, teacher = features("cuda", shape, dtype)
    student, teacher = strided_copy(student, layout), strided_copy(teacher, layout)
    check_cafd(student, teacher, "triton")
    check_cafd(student, teacher[:, :, ::2, ::3], "triton")
