"""Run folders: damaged ones are named, hostile ones run nothing, one writer at a time, and text is never markup."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsct_kernels.distill import checkpoint, cli, data, files, loop, models, objective, pictures, report, scenes
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import dubai
from dsct_kernels.distill.run import Run

from .test_data import make_tile

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--log-every=2", "--device=cpu"]
TINY += ["--teacher-steps=3", "--student-steps=3", "--arms=alone", "--checkpoint-every=1"]
CLASSES = scenes.CLASSES


@pytest.fixture(autouse=True)
def _keep_sigint():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(folder: Path, phase: str, *arguments: str) -> Path:
    """A run that was stopped after the second step of a phase, its checkpoint written."""
    with pytest.MonkeyPatch.context() as patch:
        steps = []

        def stop(run: Run) -> bool:
            if next(p for p in run.phases() if p not in run.results) == phase:
                steps.append(1)
            return len(steps) == 2

        patch.setattr(Run, "should_stop", stop)
        assert cli.main([*TINY, "--no-pictures", *arguments, "--out", str(folder)]) == cli.INTERRUPTED
    return folder


@pytest.fixture(scope="module")
def in_the_student(tmp_path_factory) -> Path:
    return interrupted(tmp_path_factory.mktemp("runs") / "run", "alone")


@pytest.fixture
def folder(in_the_student, tmp_path) -> Path:
    """A run folder of one's own to break: the teacher is done, the student is under way."""
    return Path(shutil.copytree(in_the_student, tmp_path / "run"))


@pytest.fixture(scope="module")
def teacher(in_the_student) -> Path:
    return in_the_student / "teacher"


def strictly(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"bare {constant}")

    return json.loads(text, parse_constant=refuse)


def resume(folder: Path, *arguments: str) -> int:
    try:
        return cli.main(["--resume", str(folder), *arguments])
    except SystemExit as end:
        return int(end.code or 0)


def refused(capsys, folder: Path, *arguments: str) -> str:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    code = resume(folder, *arguments)
    said = capsys.readouterr().err
    assert code == 2 and len(said.splitlines()) == 1, said
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    return said


# ---- damage


@pytest.mark.parametrize(
    "tail", [b'{"phase": "alone", "st', b"{", b"\0\0\0\0", b'{"phase": "alone", "step": 2, "total": 1}', b"\xff\xfe"]
)
def test_a_torn_last_line_of_the_log_is_dropped_and_the_run_goes_on(folder, tail):
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + tail)
    assert resume(folder) == 0
    text = (folder / "metrics.jsonl").read_text()
    assert text.startswith(whole.decode()) and text.endswith("\n")
    rows = [strictly(line) for line in text.splitlines()]
    assert [(r["phase"], r["step"]) for r in rows] == [("teacher", 2), ("teacher", 3), ("alone", 2), ("alone", 3)]


def test_a_log_torn_within_the_checkpoint_still_goes_on(folder):
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[:-5])
    assert resume(folder) == 0
    assert all(strictly(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_a_finished_run_whose_log_is_torn_still_draws_its_curves(folder):
    assert resume(folder) == 0
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase"')
    pictures.curves(folder)
    assert (folder / "training_curves.png").stat().st_size > 0


def test_damage_inside_the_log_is_named_with_its_line(capsys, folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], "garbage\n", *lines[1:]]))
    assert f"{folder / 'metrics.jsonl'}: line 2 is damaged" in refused(capsys, folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"half", b"[]", b"null", b"3", b'"text"', b"\xff\xff", b"\0" * 40, b"[" * 100_000]
)
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_json_file_is_named(capsys, folder, name, content):
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(capsys, folder)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(capsys, folder, kept):
    path = folder / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert str(path) in refused(capsys, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("phase", 3), ("phase", "nobody"), ("step", "2"), ("step", None), ("step", -1), ("step", 99), ("model", []),
     ("model", {}), ("optimizer", {}), ("sums", 0.5), ("sums", torch.zeros(2)), ("rng", {}), ("metrics_bytes", None),
     ("metrics_bytes", -1), ("scaler", 1), ("unknown", 1)],
)  # fmt: skip
def test_a_checkpoint_whose_content_does_not_fit_is_named(capsys, folder, key, value):
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, key: value}, path)
    said = refused(capsys, folder)
    assert str(path) in said


@pytest.mark.parametrize(
    ("change", "named"),
    [({"crop": "32"}, "--crop"), ({"crop": None}, "--crop"), ({"batch": 1}, "--batch"), ({"surprise": 1}, "'surprise'"),
     ({"arms": "alone"}, "--arms"), ({"loss": 3}, "loss"), ({"loss": {}}, "loss.ce_weight"), ({"arms": []}, "--arms"),
     ({"teacher": ["x"]}, "--teacher"), ({"pictures": "no"}, "pictures"), ({"seed": 1.5}, "--seed")],
)  # fmt: skip
def test_a_config_with_wrong_content_is_named(capsys, folder, change, named):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    said = refused(capsys, folder)
    assert named in said
    assert str(path if "batch" not in change else folder) in said or "--batch" in said


def test_a_config_that_lacks_a_setting_is_named(capsys, folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["window"]
    path.write_text(json.dumps(settings))
    assert f"{path}: the setting window is missing" in refused(capsys, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"miou": "high"},
        {"iou": 3},
        {"parameters": None},
        {"miou": None, "iou": None},
        {"gflops": True},
        {"iou": [0.5]},
        {"iou": ["x"] * 5},
        {"teacher_ms": "slow", "teacher_share": 0.5},
        {"teacher_ms": 1.0},
    ],
)
def test_results_with_wrong_content_are_named(capsys, folder, change):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({"teacher": {**results["teacher"], **change}}))
    assert str(path) in refused(capsys, folder)
    path.write_text(json.dumps({**results, "nobody": results["teacher"]}))
    assert "'nobody'" in refused(capsys, folder)
    path.write_text(json.dumps({"teacher": {"miou": 0.5}}))
    assert "iou is missing" in refused(capsys, folder)


def test_numbers_that_json_has_no_room_for_are_none_when_they_are_read(folder):
    """NaN, as an earlier version wrote it, and what a float cannot hold: the run goes on, and writes JSON again."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results).replace(f'"miou": {results["teacher"]["miou"]}', '"miou": NaN'))
    assert "NaN" in path.read_text()
    assert resume(folder) == 0
    assert strictly(path.read_text())["teacher"]["miou"] is None
    (folder / "x.json").write_text('{"a": 1e999, "b": -Infinity, "c": 1.5}')
    assert files.read_json(folder / "x.json") == {"a": None, "b": None, "c": 1.5}


def test_a_phase_that_starts_afresh_forgets_that_it_diverged(folder):
    (folder / "checkpoint.pt").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "alone", "step": 3, "total": null, "lr": 0.1}\n')
    assert resume(folder) == 0
    assert strictly((folder / "results.json").read_text())["alone"]["diverged"] is False


def test_a_finished_phase_without_its_model_is_named(capsys, folder):
    (folder / "teacher/model.safetensors").write_bytes(b"")
    assert str(folder / "teacher") in refused(capsys, folder)
    shutil.rmtree(folder / "teacher")
    assert str(folder / "teacher") in refused(capsys, folder)


@pytest.mark.parametrize("writer", ["json", "bytes"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch, writer):
    path = tmp_path / "results.json"
    files.write_json(path, {"old": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": [0] * 1000}) if writer == "json" else files.replace_file(path, b"x" * 1000)
    assert json.loads(path.read_text()) == {"old": 1}


# ---- numbers that are none


def unlabelled(root: Path) -> list[str]:
    for group in ("Tile 1", "Tile 2", "Tile 3"):
        make_tile(root, group, size=(64, 64))
    Image.new("RGB", (64, 64), dubai.IGNORED[0]).save(root / "Tile 2/masks/image_part_001.png")
    return [
        f"--root={root}",
        "--data=dubai",
        "--val-tiles=Tile 2",
        "--teacher=segformer-tiny",
        "--student=upernet-tiny",
    ]


def test_without_a_validation_label_results_are_json_and_it_is_said_loudly(capsys, tmp_path):
    arguments = unlabelled(tmp_path / "set")
    assert cli.main([*TINY, *arguments, "--out", str(tmp_path / "run")]) == 0
    results = strictly((tmp_path / "run/results.json").read_text())
    assert results["alone"]["miou"] is None and results["alone"]["iou"] == [None] * 5
    assert results["alone"]["accuracy"] is None and results["alone"]["diverged"] is False
    said = capsys.readouterr().err
    assert "WARNING: alone has NO SCORE: no validation pixel has a label" in said
    for name in ("training_curves.png", "predictions.png", "attention.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_a_diverged_training_is_json_and_is_said_loudly(capsys, tmp_path, monkeypatch, broken):
    if broken == "loss":
        entropy = objective.cross_entropy
        monkeypatch.setattr(loop, "cross_entropy", lambda *a: entropy(*a) * float("nan"))
    arguments = [] if broken == "loss" else ["--teacher-lr=1e30", "--student-lr=1e30", "--weight-decay=1e20"]
    assert cli.main([*TINY, *arguments, "--out", str(tmp_path / "run")]) == cli.DIVERGED
    results = strictly((tmp_path / "run/results.json").read_text())
    assert results["alone"]["diverged"] is True and results["alone"]["miou"] is None
    rows = [strictly(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["total"] is None
    strictly((tmp_path / "run/config.json").read_text())
    said = capsys.readouterr().err
    assert "WARNING: alone DIVERGED" in said and "at step" in said
    assert resume(tmp_path / "run") == cli.DIVERGED  # said again, and still drawn


# ---- code


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle", "inside", "numpy"])
def test_a_hostile_checkpoint_runs_nothing_and_is_named(capsys, folder, tmp_path, kind):
    ran, path = tmp_path / "ran", folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if kind in ("torch", "legacy torch"):
        torch.save(Hostile(ran), path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(ran)))
    elif kind == "inside":
        torch.save({**state, "rng": [{**state["rng"][0], "python": Hostile(ran)}]}, path)
    else:
        with open(path, "wb") as file:
            np.save(file, np.array([Hostile(ran)], object), allow_pickle=True)
    assert str(path) in refused(capsys, folder)
    assert not ran.exists()


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["bin", "bin beside an index", "auto_map", "kernels", "backbone", "type", "adapter"])
def test_a_hostile_model_folder_runs_nothing_and_is_named(capsys, teacher, tmp_path, role, kind):
    ran, bad = tmp_path / "ran", tmp_path / "bad"
    shutil.copytree(teacher, bad)
    config = json.loads((bad / "config.json").read_text())
    named = bad / "config.json"
    (bad / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    if kind.startswith("bin"):
        named = bad / "pytorch_model.bin"
        torch.save({"x": Hostile(ran)}, named)
        (bad / "model.safetensors").unlink()
        if "index" in kind:
            named = bad / "model.safetensors.index.json"
            named.write_text(json.dumps({"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}}))
    elif kind == "auto_map":
        config["auto_map"] = {
            "AutoModelForSemanticSegmentation": "modeling_evil.Evil",
            "AutoConfig": "modeling_evil.Evil",
        }
    elif kind == "kernels":
        config["attn_implementation"] = "someone/evil-kernels"
    elif kind == "backbone":
        config |= {"backbone": str(bad), "use_pretrained_backbone": True}
    elif kind == "type":
        config |= {"model_type": "evil", "trust_remote_code": True}
    else:
        named = bad / "adapter_config.json"
        named.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(bad)}))
        torch.save({"x": Hostile(ran)}, bad / "adapter_model.bin")
    (bad / "config.json").write_text(json.dumps(config))
    assert cli.main([*TINY, f"--{role}={bad}", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert str(named) in said and len(said.splitlines()) == 1
    assert not ran.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "{", '{"image_std": [1, 1, 0]}', '{"image_mean": "x"}', '{"image_mean": [1]}'])
def test_a_damaged_preprocessor_is_named(teacher, tmp_path, content):
    bad = Path(shutil.copytree(teacher, tmp_path / "bad"))
    (bad / "preprocessor_config.json").write_text(content)
    with pytest.raises(data.DataError, match=r"preprocessor_config\.json"):
        models.load(bad, CLASSES)


def test_every_random_number_generator_goes_on_exactly(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002  # each holds a second number back

    def draw() -> list[float]:
        return [*torch.rand(3).tolist(), *np.random.standard_normal(3), random.gauss(0, 1), random.random()]  # noqa: NPY002

    path = tmp_path / "rng.pt"
    torch.save(checkpoint.rng_state(), path)
    expected = draw()
    draw()
    checkpoint.set_rng_state(torch.load(path, weights_only=True))
    assert draw() == expected


# ---- text is never markup

NAMES = ["[data]", "[/b]", "a[/data]x", "[bold]x", "$x_$", ":smile:", "[link=x]", "\\[", "%s {} 100%", "$\\frac$"]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_shows_a_path_as_it_is(capsys, tmp_path, name):
    path = tmp_path / name
    assert cli.main([*TINY, "--data=dubai", f"--root={path}", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {path}: no such folder\n"
    assert cli.main([*TINY, f"--teacher={path}", "--out", str(tmp_path / "run")]) == 2
    assert f"--teacher: {path}: neither a model folder" in capsys.readouterr().err


def test_a_run_with_brackets_and_dollars_in_every_name_finishes_and_shows_them(capsys, tmp_path):
    root = tmp_path / "[/data]$"
    for group in ("[red]a", "$a_$ [bold", ":smile:\\"):
        make_tile(root, group, part="$\\x$[i]", size=(64, 64))
    out = tmp_path / "x[/b] :warning: [bold]"
    arguments = [
        "--data=dubai",
        f"--root={root}",
        "--val-tiles=[red]a",
        "--teacher=segformer-tiny",
        "--student=upernet-tiny",
    ]
    assert cli.main([*TINY, *arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"run folder: {out}\n" in shown
    assert "1 to validate on ([red]a);" in shown
    assert (out / "predictions.png").stat().st_size > 0


def test_a_file_name_that_is_no_text_is_shown_escaped(tmp_path):
    """In a process of its own, with streams that refuse what they cannot encode."""
    command = [sys.executable, "-W", "ignore", "-m", "dsct_kernels.distill", *TINY, "--data=dubai"]
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    done = subprocess.run([*map(os.fsencode, command), b"--root=" + path], capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"no such folder" in done.stderr


def test_a_table_shows_an_arm_as_it_is():
    from rich.console import Console

    result = {"miou": 0.5, "iou": [0.5], "parameters": 1, "gflops": 1.0, "images_per_s": 1.0}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table({"dsct:[/b]": result}, ("[red]A",), 1, 1))
    assert "dsct:[/b]" not in (text := console.export_text()) and "([/b])" in text and "[red]A" in text


# ---- one writer, and what a run under way may change


def test_a_second_writer_is_told_and_the_first_goes_on(capsys, folder):
    with files.only_writer(folder):
        said = refused(capsys, folder)
        assert str(folder) in said and "another process is writing this run" in said
    assert resume(folder) == 0


def test_a_fresh_run_into_a_folder_that_is_being_written_is_told(capsys, tmp_path):
    with files.only_writer(tmp_path / "run"):
        assert cli.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    assert "another process" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


HOLD = """
import os, sys, time
from pathlib import Path
from dsct_kernels.distill.files import only_writer
with only_writer(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if not child:  # which has dropped what it inherited: before fork returned
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_writer_leaves_no_lock(tmp_path, how):
    """Nor do the workers that it forked, while they find out."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(data.DataError, match="another process"), files.only_writer(tmp_path):
            pass
        process.kill()
        process.wait()
        with files.only_writer(tmp_path):
            pass
    finally:
        process.kill()
        if how == "fork":
            os.kill(child, signal.SIGKILL)


def test_other_processes_of_one_run_take_no_lock(tmp_path, monkeypatch):
    with files.only_writer(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with files.only_writer(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="file/run: cannot be written"), files.only_writer(tmp_path / "file/run"):
        pass


def test_a_run_under_way_takes_corrections_that_change_no_number(folder, capsys):
    arguments = ["--backend=reference", "--device=cpu", "--log-every=1", "--checkpoint-every=7", "--cache-mb=0"]
    assert resume(folder, *arguments, "--no-pictures", "--eval-every=1", "--crop=32", "--temperature=1") == 0
    cfg = Config.load(folder / "config.json")
    assert (cfg.backend, cfg.log_every, cfg.checkpoint_every, cfg.cache_mb) == ("reference", 1, 7, 0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"]) for r in rows if r["phase"] == "alone" and "total" in r] == [2, 3]


@pytest.mark.parametrize(
    "argument",
    ["--crop=64", "--batch=3", "--student-lr=0.1", "--temperature=4", "--arms=dsct", "--seed=1", "--precision=bf16",
     "--window=32", "--student-steps=9", "--student=mobilenet-0.5", "--strides=8", "--data=dubai", "--scenes=4"],
)  # fmt: skip
def test_a_run_under_way_refuses_the_others_by_name(capsys, folder, argument):
    said = refused(capsys, folder, argument)
    assert f"{argument.partition('=')[0]} cannot change" in said and "--device" in said


def test_corrections_are_checked_as_well(capsys, folder):
    assert "--log-every" in refused(capsys, folder, "--log-every=0")
    assert "--out" in refused(capsys, folder, "--out=elsewhere")


def test_a_data_set_that_moved_can_be_named_anew(tmp_path):
    arguments = unlabelled(tmp_path / "set")
    folder = interrupted(tmp_path / "run", "teacher", *arguments)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert resume(folder) == 2
    assert resume(folder, f"--root={tmp_path / 'moved'}") == 0


def test_make_clean_keeps_trained_models(tmp_path):
    root = Path(__file__).parents[2]
    if not (root / "Makefile").is_file() or shutil.which("make") is None:
        pytest.skip("no Makefile or no make here")
    shutil.copy(root / "Makefile", tmp_path)
    for name in ("csrc/a.cpp", "runs/one/teacher/model.safetensors", "build/x", "dsct_kernels/_C.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "runs/one/teacher/model.safetensors").exists()
    assert not (tmp_path / "build").exists() and not (tmp_path / "dsct_kernels/_C.so").exists()
