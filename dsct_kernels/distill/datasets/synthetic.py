"""Drawn scenes: the embedded data set, nothing to download."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import scenes
from .tile import Dataset, Tile

if TYPE_CHECKING:
    from ..config import Config


@dataclass(frozen=True)
class SceneTile(Tile):
    seed: int

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        image, label = scenes.draw_scene(self.seed, self.height)
        return np.dstack([image, label])[y : y + height, x : x + width]


def draw(count: int, size: int, seed: int = 0) -> list[Tile]:
    return [SceneTile(f"scene {i:02d}", f"scene {i:02d}", size, size, seed=1000 * seed + i) for i in range(count)]


def tiles(cfg: "Config") -> list[Tile]:
    return draw(cfg.scenes, cfg.scene_size)


DATASET = Dataset(
    name="synthetic",
    classes=scenes.CLASSES,
    palette=scenes.PALETTE,
    tiles=tiles,
    split="every third scene validates",
    ignored="nothing",
    bands=("RGB",),
    layout="drawn from seeds: --scenes, --scene-size",
    own_statistics=False,
)
