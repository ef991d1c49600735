"""report.html: nothing from outside, every part there, what it says is true, and what an odd run does to it."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsct_kernels.distill import cli, page, pictures, scenes
from dsct_kernels.distill.pictures import Shown

from .datasets.make import potsdam_set

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--log-every=1", "--device=cpu"]
TINY += ["--teacher-steps=2", "--student-steps=2", "--teacher=upernet-tiny"]


class Page(HTMLParser):
    """Text, tags and attributes of a page; raises where tags do not nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.text = path.read_text()
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if self.open and self.open[-1] != "style":
            self.words += words + " "


def assert_nothing_from_outside(found: Page) -> None:
    for tag, name, value in found.attributes:
        assert tag not in ("script", "link", "iframe", "object", "base")
        if name in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/", "#")), f"{tag} {name}={value[:80]}"
    assert not re.search(r"https?://|@import|url\((?!#)", found.text)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "a <b>run"
    assert cli.main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_a_page_with_everything_in_it_and_nothing_from_outside(reported):
    found = Page(reported / "report.html")
    assert_nothing_from_outside(found)
    for title in ("Scores", "Predictions and errors", "Confusion", "Training", "Where the networks look", "Cost",
                  "Settings", "Versions"):  # fmt: skip
        assert title in found.words
    assert "a <b>run" in found.words and "<b>run" not in found.text
    assert "viewport" in found.text and "prefers-color-scheme: dark" in found.text
    results = json.loads((reported / "results.json").read_text())
    for result in results.values():
        assert f"{result['miou']:.3f}" in found.words and f"{result['parameters']:,}" in found.words
    images = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 1 * (2 + 3 + 3 + 1) + 1 * (1 + 3)  # one validation tile
    for image in images:
        Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).load()
    assert found.text.count("<svg") == 1 and "currentColor" in found.text and page.INK not in found.text
    assert 20_000 < (reported / "report.html").stat().st_size < 2_000_000


def test_the_confusion_matrix_is_that_of_the_scores(reported):
    for result in json.loads((reported / "results.json").read_text()).values():
        matrix = np.array(result["confusion"])
        assert matrix.sum() == 64 * 64
        assert np.trace(matrix) / matrix.sum() == pytest.approx(result["accuracy"])
        hit = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - hit
        assert [None if u == 0 else pytest.approx(h / u) for h, u in zip(hit, union, strict=True)] == result["iou"]


def test_report_makes_the_same_page_again(reported, capsys):
    before = (reported / "report.html").read_text()
    for name in ("report.html", "predictions.png", "attention.png", "training_curves.png"):
        (reported / name).unlink()
    assert cli.main(["report", str(reported), "--device=cpu"]) == 0
    assert (reported / "report.html").read_text() == before
    assert (reported / "predictions.png").stat().st_size > 0
    assert str(reported / "report.html") in capsys.readouterr().out


def shown(truth, alone, dsct) -> Shown:
    said = {"teacher": truth, "alone": alone, "dsct": dsct}
    arrays = {name: np.array([v], np.uint8) for name, v in said.items()}
    return Shown("tile", np.full((1, len(truth), 3), 90, np.uint8), np.array([truth], np.uint8), arrays)


def test_what_the_teacher_was_worth_is_told_pixel_by_pixel():
    tile = shown(truth=[0, 0, 0, 0, 255], alone=[0, 1, 0, 1, 0], dsct=[0, 0, 1, 2, 1])
    picture, counts = pictures.worth(tile, "alone", "dsct")
    assert counts == {"both right": 1, "fixed": 1, "broken": 1, "both wrong": 1}
    names = ("both right", "fixed", "broken", "both wrong")
    assert [tuple(p) for p in picture[0]] == [*(pictures.WORTH[n] for n in names), pictures.UNLABELLED]
    assert pictures.wrong_share(tile, "alone") == 0.5 and pictures.wrong_share(tile, "teacher") == 0
    wrong = pictures.errors(tile, "dsct", scenes.PALETTE)[0]
    assert [tuple(p) for p in wrong] == [(200,) * 3, (200,) * 3, scenes.PALETTE[1], scenes.PALETTE[2], (200,) * 3]
    assert pictures.taught(["teacher", "alone", "cafd", "dsct", "tnkd"]) == "dsct"
    assert pictures.taught(["teacher", "alone", "tnkd"]) == "tnkd"
    assert pictures.taught(["teacher", "dsct"]) is None and pictures.taught(["teacher", "alone"]) is None


def test_a_run_without_its_data_has_a_page_without_pictures_and_says_so(tmp_path, capsys):
    root, run = tmp_path / "potsdam", tmp_path / "run"
    potsdam_set(root)
    options = ["--batch=2", "--crop=32", "--window=64", "--teacher-steps=1", "--student-steps=1", "--device=cpu"]
    options += ["--teacher=upernet-tiny", "--student=upernet-tiny", "--scale-jitter=0", "--arms=dsct"]
    assert cli.main(["--data=potsdam", f"--root={root}", *options, f"--out={run}"]) == 0
    assert "Impervious surfaces" in Page(run / "report.html").words
    shutil.move(root, tmp_path / "elsewhere")
    assert cli.main(["report", str(run)]) == 0
    assert "no predictions and no attention maps" in capsys.readouterr().err
    found = Page(run / "report.html")
    assert "Left out" in found.words and "Predictions and errors" not in found.words and "Confusion" in found.words
    assert cli.main(["report", str(run), "--root", str(tmp_path / "elsewhere")]) == 0
    assert "Predictions and errors" in Page(run / "report.html").words


def test_a_run_of_an_earlier_version_and_one_that_diverged_still_have_a_page(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    results = json.loads((run / "results.json").read_text())
    for result in results.values():
        del result["confusion"]
    results["dsct"].update(miou=None, accuracy=None, iou=[None] * 5, diverged=True)
    (run / "results.json").write_text(json.dumps(results))
    for card in run.glob("*/dsct.json"):
        card.unlink()
    assert cli.main(["report", str(run), "--device=cpu"]) == 0
    found = Page(run / "report.html")
    assert_nothing_from_outside(found)
    assert "Not kept by the version" in found.words and "Versions" not in found.words


def test_a_run_cut_short_has_a_page_of_what_is_finished(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"teacher": results["teacher"]}))
    assert cli.main(["report", str(run), "--device=cpu"]) == 0
    found = Page(run / "report.html")
    assert "errors of teacher" in found.words and "what the teacher was worth" not in found.words


def rows(miou: dict[str, list[float]]) -> list[dict]:
    settings = {"data": "synthetic", "crop": 32, "val_tiles": ["scene 00"], "parts": [], "seed": 0}
    return [
        {
            "key": f"{name}{seed}", "method": name, "fold": "scene 00", "seed": seed, "student": "upernet-tiny",
            "teacher": "segformer-tiny", "steps": 5, "settings": settings, "miou": v, "accuracy": v,
            "iou": [v, None, v, v / 2, 0.1], "ms_per_step": 12.3, "kept_mb": 4.5,
        }
        for name, values in miou.items()
        for seed, v in enumerate(values)
    ]  # fmt: skip


def test_a_comparison_has_a_page_of_its_own(tmp_path):
    found = rows({"alone": [0.4, 0.41, 0.42], "dsct": [0.5, 0.515, 0.51], "kd:temperature=2": [0.41, 0.40, 0.43]})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert cli.main(["report", str(tmp_path)]) == 0
    this = Page(tmp_path / "report.html")
    assert_nothing_from_outside(this)
    assert "+0.098 ± 0.004" in this.words and "kd:temperature=2" in this.words and "Building" in this.words
    assert re.search(r"best on average\s+dsct", this.words)
    assert this.text.count("<svg") == 1


def test_methods_with_and_without_unlabelled_images_are_compared_and_shares_of_the_labels_are_not(tmp_path):
    quarter = rows({"alone": [0.4], "unlabelled+dsct": [0.5]})
    for row in quarter:
        more = {"unlabelled": 1.0} if row["method"] != "alone" else {}
        row["settings"] = {**row["settings"], "labelled": 0.25, **more}
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*quarter, *rows({"alone": [0.45]})]))
    assert cli.main(["report", str(tmp_path)]) == 0
    this = Page(tmp_path / "report.html")
    assert "+0.100" in this.words  # against alone with as many labels
    assert this.text.count("<h2>upernet-tiny") == 2 and "25% of the labels" in this.words


def test_what_two_teachers_taught_stands_apart_and_runs_without_a_teacher_beside_each(tmp_path):
    found = rows({"alone": [0.4]})
    for teacher, miou in (("a", 0.5), ("b", 0.7)):
        (row,) = rows({"dsct": [miou]})
        found.append({**row, "teacher": teacher, "settings": {**row["settings"], "teacher": teacher}})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert cli.main(["report", str(tmp_path)]) == 0
    this = Page(tmp_path / "report.html")
    assert this.words.count("taught by") == 2 and "taught by a" in this.words and "taught by b" in this.words
    assert "+0.100" in this.words and "+0.300" in this.words and "+0.200" not in this.words


def test_what_has_no_report_is_refused(tmp_path, capsys, reported):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "neither a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes((reported / "config.json").read_bytes())
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no network of this run is finished" in capsys.readouterr().err
    (tmp_path / "runs.jsonl").write_text("")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no run is finished" in capsys.readouterr().err
