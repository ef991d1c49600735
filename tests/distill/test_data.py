"""Scenes, splits, crops, and what happens to input that is wrong."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsct_kernels.distill import data, scenes
from dsct_kernels.distill.datasets import dubai, synthetic
from dsct_kernels.distill.datasets.tile import downscaled
from dsct_kernels.distill.evaluate import window_starts

LAND, WATER = dubai.PALETTE[1], dubai.PALETTE[4]


def make_tile(root: Path, group: str = "Tile 1", part: str = "image_part_001", size=(40, 50), colour=LAND) -> Path:
    """A Dubai-like tile of one class; returns its group's folder."""
    folder = root / group
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{part}.jpg", quality=95)
    Image.new("RGB", size[::-1], colour).save(folder / "masks" / f"{part}.png")
    return folder


def test_same_seed_draws_the_same_scene():
    image, label = scenes.draw_scene(5, 128)
    again, label_again = scenes.draw_scene(5, 128)
    other, _ = scenes.draw_scene(6, 128)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    assert not np.array_equal(image, other)


def test_scenes_hold_every_class_and_nothing_else():
    labels = np.concatenate([scenes.draw_scene(seed)[1].ravel() for seed in range(6)])
    assert np.array_equal(np.unique(labels), np.arange(len(scenes.CLASSES)))


def test_split_is_by_tile(tmp_path):
    for group in ("Tile 1", "Tile 2", "Tile 3"):
        for part in ("image_part_001", "image_part_002"):
            make_tile(tmp_path, group, part)
    tiles = dubai.tiles(tmp_path)
    train, val = data.split(tiles, ["Tile 2"])
    assert {t.group for t in train} == {"Tile 1", "Tile 3"} and {t.group for t in val} == {"Tile 2"}
    assert len(train) == 4 and len(val) == 2
    default_train, default_val = data.split(tiles, None)
    assert not {t.group for t in default_train} & {t.group for t in default_val}
    with pytest.raises(data.DataError, match="Tile 9"):
        data.split(tiles, ["Tile 9"])
    with pytest.raises(data.DataError, match="0 tiles to train on"):
        data.split(tiles, ["Tile 1", "Tile 2", "Tile 3"])


@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_windowed_reads_give_the_same_crops_as_the_cache(tmp_path, scale):
    make_tile(tmp_path, size=(70, 90))
    make_tile(tmp_path, "Tile 2", size=(33, 120), colour=WATER)
    tiles = [*dubai.tiles(tmp_path), *synthetic.draw(1, 64)]
    cached, windowed = data.Pixels(tiles, cache_mb=64), data.Pixels(tiles, cache_mb=0)
    assert cached.flat is not None and windowed.flat is None
    for step in range(4):
        a = data.Crops(cached, 32, 6, 1, scale, 0.1)[step]
        b = data.Crops(windowed, 32, 6, 1, scale, 0.1)[step]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_crop_shows_the_tile_it_was_cut_from():
    pixels = data.Pixels(synthetic.draw(1, 96), cache_mb=16)
    whole = pixels.window(0, 0, 0, 96, 96)
    flags = np.zeros(1, bool)
    for y, x, flip_y, flip_x, turn in ((0, 0, 0, 0, 0), (7, 30, 1, 0, 1), (64, 64, 1, 1, 0)):
        boxes = data.Boxes(
            np.array([0]), np.array([y]), np.array([x]), np.ones(1),
            flags | bool(flip_y), flags | bool(flip_x), flags | bool(turn), np.ones((1, 3)), np.zeros((1, 1)),
        )  # fmt: skip
        expected = whole[y : y + 32, x : x + 32]
        expected = expected.flip(0) if flip_y else expected
        expected = expected.flip(1) if flip_x else expected
        expected = expected.transpose(0, 1) if turn else expected
        assert torch.equal(pixels.crops(boxes, 32)[0], expected)


def test_a_tile_smaller_than_the_crop_is_padded_with_ignored():
    pixels = data.Pixels(synthetic.draw(1, 24), cache_mb=16)
    batch, _, _ = data.Crops(pixels, 32, 4, 0, 0.0, 0.0)[0]
    labels = batch[..., 3]
    assert batch.shape == (4, 32, 32, 4)
    assert (labels != data.IGNORE).sum(dim=(1, 2)).tolist() == [24 * 24] * 4


def test_batches_depend_on_seed_and_step_alone():
    pixels = data.Pixels(synthetic.draw(2, 96), cache_mb=16)
    crops = data.Crops(pixels, 32, 4, 3, 0.3, 0.1)
    late = [batch[0] for batch in crops.loader(2, 4)]
    assert torch.equal(late[0], crops[2][0]) and torch.equal(late[1], crops[3][0])
    assert not torch.equal(crops[2][0], crops[3][0])
    assert not torch.equal(crops[2][0], data.Crops(pixels, 32, 4, 4, 0.3, 0.1)[2][0])


def test_crops_of_three_bands_are_those_of_the_published_runs():
    """Drawn from one generator in one order: a number that is drawn anew in between would change every run."""
    boxes = data.Crops(data.Pixels(synthetic.draw(2, 96), cache_mb=0), 32, 2, 3, 0.5, 0.1).boxes(5)
    assert (boxes.tile.tolist(), boxes.y.tolist(), boxes.x.tolist()) == ([0, 1], [33, 6], [13, 59])
    assert boxes.scale == pytest.approx([1.48975, 1.08077], abs=1e-5)
    assert (boxes.flip_y.tolist(), boxes.turn.tolist()) == ([True, True], [False, False])
    assert boxes.gain == pytest.approx(np.array([[1.05506, 1.08967, 1.0663], [0.87926, 0.89021, 0.88863]]), abs=1e-5)
    assert boxes.shift == pytest.approx(np.array([[0.01179], [0.01909]]), abs=1e-5)


@pytest.mark.parametrize("factor", [2, 3])
def test_downscaling_averages_colours_and_keeps_labels(factor):
    (tile,) = synthetic.draw(1, 64)
    (small,) = downscaled([tile], factor)
    size = 64 // factor
    assert (small.height, small.width, small.group) == (size, size, tile.group)
    whole, pixels = tile.read(0, 0, 64, 64), small.read(0, 0, size, size)
    square = whole[4 * factor : 5 * factor, 7 * factor : 8 * factor]
    assert pixels[4, 7, :3] == pytest.approx(square[..., :3].mean((0, 1)), abs=0.5)
    assert pixels[4, 7, 3] == square[factor // 2, factor // 2, 3]
    assert np.array_equal(small.read(3, 5, 4, 6), pixels[3:7, 5:11])


def test_downscaling_by_nonsense():
    tiles = synthetic.draw(1, 64)
    assert downscaled(tiles, 1) == tiles
    with pytest.raises(data.DataError, match="--downscale: expected 1 or more, got 0"):
        downscaled(tiles, 0)
    with pytest.raises(data.DataError, match="--downscale 65: scene 00 is only 64 x 64"):
        downscaled(tiles, 65)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 47, 64, 100, 544, 2149])
def test_windows_cover_a_tile_and_overlap(length):
    size = 32
    starts = window_starts(length, size)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + size] += 1
    assert covered.min() >= 1 and starts[0] == 0 and starts[-1] + size >= length
    assert all(b - a <= 0.75 * size + 1 for a, b in pairwise(starts))


def test_palette_masks_are_read_as_colours(tmp_path):
    """Some masks of the set are 4-bit palette images: their indices are not classes."""
    folder = make_tile(tmp_path)
    mask = folder / "masks" / "image_part_001.png"
    colours = Image.new("RGB", (50, 40), LAND)
    colours.paste(WATER, (0, 0, 10, 40))
    colours.quantize(4).save(mask, bits=2)
    assert Image.open(mask).mode == "P"
    label = dubai.tiles(tmp_path)[0].read(0, 0, 40, 50)[..., 3]
    assert (label[:, :10] == 4).all() and (label[:, 10:] == 1).all()


def test_unlabelled_and_black_are_ignored(tmp_path):
    for k, colour in enumerate(dubai.IGNORED):
        make_tile(tmp_path, f"Tile {k}", colour=colour)
    assert all((tile.read(0, 0, 40, 50)[..., 3] == data.IGNORE).all() for tile in dubai.tiles(tmp_path))


# ---- bad input: an error that names the file


def pixels_of(root: Path) -> data.Pixels:
    return data.Pixels(dubai.tiles(root), cache_mb=64)


def test_missing_folder(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: no such folder"):
        dubai.tiles(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="--root"):
        dubai.tiles(None)
    with pytest.raises(data.DataError, match=rf"{tmp_path}: no tiles"):
        dubai.tiles(tmp_path)


def test_image_without_label(tmp_path):
    folder = make_tile(tmp_path)
    (folder / "masks" / "image_part_001.png").unlink()
    with pytest.raises(data.DataError, match=r"Tile 1/images/image_part_001.jpg: no label"):
        dubai.tiles(tmp_path)


def test_sizes_that_differ(tmp_path):
    folder = make_tile(tmp_path)
    Image.new("RGB", (51, 40), LAND).save(folder / "masks" / "image_part_001.png")
    with pytest.raises(data.DataError, match=r"masks/image_part_001.png: 51 x 40, but its image .* is 50 x 40"):
        dubai.tiles(tmp_path)


def test_unknown_colour(tmp_path):
    folder = make_tile(tmp_path)
    mask = Image.new("RGB", (50, 40), LAND)
    mask.putpixel((7, 3), (1, 2, 3))
    mask.save(folder / "masks" / "image_part_001.png")
    with pytest.raises(data.DataError, match=r"masks/image_part_001.png: unknown colour #010203 at row 3, column 7"):
        pixels_of(tmp_path)


@pytest.mark.parametrize("which", ["images/image_part_001.jpg", "masks/image_part_001.png"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_truncated_file(tmp_path, which, kept):
    path = make_tile(tmp_path, size=(200, 200)) / which
    if path.suffix == ".png":  # noise, so that half the file is half the picture
        noise = np.random.default_rng(0).integers(0, 5, (200, 200))
        Image.fromarray(np.array(dubai.PALETTE, np.uint8)[noise]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(data.DataError, match=which):
        pixels_of(tmp_path)


def test_sixteen_bit_image(tmp_path):
    folder = make_tile(tmp_path)
    (folder / "images" / "image_part_001.jpg").unlink()
    Image.fromarray(np.zeros((40, 50), np.uint16)).save(folder / "images" / "image_part_001.png")
    with pytest.raises(data.DataError, match=r"images/image_part_001.png: samples are uint16, expected uint8"):
        pixels_of(tmp_path)


# ---- the real tiles


def test_real_tiles(dubai_root):
    tiles = dubai.tiles(dubai_root)
    assert len(tiles) >= 54 and all((dubai_root / tile.group).is_dir() for tile in tiles)
    small = [tile for tile in tiles if tile.height * tile.width < 400_000]
    labels = torch.cat([data.Pixels([tile], 64).flat[:, 3] for tile in small])
    share = torch.bincount(labels.int(), minlength=256) / len(labels)
    assert share[:5].min() > 0.02 and share[255] < 0.05 and share[:5].sum() + share[255] > 0.9999
