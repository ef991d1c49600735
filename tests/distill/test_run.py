"""The whole run at toy size: what it leaves, resuming, Ctrl-C, model folders."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsct_kernels.distill import cli, data, log, models, objective, scenes
from dsct_kernels.distill.config import ARMS, Config, Loss, arm_loss
from dsct_kernels.distill.run import Run

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--log-every=2", "--device=cpu"]
TINY += ["--teacher-steps=4", "--student-steps=5", "--strides=16,32", "--tnkd-weight=0.5"]  # every part of the loss
CLASSES = scenes.CLASSES


@pytest.fixture(autouse=True)
def _keep_sigint():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert cli.main([*TINY, "--out", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Bitwise the same weights, the same log and the same scores."""
    for name in ("teacher", "student-alone", "student-dsct"):
        one, two = weights(a / name), weights(b / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), f"{name} differs"
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    assert {k: v["iou"] for k, v in one.items()} == {k: v["iou"] for k, v in two.items()}


def test_a_run_leaves_everything(finished, capsys):
    for name in ("config.json", "metrics.jsonl", "training_curves.png", "predictions.png", "attention.png"):
        assert (finished / name).stat().st_size > 0, name
    assert not (finished / "checkpoint.pt").exists()
    assert len(list((finished / "tensorboard").glob("*/events*"))) == 3
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["teacher", "alone", "dsct"]
    for result in results.values():
        assert 0 <= result["miou"] <= 1 and len(result["iou"]) == len(CLASSES)
        assert result["parameters"] > 0 and result["gflops"] > 0 and result["images_per_s"] > 0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "dsct"] == [2, 4, 5]
    last = rows[-1]
    loss = Config.load(finished / "config.json").loss
    tnkd = loss.alpha * last["tckd"] + loss.beta * last["nckd"]
    parts = loss.ce_weight * last["ce"] + loss.tnkd_weight * tnkd + loss.cafd_weight * last["cafd"]
    parts += loss.matched_weight * last["matched"] + loss.jaccard_weight * last["jaccard"]
    assert last["total"] == pytest.approx(parts, rel=1e-4) and all(last[name] > 0 for name in log.PARTS)


def test_both_students_start_from_the_same_weights_and_see_the_same_crops(tmp_path):
    command = [*TINY, "--no-pictures", "--student-steps", "1", "--log-every", "1", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    alone, dsct = rows[-2:]
    assert (alone["phase"], dsct["phase"]) == ("alone", "dsct")
    assert alone["total"] == pytest.approx(dsct["ce"], rel=1e-5)


@pytest.mark.parametrize(("phase", "step"), [("teacher", 1), ("alone", 3), ("dsct", 2)])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(finished, tmp_path, monkeypatch, phase, step):
    folder = tmp_path / "run"
    should_stop = Run.should_stop
    steps: dict[str, int] = {}

    def stop_there(run: Run) -> bool:
        under_way = next(p for p in run.phases() if p not in run.results)
        steps[under_way] = steps.get(under_way, 0) + 1
        return steps.get(phase) == step or should_stop(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", stop_there)
        assert cli.main([*TINY, "--out", str(folder)]) == cli.INTERRUPTED
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["phase"], state["step"]) == (phase, step)
    assert not list(folder.glob("*.tmp"))
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(finished, folder)


def test_resume_drops_what_was_logged_after_the_checkpoint(finished, tmp_path, monkeypatch):
    """A killed run: the checkpoint is older than the log."""
    folder = tmp_path / "run"

    def killed(run: Run, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "finish", killed)
        cli.main([*TINY, "--checkpoint-every", "3", "--out", str(folder)])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert cli.main(["--resume", str(folder)]) == 0
    assert_same_run(finished, folder)


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "dsct_kernels.distill", *TINY, "--no-pictures", "--arms", "alone"]
    command += ["--teacher-steps", "100000", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED, output
    assert f"dsct-distill --resume {folder}" in output.replace("\n", "")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["phase"] == "teacher" and state["step"] >= 2
    cfg = replace(Config.load(folder / "config.json"), teacher_steps=state["step"] + 1)
    cfg.save(folder / "config.json")
    assert cli.main(["--resume", str(folder)]) == 0


def test_student_folder_opens_with_from_pretrained(finished):
    from transformers import AutoModelForSemanticSegmentation

    student = AutoModelForSemanticSegmentation.from_pretrained(finished / "student-dsct", local_files_only=True)
    assert tuple(student.config.id2label.values()) == CLASSES
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in weights(finished / "student-dsct").items())
    assert student.eval()(pixel_values=torch.zeros(1, 3, 64, 64)).logits.shape[:2] == (1, len(CLASSES))
    assert json.loads((finished / "student-dsct/preprocessor_config.json").read_text())["do_normalize"]


def test_a_teacher_is_loaded_and_used_as_it_is(finished, tmp_path):
    folder = tmp_path / "run"
    arms = "tnkd,cafd:strides=8+32:spatial_temperature=2"
    command = [*TINY, "--no-pictures", "--teacher", str(finished / "teacher"), "--arms", arms, "--out", str(folder)]
    assert cli.main(command) == 0
    one, two = weights(finished / "teacher"), weights(folder / "teacher")
    assert all(torch.equal(one[k], two[k]) for k in one)
    results = json.loads((folder / "results.json").read_text())
    assert results["teacher"]["iou"] == json.loads((finished / "results.json").read_text())["teacher"]["iou"]
    assert list(results) == ["teacher", *arms.split(",")]


@pytest.mark.parametrize("preset", ["segformer-tiny", "upernet-tiny", "mobilenet-0.25"])
def test_features_come_at_the_strides_asked_for(preset):
    model = models.build(preset, CLASSES).eval()
    strides = (8,) if preset.startswith("mobilenet") else (8, 16, 32)  # this one stays at stride 8
    out = models.forward(model, torch.rand(2, 3, 64, 64), strides)
    assert [f.shape[-1] for f in out.features] == [64 // s for s in strides]


@pytest.mark.parametrize("classes", [("A", "B"), ("Road", "Field", "Building", "Tree", "Water")])
def test_a_model_with_other_classes_is_refused(finished, classes):
    with pytest.raises(data.DataError, match=re.escape(str(finished / "teacher")) + ".*its classes are Field, Road"):
        models.load(finished / "teacher", classes)


def test_errors_name_what_is_wrong(finished, tmp_path, capsys):
    def failed(*arguments: str) -> str:
        assert cli.main([*TINY, "--out", str(tmp_path / "run"), *arguments]) == 2
        return capsys.readouterr().err

    assert "nowhere: no such folder" in failed("--data", "dubai", "--root", str(tmp_path / "nowhere"))
    assert "no/such/model: neither a model folder" in failed("--teacher", "no/such/model")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((finished / "teacher/config.json").read_text())
    (broken / "model.safetensors").write_bytes((finished / "teacher/model.safetensors").read_bytes()[:5000])
    assert f"{broken}: cannot be loaded" in failed("--teacher", str(broken)).replace("\n", "")
    with pytest.raises(SystemExit):
        cli.main(["--arms", "dsct:temprature=3"])
    assert "temprature" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--out", str(finished)])
    assert "--resume" in capsys.readouterr().err


def test_arms():
    base = Loss(matched_weight=5.0, jaccard_weight=4.0, tnkd_weight=2.0, cafd_weight=3.0, strides=(16,))
    names = ("matched_weight", "jaccard_weight", "tnkd_weight", "cafd_weight")
    weights = {arm: tuple(getattr(arm_loss(arm, base), name) for name in names) for arm in ARMS}
    assert weights == {"alone": (0, 0, 0, 0), "cafd": (5, 0, 0, 3), "jaccard": (0, 4, 0, 0), "tnkd": (0, 0, 2, 0),
                       "dsct": (5, 4, 2, 3)}  # fmt: skip
    assert arm_loss("dsct", base) == base
    assert arm_loss("tnkd", Loss()).tnkd_weight == 1  # whose default is 0
    assert not arm_loss("alone", base).teaches and all(arm_loss(arm, Loss()).teaches for arm in ARMS if arm != "alone")
    assert (Loss().compared, base.compared, replace(base, cafd_weight=0).compared) == ((), (16,), ())
    changed = arm_loss("dsct:temperature=4:strides=8+16", base)
    assert changed.temperature == 4 and changed.strides == (8, 16)


def test_mixed_precision(tmp_path):
    """In a process of its own, since accelerate keeps one precision per process. The teacher outlives its wrapper."""
    command = [sys.executable, "-m", "dsct_kernels.distill", *TINY, "--precision=bf16", "--out", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == {"teacher", "alone", "dsct"}


def test_two_processes_share_the_training(tmp_path):
    """As torchrun starts them: each has its crops and its validation tiles, and one of them writes."""
    # torchrun, since `accelerate launch --cpu` starts one process and says nothing.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    tiny = [*TINY, "--scenes=6", "--log-every=1", "--teacher-steps=2", "--student-steps=2", "--no-pictures"]
    both = tmp_path / "both"
    command = [*launch, "dsct_kernels.distill", *tiny, "--out", str(both)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in rows] == [(p, s) for p in ("teacher", "alone", "dsct") for s in (1, 2)]

    # Scores of the shared validation are those of one process that looks at every tile.
    again = tmp_path / "again"
    assert cli.main([*tiny, "--teacher", str(both / "teacher"), "--arms=alone", "--out", str(again)]) == 0
    scores = [json.loads((folder / "results.json").read_text())["teacher"]["iou"] for folder in (both, again)]
    assert scores[0] == pytest.approx(scores[1], nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_cross_entropy_is_torchs_of_upsampled_logits(dtype, labelled):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 8, 6).to(dtype).requires_grad_()
    target = torch.randint(0, 5, (2, 32, 24), dtype=torch.uint8)
    target[:, :5] = data.IGNORE
    if not labelled:
        target.fill_(data.IGNORE)
    got = objective.cross_entropy(models.Output(logits, []), target, "auto")
    full = torch.nn.functional.interpolate(logits.float(), size=target.shape[1:], mode="bilinear")
    valid = (target != data.IGNORE).sum().clamp(min=1)
    keywords = {"ignore_index": data.IGNORE, "reduction": "sum"}
    want = torch.nn.functional.cross_entropy(full, target.long(), **keywords) / valid
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=torch.finfo(dtype).eps * 16, atol=1e-8)
