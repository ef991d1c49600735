"""`dsct-distill check` and `dsct-distill data`."""

import re

import numpy as np
import pytest
from PIL import Image

from dsct_kernels.distill import cli
from dsct_kernels.distill.datasets import REGISTRY, potsdam
from dsct_kernels.distill.datasets.check import markdown

from . import make


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(["check", *arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_sound_set(tmp_path, capsys):
    written = make.potsdam_set(tmp_path / "set")
    code, said = run(capsys, "potsdam", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "out"))
    assert code == 0 and "nothing wrong" in said
    assert "pairs: 3 found (2 train, 1 val), 0 missing or broken" in said
    assert "3 x 64 x 64, 3 bands of uint8" in said
    counts = sum(np.bincount(label.ravel(), minlength=6) for _, label in written.values())
    for name, n in zip(potsdam.CLASSES, counts, strict=True):
        share = 100 * n / (3 * 64 * 64)
        assert re.search(rf"{name} +{n:,d} +{share:.3f}%", said)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [p.name for p in pictures] == ["2_10.png", "2_13.png", "7_7.png"]
    image, label = written["2_10"]
    picture = np.asarray(Image.open(pictures[0])).astype(int)
    assert np.array_equal(picture[:, :64], image)
    assert np.array_equal(picture[:, 64:128], make.coloured(label, potsdam.PALETTE))
    assert np.abs(picture[:, 128:] - (picture[:, :64] + picture[:, 64:128]) / 2).max() <= 0.5


def test_everything_that_is_wrong_is_counted_and_named(tmp_path, capsys):
    written = make.potsdam_set(tmp_path / "set", numbers=("2_10", "2_11", "2_12", "3_10", "2_13"))
    path = {n: next((tmp_path / "set").rglob(f"top_potsdam_{n}_label.tif")) for n in written}
    colours = make.coloured(written["2_10"][1], potsdam.PALETTE)
    colours[3, 5:8] = (1, 2, 3)
    make.geotiff(path["2_10"], colours)
    make.geotiff(path["2_13"], np.where(colours == 1, 1, colours)[::-1].copy())
    path["2_11"].unlink()
    make.geotiff(path["2_12"], colours[:32])
    colours = make.coloured(written["3_10"][1], potsdam.PALETTE)
    make.geotiff(path["3_10"], colours, east=366_001.0)
    code, said = run(capsys, "potsdam", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "out"))
    assert code == 1 and "something is wrong" in said
    assert "pairs: 3 found (2 train, 1 val), 2 missing or broken" in said
    assert "top_potsdam_2_11_RGB.tif: no label, expected" in said
    assert "top_potsdam_2_12_label.tif: 64 x 32, but its image" in said
    assert f"#010203: 6 pixels in 2 files, for one {path['2_10']}, row 3, column 5" in said
    assert f"{path['3_10']}: georeferenced elsewhere than its image" in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


@pytest.mark.parametrize("damaged", ["image", "label"])
def test_a_damaged_file_is_one_of_the_findings(tmp_path, capsys, damaged):
    make.folder_set(tmp_path / "set")
    path = tmp_path / "set" / ("images/b.tif" if damaged == "image" else "labels/b_mask.tif")
    path.write_bytes(path.read_bytes()[:-300])
    code, said = run(capsys, "folder", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "out"))
    assert code == 1 and "pairs: 2 found" in said and str(path) in said


def test_sixteen_bits_can_be_looked_at(tmp_path, capsys):
    make.folder_set(tmp_path / "set")
    code, _ = run(capsys, "folder", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "out"))
    picture = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert code == 0 and picture.shape == (64, 192, 3)
    assert picture[:, :64].max() > 240 and picture[10:, :64].std() > 20


def test_what_cannot_be_checked(tmp_path, capsys):
    assert run(capsys, "potsdam", "--root", str(tmp_path)) == (2, f"error: {tmp_path}: no tiles, expected "
               "2_Ortho_RGB/top_potsdam_2_10_RGB.tif\n")  # fmt: skip
    assert run(capsys, "vaihingen", "--root", str(tmp_path), "--bands", "RGB")[0] == 2
    with pytest.raises(SystemExit):
        cli.main(["check", "synthetic", "--root", "x"])


def test_the_table_names_every_set_with_its_classes_colours_and_choices(capsys):
    assert cli.main(["data"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    table = markdown()
    for one in REGISTRY.values():
        assert one.name in said
        for name, colour in zip(one.classes, one.palette, strict=True):
            assert f"{name} #{''.join(f'{v:02X}' for v in colour)}" in table
    assert cli.main(["data", "--markdown"]) == 0
    assert capsys.readouterr().out == table
    assert len({line.count("|") for line in table.splitlines()}) == 1
