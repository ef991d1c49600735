"""Images without labels: how they are read, and that students with a teacher learn from them, and only those."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from safetensors.torch import load_file

from dsct_kernels.distill import cli, data
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import tiles_of
from dsct_kernels.distill.datasets.unlabelled import unlabelled_tiles
from dsct_kernels.distill.files import DataError

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--device=cpu", "--no-pictures"]
TINY += ["--teacher-steps=2", "--student-steps=3", "--log-every=1", "--accumulate=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A PNG, a JPEG in a folder of its own, and a GeoTIFF that has no data in its left half."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for name, size in (("a.png", (40, 50)), ("more/b.JPG", (64, 33))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name, format=None)
    pixels = rng.integers(1, 256, (3, 48, 48), np.uint8)
    pixels[:, :, :24] = 0
    shape = {"height": 48, "width": 48, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(folder / "c.tif", "w", driver="GTiff", **shape) as file:
        file.write(pixels)
    (folder / "notes.txt").write_text("no image")
    return folder


def of(images: Path | None, **changes) -> Config:
    return Config(scenes=3, scene_size=64, unlabelled=None if images is None else str(images), **changes)


def test_every_image_below_the_folder_is_a_tile_without_labels(images):
    cfg = of(images)
    found = unlabelled_tiles(cfg, tiles_of(cfg)[0])
    assert [(tile.name, tile.height, tile.width) for tile in found] == [
        ("a.png", 40, 50), ("c.tif", 48, 48), ("more/b.JPG", 64, 33)]  # fmt: skip
    for tile in found[::2]:
        assert not tile.read(0, 0, tile.height, tile.width)[..., -1].any()
    assert np.array_equal(found[0].read(3, 4, 5, 6)[..., :-1], np.asarray(Image.open(images / "a.png"))[3:8, 4:10])
    label = found[1].read(0, 20, 48, 8)[..., -1]
    assert (label[:, :4] == data.IGNORE).all() and not label[:, 4:].any()


def test_they_are_seen_at_the_same_scale_as_the_labelled(images):
    cfg = of(images, downscale=2)
    assert [(tile.height, tile.width) for tile in unlabelled_tiles(cfg, tiles_of(cfg)[0])] == [
        (20, 25), (24, 24), (32, 16)]  # fmt: skip


def test_what_cannot_be_read_is_refused_by_name(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", height=8, width=8, count=3, dtype="uint16"):
        pass
    like = tiles_of(of(None))[0]
    for folder, said in ((tmp_path / "no", "no such folder"), (tmp_path / "empty", "no image below it"),
                         (tmp_path, "deep.tif: samples are uint16")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            unlabelled_tiles(of(folder), like)
    for more, said in ((["--arms", "alone"], "--unlabelled"), (["--unlabelled-weight=-1"], "--unlabelled-weight")):
        with pytest.raises(SystemExit):
            cli.main([*TINY, *more, "--unlabelled", str(images), "--out", str(tmp_path / "run")])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_students_with_a_teacher_learn_from_them_and_nobody_else_does(images, tmp_path):
    weights = {}
    for name, more in (("without", []), ("with", ["--unlabelled", str(images)])):
        assert cli.main([*TINY, *more, "--out", str(tmp_path / name)]) == 0
        for phase in ("teacher", "student-alone", "student-dsct"):
            weights[name, phase] = load_file(tmp_path / name / phase / "model.safetensors")

    def same(phase: str) -> bool:
        one, two = weights["without", phase], weights["with", phase]
        return all(torch.equal(one[key], two[key]) for key in one)

    assert same("teacher") and same("student-alone") and not same("student-dsct")
