"""Many processes, small batches, kills: the numbers of a run do not depend on how it was made."""

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dsct_kernels.distill import card, checkpoint, cli, data, loop, models, objective, scenes
from dsct_kernels.distill.config import LATER, Config, Loss
from dsct_kernels.distill.datasets import dubai
from dsct_kernels.distill.engine import Training, make_accelerator
from dsct_kernels.distill.run import Run

from . import forked
from .test_data import make_tile

CLASSES = scenes.CLASSES


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- the mean over the step's pixels


@pytest.fixture(scope="module")
def partly_labelled(tmp_path_factory) -> list[str]:
    """Crops with few labels or many, and all parts of the loss but Jaccard, which is one ratio per batch."""
    root = tmp_path_factory.mktemp("set")
    for k, group in enumerate(("Tile 1", "Tile 2", "Tile 3")):
        make_tile(root, group, size=(64, 64))
        mask = Image.new("RGB", (64, 64))
        for i in range(16):
            mask.paste(dubai.DATASET.palette[(i + k) % 5], (i % 4 * 16, i // 4 * 16, 64, 64))
        mask.paste(dubai.IGNORED[0], (0, 0, 64, 60 if k == 0 else 5))
        mask.save(root / group / "masks/image_part_001.png")
    arguments = ["--data=dubai", f"--root={root}", "--val-tiles=Tile 2", "--crop=32", "--window=64", "--device=cpu"]
    arguments += ["--downscale=1", "--teacher=sober", "--student=sober", "--teacher-steps=2", "--student-steps=3"]
    arguments += ["--no-pictures", "--arms=dsct", "--log-every=1", "--jaccard-weight=0", "--tnkd-weight=1"]
    # At low temperatures the networks, which know little yet, differ by more than rounding hides.
    return [*arguments, "--strides=8", "--matched-temperature=0.05", "--temperature=0.1", "--spatial-temperature=0.1"]


@pytest.fixture(scope="module")
def at_once(partly_labelled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("at_once") / "run"
    forked.finished([*partly_labelled, "--batch=4", "--out", str(folder)], folder.with_name("said"))
    return folder


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [(1, ["--batch=2", "--accumulate=2"]), (2, ["--batch=2"]), (2, ["--batch=1", "--accumulate=2"]),
     (2, ["--batch=2", "--parallel=fsdp"])],
    ids=["accumulated", "two processes", "two processes that accumulate", "two processes that share weights"],
)  # fmt: skip
def test_a_step_is_the_same_however_its_batch_is_shared_out(partly_labelled, at_once, tmp_path, processes, arguments):
    """Four crops a step, in one batch or in parts with few labels or many: the same losses and the same weights."""
    folder = tmp_path / "run"
    forked.finished([*partly_labelled, *arguments, "--out", str(folder)], tmp_path / "said", processes)
    for got, want in zip(rows(folder), rows(at_once), strict=True):
        assert got.pop("phase") == want.pop("phase") and got == pytest.approx(want, rel=1e-4, abs=0), (got, want)
    for phase, lr in (("teacher", 1e-3), ("student-dsct", 3e-3)):
        got, want = weights(folder / phase), weights(at_once / phase)
        assert got.keys() == want.keys()
        worst = max(float((got[k] - want[k]).abs().max()) for k in want)
        print(phase, worst)
        assert worst < 0.01 * lr, worst  # Adam's steps are of the size of the rate, whatever the gradient's size is


# ---- kills


KILLED = [*forked.TINY, "--batch=2", "--teacher=micro", "--student=micro", "--teacher-steps=2", "--student-steps=4"]
KILLED += ["--arms=dsct", "--log-every=2", "--checkpoint-every=1", "--eval-every=2", "--keep=2", "--ema=0.9"]
KILLED += ["--strides=8", "--distill-warmup=0.5", "--schedule=poly"]


def what_counts(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {"log": (folder / "metrics.jsonl").read_text()}
    results = json.loads((folder / "results.json").read_text())
    found["scores"] = {k: (v["iou"], v["best_miou"]) for k, v in results.items()}
    for model in sorted(folder.glob("*/model.safetensors")):
        found[model.parent.name] = model.read_bytes()
    assert len(found) == 6
    return found


@pytest.mark.parametrize(("processes", "kills"), [(1, 30), (2, 6)])
def test_a_run_that_is_killed_at_random_moments_has_the_numbers_of_one_that_is_not(tmp_path, processes, kills):
    start = [*KILLED, "--out"]
    folder, said = tmp_path / "whole", tmp_path / "said"
    forked.finished([*start, str(folder)], said, processes)
    started = time.monotonic()  # a second time, now that the server runs
    forked.finished([*start, str(tmp_path / "again")], said, processes)
    length = time.monotonic() - started
    want = what_counts(folder)
    assert what_counts(tmp_path / "again") == want
    chance, done, runs = random.Random(0), 0, 0
    while done < kills:
        folder, runs = tmp_path / str(runs), runs + 1
        ended, here = False, 0
        while not ended:
            resume = ["--resume", str(folder)] if (folder / "config.json").exists() else [*start, str(folder)]
            family = forked.start(resume, said, processes)
            left_alone = done == kills or here == 8  # should the machine have slowed down, it would never end
            moment = time.monotonic() + (120 if left_alone else chance.uniform(0, length))
            while time.monotonic() < moment and any(p.is_alive() for p in family):
                time.sleep(0.002)
            ended = all(p.exitcode == 0 for p in family)
            assert not any(p.exitcode for p in family) and (ended or not left_alone), said.read_text()
            if not ended:
                done, here = done + 1, here + 1
                for p in chance.sample(family, len(family)):  # one of them may go on for a while
                    p.kill()
                    p.join()
        assert what_counts(folder) == want
        assert not [p.name for p in folder.iterdir() if "checkpoint" in p.name or p.suffix == ".tmp"]


# ---- checkpoints


def small(**settings: object) -> Config:
    cfg = Config(scenes=3, scene_size=64, crop=32, window=64, batch=2, device="cpu", pictures=False, log_every=1)
    return replace(cfg, teacher="micro", student="micro", teacher_steps=6, student_steps=6, arms=("alone",), **settings)


def test_the_last_checkpoints_are_kept_and_nothing_of_a_phase_that_is_done(tmp_path, monkeypatch):
    seen = []

    def stop(run: Run) -> bool:
        seen.append(sorted(p.name for p in run.folder.glob("checkpoint*")))
        return len(seen) == 6 + 5

    monkeypatch.setattr(Run, "should_stop", stop)
    run = Run(small(keep=3, checkpoint_every=1), tmp_path)
    with pytest.raises(loop.Interrupted):
        run.all()
    three = [[f"checkpoint-{k - 2}.pt", f"checkpoint-{k - 1}.pt", "checkpoint.pt"] for k in (3, 4, 5)]
    assert seen[2:6] == [["checkpoint-1.pt", "checkpoint.pt"], *three] and seen[6] == []
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in three[2]]
    assert steps == [3, 4, 5]

    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(data.DataError, match=r"checkpoint\.pt: damaged.*put checkpoint-4\.pt in its place"):
        Run(small(keep=3, checkpoint_every=1), tmp_path)
    (tmp_path / "checkpoint-4.pt").replace(tmp_path / "checkpoint.pt")
    assert Run(small(keep=3, checkpoint_every=1), tmp_path).saved["step"] == 4


def test_checkpoints_that_a_kill_left_of_the_last_phase_go(tmp_path):
    cfg = small(keep=2, checkpoint_every=1)
    Run(cfg, tmp_path).all()
    for name in ("checkpoint-2.pt", "checkpoint-3.pt"):  # results.json was written and one of three was gone already
        (tmp_path / name).write_bytes(b"")
    Run(cfg, tmp_path).all()
    assert not [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name]


def test_the_best_network_on_the_way_is_kept_with_its_score(tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.3, None, 0.4, 0.4])  # at step 2, at step 4 and at the end, of each of two phases
    seen: dict[float | None, dict[str, torch.Tensor]] = {}

    def scored(_run: Run, model: torch.nn.Module) -> dict:
        miou = next(scores)
        seen.setdefault(miou, {k: v.clone() for k, v in model.state_dict().items()})
        return {"miou": miou, "iou": [miou] * len(CLASSES), "accuracy": miou}

    monkeypatch.setattr(Run, "scores", scored)
    run = Run(small(eval_every=2), tmp_path)
    run.all()
    assert [run.results[phase]["best_miou"] for phase in ("teacher", "alone")] == [0.5, 0.4]
    for folder, miou in (("teacher", 0.5), ("student-alone", 0.4)):
        best, last = (models.load(tmp_path / name, CLASSES).state_dict() for name in (f"{folder}-best", folder))
        assert card.read(tmp_path / f"{folder}-best") == card.read(tmp_path / folder) is not None
        assert all(torch.equal(value, seen[miou][name]) for name, value in best.items())
        assert any((value != last[name]).any() for name, value in best.items())


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """Neither its settings nor its checkpoint know of what came later."""
    Run(small(checkpoint_every=3), tmp_path / "whole").all()
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(Run, "should_stop", lambda run: run.checkpoint.exists())
        Run(small(checkpoint_every=3), tmp_path / "run").all()
    path = tmp_path / "run/config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in LATER}))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    (own,) = state.pop("rng")
    del state["average"], state["best"]
    torch.save({**state, "rng": own}, tmp_path / "run/checkpoint.pt")
    assert cli.main(["--resume", str(tmp_path / "run")]) == 0
    for name in ("metrics.jsonl", "teacher/model.safetensors", "student-alone/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "should_stop", lambda run: True)
    with pytest.raises(loop.Interrupted):
        Run(small(), tmp_path).all()
    with pytest.raises(data.DataError, match="written by 1 processes, this run has 2; go on with as many"):
        checkpoint.read(tmp_path / "checkpoint.pt", {"teacher": 6}, 2)


# ---- schedules, averages, determinism


def test_schedules():
    steps = 100
    for kind in ("cosine", "poly"):
        rates = [objective.schedule(step, steps, kind) for step in range(steps)]
        assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
        assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.02
    assert objective.schedule(50, steps, "poly", 2.0) == pytest.approx((50 / 95) ** 2)
    assert objective.schedule(50, steps, "poly", 0.0) == 1
    assert objective.schedule(50, steps) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 45 / 95)))
    assert [objective.taught(step, 10, 0.4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert objective.taught(0, 10, 0.0) == 1


def test_the_weights_of_what_is_learnt_from_the_teacher_rise(tmp_path):
    forked.finished([*KILLED, "--distill-warmup=1", "--log-every=1", "--out", str(tmp_path / "run")], tmp_path / "said")
    for row in rows(tmp_path / "run"):
        if row["phase"] == "dsct" and "total" in row:
            taught = 3 * row["matched"] + 3 * row["jaccard"] + row["cafd"]
            assert row["total"] == pytest.approx(row["ce"] + row["step"] / 4 * taught, rel=1e-4)
            assert row["matched"] > 0 and row["cafd"] > 0
    assert Loss().warmed(1) is not None and Loss(cafd_weight=0, strides=(8,)).warmed(0.5).compared == ()


def test_the_average_is_what_is_evaluated_and_kept():
    """Weights and running statistics, averaged with a decay that grows to the one asked for."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    cfg = small(ema=0.5)
    training = Training(cfg, make_accelerator(cfg), network, 0.1)
    want: dict[str, torch.Tensor] = {}
    for step in range(9):
        training.step((training.model(torch.randn(4, 2, 5, 5)) ** 2).mean(), 0.1)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                want[name] = value.clone() if step == 0 else decay * want[name] + (1 - decay) * value
    kept = training.finished()
    assert kept is not network and not kept.training
    for name, value in want.items():
        torch.testing.assert_close(kept.state_dict()[name], value)
        assert not torch.allclose(value, network.state_dict()[name], rtol=1e-3)


def test_deterministic_mode_refuses_what_is_not(tmp_path, monkeypatch):
    was = torch.are_deterministic_algorithms_enabled()
    try:
        run = Run(small(deterministic=True), tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
        entropy = loop.cross_entropy

        def scattered(*arguments: object) -> torch.Tensor:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))  # which of the two, is left open
            return entropy(*arguments)

        monkeypatch.setattr(loop, "cross_entropy", scattered)
        with pytest.raises(data.DataError, match="--deterministic: put_ does not have a deterministic implementation"):
            run.all()
    finally:
        torch.use_deterministic_algorithms(was)


def test_deterministic_mode_trains(tmp_path):
    arguments = [*KILLED, "--deterministic", "--teacher-steps=2", "--student-steps=2"]
    forked.finished([*arguments, "--out", str(tmp_path / "run")], tmp_path / "said")
    assert Config.load(tmp_path / "run/config.json").deterministic


def test_settings_that_do_not_go_together_are_refused(capsys, tmp_path):
    for arguments, said in (
        (["--parallel=fsdp"], "--parallel fsdp: expected several processes"),
        (["--parallel=fsdp", "--ema=0.9"], "--ema 0.9: expected 0 with --parallel fsdp"),
        (["--ema=1"], "--ema: expected a number from 0 to 1"),
        (["--accumulate=0"], "--accumulate: expected a whole number"),
        (["--schedule=linear"], "--schedule"),
    ):
        with pytest.raises(SystemExit) as end:
            raise SystemExit(cli.main([*forked.TINY, *arguments, "--out", str(tmp_path / "run")]))
        error = capsys.readouterr().err
        assert end.value.code == 2 and said in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "run").exists()
