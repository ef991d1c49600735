"""The comparison: fair between methods, resumable, checked before it trains, and honest about its noise."""

import json
import math
import multiprocessing
import os
import signal
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsct_kernels.distill import cli, compare, data, methods, models, pictures, rivals, table, trial
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets.tile import UnlabelledTile
from dsct_kernels.distill.files import DataError, only_writer

TINY = Config(
    data="synthetic",
    scenes=6,
    scene_size=64,
    crop=32,
    batch=2,
    teacher="segformer-tiny",
    student="upernet-tiny",
    teacher_steps=2,
    student_steps=3,
    window=64,
    device="cpu",
    val_tiles=("scene 00", "scene 03"),
)
TYPED = ["--data", "synthetic", "--scenes", "6", "--scene-size", "64", "--crop", "32", "--batch", "2", "--window", "64",
         "--teacher", "segformer-tiny", "--teacher-steps", "2", "--student-steps", "3", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with one teacher and what it says of the crops of seed 0."""
    folder = tmp_path_factory.mktemp("comparison")
    trial.train_teacher(job("cwd", folder))
    trial.ask_teacher(job("cwd", folder))
    return folder


def job(method: str, out: Path, **changes) -> trial.Job:
    return trial.Job(replace(TINY, **changes), method, (16, 32), out)


def result(method: str, out: Path, **changes) -> dict:
    found = trial.run(job(method, out, **changes))
    return {k: found[k] for k in ("miou", "iou", "accuracy")}


@pytest.fixture(scope="module")
def alone(out) -> dict:
    return result("alone", out)


def test_the_same_run_twice_is_the_same_run_and_another_seed_is_not(out, alone):
    assert result("alone", out) == alone
    assert result("alone", out, seed=1) != alone


@pytest.mark.parametrize("name", methods.TERMS)
def test_every_method_starts_from_the_same_weights_and_sees_the_same_crops(out, alone, name):
    """At weight 0 all that a method could change is the weights it starts from, the crops and the random numbers."""
    assert result(f"{name}:weight=0", out) == alone


@pytest.mark.parametrize("name", ["balanced", *methods.TERMS])
def test_every_method_trains_the_student_otherwise_than_cross_entropy_alone(out, alone, name):
    changes = "" if name == "balanced" else ":weight=5"
    assert result(name + changes, out) != alone


def test_the_kept_answers_are_what_the_teacher_says_of_those_very_crops(out):
    this = job("cwd", out)
    kept = torch.load(this.answers_file(), weights_only=True)
    classes, _ = data.classes_of(this.cfg)
    teacher = trial.build(this.cfg.teacher, classes, torch.device("cpu"))
    teacher.load_state_dict(torch.load(this.teacher_file, weights_only=True)["model"])
    train, _, _ = trial.pixels(this)
    for step in range(3):
        images, _ = trial.inputs(trial.crops_of(this.cfg, train, 0)[step], train, torch.device("cpu"))
        with torch.no_grad():
            said = models.forward(teacher.eval(), images, (16, 32))
        torch.testing.assert_close(kept["logits"][step].float(), said.logits, rtol=2e-3, atol=2e-3)
        for maps, feature in zip(kept["features"], said.features, strict=True):
            torch.testing.assert_close(maps[step].float(), feature, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def half(out) -> Path:
    """A teacher that saw the labels of half of the images, and what it says of all of them."""
    this = part("unlabelled+dsct", out)
    trial.train_teacher(this)
    trial.ask_teacher(this)
    return out


def part(method: str, out: Path) -> trial.Job:
    return replace(job(method, out), labelled=0.5)


def test_a_share_of_the_labels_is_every_so_manieth_image_and_the_rest_have_none():
    train, _, rest = trial.pixels(part("alone", Path()))
    whole, _, nothing = trial.pixels(job("alone", Path()))
    assert nothing is None and rest is not None
    assert [t.name for t in train.tiles] == ["scene 02", "scene 05"]
    assert sorted(t.name for t in (*train.tiles, *rest.tiles)) == [t.name for t in whole.tiles]
    there = {tile.name: i for i, tile in enumerate(whole.tiles)}
    for i, tile in enumerate(rest.tiles):
        seen, known = rest.window(i, 0, 0, 64, 64), whole.window(there[tile.name], 0, 0, 64, 64)
        assert torch.equal(seen[..., :-1], known[..., :-1])
        assert not seen[..., -1].any() and known[..., -1].any()


def test_unlabelled_crops_are_taught_by_the_teacher_alone_and_only_inside_of_the_image():
    target = torch.tensor([[[0, 0, 255], [0, 255, 0]]], dtype=torch.uint8)
    logits = torch.randn(1, 5, 2, 3)
    taught = data.pseudo_labels(target, logits)
    assert taught.dtype == torch.uint8
    assert torch.equal(taught == 255, target == 255)
    assert torch.equal(taught[target != 255].long(), logits.argmax(1)[target != 255])


def test_unlabelled_images_change_the_student_by_their_weight_and_methods_without_them_do_not_see_them(half):
    def scores(method: str) -> dict:
        found = trial.run(part(method, half))
        return {k: found[k] for k in ("miou", "iou", "accuracy", "kept_mb")}

    dsct, alone = scores("dsct"), scores("alone")
    with_them = scores("unlabelled+dsct")
    assert with_them != dsct != alone
    assert scores("unlabelled:weight=1e-30+dsct") != with_them
    assert with_them["kept_mb"] > 1.2 * dsct["kept_mb"]


def test_what_the_labels_of_unlabelled_images_are_makes_no_difference(half, monkeypatch):
    """The files do hold labels here, since a share is left out of sets that have them all."""
    this = part("unlabelled+dsct", half)
    before = trial.run(this)
    original = data.Pixels._decode

    def scrambled(self, flat, i):
        original(self, flat, i)
        tile = self.tiles[i]
        if tile.name not in ("scene 02", "scene 05"):
            here = flat[self.offsets[i] : self.offsets[i + 1]]
            if not isinstance(tile, UnlabelledTile) and tile.group not in TINY.val_tiles:
                here[:, -1] = (here[:, -1] + 1) % 3

    trial.pixels_of.cache_clear()
    monkeypatch.setattr(data.Pixels, "_decode", scrambled)
    after = trial.run(this)
    trial.pixels_of.cache_clear()
    assert {k: after[k] for k in ("miou", "iou")} == {k: before[k] for k in ("miou", "iou")}


def test_a_run_with_a_share_of_the_labels_is_another_run_with_another_teacher(out):
    all_known, some = job("dsct", out), part("dsct", out)
    assert some.key != all_known.key and some.teacher_key != all_known.teacher_key
    assert part("unlabelled+dsct", out).key != some.key
    assert "labelled" not in all_known.settings()


def test_cwd_on_features_learns_the_convolution_that_its_paper_puts_after_the_student(out, monkeypatch):
    seen = {}
    original = trial.fit

    def spy(cfg, student, objective, *rest):
        before = [p.detach().clone() for p in objective.parameters()]
        original(cfg, student, objective, *rest)
        seen["moved"] = [not torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True)]

    monkeypatch.setattr(trial, "fit", spy)
    result("cwd_features", out)
    assert seen["moved"] == [True, True]


def own_network(classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), torch.nn.Conv2d(8, classes, 1))


def seven(_classes: int) -> torch.nn.Module:
    return own_network(7 + _classes)


def own_victim(classes: int) -> torch.nn.Module:
    if multiprocessing.parent_process() is not None:  # in a worker
        os.kill(os.getpid(), signal.SIGKILL)
    return own_network(classes)


def own_number(classes: int) -> int:
    return classes


def test_any_module_of_ones_own_is_a_teacher_and_a_student(tmp_path):
    own = f"{__name__}:own_network"
    this = trial.Job(replace(TINY, teacher=own, student=own), "cwd", (), tmp_path)
    trial.train_teacher(this)
    trial.ask_teacher(this)
    assert 0 <= trial.run(this)["miou"] <= 1


def test_a_teacher_that_a_folder_holds_is_taken_as_it_is(tmp_path, out):
    classes, _ = data.classes_of(TINY)
    torch.manual_seed(5)
    made = models.build("segformer-tiny", classes)
    models.save(made, tmp_path / "folder")
    this = job("cwd", tmp_path, teacher=str(tmp_path / "folder"))
    trial.train_teacher(this)
    kept = torch.load(this.teacher_file, weights_only=True)["model"]
    assert all(torch.equal(v, kept[k]) for k, v in made.state_dict().items())


def test_upernets_logits_are_taken_before_it_resizes_them():
    network = trial.build("upernet-tiny", ("a", "b", "c"), torch.device("cpu")).eval()
    with torch.no_grad():
        assert models.forward(network, torch.rand(1, 3, 64, 64)).logits.shape[-2:] == (16, 16)


def test_a_loss_that_is_not_finite_fails_the_run_and_says_in_how_many_steps(out, monkeypatch):
    broken = replace(methods.TERMS["kd"], call=lambda b, **_: b.student.logits.sum() * math.nan)
    monkeypatch.setitem(methods.TERMS, "kd", broken)
    with pytest.raises(FloatingPointError, match="not finite in 3 of 3 steps"):
        trial.run(job("kd", out))


def test_a_loss_that_keeps_more_for_its_backward_pass_is_seen_to_keep_more(out):
    cheap, dear = (trial.run(job(name, out))["kept_mb"] for name in ("alone", "dkd+kd"))
    assert 0 < cheap < dear


# ------------------------------------------------------------------------------------------------ methods as text


def test_a_method_is_terms_with_settings_and_defaults_where_none_is_given():
    parsed = methods.method("balanced:power=0.3+cwd:temperature=2:weight=7+tnkd:beta=0.5:anneal=cosine")
    assert parsed.balance == 0.3
    assert [(p.term, p.weight, p.anneal) for p in parsed.parts] == [("cwd", 7.0, "no"), ("tnkd", 1.0, "cosine")]
    assert dict(parsed.parts[0].settings) == {"temperature": 2.0}
    assert dict(parsed.parts[1].settings)["beta"] == 0.5
    assert dict(parsed.parts[1].settings)["alpha"] == 1.0
    assert methods.method("alone") == methods.Method("alone", (), 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cdw", "'cdw' is none of alone, balanced, unlabelled, kd"),
        ("", "'' is none of"),
        ("cwd+", "'' is none of"),
        ("cwd:tau=4", "cwd has no setting 'tau'; it has: weight, anneal, temperature"),
        ("alone:weight=2", "alone has no setting 'weight'; it has: none"),
        ("cwd:temperature=hot", "temperature of cwd must be a number, got 'hot'"),
        ("cwd:temperature", "temperature of cwd must be a number, got ''"),
        ("cwd:weight=-1", "weight of cwd must be finite and not negative, got '-1'"),
        ("cwd:weight=nan", "weight of cwd must be finite and not negative, got 'nan'"),
        ("kd:weight=inf", "weight of kd must be finite"),
        ("kd:anneal=sometimes", "anneal must be one of no, linear, cosine, late, got 'sometimes'"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_name(text, said):
    with pytest.raises(ValueError, match=r"^method '") as caught:
        methods.method(text)
    assert said in str(caught.value)


def test_annealing_scales_a_term_from_the_first_step_to_the_last():
    student = models.Output(torch.randn(1, 3, 4, 4, requires_grad=True), [])
    teacher = models.Output(torch.randn(1, 3, 4, 4), [])
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    frequency = torch.full((3,), 1 / 3)

    def part(text: str, done: float) -> float:
        make = [methods.Objective(methods.method(m), frequency, student, teacher) for m in (text, "alone")]
        with_it, without = (objective(student, teacher, target, done).item() for objective in make)
        return with_it - without

    full = 3 * rivals.cwd(student.logits, teacher.logits).item()
    for name, at in (("no", (1, 1, 1)), ("linear", (1, 0.5, 0)), ("cosine", (1, 0.5, 0)), ("late", (0, 1, 1))):
        for done, share in zip((0.0, 0.5, 1.0), at, strict=True):
            assert part(f"cwd:anneal={name}", done) == pytest.approx(share * full, abs=1e-5)


def test_balanced_cross_entropy_weighs_a_class_by_the_root_of_its_rarity():
    student = models.Output(torch.randn(1, 2, 4, 4), [])
    target = torch.randint(2, (1, 4, 4), dtype=torch.uint8)
    target[0, 0] = 255
    objective = methods.Objective(methods.method("balanced"), torch.tensor([0.8, 0.2]), student, None)
    logp = student.logits.log_softmax(1)
    total, norm = 0.0, 0.0
    for i, j in (target[0] != 255).nonzero().tolist():
        k = int(target[0, i, j])
        w = (1 / 0.8**0.5, 1 / 0.2**0.5)[k]
        total, norm = total - w * logp[0, k, i, j].item(), norm + w
    assert objective(student, None, target, 0.0).item() == pytest.approx(total / norm, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the table


def row(method: str, seed: int, miou: float, fold: str = "a", **more) -> dict:
    return {"method": method, "fold": fold, "seed": seed, "student": "s", "teacher": "t", "steps": 1, "miou": miou,
            "iou": [miou, None], "ms_per_step": 10.0, "kept_mb": 5.0, **more}  # fmt: skip


def test_differences_are_paired_by_fold_and_seed_so_that_what_folds_differ_by_cancels():
    rows = [row("alone", s, 0.4 + 0.1 * (f == "b") + 0.01 * s, f) for f in "ab" for s in range(3)]
    gains = iter((0.02, 0.03, 0.01, 0.02, 0.03, 0.01))
    rows += [row("cwd", r["seed"], r["miou"] + next(gains), r["fold"]) for r in list(rows)]
    d = table.paired(rows, "cwd", "alone", lambda r: r["miou"])
    assert d.mean == pytest.approx(0.02)
    assert d.error == pytest.approx(math.sqrt(0.0004 / 5 / 6))
    assert d.clear
    text = table.table(rows, ["alone", "cwd"], ["alone"], ("x", "y"))
    assert "+0.0200 ± 0.0037 **clear**" in text
    assert "6 of 6" in text


@pytest.mark.parametrize(
    ("pairs", "clear"),
    [
        ((0.01, 0.02, 0.03), True),
        ((-0.01, -0.02, -0.03), True),
        ((0.05, -0.03, 0.01), False),
        ((0.05, 0.05), False),
        ((0.05,), False),
    ],
    ids=["above twice the error", "below it", "inside the spread", "two pairs only", "one pair"],
)
def test_a_difference_is_called_clear_only_beyond_twice_its_error_with_three_pairs(pairs, clear):
    assert table.Difference(pairs).clear is clear


def test_a_run_without_its_partner_and_a_class_that_is_nowhere_take_no_part():
    rows = [row("alone", 0, 0.4), row("cwd", 0, 0.5), row("cwd", 1, 0.9)]
    assert table.paired(rows, "cwd", "alone", lambda r: r["miou"]).pairs == pytest.approx((0.1,))
    assert table.paired(rows, "cwd", "alone", lambda r: r["iou"][1]).pairs == ()
    assert "| cwd | +0.1000 | - |" in table.table(rows, ["alone", "cwd"], ["alone"], ("x", "y"))


def test_the_chart_is_drawn_even_of_one_pair(tmp_path):
    rows = [row("alone", 0, 0.4), row("cwd", 0, 0.5)]
    pictures.save(table.chart(rows, ["alone", "cwd", "kd"], "alone"), tmp_path / "c.png", 110)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert table.chart(rows, ["alone", "kd"], "alone") is None


# ------------------------------------------------------------------------------------------------ the command


def test_a_comparison_goes_on_where_it_was_and_an_unfinished_line_is_no_run(tmp_path, capsys, monkeypatch):
    ran = []
    serial(monkeypatch, ran)
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0,1", "--methods", "alone,kd"]
    assert cli.main(typed) == 0
    assert ran == ["train_teacher", "ask_teacher", "ask_teacher", "run", "run", "run", "run"]
    first = (tmp_path / "comparison-segformer-tiny-upernet-tiny-3.md").read_text()
    lines = (tmp_path / "runs.jsonl").read_bytes().splitlines(True)
    assert len(lines) == 4
    (tmp_path / "runs.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:25])  # killed while it wrote the third
    ran.clear()
    assert cli.main(typed) == 0
    assert ran == ["run", "run"]
    rows = compare.read_rows(tmp_path / "runs.jsonl")
    assert [r["miou"] for r in rows] == [json.loads(line)["miou"] for line in lines]
    assert scores(first) == scores((tmp_path / "comparison-segformer-tiny-upernet-tiny-3.md").read_text())
    ran.clear()
    assert cli.main([*typed[:-1], "alone,kd,cwd", "--against", "alone,kd"]) == 0  # a larger one: only what is new
    assert ran == ["run", "run"]
    assert "against kd" in capsys.readouterr().out
    assert (tmp_path / "comparison-segformer-tiny-upernet-tiny-3.png").is_file()


def scores(text: str) -> list[list[str]]:
    """The table without what time it took."""
    return [line.split("|")[1:-3] for line in text.splitlines() if line.startswith("|")]


def serial(monkeypatch, ran: list[str]) -> None:
    """Runs in this process: what a worker does without the seconds that starting one takes."""

    class Here:
        def __init__(self, *_):
            pass

        def submit(self, function, stage, *rest):
            ran.append(stage.__name__)
            future = Future()
            try:
                future.set_result(function(stage, *rest))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)


def test_a_worker_that_is_killed_ends_the_comparison_and_keeps_what_was_done(tmp_path, capsys):
    own = f"{__name__}:own_victim"
    (tmp_path / "runs.jsonl").write_text('{"key": "of another comparison"}\n')
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0", "--methods", "alone"]
    assert cli.main([*typed, "--student", own]) == 1
    said = capsys.readouterr()
    assert "a worker was killed" in said.err
    assert "1 runs to go; the same command goes on" in said.out
    assert (tmp_path / "runs.jsonl").read_text() == '{"key": "of another comparison"}\n'


def test_a_teacher_that_fails_is_named_once_and_what_needs_none_runs(tmp_path, capsys, monkeypatch):
    ran = []
    serial(monkeypatch, ran)

    def train_teacher(job):
        raise FloatingPointError("the loss was not finite in 2 of 2 steps")

    monkeypatch.setattr(compare, "train_teacher", train_teacher)
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0", "--methods", "alone,kd,cwd"]
    assert cli.main(typed) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1
    assert "teacher: FAILED: FloatingPointError" in out
    assert ran == ["train_teacher", "run"]
    assert "2 runs to go" in out


def test_real_workers_do_it_too_and_no_time_is_no_run(tmp_path, capsys):
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0", "--methods", "alone"]
    assert cli.main([*typed, "--minutes", "0"]) == 0
    assert not (tmp_path / "runs.jsonl").exists()
    assert "1 runs to go" in capsys.readouterr().out
    assert cli.main([*typed, "--jobs", "2"]) == 0
    assert len(compare.read_rows(tmp_path / "runs.jsonl")) == 1


def test_a_run_that_fails_is_named_and_costs_no_other(tmp_path, capsys, monkeypatch):
    serial(monkeypatch, [])
    original = trial.run

    def run(job):
        if job.method == "kd":
            raise FloatingPointError("the loss was not finite in 1 of 3 steps")
        return original(job)

    monkeypatch.setattr(compare, "run", run)
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0", "--methods", "kd,alone"]
    assert cli.main(typed) == 1
    assert "kd: FAILED: FloatingPointError" in capsys.readouterr().out
    assert [r["method"] for r in compare.read_rows(tmp_path / "runs.jsonl")] == ["alone"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--methods", "alone,cdw"], "'cdw' is none of"),
        (["--methods", "alone,alone"], "--methods: expected different values"),
        (["--methods", "alone,cwd,cwd:temperature=4"], "--methods: 'cwd' and 'cwd:temperature=4' are the same"),
        (["--methods", "alone,cwd:temperature=0"], "method 'cwd:temperature=0'"),
        (["--methods", "alone,over_positions:weights=heavy"], "method 'over_positions:weights=heavy'"),
        (["--against", "cwd", "--methods", "alone"], "--against: 'cwd' is not one of --methods"),
        (["--folds", "3"], "--folds: expected some of 0,1,2, got 3"),
        (["--seeds", "1,1"], "--seeds: expected different values, got 1,1"),
        (["--seeds", "-1"], "--seeds: expected 0 or more, got -1"),
        (["--crop", "48"], "--crop: expected a multiple of 32, got 48"),
        (["--student-steps", "0"], "--student-steps: expected a whole number from 1 to"),
        (["--labelled", "0"], "--labelled: expected a share above 0 and up to 1, got 0"),
        (["--methods", "alone,unlabelled+dsct"], "--methods: 'unlabelled+dsct' needs images without labels"),
        (["--methods", "alone,unlabelled", "--labelled", ".5"], "unlabelled needs a term that learns from the teacher"),
        (["--jobs", "0"], "--jobs: expected 1 or more, got 0"),
        (["--student", "resnet"], "resnet: neither a model folder"),
        (["--teacher", "nowhere"], "nowhere: neither a model folder"),
        (["--teacher", "no_such_package:make"], "No module named 'no_such_package'"),
        (["--teacher", "torch:no_such_function"], "no_such_function"),
        (["--student", f"{__name__}:own_number"], "own_number: expected a torch.nn.Module of it, got int"),
        (["--student", f"{__name__}:seven"], "--student: expected logits of"),
        (["--student", f"{__name__}:own_network", "--methods", "alone,at"], "has no feature taps"),
        (["--data", "dubai"], "--data dubai needs --root DIR"),
        (["--data", "dubai", "--root", "/no/such"], "/no/such: no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, capsys, typed, said):
    assert cli.main(["compare", *TYPED, "--out", str(tmp_path / "new"), *typed]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_of_runs_that_is_none_is_refused_with_its_line(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\nnot a run\n')
    with pytest.raises(DataError, match=r"runs.jsonl, line 2: not a finished run"):
        compare.read_rows(tmp_path / "runs.jsonl")


def test_a_run_is_known_by_all_that_it_depends_on_and_a_run_without_a_teacher_not_by_the_teacher(tmp_path):
    base = job("cwd", tmp_path)
    changes = ({"seed": 1}, {"crop": 64}, {"teacher_steps": 9}, {"teacher": "segformer-b0"}, {"val_tiles": ("x",)})
    changes += ({"student": "mobilenet-0.25"}, {"student_steps": 4}, {"student_lr": 0.1}, {"downscale": 2})
    for change in changes:
        assert job("cwd", tmp_path, **change).key != base.key, change
    assert job("cwd:temperature=2", tmp_path).key != base.key
    assert job("cwd:temperature=4", tmp_path).key == base.key, "a default, typed"
    assert job("alone", tmp_path, teacher_steps=9).key == job("alone", tmp_path).key


def test_the_help_names_every_method_with_its_settings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    said = capsys.readouterr().out
    for name in ("balanced", *methods.TERMS):
        assert name in said
    assert "temperature=4.0" in said.replace("\n", "")


def test_a_folder_that_another_comparison_writes_is_refused(tmp_path, capsys):
    typed = ["compare", *TYPED, "--out", str(tmp_path), "--folds", "0", "--seeds", "0", "--methods", "alone"]
    with only_writer(tmp_path):
        assert cli.main(typed) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_run_without_a_number_is_not_written_as_something_that_json_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        compare.append_row(tmp_path / "runs.jsonl", {"miou": math.nan})
