"""Every setting is checked before anything is trained or written: one line that names it, exit code 2."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dsct_kernels.distill import check, cli, loop, scenes
from dsct_kernels.distill.config import Config, Loss
from dsct_kernels.distill.datasets import synthetic

from .test_data import make_tile

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--log-every=2", "--device=cpu"]
TINY += ["--teacher-steps=4", "--student-steps=5"]
SMALL = replace(Config(), scenes=3, scene_size=64, crop=32, batch=2, window=64, device="cpu")


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    def trained(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(loop, "train", trained)


def refused(capsys, folder: Path, *arguments: str) -> str:
    """What a refused command says on stderr."""
    capsys.readouterr()  # what the test's own preparations said, a library's progress bar for one
    try:
        code = cli.main([*TINY, "--out", str(folder), *arguments])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said
    assert not folder.exists()
    return said


@pytest.mark.parametrize(
    "argument",
    [
        "--backend=foo", "--device=tpu", "--precision=fp8", "--data=mars", "--temperature=0", "--temperature=-1",
        "--temperature=nan", "--temperature=inf", "--channel-temperature=0", "--spatial-temperature=nan",
        "--tnkd-weight=-1", "--tnkd-weight=nan", "--cafd-weight=inf", "--ce-weight=-0.5", "--alpha=-1", "--beta=nan",
        "--batch=0", "--batch=-2", "--batch=1", "--batch=x", "--crop=0", "--crop=-5", "--crop=16", "--strides=0",
        "--strides=-3", "--strides=16,0", "--strides=", "--strides=1000", "--strides=x", "--seed=-1",
        "--seed=4294967296", "--teacher-seed=-1", "--window=0", "--window=-1", "--window=31", "--student-steps=-5",
        "--student-steps=0", "--teacher-steps=0", "--teacher-lr=0", "--teacher-lr=nan", "--student-lr=-1",
        "--student-lr=inf", "--weight-decay=-1", "--weight-decay=nan", "--scale-jitter=-1", "--scale-jitter=nan",
        "--colour-jitter=-0.1", "--colour-jitter=inf", "--scenes=0", "--scenes=1", "--scene-size=0", "--scene-size=65",
        "--downscale=0", "--downscale=65", "--cache-mb=-1", "--cache-mb=nan", "--cache-mb=inf", "--log-every=0",
        "--eval-every=-1", "--checkpoint-every=0", "--val-tiles=nowhere", "--val-tiles=", "--student=upernet-tinny",
        "--teacher=segformer-b9", "--student=/nowhere", "--arms=dsct,dsct", "--arms=", "--arms=alone,",
        "--arms=dsct:temperature=0", "--arms=dsct:temperature=hot", "--arms=dsct:strides=0", "--arms=cafd:strides=999",
        "--arms=dsct:strides=a", "--arms=dsct:nonsense=1", "--arms=best", "--arms=tnkd:tnkd_weight=-1",
        "--arms=dsct:alpha=nan", "--arms=dsct:matched_weight=0:jaccard_weight=0:ce_weight=0",
        "--root=/somewhere", "--precision=fp16",
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name_before_training(capsys, tmp_path, argument):
    option, _, value = argument.partition("=")
    said = refused(capsys, tmp_path / "run", argument)
    assert option in said, said
    assert value[:2] in said, said


def test_the_reference_backend_is_accepted_and_one_that_cannot_serve_here_is_not(capsys, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="training began"):
        cli.main([*TINY, "--backend=reference", "--out", str(tmp_path / "fine")])
    monkeypatch.setattr("dsct_kernels.backends.NATIVE_MISSING", "it is out of order")
    said = refused(capsys, tmp_path / "run", "--backend=native")
    assert "--backend" in said and "out of order" in said


def test_every_number_of_a_run_has_a_range():
    """A setting that is added later must get one."""
    numbers = {f.name for f in fields(Config) if type(f.default) in (int, float)}
    assert numbers == set(check.RANGES)


@pytest.mark.parametrize("name", sorted(check.RANGES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, True, "7", None, (3,)])
def test_numbers_from_a_file_are_checked_as_those_typed(name, value):
    """A config.json that was edited by hand."""
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected a .*number"):
        check.settings(replace(SMALL, **{name: value}))


@pytest.mark.parametrize("name", [f.name for f in fields(Loss)])
@pytest.mark.parametrize("value", [math.nan, -1, True, "7", None])
def test_loss_settings_from_a_file_are_checked_too(name, value):
    import torch

    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected"):
        check.losses(replace(SMALL, loss=replace(Loss(), **{name: value})), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", 3), ("teacher", ""), ("student", None), ("arms", "alone"), ("arms", ()), ("arms", (1,)),
     ("val_tiles", "scene 00"), ("val_tiles", ()), ("pictures", 1), ("data", None), ("backend", 1), ("root", 5)],
)  # fmt: skip
def test_names_from_a_file_are_checked_too(name, value):
    with pytest.raises(ValueError, match="expected"):
        check.settings(replace(SMALL, **{name: value}))


def test_the_defaults_of_both_data_sets_pass():
    check.settings(cli.config_from({}))
    check.settings(cli.config_from({"data": "dubai", "root": "/somewhere"}))
    check.everything(SMALL)


def networks(**settings: object) -> None:
    check.networks(replace(SMALL, **settings), scenes.CLASSES, synthetic.draw(1, 64))


def test_batch_1_is_fine_where_nothing_normalises_over_the_batch():
    networks(batch=1, student="segformer-tiny")
    with pytest.raises(ValueError, match=r"--batch 1: student mobilenet-0.25 .*expected --batch 2"):
        networks(batch=1, student="mobilenet-0.25", arms=("alone",))


def test_strides_must_be_there_in_both_networks():
    with pytest.raises(ValueError, match=r"--strides: student mobilenet-0.5 has no feature map at stride 16; it has: "):
        networks(student="mobilenet-0.5", loss=replace(Loss(), strides=(16, 32)))
    networks(student="mobilenet-0.5")  # which compares no features
    networks(student="mobilenet-0.5", loss=replace(Loss(), strides=(8,)))
    networks(crop=40)  # 40 / 32 is no whole number, and the stride is there all the same
    networks(student="mobilenet-0.5", arms=("alone", "tnkd"), loss=replace(Loss(), strides=(16,)))  # no CAFD there


def test_a_student_folder_with_other_classes_is_refused_before_the_teacher_is_trained(capsys, tmp_path):
    from dsct_kernels.distill import models

    models.save(models.build("upernet-tiny", ("a", "b")), tmp_path / "other")
    said = refused(capsys, tmp_path / "run", f"--student={tmp_path / 'other'}")
    assert str(tmp_path / "other") in said and "its classes are a, b" in said


def test_a_teacher_folder_without_all_of_its_weights_is_refused(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    from dsct_kernels.distill import models

    folder = tmp_path / "teacher"
    models.save(models.build("segformer-tiny", scenes.CLASSES), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    said = refused(capsys, tmp_path / "run", f"--teacher={folder}")
    assert str(folder) in said and "classifier" in said
    with pytest.raises(AssertionError, match="training began"):  # a student may start from a part
        cli.main([*TINY, "--teacher", "segformer-tiny", "--student", str(folder), "--out", str(tmp_path / "fine")])


def test_data_that_does_not_fit_is_refused_before_training(capsys, tmp_path):
    make_tile(tmp_path / "set", size=(40, 50))
    real = ["--data=dubai", f"--root={tmp_path / 'set'}"]
    assert "0 tiles to train on" in refused(capsys, tmp_path / "run", *real)
    make_tile(tmp_path / "set", "Tile 2", size=(40, 50))
    assert "--val-tiles: no tile 'Tile 3'" in refused(capsys, tmp_path / "run", *real, "--val-tiles=Tile 3")
    (tmp_path / "set/Tile 2/masks/image_part_001.png").write_bytes(b"")
    assert "image_part_001.png" in refused(capsys, tmp_path / "run", *real)


def test_from_a_shell_a_refusal_is_one_line(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "dsct_kernels.distill", *TINY, "--temperature=0"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --temperature: expected a finite number > 0, got 0.0\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_users_is_not_written_over(capsys, tmp_path):
    """--out beside a folder of one's own that is called teacher."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main([*TINY, "--out", str(tmp_path)])
    assert "(teacher)" in capsys.readouterr().err
    assert (tmp_path / "teacher/model.safetensors").read_text() == "mine"


def test_the_saved_settings_are_strict_json_and_come_back(tmp_path):
    SMALL.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == SMALL
    with pytest.raises(ValueError, match="JSON"):
        replace(SMALL, cache_mb=math.inf).save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["cache_mb"] == SMALL.cache_mb
