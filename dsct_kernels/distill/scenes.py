"""Procedural aerial scenes with exact labels: the embedded data set, drawn from a seed, nothing to download."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, ...]
Points = Any  # (n, 2) as an array or a list of pairs

CLASSES = ("Field", "Road", "Building", "Tree", "Water")
PALETTE = ((214, 190, 110), (110, 110, 120), (200, 60, 50), (40, 120, 50), (60, 120, 210))
FIELD, ROAD, BUILDING, TREE, WATER = range(5)

FIELD_COLOURS = ((122, 138, 72), (152, 140, 92), (96, 122, 62), (170, 152, 108), (134, 112, 84), (82, 104, 58))
ROAD_COLOURS = ((128, 126, 122), (104, 104, 106), (150, 138, 118))  # asphalt, dark asphalt, dirt
ROOF_COLOURS = ((150, 82, 66), (140, 138, 136), (112, 96, 86), (186, 180, 172), (92, 92, 98))
TREE_COLOURS = ((58, 84, 44), (70, 98, 50), (84, 104, 58))
WATER_COLOURS = ((62, 86, 88), (52, 74, 92), (82, 98, 84))


class _Canvas:
    """An image and its label map, drawn with the same shapes; shadows darken the image and leave the label."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.image = Image.new("RGB", (size, size))
        self.label = Image.new("L", (size, size), FIELD)
        angle = rng.uniform(0, 2 * math.pi)
        self.sun = np.array([math.cos(angle), math.sin(angle)])

    def colour(self, colours: tuple[Colour, ...], spread: float = 12) -> Colour:
        base = np.array(colours[self.rng.integers(len(colours))])
        return tuple(
            int(v) for v in np.clip(base + self.rng.normal(0, spread / 2) + self.rng.normal(0, spread / 2, 3), 0, 255)
        )

    def shape(self, points: Points, label: int, colour: Colour) -> None:
        points = [tuple(p) for p in points]
        ImageDraw.Draw(self.image).polygon(points, fill=colour)
        ImageDraw.Draw(self.label).polygon(points, fill=label)

    def line(self, points: Points, width: int, label: int, colour: Colour) -> None:
        points = [tuple(p) for p in points]
        for picture, fill in ((self.image, colour), (self.label, label)):
            draw = ImageDraw.Draw(picture)
            draw.line(points, fill=fill, width=width)
            for x, y in points:  # round joints, else wide bends show cracks
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2 - 1, y + width / 2 - 1), fill=fill)

    def shadow(self, points: Points, reach: float) -> None:
        """Darken the hull swept by a shape of some height."""
        points = np.asarray(points, float)
        mask = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(mask)
        for part in np.linspace(0, 1, 4):
            draw.polygon([tuple(p) for p in points + self.sun * reach * part], fill=130)
        self.image.paste(Image.new("RGB", self.image.size, (12, 16, 26)), mask=mask)


def _fields(c: _Canvas) -> None:
    """Split the ground by random lines; each parcel has a colour and a plough direction."""
    rng, size = c.rng, c.size
    y, x = np.mgrid[:size, :size].astype(np.float32)
    parcel = np.zeros((size, size), np.int64)
    for bit in range(int(rng.integers(4, 7))):
        angle, (px, py) = rng.uniform(0, math.pi), rng.uniform(0, size, 2)
        parcel |= ((x - px) * math.cos(angle) + (y - py) * math.sin(angle) > 0).astype(np.int64) << bit
    ground = np.zeros((size, size, 3), np.float32)
    for k in np.unique(parcel):
        angle, period = rng.uniform(0, math.pi), rng.uniform(3, 9)
        stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period) * rng.uniform(0, 14)
        ground = np.where((parcel == k)[..., None], np.array(c.colour(FIELD_COLOURS)) + stripes[..., None], ground)
    c.image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))


def _curve(rng: np.random.Generator, size: int, bend: float) -> np.ndarray:
    """A bent line from one side of the scene to the other."""
    angle, middle = rng.uniform(0, math.pi), rng.uniform(0.15, 0.85, 2) * size
    along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    t = np.linspace(-1.2, 1.2, 60)[:, None]
    wave = bend * size * np.sin(t * rng.uniform(1.5, 4) + rng.uniform(0, 6))
    return middle + along * t * size + across * wave


def _blob(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    wave = np.sum([rng.uniform(0, 0.25 / k) * np.sin(k * angle + rng.uniform(0, 6)) for k in (1, 2, 3, 5)], axis=0)
    return np.asarray(centre) + (radius * (1 + wave))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _water(c: _Canvas) -> None:
    rng = c.rng
    if rng.random() < 0.5:
        c.line(_curve(rng, c.size, 0.08), int(rng.integers(24, 60)), WATER, c.colour(WATER_COLOURS))
    for _ in range(int(rng.integers(0, 3))):
        c.shape(_blob(rng, rng.uniform(0, c.size, 2), rng.uniform(0.08, 0.2) * c.size), WATER, c.colour(WATER_COLOURS))


def _tree(c: _Canvas, centre: np.ndarray, radius: float) -> None:
    crown = _blob(c.rng, centre, radius)
    c.shadow(crown, radius * 0.9)
    c.shape(crown, TREE, c.colour(TREE_COLOURS))


def _trees(c: _Canvas) -> None:
    rng = c.rng
    for _ in range(int(rng.integers(4, 9))):  # groves and lone trees
        centre, spread = rng.uniform(0, c.size, 2), rng.uniform(10, 50)
        for _ in range(int(rng.integers(3, 26))):
            _tree(c, rng.normal(centre, spread), rng.uniform(5, 13))


def _buildings(c: _Canvas, roads: list[np.ndarray]) -> None:
    rng = c.rng
    for road in roads:
        for k in range(4, len(road) - 4, int(rng.integers(3, 6))):
            if rng.random() < 0.3:
                continue
            along = road[k + 1] - road[k]
            along = along / max(np.hypot(*along), 1e-6)
            across = np.array([-along[1], along[0]]) * rng.choice([-1, 1])
            length, depth = rng.uniform(8, 20, 2)
            centre = road[k] + across * (depth + rng.uniform(11, 22))
            corners = [
                centre + along * length * i + across * depth * j for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))
            ]
            c.shadow(corners, rng.uniform(5, 14))
            roof = c.colour(ROOF_COLOURS)
            c.shape(corners, BUILDING, roof)
            if rng.random() < 0.5:  # a ridge: one half of the roof lies in the sun
                half = [corners[0], corners[1], (corners[1] + corners[2]) / 2, (corners[0] + corners[3]) / 2]
                c.shape(half, BUILDING, tuple(min(255, v + 22) for v in roof))


def draw_scene(seed: int, size: int = 384) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (size, size, 3) and label (size, size), both uint8. Same seed, same pixels."""
    rng = np.random.default_rng(seed)
    c = _Canvas(rng, size)
    _fields(c)
    _water(c)
    roads = [_curve(rng, size, rng.uniform(0, 0.06)) for _ in range(int(rng.integers(2, 5)))]
    for road in roads:
        c.line(road, int(rng.integers(8, 17)), ROAD, c.colour(ROAD_COLOURS))
    _trees(c)
    _buildings(c, roads)
    image = np.asarray(c.image.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    haze = rng.uniform(0.94, 1.06, 3) * rng.uniform(0.75, 1.2)
    y, x = np.mgrid[:size, :size] / size
    light = 1 + rng.uniform(-0.15, 0.15) * (x - 0.5) + rng.uniform(-0.15, 0.15) * (y - 0.5)
    grain = rng.normal(0, 7, (size // 2, size // 2, 3)).repeat(2, 0).repeat(2, 1) + rng.normal(0, 6, (size, size, 3))
    image = image * haze * light[..., None] + grain
    return np.clip(image, 0, 255).astype(np.uint8), np.asarray(c.label).copy()
