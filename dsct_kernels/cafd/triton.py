"""CAFD on Triton (triton_kernels.py): four launches forward, two backward where a tile has all positions, else three.

Forward, both networks in each launch: maximum, sum of exponentials and sum of magnitudes of every channel; the weights
of the channels; the attention map (the second read of the features, meant to hit L2); the divergence and its gradient
with respect to the map. Backward takes that gradient to the features. Every sum has a fixed order.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from . import op

__all__ = ["attention_map", "cafd", "why_not"]

MOST_COMPILED = 7  # kernels of one variant, forward and backward
LONGEST_ROW = 16384  # adjacent positions that one program of the backward holds in registers
ENOUGH_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU: more splits gain nothing

# ---------------------------------------------------------------------------------------------- launch choices


class Tile(NamedTuple):
    """Also a constant of the kernels, as it is."""

    channels: int
    positions: int
    warps: int
    unroll: int = 1  # tiles loaded together; of write_kernel: one after the other
    last: bool = False  # channels_last: set by Network


@dataclass(frozen=True)
class Config:
    stats: Tile  # row_stats_kernel, rho_kernel
    maps: Tile
    write: Tile


def fit(tile: Tile, channels: int, positions: int, positions_adjacent: bool) -> Tile:
    """The tile no larger than the tensor; what one dimension leaves free goes to the other."""
    c, p, size = tile.channels, tile.positions, tile.channels * tile.positions
    most_c, most_p = next_power_of_2(channels), max(16 if positions_adjacent else 1, next_power_of_2(positions))
    if positions_adjacent:
        p = min(p, most_p)
        c = min(size // p, most_c)
    else:
        c = min(c, most_c)
        p = min(size // c, most_p)
    return Tile(c, p, tile.warps, tile.unroll)


def choose(channels: int, positions: int, itemsize: int, positions_adjacent: bool) -> Config:
    """The launches for (N, C, H*W) features: lanes along positions (NCHW) or along channels (channels_last, tokens)."""
    wide = max(1, 4 // itemsize)  # two-byte values: twice as many in a 16-byte load
    if positions_adjacent:
        stats = Tile(1, 512 * wide, 4, unroll=4)
        maps = Tile(32, 32 * wide, 4, unroll=2)
        write = Tile(1, 1024 * wide, 4)
    else:
        stats = Tile(64 * wide, 16, 4, unroll=2)
        maps = Tile(64 * wide, 16, 4, unroll=2)
        write = Tile(64 * wide, 32, 4)
    stats, maps, write = (fit(t, channels, positions, positions_adjacent) for t in (stats, maps, write))
    if positions_adjacent and positions <= LONGEST_ROW:  # whole rows: two launches, and the features are read once
        row = max(16, next_power_of_2(positions))
        write = Tile(1, row, max(1, min(16, row // 1024)), unroll=1 if positions <= 1024 else 4)
    return Config(stats, maps, write)


# ------------------------------------------------------------------------------------------------- the launches


class Maps(NamedTuple):
    """One network as the kernels see it."""

    features: Tensor  # dense
    partial: Tensor  # (N, splits, 3, C)
    stats: Tensor  # (N, row)
    map: Tensor  # (N, H, W)
    channels: int
    positions: int
    row: int


class Network:
    """One network's features: sizes, tiles, programs."""

    def __init__(self, x: Tensor, config: Config | None) -> None:
        self.samples, self.channels, height, width = x.shape
        self.positions = height * width
        self.last = channels_last(x)
        self.features = dense(x, self.last)
        config = config or choose(self.channels, self.positions, x.element_size(), not self.last)
        tiles = (tile._replace(last=self.last) for tile in (config.stats, config.maps, config.write))
        self.stats, self.maps, self.write = tiles
        # positions are split over programs until there are enough of them
        step = self.stats.positions * self.stats.unroll
        blocks = -(-self.channels // self.stats.channels)
        wanted = -(-ENOUGH_PROGRAMS // max(1, blocks * self.samples))
        splits = max(1, min(wanted, -(-self.positions // step), 64))
        steps = -(-self.positions // (splits * step))
        self.splits = -(-self.positions // (steps * step))
        self.walk = (self.splits, steps)
        self.stats_programs = self.samples * blocks * self.splits

    def to_kernels(self, stats: Tensor | None, map_: Tensor | None) -> Maps:
        """None for memory of its own."""
        if stats is None:
            row = stats_row(self.channels, self.positions)
            stats = self.features.new_empty([self.samples, row], dtype=torch.float32)
        if map_ is None:
            map_ = stats.new_empty([self.samples, self.positions])
        partial = stats.new_empty([self.samples, self.splits, 3, self.channels])
        return Maps(self.features, partial, stats, map_, self.channels, self.positions, stats.shape[1])


def stats_row(channels: int, positions: int) -> int:
    """Numbers a sample of `stats` takes (triton_kernels.py), a multiple of 16 so that every row is aligned."""
    return -(-(2 * positions + 4 * channels + 2) // 16) * 16


_results = op.Results(stats_row)


def _attend(student: Network, teacher: Network, s: Maps, t: Maps | None, numbers: Tensor | tuple[float, ...]) -> None:
    """stats of each network, of which A is the first part: three launches for both, or for the student alone."""
    from . import triton_kernels as kernels

    networks = (student,) if t is None else (student, teacher)
    launch(
        kernels.row_stats_kernel, sum(x.stats_programs for x in networks), max(x.stats.warps for x in networks),
        s, t, *student.walk, *teacher.walk, student.stats_programs, numbers, TILE_S=student.stats,
        TILE_T=teacher.stats)  # fmt: skip
    launch(
        kernels.channel_weights_kernel, sum(x.samples for x in networks), 4,
        s, t, student.splits, teacher.splits, student.samples, numbers,
        BLOCK_S=next_power_of_2(student.channels), BLOCK_T=next_power_of_2(teacher.channels))  # fmt: skip
    programs = [x.samples * -(-x.positions // x.maps.positions) for x in networks]
    launch(
        kernels.maps_kernel, sum(programs), max(x.maps.warps for x in networks),
        s, t, programs[0], numbers, TILE_S=student.maps, TILE_T=teacher.maps)  # fmt: skip


def forward(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C', H, W)
    temperatures: Tensor,  # (2,) float64: channel, spatial
    reduction: int,
    needs_grad: bool,
    configs: tuple[Config, Config] | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: loss, grad_map, stats (docs/ops.md). `configs` replaces the table's choice for the two networks."""
    from . import triton_kernels as kernels

    loss, grad_map, stats = _results.cafd(student, teacher, temperatures, reduction, needs_grad)
    samples = student.shape[0]
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"teacher: expected maps of {tuple(student.shape[2:])}, got {tuple(teacher.shape[2:])}")
    if samples == 0:
        return loss.zero_(), grad_map, stats
    per_sample = loss if reduction == 0 else loss.new_empty([samples])
    with on_device(student):
        a, b = (Network(x, configs[i] if configs else None) for i, x in enumerate((student, teacher)))
        s, t = a.to_kernels(stats, None), b.to_kernels(None, None)
        _attend(a, b, s, t, numbers_for(temperatures, by_pointer))
        block = min(4096, max(16, next_power_of_2(s.positions)))
        launch(
            kernels.kl_kernel, samples, 8 if block > 512 else 1,
            s, t, per_sample, grad_map if needs_grad else None, 1.0 / samples if reduction == 1 else 1.0,
            BLOCK=block)  # fmt: skip
        if reduction != 0:
            torch.sum(per_sample, 0, out=loss)
    return loss, grad_map, stats


def map_forward(features: Tensor, temperatures: Tensor, config: Config | None = None,
                by_pointer: bool | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op attention_map: map, stats."""
    attention, stats = _results.attention_map(features, temperatures)
    if features.shape[0] > 0:
        with on_device(features):
            network = Network(features, config)
            x = network.to_kernels(stats, attention)
            _attend(network, network, x, None, numbers_for(temperatures, by_pointer))
    return attention, stats


def map_backward(features: Tensor, grad_map: Tensor, stats: Tensor, temperatures: Tensor,
                 config: Config | None = None, by_pointer: bool | None = None) -> Tensor:  # fmt: skip
    """The op attention_map_backward: the gradient of the features from that of the map."""
    from . import triton_kernels as kernels

    grad = torch.empty_like(features)
    if features.shape[0] == 0:
        return grad
    network = Network(features, config)
    x, out, grad_map = network.to_kernels(stats, None), dense(grad, network.last), grad_map.contiguous()
    numbers = numbers_for(temperatures, by_pointer)
    with on_device(features):
        centered, products = torch.empty_like(grad_map), stats.new_empty([network.samples, 2])
        block = min(4096, max(16, next_power_of_2(x.positions)))
        launch(
            kernels.center_kernel, network.samples, 8 if block > 512 else 1,
            x, grad_map, centered, products, BLOCK=block)  # fmt: skip
        tile, whole = network.write, network.write.positions >= x.positions
        if not whole:
            launch(
                kernels.rho_kernel, network.stats_programs, network.stats.warps,
                x, centered, *network.walk, numbers, TILE=network.stats)  # fmt: skip
        blocks = -(-x.channels // (tile.channels * tile.unroll)) * -(-x.positions // tile.positions)
        launch(
            kernels.write_kernel, network.samples * blocks, tile.warps,
            x, centered, products, out, network.splits, numbers, WHOLE=whole, TILE=tile)  # fmt: skip
    return settled(grad, out, network.last)


# ------------------------------------------------------------------------------------------------- the ops


for _name, _run in (("cafd", forward), ("attention_map", map_forward), ("attention_map_backward", map_backward)):
    define(f"{_name}_triton", op.SIGNATURES[_name], _run)
_ops = op.register("_triton", _results)


def cafd(student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    loss = op.cafd if student.shape[2:] == teacher.shape[2:] else op.cafd_pooled
    return loss(_ops, student, teacher, *args)


def attention_map(*args: Any) -> Tensor:
    """A, (N, H, W), differentiable; the arguments are reference.attention_map's."""
    return op.attention_map(_ops, *args)
