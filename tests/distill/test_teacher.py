"""The teacher at work: what is compared, inference mode, precision, torch.compile, cost."""

import json
import re
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dsct_kernels import backends, cafd_loss, dsct_loss, jaccard_loss, matched_cafd_loss, tnkd_loss
from dsct_kernels.distill import adapter, check, cli, models, scenes
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import synthetic
from dsct_kernels.distill.files import DataError
from dsct_kernels.distill.teacher import Teacher, nearest_strides, pair

IMAGES = torch.rand(2, 3, 32, 48)
BLACK = torch.zeros(1, 3, 32, 48)


class Net(nn.Module):
    """Maps at strides 2, 4, ..., logits at the last; behind the adapter with all of them as taps."""

    def __init__(self, strides=(2, 4), classes=3):
        super().__init__()
        widths, before = [3, *(4 + 2 * i for i in range(len(strides)))], [1, *strides]
        self.stages = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=strides[i] // before[i], padding=1)
            for i in range(len(strides))
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(widths[-1], classes, 1)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images).relu()
        return self.head(self.drop(images))


def network(*strides: int) -> adapter.Adapter:
    return adapter.Adapter(Net(strides), taps=[f"stages.{i}" for i in range(len(strides))])


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student,teacher,expected",
    [
        ([4, 8, 16, 32], [4, 8, 16, 32], (32, 32)),
        ([2, 4, 8, 8], [4, 8, 16, 32], (8, 8)),
        ([4, 8, 16, 32], [14], (16, 14)),
        ([8], [16, 32], (8, 16)),
        ([4, 16], [8, 8], (16, 8)),
        ([1], [1], (1, 1)),
    ],
)
def test_the_deepest_pair_of_equal_stride_is_taken_or_the_nearest(student, teacher, expected):
    assert nearest_strides(student, teacher) == expected


@pytest.mark.parametrize(
    "keywords,says,shapes",
    [
        (
            {"taps": ("auto",)},
            ["compared: student stages.1 (1, 6, 8, 12) at stride 4, teacher stages.1 (1, 6, 8, 12) at stride 4"],
            [(6, 8, 12), (6, 8, 12)],
        ),
        (
            {"taps": ("model.stages.0=model.stages.2", "model.stages.1 = model.stages.0")},
            [
                "compared: student model.stages.0 (1, 4, 16, 24) at stride 2, "
                "teacher model.stages.2 (1, 8, 4, 6) at stride 8",
                "compared: student model.stages.1 (1, 6, 8, 12) at stride 4, "
                "teacher model.stages.0 (1, 4, 16, 24) at stride 2",
            ],
            [(4, 16, 24), (6, 8, 12), (8, 4, 6), (4, 16, 24)],
        ),
        (
            {"strides": (2,)},
            ["compared: student stages.0 (1, 4, 16, 24) at stride 2, teacher stages.0 (1, 4, 16, 24) at stride 2"],
            [(4, 16, 24), (4, 16, 24)],
        ),
        ({}, [], []),
    ],
    ids=["auto", "names", "strides", "nothing"],
)
def test_what_is_compared_is_said_with_shapes_and_is_what_comes(keywords, says, shapes):
    student, teacher = network(2, 4).train(), network(2, 4, 8)
    one = Teacher(teacher, student, BLACK, **keywords)
    assert one.says == says
    assert student.training, "the look at the shapes leaves it as it was"
    out, said = models.forward(student, IMAGES, one.asks), one(IMAGES)
    assert [tuple(f.shape[1:]) for f in (*out.features, *said.features)] == shapes
    assert all(f.requires_grad for f in out.features) and not any(f.requires_grad for f in said.features)
    hooks = sum(len(m._forward_hooks) for m in student.modules())
    one.close()
    assert sum(len(m._forward_hooks) for m in student.modules()) == hooks - (4 if len(says) == 2 else 0)


def test_a_name_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"names: Adapter has no module 'model.stages.7'.*'model.stages.1'"):
        pair(network(2, 4), network(2), BLACK, taps=("model.stages.0=model.stages.0", "model.stages.7=model.head"))


def test_a_network_without_maps_is_refused():
    class Flat(nn.Module):
        def forward(self, pixel_values, output_hidden_states=False):
            return type("Out", (), {"logits": pixel_values, "hidden_states": [pixel_values.mean((2, 3))]})

    flat = models.with_normalisation(Flat(), *models.IMAGENET)
    for keywords in ({"taps": ("auto",)}, {"strides": (4,)}):
        with pytest.raises(DataError, match="no hidden state"):
            pair(network(2), flat, BLACK, **keywords)


# --- inference mode --------------------------------------------------------------------------------------------------

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason="no build")),
]
LOSSES = {
    "tnkd": lambda s, t, y, backend: tnkd_loss(s.logits, t.logits, y, backend=backend),
    "cafd": lambda s, t, y, backend: cafd_loss(s.features, t.features, backend=backend),
    "matched": lambda s, t, y, backend: matched_cafd_loss(s.logits, t.logits, backend=backend),
    "jaccard": lambda s, t, y, backend: jaccard_loss(s.logits, t.logits, y, backend=backend),
    "dsct": lambda s, t, y, backend: (
        dsct_loss(s.logits, t.logits, y, s.features, t.features, tnkd_weight=1.0, backend=backend).total
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_what_a_teacher_in_inference_mode_says(loss, backend):
    """The same loss and gradient as of a teacher under no_grad; the network itself did run in inference mode."""
    student, teacher = network(2, 4), network(2, 4, 8)
    inside = []
    teacher.model.head.register_forward_hook(lambda _m, _a, out: inside.append((out.is_inference(), out.requires_grad)))
    one = Teacher(teacher, student, BLACK, strides=(2, 4))
    inside.clear()
    said, out = one(IMAGES), models.forward(student, IMAGES, one.asks)
    assert inside == [(True, False)] and not said.logits.is_inference()
    with torch.no_grad():
        plain = models.forward(teacher, IMAGES, (2, 4))
    target = torch.randint(0, 3, (2, 32, 48))
    gradients = []
    for answer in (said, plain):
        value = LOSSES[loss](out, answer, target, backend)
        gradients.append(torch.autograd.grad(value, student.model.stages[0].weight, retain_graph=True)[0])
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_the_teacher_is_in_eval_mode_and_never_gets_a_gradient():
    student, teacher = network(2), network(2).train()
    one = Teacher(teacher, student, BLACK)
    assert torch.equal(one(IMAGES).logits, one(IMAGES).logits), "no dropout"
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored,dtype,expected",
    [
        (torch.float32, "auto", torch.bfloat16),  # that of the run
        (torch.float16, "auto", torch.float16),
        (torch.float32, "float32", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_the_teacher_runs_in_its_own_dtype(stored, dtype, expected):
    if (stored, dtype) == (torch.float32, "float32"):
        expected = torch.float32
    teacher = network(2)
    teacher.model.to(stored)
    before = [p.dtype for p in teacher.parameters()]
    one = Teacher(teacher, network(2), BLACK, dtype=dtype, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert one(IMAGES).logits.dtype == expected
    assert [p.dtype for p in teacher.parameters()] == before, "a copy is cast, not the teacher that is saved"
    assert one.network.get_buffer("pixel_mean").dtype == torch.float32
    torch.testing.assert_close(
        one(IMAGES).logits.float(), models.forward(teacher, IMAGES).logits.float(), rtol=0.05, atol=0.02
    )


# --- torch.compile and cost ------------------------------------------------------------------------------------------


def test_a_compiled_teacher_says_the_same_with_its_taps(monkeypatch):
    """All of torch.compile but the C++ compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    teacher, student = network(2, 4), network(2)
    plain = Teacher(teacher, student, BLACK, taps=("model.stages.0=model.stages.1",))
    one = Teacher(teacher, student, BLACK, taps=("model.stages.0=model.stages.1",), compiled=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    said = one(IMAGES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    expected = plain(IMAGES)
    torch.testing.assert_close(said.logits, expected.logits)
    torch.testing.assert_close(said.features, expected.features)


def test_its_cost_is_apart_from_that_of_the_rest_of_the_step():
    class Slow(Net):
        def forward(self, images):
            time.sleep(0.02)
            return super().forward(images)

    one = Teacher(adapter.Adapter(Slow((2,))), network(2), BLACK, calls=2)
    assert one.cost() == {}
    for _ in range(3):
        for _ in range(2):  # batches of an accumulated step
            one(IMAGES)
        time.sleep(0.04)
    cost = one.cost()  # sleeping takes at least as long as asked for; how much longer is up to the machine
    assert cost["teacher_ms"] >= 40
    assert 0 < cost["teacher_share"] < 1 and cost["teacher_ms"] / cost["teacher_share"] >= 79


# --- in a run --------------------------------------------------------------------------------------------------------

TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--batch=2", "--window=64", "--log-every=2", "--device=cpu"]
TINY += ["--teacher-steps=2", "--student-steps=4"]


@pytest.fixture
def _trained(monkeypatch):
    """How many numbers each optimiser is given."""
    counts: list[int] = []
    adam = torch.optim.AdamW

    class Counting(adam):  # type: ignore[misc, valid-type]
        def __init__(self, parameters, **keywords):
            parameters = list(parameters)
            counts.append(sum(p.numel() for p in parameters))
            super().__init__(parameters, **keywords)

    monkeypatch.setattr(torch.optim, "AdamW", Counting)
    return counts


def test_a_run_says_what_it_compares_trains_nothing_more_and_reports_the_teachers_cost(tmp_path, capsys, _trained):
    command = [*TINY, "--taps=auto", "--teacher-dtype=bfloat16", "--arms=alone,dsct", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    expected = (
        "student hidden_states[4] (1, 64, 1, 1) at stride 32, teacher hidden_states[3] (1, 128, 1, 1) at stride 32"
    )
    assert printed.count(f"compared: {expected}") == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    teacher, alone, dsct = (results[phase] for phase in ("teacher", "alone", "dsct"))
    assert _trained == [teacher["parameters"], alone["parameters"], alone["parameters"]]
    assert dsct["teacher_ms"] > 0 and 0 < dsct["teacher_share"] < 1
    assert "teacher_ms" not in teacher and "teacher_ms" not in alone
    assert f"{dsct['teacher_ms']:.1f} ({dsct['teacher_share']:.0%})" in printed
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["cafd"] > 0
    assert (tmp_path / "run/attention.png").stat().st_size > 0
    assert Config.load(tmp_path / "run/config.json").loss.taps == ("auto",)


def test_a_cnn_teaches_a_transformer_by_named_modules(tmp_path, capsys):
    """Tokens of SegFormer, by a tap of its own, against a stage of a ResNet."""
    taps = "segformer.stages.1.blocks.0=backbone.encoder.stages.1"
    sides = ["--teacher=upernet-tiny", "--student=segformer-tiny", "--no-pictures"]
    command = [*TINY, *sides, f"--arms=dsct:taps={taps}", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    mine, its = taps.split("=")
    assert f"student {mine} (1, 48, 4, 4) at stride 8, teacher {its} (1, 16, 4, 4) at stride 8" in printed
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["phase"].startswith("dsct") and rows[-1]["cafd"] > 0


def plain_network(classes):
    """What `--teacher package.module:function` calls."""
    return adapter.Adapter(Net((2, 4, 8, 16), classes), taps=["stages.2", "stages.3"])


def without_taps(classes):
    return Net((2, 4, 8, 16), classes)


def test_a_network_without_taps_is_fine_where_no_features_are_compared():
    cfg = replace(Config(), teacher=f"{__name__}:without_taps", crop=32, window=64)
    check.networks(cfg, scenes.CLASSES, synthetic.draw(1, 64))


def test_any_module_teaches_through_a_function_and_a_resumed_run_calls_none_that_is_not_typed(tmp_path, capsys):
    folder, teacher = tmp_path / "run", f"--teacher={__name__}:plain_network"
    command = [*TINY, "--no-pictures", "--taps=auto", "--arms=dsct", "--student=segformer-tiny", "--out", str(folder)]
    assert cli.main([*command, teacher]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "student hidden_states[2] (1, 96, 2, 2) at stride 16, teacher stages.3 (1, 10, 2, 2) at stride 16" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["teacher"]["parameters"] == models.parameters(Net((2, 4, 8, 16), len(scenes.CLASSES)))
    with pytest.raises(SystemExit):
        cli.main(["--resume", str(folder)])
    assert f"its teacher comes of {__name__}:plain_network" in capsys.readouterr().err
    saved = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    assert len(saved) == 2 and cli.main(["--resume", str(folder), teacher]) == 0
    assert saved == {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    (folder / "teacher/model.safetensors").write_bytes(b"no")
    assert cli.main(["--resume", str(folder), teacher]) == 2
    assert "its weights are not those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([f"--teacher={__name__}:without_taps", "--taps=auto"], "Net has no feature taps"),
        (["--teacher=no.such:thing"], "--teacher: no.such:thing: No module named 'no'"),
        (["--taps=encoder"], r"--taps: expected auto, or student.module=teacher.module each, got \('encoder',\)"),
        (["--taps=auto", "--strides=16"], r"--taps: expected none with --strides \(16,\)"),
        (["--taps=backbone=backbone"], "--taps: names: SegformerForSemanticSegmentation has no module 'backbone'"),
        (["--arms=dsct:taps=a=segformer"], "--arms dsct:taps=a=segformer: names: UperNet.* has no module 'a'"),
        (["--teacher-dtype=int8"], "--teacher-dtype: invalid choice: 'int8'"),
    ],
)
def test_taps_that_cannot_be_are_refused_before_training(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("dsct_kernels.distill.loop.train", lambda *_: pytest.fail("training began"))
    try:
        code = cli.main([*TINY, *arguments, "--out", str(tmp_path / "run")])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and re.search(said, error), error
    assert not (tmp_path / "run").exists()
