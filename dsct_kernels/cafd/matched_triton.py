"""Matched CAFD on Triton (matched_triton_kernels.py): three launches forward, one backward.

Forward: maxima and sums of stretches of every row of both networks, from one read of the maps; the rows put together,
the weights of the channels and the losses of the samples, one program each; their sum. Backward reads both maps again
and writes the gradient. Every sum has a fixed order, and the host is asked for nothing.

Variants: one of each kernel for a combination of dtypes, layouts, mask or none, and power-of-two size classes of C and
H*W.
"""

import torch
from torch import Tensor

from .. import values
from ..triton_common import define, launch, next_power_of_2, on_device, why_not
from ..values import Number
from . import matched_op
from .triton import Config, Network, Temperatures, Tile, fit

__all__ = ["matched_cafd", "why_not"]

MOST_COMPILED = 3  # kernels of one variant, forward and backward
JOINED = 1024  # numbers of a kind that a program of matched_join_kernel holds at a time


def choose(x: Tensor) -> Config:
    """Tiles of (N, C, H, W) maps: lanes along positions (NCHW) or along channels (channels_last)."""
    network = Network(x, None)
    adjacent, channels, positions = network.adjacent, network.channels, network.positions
    stats = Tile(1, 512, 4, unroll=4) if adjacent else Tile(32, 16, 4, unroll=4)
    write = Tile(1, 2048, 4) if adjacent else Tile(32, 64, 4)
    stats, write = (fit(tile, channels, positions, adjacent) for tile in (stats, write))
    return Config(stats, stats, write, 1)


def _dense(*maps: Network) -> int:
    """Channels, where those of a position lie side by side and positions follow without a gap; else 0."""
    last = all(x.flat and not x.adjacent and x.strides[1] == 1 and x.strides[3] == x.channels for x in maps)
    return maps[0].channels if last else 0


def forward(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C, H, W)
    mask: Tensor | None,  # (N, 1, H, W) bool, contiguous
    temperatures: Tensor,  # (2,) float64: channel, spatial
    uniform: bool,
    reduction: int,
    config: Config | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The op: loss, stats (docs/ops.md). `config` replaces the table's choice."""
    from . import matched_triton_kernels as kernels

    loss, stats = matched_op.fake(student, teacher, mask, temperatures, uniform, reduction)
    samples, channels = student.shape[:2]
    if samples == 0:
        return loss.zero_(), stats
    config = config or choose(student)
    s, t = Network(student, config), Network(teacher, config)
    numbers = Temperatures(temperatures, by_pointer)
    acc = kernels.tl.float64 if loss.dtype == torch.float64 else kernels.tl.float32
    partial = loss.new_empty([samples, s.splits, 6, channels])
    per_sample = loss if reduction == 0 else loss.new_empty([samples])
    tile, block = config.stats, next_power_of_2(channels)
    joined = max(1, min(JOINED // block, next_power_of_2(s.splits)))
    with on_device(student):
        launch(
            kernels.matched_part_kernel, s.stats_programs, tile.warps,
            student, teacher, mask, partial, numbers.scale, numbers.at, channels, s.positions, s.width, *s.strides,
            *t.strides, s.splits, s.span, CHANNELS=tile.channels, POSITIONS=tile.positions, UNROLL=tile.unroll,
            FLAT_S=s.flat, FLAT_T=t.flat, DENSE=_dense(s, t), UNIFORM=uniform, ACC=acc)  # fmt: skip
        launch(
            kernels.matched_join_kernel, samples, max(4, min(8, block * joined // 128)),
            partial, stats, per_sample, numbers.channel, numbers.spatial, numbers.scale, numbers.at,
            1.0 / samples if reduction == 1 else 1.0, channels, s.splits, BLOCK=block,
            SPLITS=joined, UNIFORM=uniform, ACC=acc)  # fmt: skip
        if reduction != 0:
            torch.sum(per_sample, 0, out=loss)
    return loss, stats


def backward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperatures: Tensor,
    grad_output: Tensor,  # (N,) or (): the loss's
    reduction: int,
    config: Config | None = None,
    by_pointer: bool | None = None,
) -> Tensor:
    """The op matched_cafd_backward: the gradient of the student's maps."""
    from . import matched_triton_kernels as kernels

    grad = torch.empty_like(student)
    samples, channels = student.shape[:2]
    if samples == 0:
        return grad
    config = config or choose(student)
    s, t, g = (Network(x, config) for x in (student, teacher, grad))
    numbers = Temperatures(temperatures, by_pointer)
    acc = kernels.tl.float64 if grad_output.dtype == torch.float64 else kernels.tl.float32
    tile = config.write
    programs = samples * -(-channels // tile.channels) * -(-s.positions // tile.positions)
    with on_device(student):
        launch(
            kernels.matched_write_kernel, programs, tile.warps,
            student, teacher, mask, stats, grad_output, grad, numbers.spatial, numbers.scale, numbers.at,
            1.0 / samples if reduction == 1 else 1.0, channels, s.positions, s.width,
            grad_output.stride(0) if reduction == 0 else 0, *s.strides, *t.strides, *g.strides,
            CHANNELS=tile.channels, POSITIONS=tile.positions, FLAT_S=s.flat, FLAT_T=t.flat, FLAT_G=g.flat,
            DENSE=_dense(s, t, g), ACC=acc)  # fmt: skip
    return grad


define("matched_cafd_triton", matched_op.SIGNATURES["matched_cafd"], forward)
define("matched_cafd_backward_triton", matched_op.SIGNATURES["matched_cafd_backward"], backward)
_ops = matched_op.register("_triton")


def matched_cafd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    channel_temperature: Number | None,
    temperature: Number,
    reduction: int,
) -> Tensor:
    """The loss; the arguments are reference.matched_cafd's."""
    pair = (1.0 if channel_temperature is None else channel_temperature, temperature)
    temperatures = values.packed(pair, student.device)
    return matched_op.call(_ops, student, teacher, mask, temperatures, channel_temperature is None, reduction)
