"""Every layout is written as its owners have it, and read back; and what torchgeo and mmsegmentation disagree on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dsct_kernels.distill import check, cli, data, evaluate
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import REGISTRY, check_choices, dataset_of, gid, potsdam, tiles_of, vaihingen
from dsct_kernels.distill.files import DataError
from dsct_kernels.distill.run import Run

from . import make


def read(cfg: Config) -> make.Written:
    found = {}
    for tile in tiles_of(cfg):
        pixels = tile.read(0, 0, tile.height, tile.width)
        found[tile.name] = (pixels[..., :-1], pixels[..., -1])
    return found


def assert_read_as_written(cfg: Config, written: make.Written, bands=None) -> None:
    check_choices(cfg)
    found = read(cfg)
    assert sorted(found) == sorted(written)
    for name, (image, label) in written.items():
        image = image if bands is None else image[..., bands]
        assert np.array_equal(found[name][0], image), name
        assert np.array_equal(found[name][1], label), name


def sides(cfg: Config) -> tuple[set[str], set[str]]:
    train, val = data.split(tiles_of(cfg), None)
    return {tile.name for tile in train}, {tile.name for tile in val}


LAYOUTS = {
    "dubai": ("dubai", make.dubai_set),
    "potsdam": ("potsdam", make.potsdam_set),
    "potsdam, not nested": ("potsdam", lambda root: make.potsdam_set(root, nested=False)),
    "potsdam, converted": ("potsdam", lambda root: make.converted_set(root, 6)),
    "vaihingen": ("vaihingen", make.vaihingen_set),
    "vaihingen, complete": ("vaihingen", lambda root: make.vaihingen_set(root, vaihingen.COMPLETE)),
    "vaihingen, converted": (
        "vaihingen", lambda root: make.converted_set(root, 6, ("area1_0_0_64_64",), ("area2_0_0_64_64",))
    ),
    "gid": ("gid", make.gid_set),
    "gid, converted": (
        "gid", lambda root: make.converted_set(root, 5, ("GF2_a-MSS1_0_0_64_64",), ("GF2_a-MSS1_64_0_128_64",))
    ),
    "gid15": ("gid15", lambda root: make.gid_set(root, fine=True)),
    "gid15, zip": ("gid15", make.gid15_zip),
    "loveda": ("loveda", make.loveda_set),
    "loveda, converted": ("loveda", lambda root: make.converted_set(root, 7, ("0", "1"), ("2",))),
    "folder": ("folder", make.folder_set),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_it_was_written(tmp_path, layout):
    name, write = LAYOUTS[layout]
    assert_read_as_written(Config(data=name, root=str(tmp_path)), write(tmp_path))


def test_every_data_set_has_a_layout_here():
    assert {name for name, _ in LAYOUTS.values()} == set(REGISTRY) - {"synthetic"}


@pytest.mark.parametrize("data_set", ["dubai", "potsdam", "vaihingen", "gid", "gid15", "loveda", "folder"])
def test_one_run_trains_evaluates_and_predicts(tmp_path, data_set):
    """Each layout above once; the folder is one of four bands and 16 bits."""
    _, write = LAYOUTS["gid15, zip" if data_set == "gid15" else data_set]
    write(tmp_path / "set")
    run = Run(make.tiny(data_set, tmp_path / "set"), tmp_path / "run")
    trained = run.all()
    assert set(run.results) == {"teacher", "dsct"}
    for result in run.results.values():
        assert 0 <= result["accuracy"] <= 1 and not result["diverged"]
    whole = run.accelerator, trained["dsct"], run.val_pixels, 0, run.cfg, len(run.classes)
    classes = torch.cat([found for _, found in evaluate.strips(*whole)])
    assert classes.shape == (make.SIDE, make.SIDE) and int(classes.max()) < len(run.classes)
    bands = 4 if data_set == "folder" else 3
    assert trained["dsct"].pixel_mean.shape == (bands, 1, 1)
    run.log.close()


@pytest.mark.parametrize("name", REGISTRY)
def test_the_defaults_of_every_set_pass(name):
    root = {} if name == "synthetic" else {"root": "/somewhere"}
    check.settings(cli.config_from({"data": name, **root}))


# ---- splits


def test_the_owners_splits(tmp_path):
    make.potsdam_set(tmp_path / "potsdam")
    assert sides(Config(data="potsdam", root=str(tmp_path / "potsdam"))) == ({"2_10", "7_7"}, {"2_13"})
    make.vaihingen_set(tmp_path / "vaihingen")
    assert sides(Config(data="vaihingen", root=str(tmp_path / "vaihingen"))) == ({"area1", "area3"}, {"area2"})
    make.loveda_set(tmp_path / "loveda")
    train, val = sides(Config(data="loveda", root=str(tmp_path / "loveda")))
    assert {n.split("/")[0] for n in train} == {"Train"} and {n.split("/")[0] for n in val} == {"Val"}
    make.gid15_zip(tmp_path / "gid15")
    train, val = sides(Config(data="gid15", root=str(tmp_path / "gid15")))
    assert len(train) == 2 and len(val) == 1
    make.gid_set(tmp_path / "gid")
    assert len(sides(Config(data="gid", root=str(tmp_path / "gid")))[1]) == 1  # every third


def test_the_contests_lists_are_whole():
    assert (len(potsdam.TRAIN), len(potsdam.VAL), len({*potsdam.TRAIN, *potsdam.VAL})) == (24, 14, 38)
    assert (len(vaihingen.TRAIN), len(vaihingen.VAL), len({*vaihingen.TRAIN, *vaihingen.VAL})) == (16, 17, 33)


def test_chosen_tiles_come_before_the_owners_split(tmp_path):
    make.potsdam_set(tmp_path)
    train, val = data.split(tiles_of(Config(data="potsdam", root=str(tmp_path))), ["7_7"])
    assert ({t.name for t in train}, {t.name for t in val}) == ({"2_10", "2_13"}, {"7_7"})


def test_labels_of_the_participants_alone_have_nothing_to_validate_on(tmp_path):
    make.potsdam_set(tmp_path, numbers=("2_10", "2_11", "2_13"))
    next(tmp_path.rglob("top_potsdam_2_13_label.tif")).unlink()
    tiles = tiles_of(Config(data="potsdam", root=str(tmp_path)))
    assert {t.name for t in tiles} == {"2_10", "2_11"}
    with pytest.raises(DataError, match=r"no tile of the data set's own validation split .*--val-tiles .*2_10, 2_11"):
        data.split(tiles, None)


# ---- where torchgeo and mmsegmentation disagree


def test_clutter_is_the_last_class_of_both_isprs_sets():
    for name in ("potsdam", "vaihingen"):
        assert REGISTRY[name].classes[5] == "Clutter" and REGISTRY[name].palette[5] == (255, 0, 0)
        assert REGISTRY[name].classes[0] == "Impervious surfaces" and REGISTRY[name].palette[0] == (255, 255, 255)


@pytest.mark.parametrize("name", ["potsdam", "vaihingen"])
def test_eroded_boundaries_are_ignored(tmp_path, name):
    if name == "potsdam":
        written = make.potsdam_set(tmp_path, eroded=True)
    else:
        written = make.vaihingen_set(tmp_path, "gts_eroded_for_participants")
        path = tmp_path / "gts_eroded_for_participants/top_mosaic_09cm_area1_noBoundary.tif"
        label = written["area1"][1].copy()
        colours = make.coloured(label, potsdam.PALETTE)
        colours[3], label[3] = 0, 255
        make.geotiff(path, colours)
        written["area1"] = (written["area1"][0], label)
    assert any((label == 255).any() for _, label in written.values())
    assert_read_as_written(Config(data=name, root=str(tmp_path), labels="eroded"), written)
    with pytest.raises(DataError, match=r"no tiles, expected "):
        read(Config(data=name, root=str(tmp_path)))  # the full labels are not there


def test_full_and_eroded_labels_lie_side_by_side(tmp_path):
    full = make.vaihingen_set(tmp_path)
    make.vaihingen_set(tmp_path, "gts_eroded_for_participants")
    assert_read_as_written(Config(data="vaihingen", root=str(tmp_path)), full)
    assert_read_as_written(Config(data="vaihingen", root=str(tmp_path), labels="eroded"), full)


@pytest.mark.parametrize(("number", "colour"), [("6_7", (252, 255, 0)), ("4_12", (225, 227, 9))])
def test_cars_of_two_labels_of_potsdam_are_off_their_colour(tmp_path, number, colour):
    written = make.potsdam_set(tmp_path, numbers=("2_10", number, "2_13"))
    path = next(tmp_path.rglob(f"top_potsdam_{number}_label.tif"))
    off = np.array([*potsdam.PALETTE[:4], colour, potsdam.PALETTE[5]], np.uint8)
    make.geotiff(path, off[written[number][1]])
    assert_read_as_written(Config(data="potsdam", root=str(tmp_path)), written)
    make.geotiff(next(tmp_path.rglob("top_potsdam_2_10_label.tif")), off[written["2_10"][1]])
    with pytest.raises(DataError, match=r"top_potsdam_2_10_label.tif: unknown colour #\w{6} at row \d+, column \d+"):
        read(Config(data="potsdam", root=str(tmp_path)))


def test_no_data_of_loveda_is_ignored_and_background_is_a_class(tmp_path):
    assert REGISTRY["loveda"].classes[0] == "Background" and len(REGISTRY["loveda"].classes) == 7
    written = make.loveda_set(tmp_path)
    numbers = np.arange(8, dtype=np.uint8).repeat(8 * make.SIDE).reshape(make.SIDE, make.SIDE)
    make.png(tmp_path / "Train/Rural/masks_png/0.png", numbers)
    label = read(Config(data="loveda", root=str(tmp_path)))["Train/Rural/0"][1]
    assert len(written) == 4
    assert [label[8 * k, 0] for k in range(8)] == [255, 0, 1, 2, 3, 4, 5, 6]


def test_forest_of_gid_is_cyan_and_black_is_no_class():
    assert dict(zip(gid.CLASSES, gid.PALETTE, strict=True))["Forest"] == (0, 255, 255)
    assert dict(zip(gid.CLASSES, gid.PALETTE, strict=True))["Water"] == (0, 0, 255)
    assert (0, 0, 0) not in gid.PALETTE and (0, 0, 0) not in gid.PALETTE_15
    assert len(set(gid.PALETTE_15)) == len(gid.CLASSES_15) == 15


# ---- bands


def test_potsdams_choices_of_bands(tmp_path):
    written = make.potsdam_set(tmp_path, "RGBIR")
    image = next(iter(written.values()))[0]
    image[:4, :4, 3] = 0  # near infrared of 0: the fourth band is no alpha band, whatever GDAL takes it for
    make.geotiff(next(tmp_path.rglob("top_potsdam_2_10_RGBIR.tif")), image)
    for bands, order in (("RGB", [0, 1, 2]), ("IRRG", [3, 0, 1]), ("RGBIR", [0, 1, 2, 3])):
        assert_read_as_written(Config(data="potsdam", root=str(tmp_path), bands=bands), written, order)
    own = make.potsdam_set(tmp_path, "IRRG")  # files of just these bands come first
    assert_read_as_written(Config(data="potsdam", root=str(tmp_path), bands="IRRG"), own)


def test_gids_choices_of_bands(tmp_path):
    written = make.gid_set(tmp_path, source="image_NirRGB")
    for bands, order in (("RGB", [1, 2, 3]), ("IRRG", [0, 1, 2]), ("RGBIR", [1, 2, 3, 0])):
        assert_read_as_written(Config(data="gid", root=str(tmp_path), bands=bands), written, order)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vaihingen", {"bands": "RGB"}, "--bands RGB: vaihingen has IRRG"),
        ("potsdam", {"bands": "BGR"}, "--bands BGR: potsdam has RGB, IRRG, RGBIR"),
        ("loveda", {"labels": "eroded"}, "--labels eroded: loveda has one kind"),
        ("potsdam", {"labels": "thin"}, "--labels thin: potsdam has full, eroded"),
        ("synthetic", {"bands": "IRRG"}, "--bands IRRG: synthetic has RGB"),
    ],
)
def test_a_choice_that_a_set_does_not_have(name, settings, said):
    with pytest.raises(ValueError, match=said):
        check_choices(Config(data=name, **settings))


@pytest.mark.parametrize("settings", [{"labels": "eroded"}, {"bands": "RGBIR"}])
def test_a_converted_set_has_no_choice(tmp_path, settings):
    make.converted_set(tmp_path, 6)
    with pytest.raises(DataError, match=f"--{next(iter(settings))}.*mmsegmentation's layout"):
        read(Config(data="potsdam", root=str(tmp_path), **settings))


# ---- what is missing


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"synthetic", "folder"}))
def test_an_empty_folder_names_what_was_expected_and_an_archive_is_to_be_unpacked(tmp_path, name):
    with pytest.raises(DataError, match=rf"--data {name} needs --root DIR"):
        read(Config(data=name))
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        read(Config(data=name, root=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=rf"{tmp_path}: no tiles, expected .*\w"):
        read(Config(data=name, root=str(tmp_path)))
    (tmp_path / "archive.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack .*archive.zip there first"):
        read(Config(data=name, root=str(tmp_path)))


@pytest.mark.parametrize(
    ("layout", "gone", "said"),
    [
        ("potsdam", "top_potsdam_7_7_label.tif", r"top_potsdam_7_7_RGB.tif: no label, expected .*7_7_label.tif"),
        ("potsdam", "top_potsdam_7_7_RGB.tif", r"top_potsdam_7_7_label.tif: no image, expected .*7_7_RGB.tif"),
        ("vaihingen", "gts_for_participants/*area3.tif", r"top/.*area3.tif: no label, expected .*area3.tif"),
        ("gid", "*1-MSS1_label.tif", r"1-MSS1.tif: no label, expected .*1-MSS1_label.tif"),
        ("gid15, zip", "*0-MSS1_15label.png", r"0-MSS1.tif: no label, expected .*0-MSS1_15label.png"),
        ("loveda", "Rural/masks_png/0.png", r"images_png/0.png: no label, expected .*masks_png/0.png"),
        ("potsdam, converted", "ann_dir/val/*.png", r"img_dir/val/2_13_.*: no label, expected .*ann_dir/val/2_13_"),
        ("folder", "labels/b_mask.tif", r"images/b.tif: no label, expected .*labels/b_mask.tif"),
    ],
)  # fmt: skip
def test_the_half_of_a_pair_that_is_missing_is_named(tmp_path, layout, gone, said):
    name, write = LAYOUTS[layout]
    write(tmp_path)
    next(tmp_path.rglob(gone)).unlink()
    with pytest.raises(DataError, match=said):
        read(Config(data=name, root=str(tmp_path)))


def test_files_of_the_same_name_are_taken_from_the_archive_that_has_them_all(tmp_path):
    """The participants' archive holds 24 of the 38 labels again."""
    written = make.potsdam_set(tmp_path)
    other = make.coloured(make.classes(6, 9), potsdam.PALETTE)
    make.geotiff(tmp_path / "1/5_Labels_for_participants/top_potsdam_2_10_label.tif", other)
    assert_read_as_written(Config(data="potsdam", root=str(tmp_path)), written)


def test_the_classes_of_a_folder_are_those_of_its_yaml(tmp_path):
    make.folder_set(tmp_path)
    one = dataset_of(Config(data="folder", root=str(tmp_path)))
    assert one.classes == ("roof", "grass", "water")
    assert one.palette == ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def test_the_table_in_the_docs_is_that_of_the_code():
    from dsct_kernels.distill.datasets.check import markdown

    page = Path(__file__).parents[3] / "docs" / "data-sets.md"
    if not page.is_file():
        pytest.skip("no docs here")
    assert markdown() in page.read_text(), "dsct-distill data --markdown prints what belongs there"
