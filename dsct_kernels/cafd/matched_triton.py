"""Matched CAFD on Triton (matched_triton_kernels.py): three launches forward, one backward.

Forward: maxima and sums of stretches of every row of both networks, from one read of the maps; the rows put together,
the weights of the channels and the losses of the samples, one program each; their sum. Backward reads both maps again
and writes the gradient. Every sum has a fixed order, and the host is asked for nothing.
"""

from typing import Any

import torch
from torch import Tensor

from ..triton_common import (
    channels_last,
    define,
    dense,
    launch,
    next_power_of_2,
    numbers_for,
    on_device,
    settled,
    why_not,
)
from . import matched_op
from .triton import Config, Network, Tile, fit

__all__ = ["matched_cafd", "why_not"]

MOST_COMPILED = 3  # kernels of one variant, forward and backward
JOINED = 1024  # numbers of a kind that a program of matched_join_kernel holds at a time


def choose(x: Tensor) -> Config:
    """Tiles of (N, C, H, W) maps: lanes along positions (NCHW) or along channels (channels_last)."""
    last, channels, positions = channels_last(x), x.shape[1], x.shape[2] * x.shape[3]
    stats = Tile(32, 16, 4, unroll=4) if last else Tile(1, 512, 4, unroll=4)
    write = Tile(32, 64, 4) if last else Tile(1, 2048, 4)
    stats, write = (fit(tile, channels, positions, not last) for tile in (stats, write))
    return Config(stats, stats, write)


def forward(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C, H, W)
    mask: Tensor | None,  # (N, 1, H, W) bool, contiguous
    temperatures_: Tensor,  # (2,) float64: channel, spatial
    uniform: bool,
    reduction: int,
    config: Config | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The op: loss, stats (docs/ops.md). `config` replaces the table's choice."""
    from . import matched_triton_kernels as kernels

    loss, stats = matched_op.fake(student, teacher, mask, temperatures_, uniform, reduction)
    samples, channels = student.shape[:2]
    if samples == 0:
        return loss.zero_(), stats
    s = Network(student, config or choose(student))
    numbers = numbers_for(temperatures_, by_pointer)
    partial = loss.new_empty([samples, s.splits, 6, channels])
    per_sample = loss if reduction == 0 else loss.new_empty([samples])
    block = next_power_of_2(channels)
    joined = max(1, min(JOINED // block, next_power_of_2(s.splits)))
    with on_device(student):
        launch(
            kernels.matched_part_kernel, s.stats_programs, s.stats.warps,
            s.features, dense(teacher, s.last), mask, partial, *s.walk, s.positions, numbers,
            CHANNELS=channels, TILE=s.stats, UNIFORM=uniform)  # fmt: skip
        launch(
            kernels.matched_join_kernel, samples, max(4, min(8, block * joined // 128)),
            partial, stats, per_sample, numbers, 1.0 / samples if reduction == 1 else 1.0, channels, s.splits,
            BLOCK=block, SPLITS=joined, UNIFORM=uniform)  # fmt: skip
        if reduction != 0:
            torch.sum(per_sample, 0, out=loss)
    return loss, stats


def backward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperatures_: Tensor,
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
    s = Network(student, config or choose(student))
    out, tile = dense(grad, s.last), s.write
    programs = samples * -(-channels // tile.channels) * -(-s.positions // tile.positions)
    with on_device(student):
        launch(
            kernels.matched_write_kernel, programs, tile.warps,
            s.features, dense(teacher, s.last), mask, stats, grad_output, out,
            1.0 / samples if reduction == 1 else 1.0, s.positions, grad_output.stride(0) if reduction == 0 else 0,
            numbers_for(temperatures_, by_pointer), CHANNELS=channels, TILE=tile)  # fmt: skip
    return settled(grad, out, s.last)


define("matched_cafd_triton", matched_op.SIGNATURES["matched_cafd"], forward)
define("matched_cafd_backward_triton", matched_op.SIGNATURES["matched_cafd_backward"], backward)
_ops = matched_op.register("_triton")


def matched_cafd(*args: Any) -> Tensor:
    """The loss; the arguments are reference.matched_cafd's."""
    return matched_op.matched_cafd(_ops, *args)
