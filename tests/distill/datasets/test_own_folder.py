"""One's own folder: what a data.yaml may say, and what is said of one that is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from dsct_kernels.distill import check, cli, data
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import tiles_of
from dsct_kernels.distill.datasets.folder import describe
from dsct_kernels.distill.files import DataError

from . import make

NUMBERS = make.YAML


def sides(root) -> tuple[list[str], list[str]]:
    train, val = data.split(tiles_of(Config(data="folder", root=str(root))), None)
    return [t.name for t in train], [t.name for t in val]


def test_labels_may_be_colours(tmp_path):
    text = NUMBERS
    for value in (3, 7, 12):
        text = text.replace(f", value: {value}}}", "}")
    written = make.folder_set(tmp_path, text.replace("ignored: [0]", 'ignored: ["#000000", [9, 9, 9]]'))
    palette = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))
    for k, name in enumerate("abc"):
        make.geotiff(tmp_path / f"labels/{name}_mask.tif", make.coloured(make.classes(4, k), palette))
    for tile in tiles_of(Config(data="folder", root=str(tmp_path))):
        assert np.array_equal(tile.read(0, 0, 64, 64)[..., -1], written[tile.name][1])


def test_lists_say_who_trains_and_who_validates(tmp_path):
    make.folder_set(tmp_path)
    assert sides(tmp_path) == (["a", "b"], ["c"])  # val alone: all others train
    (tmp_path / "data.yaml").write_text(NUMBERS.replace("val: [c]", "train: train.txt\nval: [c]"))
    (tmp_path / "train.txt").write_text("a\n")
    assert sides(tmp_path) == (["a"], ["c"])  # b is in neither list
    (tmp_path / "data.yaml").write_text(NUMBERS.replace("val: [c]\n", ""))
    assert sides(tmp_path) == (["b", "c"], ["a"])  # every third group


def test_folders_say_who_trains_and_who_validates(tmp_path):
    make.folder_set(tmp_path)
    for name, side in (("a", "train"), ("b", "val"), ("c", "train")):
        for folder, suffix in (("images", ""), ("labels", "_mask")):
            (tmp_path / side / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"{name}{suffix}.tif").rename(tmp_path / side / folder / f"{name}{suffix}.tif")
    text = NUMBERS.replace("images/{name}.tif", "'{side}/images/{name}.tif'").replace("val: [c]\n", "")
    text = text.replace("labels/{name}_mask.tif", "'{side}/labels/{name}_mask.tif'")
    (tmp_path / "data.yaml").write_text(text)
    assert sides(tmp_path) == (["train/a", "train/c"], ["val/b"])


def test_tiles_of_one_group_stay_together(tmp_path):
    make.folder_set(tmp_path, NUMBERS.replace("val: [c]", 'group: "^([ab])|c"'))
    tiles = tiles_of(Config(data="folder", root=str(tmp_path)))
    assert [(t.name, t.group) for t in tiles] == [("a", "a"), ("b", "b"), ("c", "c")]
    (tmp_path / "data.yaml").write_text(NUMBERS.replace("val: [c]", 'group: "x"'))
    with pytest.raises(DataError, match=r"data.yaml: group: 'x' finds nothing in the name 'a'"):
        tiles_of(Config(data="folder", root=str(tmp_path)))


def test_bands_by_the_names_of_ones_own(tmp_path):
    written = make.folder_set(tmp_path, NUMBERS.replace("[R, G, B, IR]", "[blue, green, red, nir]"))
    (tile, *_) = tiles_of(Config(data="folder", root=str(tmp_path), bands="nir,red"))
    assert np.array_equal(
        tile.read(0, 0, 64, 64)[..., :-1], np.where(written["a"][0].any(-1)[..., None], written["a"][0][..., [3, 2]], 0)
    )
    with pytest.raises(DataError, match=r"--bands RGB: data.yaml has no band 'R' there; it has blue, green, red, nir"):
        tiles_of(Config(data="folder", root=str(tmp_path), bands="RGB"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("classes:", "clases:", "unknown entry 'clases'; there are: name, image, label"),
        (NUMBERS, "- 1", "expected image, label, classes"),
        (NUMBERS, "a: [", "is no YAML"),
        ("image: images/{name}.tif\n", "", "image is missing"),
        ("images/{name}.tif", "images/x.tif", "image: expected one {name} in it"),
        ("images/{name}.tif", "'{side}/{name}.tif'", "{side} must stand in both"),
        ("value: 3", "value: 300", "classes: expected a number from 0 to 255, got 300"),
        (", value: 3", "", "classes: roof has no value"),
        ("value: 7", "value: 3", "grass has the name, colour or value of another class"),
        ("name: grass, ", "", "classes: expected name, colour and perhaps value"),
        ('"#FF0000"', "red", "classes: expected a colour as"),
        ('"#FF0000"', "[1, 2]", "classes: expected a colour as"),
        ("ignored: [0]", "ignored: 0", "ignored: expected a list, got 0"),
        ("ignored: [0]", "ignored: [7]", "ignored: 7 is also a class"),
        ("[R, G, B, IR]", "[R, R]", "bands: expected different names"),
        ("val: [c]", "val: [d]", "train or val names 'd', but there is no such image"),
        ("val: [c]", "val: [c]\ntrain: [c]", "c stands in both train and val"),
        ("val: [c]", "val: lists/val.txt", "lists/val.txt cannot be read"),
        ("val: [c]", "train: [c]", "val is missing"),
        ("val: [c]", "group: (", "group: expected a regular expression"),
    ],
)
def test_a_yaml_that_is_wrong_is_named_with_what_was_expected(tmp_path, old, new, said):
    make.folder_set(tmp_path)
    assert NUMBERS.count(old) >= 1
    (tmp_path / "data.yaml").write_text(NUMBERS.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        tiles_of(Config(data="folder", root=str(tmp_path)))
    assert str(error.value).startswith(str(tmp_path / "data.yaml")) and said in str(error.value)


def test_a_folder_without_a_yaml_or_images(tmp_path):
    with pytest.raises(DataError, match=r"data.yaml: cannot be read .*docs/data-sets.md"):
        tiles_of(Config(data="folder", root=str(tmp_path)))
    (tmp_path / "data.yaml").write_text(NUMBERS)
    with pytest.raises(DataError, match=r"no tiles, expected images/\{name\}.tif, as .*data.yaml says"):
        tiles_of(Config(data="folder", root=str(tmp_path)))


def test_an_unknown_class_number_is_named(tmp_path):
    make.folder_set(tmp_path)
    values = np.full((64, 64), 7, np.uint8)
    values[5, 9] = 8
    make.geotiff(tmp_path / "labels/a_mask.tif", values)
    (tile, *_) = tiles_of(Config(data="folder", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"a_mask.tif: unknown class number 8 at row 5, column 9; known: 3, 7, 12, 0"):
        tile.read(0, 0, 64, 64)
    make.geotiff(tmp_path / "labels/a_mask.tif", values.astype(np.uint16))
    with pytest.raises(DataError, match=r"a_mask.tif: samples are uint16, expected class numbers as uint8"):
        tile.read(0, 0, 64, 64)


def test_from_the_command_line_and_before_anything_is_written(tmp_path, capsys):
    make.folder_set(tmp_path / "set")
    check.everything(make.tiny("folder", tmp_path / "set", bands="IRRG"))
    command = ["--data", "folder", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--bands", "XY"]) == 2
    assert "--bands XY: data.yaml has no band 'XY'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_yaml_in_the_docs_is_one(tmp_path):
    page = Path(__file__).parents[3] / "docs" / "data-sets.md"
    if not page.is_file():
        pytest.skip("no docs here")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "data.yaml").write_text(text)
    this = describe(tmp_path)
    assert this.classes == ("roof", "road") and this.key.colours and this.bands == ("R", "G", "B", "IR")
    assert this.sides == {"tile_07": "val", "tile_12": "val"} and re.search(this.group or "", "tile_07_a")
