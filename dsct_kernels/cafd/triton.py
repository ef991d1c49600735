"""CAFD on Triton (triton_kernels.py): four launches forward, two backward where the positions are adjacent, else three.

Forward, both networks in each launch: maximum, sum of exponentials and sum of magnitudes of every channel; the weights
of the channels; the attention map (the second read of the features, meant to hit L2); the divergence and its gradient
with respect to the map. Backward takes that gradient to the features. Every sum has a fixed order.

Variants: one of each kernel for a combination of dtypes, layouts and power-of-two size classes (of C, H*W) that a
process uses: a training run uses one per stage at most.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import values
from ..dtypes import acc_dtype
from ..pool import pooling
from ..triton_common import LOG2_E, define, launch, next_power_of_2, on_device, why_not
from ..values import Number
from . import op

__all__ = ["attention_map", "cafd", "why_not"]

MOST_COMPILED = 7  # kernels of one variant, forward and backward
LONGEST_ROW = 16384  # positions that one program holds in registers in the one-launch backward
ENOUGH_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU: more splits gain nothing

# ---------------------------------------------------------------------------------------------- launch choices


@dataclass(frozen=True)
class Tile:
    channels: int
    positions: int
    warps: int
    unroll: int = 1  # tiles loaded together


@dataclass(frozen=True)
class Config:
    stats: Tile  # row_stats_kernel, rho_kernel
    maps: Tile
    write: Tile
    rows: int  # channels a program of row_backward_kernel takes, one after the other


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
    rows = 1 if positions <= 1024 else 4
    stats, maps, write = (fit(t, channels, positions, positions_adjacent) for t in (stats, maps, write))
    return Config(stats, maps, write, rows)


def candidates(channels: int, positions: int, itemsize: int, positions_adjacent: bool) -> list[Config]:
    """What tuning tries: the table's choice, and from there one kernel's launch changed at a time."""
    base = choose(channels, positions, itemsize, positions_adjacent)
    found = [base, *(replace(base, rows=rows) for rows in (1, 2, 4, 8))]
    for warps in (4, 8):
        for size in (512, 1024, 2048, 4096):
            for lanes in (32, 64, 128, 256, 512, 1024):
                if lanes > size:
                    continue
                shape = (size // lanes, lanes) if positions_adjacent else (lanes, size // lanes)
                tile = fit(Tile(*shape, warps), channels, positions, positions_adjacent)
                found.append(replace(base, write=tile))
                for unroll in (1, 2, 4):
                    found.append(replace(base, stats=replace(tile, unroll=unroll)))
                    found.append(replace(base, maps=replace(tile, unroll=unroll)))
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------- the launches


class Network:
    """One network's features as the kernels see them: sizes, strides, tiles."""

    def __init__(self, x: Tensor, config: Config | None) -> None:
        self.features = x
        self.samples, self.channels, height, self.width = x.shape
        self.positions = height * self.width
        s_n, s_c, s_h, s_w = x.stride()
        self.flat = height == 1 or self.width == 1 or s_h == s_w * self.width
        if self.width == 1:
            s_w = s_h
        self.strides = (s_n, s_c, s_h, s_w)
        self.adjacent = self.flat and (s_w == 1 or self.positions == 1)
        self.config = config or choose(self.channels, self.positions, x.element_size(), self.adjacent)
        self.dtype = acc_dtype(x)
        self.row = stats_row(self.channels, self.positions)
        # positions are split over programs until there are enough of them
        tile = self.config.stats
        step = tile.positions * tile.unroll
        blocks = -(-self.channels // tile.channels)
        wanted = -(-ENOUGH_PROGRAMS // max(1, blocks * self.samples))
        self.splits = max(1, min(wanted, -(-self.positions // step), 64))
        self.span = -(-self.positions // (self.splits * step)) * step
        self.splits = -(-self.positions // self.span)
        self.stats_programs = self.samples * blocks * self.splits
        self.maps_programs = self.samples * -(-self.positions // self.config.maps.positions)

    def acc(self) -> Any:
        import triton.language as tl

        return tl.float64 if self.dtype == torch.float64 else tl.float32

    def constants(self, tile: Tile, which: str) -> dict[str, Any]:
        return {
            f"CHANNELS_{which}": tile.channels,
            f"POSITIONS_{which}": tile.positions,
            f"UNROLL_{which}": tile.unroll,
            f"FLAT_{which}": self.flat,
            f"ACC_{which}": self.acc(),
        }


def stats_row(channels: int, positions: int) -> int:
    """Numbers a sample of `stats` takes (triton_kernels.py), a multiple of 16 so that every row is aligned."""
    return -(-(2 * positions + 4 * channels + 2) // 16) * 16


_results = op.Results(stats_row)


class Temperatures:
    """As the kernels take them: numbers, where they lie on the CPU, else where they are, and the host is not asked.

    `by_pointer` makes that choice by itself: the interpreter's tensors all lie on the CPU.
    """

    def __init__(self, temperatures: Tensor, by_pointer: bool | None) -> None:
        if by_pointer is None:
            by_pointer = temperatures.device.type != "cpu"
        self.at = temperatures if by_pointer else None
        numbers: list[float] = [1.0, 1.0] if by_pointer else temperatures.tolist()
        self.channel, self.spatial = numbers
        self.scale = LOG2_E / self.spatial


def _attend(networks: list[Network], temperatures: Temperatures, maps: bool) -> tuple[list[Tensor], list[Any]]:
    """stats of each network (A is its first part) and, if `maps`, the maps by themselves: three launches for both."""
    from . import triton_kernels as kernels

    scale, at = temperatures.scale, temperatures.at
    s, t = networks[0], networks[-1]
    both = len(networks) == 2
    partial = [x.features.new_empty([x.samples, x.splits, 3, x.channels], dtype=x.dtype) for x in networks]
    stats = [x.features.new_empty([x.samples, x.row], dtype=x.dtype) for x in networks]
    out = [x.features.new_empty([x.samples, *x.features.shape[2:]], dtype=x.dtype) if maps else None for x in networks]
    launch(
        kernels.row_stats_kernel, sum(x.stats_programs for x in networks), max(x.config.stats.warps for x in networks),
        s.features, t.features if both else None, partial[0], partial[-1] if both else None, s.stats_programs,
        scale, at, s.channels, s.positions, s.width, *s.strides, s.splits, s.span,
        t.channels, t.positions, t.width, *t.strides, t.splits, t.span,
        **s.constants(s.config.stats, "S"), **t.constants(t.config.stats, "T"), BOTH=both)  # fmt: skip
    launch(
        kernels.channel_weights_kernel, sum(x.samples for x in networks), 4,
        partial[0], partial[-1] if both else None, stats[0], stats[-1] if both else None, s.samples,
        temperatures.channel, scale, at,
        s.row, s.channels, s.positions, s.splits, t.row, t.channels, t.positions, t.splits,
        BLOCK_S=max(16, next_power_of_2(s.channels)), ACC_S=s.acc(), BLOCK_T=max(16, next_power_of_2(t.channels)),
        ACC_T=t.acc(), BOTH=both)  # fmt: skip
    launch(
        kernels.maps_kernel, sum(x.maps_programs for x in networks), max(x.config.maps.warps for x in networks),
        s.features, t.features if both else None, stats[0], stats[-1] if both else None, out[0],
        out[-1] if both else None, s.maps_programs, scale, at,
        s.row, s.channels, s.positions, s.width, *s.strides, t.row, t.channels, t.positions, t.width, *t.strides,
        **s.constants(s.config.maps, "S"), **t.constants(t.config.maps, "T"), BOTH=both)  # fmt: skip
    return stats, out


def forward(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C', H', W')
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
    if samples == 0:
        return loss.zero_(), grad_map, stats
    factor = 1.0 / samples if reduction == 1 else 1.0
    per_sample = loss if reduction == 0 else loss.new_empty([samples])
    same = student.shape[2:] == teacher.shape[2:]
    with on_device(student):
        s = Network(student, configs[0] if configs else None)
        t = Network(teacher, configs[1] if configs else None)
        (stats, stats_t), maps = _attend([s, t], Temperatures(temperatures, by_pointer), maps=not same)
        map_s, map_t, row_s, row_t = stats, stats_t, s.row, t.row
        positions, pooled_grad = s.positions, grad_map if needs_grad else None
        if not same:  # the maps are tiny: pooled in float64 by matrix products, both ways in a fixed order
            size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:])]
            positions = row_s = row_t = size[0] * size[1]
            down = [[pooling(x, to, student.device) for x, to in zip(m.shape[1:], size)] for m in maps]
            pooled = [rows @ m.double() @ columns.T for m, (rows, columns) in zip(maps, down)]
            sums = [m.sum((1, 2), keepdim=True) for m in pooled]
            map_s, map_t = ((m / total).to(loss.dtype).contiguous() for m, total in zip(pooled, sums))
            pooled_grad = torch.empty_like(map_s) if needs_grad else None
        block = min(4096, max(16, next_power_of_2(positions)))
        launch(
            kernels.kl_kernel, samples, 8 if block > 512 else 1,
            map_s, map_t, per_sample, pooled_grad, row_s, row_t, positions, factor, NEEDS_GRAD=needs_grad, BLOCK=block,
            ACC=kernels.tl.float64 if loss.dtype == torch.float64 else kernels.tl.float32)  # fmt: skip
        if needs_grad and not same:
            assert pooled_grad is not None
            g = pooled_grad.double()
            g = (g - (g * map_s).sum((1, 2), keepdim=True)) / sums[0]
            rows, columns = down[0]
            grad_map.copy_(rows.T @ g @ columns)
        if reduction != 0:
            torch.sum(per_sample, 0, out=loss)
            if reduction == 1 and samples > 1:
                loss.mul_(factor)
    return loss, grad_map, stats


def map_forward(features: Tensor, temperatures: Tensor, config: Config | None = None,
                by_pointer: bool | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op attention_map: map, stats."""
    if features.shape[0] == 0:
        return _results.attention_map(features, temperatures)
    with on_device(features):
        stats, maps = _attend([Network(features, config)], Temperatures(temperatures, by_pointer), maps=True)
    return maps[0], stats[0]


def map_backward(features: Tensor, grad_map: Tensor, stats: Tensor, temperatures: Tensor,
                 config: Config | None = None, by_pointer: bool | None = None) -> Tensor:  # fmt: skip
    """The op attention_map_backward: the gradient of the features from that of the map."""
    from . import triton_kernels as kernels

    grad = torch.empty_like(features)
    if features.shape[0] == 0:
        return grad
    x, g = Network(features, config), Network(grad, config)
    grad_map = grad_map.contiguous()
    t = Temperatures(temperatures, by_pointer)
    acc = x.acc()
    with on_device(features):
        centered, products = torch.empty_like(grad_map), stats.new_empty([x.samples, 2])
        block = min(4096, max(16, next_power_of_2(x.positions)))
        launch(
            kernels.center_kernel, x.samples, 8 if block > 512 else 1,
            grad_map, stats, centered, products, x.row, x.positions, BLOCK=block, ACC=acc)  # fmt: skip
        if x.adjacent and g.adjacent and x.positions <= LONGEST_ROW:
            block = max(16, next_power_of_2(x.positions))
            groups = -(-x.channels // x.config.rows)
            launch(
                kernels.row_backward_kernel, x.samples * groups, max(1, min(16, block // 1024)),
                features, centered, products, stats, grad, x.row, x.channels, x.positions, *x.strides[:2],
                *g.strides[:2], groups, t.channel, t.spatial, t.scale, t.at, ROWS=x.config.rows, BLOCK=block,
                ACC=acc)  # fmt: skip
            return grad
        partial = stats.new_empty([x.samples, x.splits, x.channels])
        tile = x.config.stats
        launch(
            kernels.rho_kernel, x.stats_programs, tile.warps,
            features, centered, stats, partial, x.row, x.channels, x.positions, x.width, *x.strides, x.splits, x.span,
            t.scale, t.at, CHANNELS=tile.channels, POSITIONS=tile.positions, UNROLL=tile.unroll, FLAT=x.flat,
            ACC=acc)  # fmt: skip
        tile = x.config.write
        blocks = -(-x.positions // tile.positions)
        launch(
            kernels.write_kernel, x.samples * -(-x.channels // tile.channels) * blocks, tile.warps,
            features, centered, products, stats, partial, grad, x.row, x.channels, x.positions, x.width, *x.strides,
            *g.strides, blocks, x.splits, t.channel, t.spatial, t.scale, t.at, CHANNELS=tile.channels,
            POSITIONS=tile.positions, FLAT=x.flat, GRAD_FLAT=g.flat, ACC=acc)  # fmt: skip
    return grad


# ------------------------------------------------------------------------------------------------- the ops


for _name, _run in (("cafd", forward), ("attention_map", map_forward), ("attention_map_backward", map_backward)):
    define(f"{_name}_triton", op.SIGNATURES[_name], _run)
_cafd, _map, _backward = op.register("_triton", _results)


def cafd(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    temperatures = values.packed((channel_temperature, spatial_temperature), student.device)
    return op.call(_cafd, _backward, student, teacher, temperatures, reduction)


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    attention: Tensor = _map(features, values.packed((channel_temperature, spatial_temperature), features.device))[0]
    return attention
