"""The examples run, and learn what their loops' own formulas teach: the same losses, the same weights after the steps.

Each loop runs twice: as it is, with the kernels, and with `formula` in the place of `dsct_loss`. What a loop does to a
loss on the way (accumulation, scaling, averaging over processes) is then part of the comparison.
"""

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

import dsct_kernels.dsct
from dsct_kernels import DSCTLosses, cafd_loss, jaccard_loss, matched_cafd_loss

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.rglob("*.py"))
# torchvision and what stands on it, where `make test` puts them: not in the environment itself, since transformers
# imports a torchvision that it finds, and that fails beside a CPU build of torch (see with_torchvision).
BESIDE = Path(sys.prefix) / "torchvision"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def formula(
    student: Tensor, teacher: Tensor, target: Tensor, features: Any = None, taught: Any = None, **_: Any
) -> DSCTLosses:
    """What a loop without kernels would do: everything at the labels' size by F, the rest in plain PyTorch."""
    at_labels = F.interpolate(student.float(), target.shape[-2:], mode="bilinear")
    ce = F.cross_entropy(at_labels, target.long(), ignore_index=255)
    matched = matched_cafd_loss(student, teacher, target, backend="reference")
    jaccard = jaccard_loss(student, teacher, target, backend="reference")
    cafd = torch.zeros(()) if features is None else cafd_loss(features, taught, backend="reference")
    nothing = torch.zeros(())
    total = ce + 3 * matched + 3 * jaccard + cafd
    return DSCTLosses(total, ce.detach(), nothing, nothing, cafd.detach(), matched.detach(), jaccard.detach())


def trained(name: str, loss: Any = None, **settings: Any) -> tuple[dict[str, Tensor], list[DSCTLosses]]:
    """The student's weights after an example's steps, and the losses on the way; `loss` in the place of dsct_loss."""
    module, real, seen = load(name), dsct_kernels.dsct.dsct_loss, []

    def watched(*args: Any, **keywords: Any) -> DSCTLosses:
        seen.append((loss or real)(*args, **keywords))
        return seen[-1]

    if hasattr(module, "dsct_loss"):
        module.dsct_loss = watched
    dsct_kernels.dsct.dsct_loss = watched  # the module DSCTLoss calls this one
    try:
        result = module.main(**settings)
    finally:
        dsct_kernels.dsct.dsct_loss = real
    student = next(x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, nn.Module))
    whole = {k: p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in student.state_dict().items()}
    return {k: p.detach().clone() for k, p in whole.items() if p.is_floating_point()}, seen


def named(key: str, message: str) -> str:
    return f"{key}: {message}"


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    (weights, losses), (their_weights, their_losses) = ours, theirs
    assert len(losses) == len(their_losses) > 0 and weights.keys() == their_weights.keys()
    for one, other in zip(losses, their_losses):
        for part in DSCTLosses._fields:
            a, b = getattr(one, part).detach(), getattr(other, part).detach()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-5, check_dtype=False, msg=f"{part}: {a} and {b}")
    for key, weight in weights.items():
        torch.testing.assert_close(weight, their_weights[key], rtol=10 * tolerance, atol=5e-5, msg=partial(named, key))


def assert_learnt(ours: Any, frozen: Any) -> None:
    """The weights moved by more than `assert_same` would overlook; `frozen` is a run that learnt nothing."""
    assert max((ours[0][key] - frozen[0][key]).abs().max() for key in ours[0]) > 1e-3


def nothing(student: Tensor, *_: Any, **__: Any) -> DSCTLosses:
    return DSCTLosses(0 * student.float().sum(), *torch.zeros(6))


# For HF's Trainer: AdamW minds no factor, and takes any rounding of a gradient that is 0 for a whole step.
PLAIN_SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None and not (BESIDE / module).is_dir():
            pytest.skip(f"no {module} here")


def three_runs(name: str, **settings: Any) -> list[tuple[dict[str, Tensor], list[DSCTLosses]]]:
    """An example as it is, with its loop's own formula, and learning nothing."""
    return [trained(name, loss, **settings) for loss in (None, formula, nothing)]


def in_plain_tuples(runs: Any) -> Any:
    """What torch.load reads without being told about our types."""
    return [(weights, [tuple(x.detach() for x in step) for step in seen]) for weights, seen in runs]


def with_names(runs: Any) -> Any:
    return [(weights, [DSCTLosses(*step) for step in seen]) for weights, seen in runs]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_an_example_is_short_and_says_which_lines_are_ours(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    assert 2 <= text.count("# dsct") <= 4
    assert re.search(r"^from dsct_kernels import \w+  # dsct$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "name,packages",
    [
        ("lightning_module", ("lightning",)),
        ("hf_trainer", ("transformers", "accelerate")),
    ],
)
def test_a_loop_learns_what_its_own_formula_teaches(name, packages):
    needs(*packages)
    settings = PLAIN_SGD if name == "hf_trainer" else {}
    ours, theirs, frozen = three_runs(name, **settings)
    assert_same(ours, theirs)
    assert_learnt(ours, frozen)


# --- loops with torchvision, in a process of their own ---------------------------------------------------------------

ON_TORCHVISION = {
    "torchvision_deeplab": "torchvision",
    "smp": "segmentation_models_pytorch",
    "timm_features": "timm",
    "torchdistill_config/run": "torchdistill",
}


def with_torchvision(_: int, file: str, names: list[str]) -> None:
    """Runs the examples of these names three times each, and leaves what came in a file.

    torchvision's wheels hold operators compiled for one build of torch. Beside another (PyPI's for CUDA, torch for the
    CPU) they stay out, and the import fails where it describes two of them for tracing: those are then declared, and
    nothing more. No segmenter calls them; who does is told by torchvision that its operators could not be loaded.
    """
    torch.set_num_threads(1)
    sys.path.append(str(BESIDE))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    torch.save({name: in_plain_tuples(three_runs(name)) for name in names}, file)


@pytest.fixture(scope="module")
def on_torchvision(tmp_path_factory):
    needs("torchvision")
    file = tmp_path_factory.mktemp("torchvision") / "runs.pt"
    there = [
        name
        for name, module in ON_TORCHVISION.items()
        if (BESIDE / module).is_dir() or importlib.util.find_spec(module)
    ]
    torch.multiprocessing.spawn(with_torchvision, (str(file), there))
    return torch.load(file)


@pytest.mark.parametrize("name", ON_TORCHVISION)
def test_a_loop_on_torchvision_learns_what_its_own_formula_teaches(name, on_torchvision):
    needs(ON_TORCHVISION[name])
    ours, theirs, frozen = with_names(on_torchvision[name])
    assert_same(ours, theirs)
    assert_learnt(ours, frozen)


# --- loops of several processes --------------------------------------------------------------------------------------

LOOPS = {
    "ddp": {},
    "ddp, float16 and a scaler, checkpointing": {"amp": "float16", "checkpoint": True},
    "fsdp": {"fsdp": True},
    "fsdp, bfloat16, checkpointing": {"fsdp": True, "amp": "bfloat16", "checkpoint": True},
}


def one_of_two(rank: int, folder: str) -> None:
    """Runs every loop three times in a process group of two, and leaves what came in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    runs = {name: in_plain_tuples(three_runs("plain_ddp", **settings)) for name, settings in LOOPS.items()}
    torch.save(runs, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loop", LOOPS)
def test_two_processes_learn_what_their_own_formula_teaches(loop, of_two):
    for of_rank in of_two:
        ours, theirs, frozen = with_names(of_rank[loop])
        assert_same(ours, theirs, 1e-4 if "float16" not in loop else 1e-2)
        assert_learnt(ours, frozen)
    (a, seen_a), (b, seen_b) = of_two[0][loop][0], of_two[1][loop][0]
    assert all(torch.equal(a[key], b[key]) for key in a), "the processes have parted"
    assert seen_a[0][0] != seen_b[0][0], "both processes read the same batch"


# --- what a framework does with the loss beside backward -------------------------------------------------------------


def test_hf_trainer_takes_the_mean_over_micro_batches(monkeypatch):
    """A loop of one's own over the same batches ends with the same weights; without `loss_is_scaled_for_ga` not."""
    needs("transformers", "accelerate")
    module = load("hf_trainer")

    def networks() -> tuple[nn.Module, nn.Module]:
        student, teacher = module_networks()
        for part in student.modules():  # nothing random: the Trainer draws more numbers than the loop below
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if hasattr(part, "drop_prob"):
                part.drop_prob = 0.0
        return student, teacher

    module_networks = module.networks
    monkeypatch.setattr(module, "networks", networks)
    ours = module.main(**PLAIN_SGD).state_dict()

    student, teacher = networks()
    samples = module.samples()
    student.train(), teacher.eval()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    for first in (0, 4):
        for micro in (samples[first : first + 2], samples[first + 2 : first + 4]):
            images, labels = (torch.stack([sample[key] for sample in micro]) for key in ("pixel_values", "labels"))
            seen = student(pixel_values=images, output_hidden_states=True)
            with torch.no_grad():
                taught = teacher(pixel_values=images, output_hidden_states=True)
            losses = formula(seen.logits, taught.logits, labels, seen.hidden_states, taught.hidden_states[1:])
            (losses.total / 2).backward()
        optimiser.step()
        optimiser.zero_grad()
    for key, weight in student.state_dict().items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-5, msg=partial(named, key))

    monkeypatch.setattr(module.Distilling, "loss_is_scaled_for_ga", None)
    doubled = module.main(**PLAIN_SGD).state_dict()
    assert max((doubled[key] - ours[key]).abs().max() for key in ours if ours[key].is_floating_point()) > 1e-2


def test_lightning_logs_every_part_and_saves_the_student_alone():
    needs("lightning")
    module, trainer = load("lightning_module").main()
    logged = trainer.logged_metrics
    assert set(DSCTLosses._fields) <= set(logged)
    parts = logged["ce"] + 3 * logged["matched"] + 3 * logged["jaccard"]
    torch.testing.assert_close(logged["total"], parts)
    assert all(key.startswith("student.") for key in module.state_dict())
    assert not module.teacher[0].training


def test_mmengine_adds_up_the_total_alone_and_its_gradient_is_the_formulas():
    student, losses = load("mmseg_loss").main()
    torch.manual_seed(0)
    own, teacher = (nn.Conv2d(3, 6, 7, stride, 3) for stride in (4, 2))
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 6, (2, 1, 64, 64))
    labels[:, :, :5] = 255
    total = 0.5 * formula(own(images), teacher(images).detach(), labels[:, 0]).total
    total.backward()
    torch.testing.assert_close(losses["loss_dsct"], total)
    for ours, theirs in zip(student.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    # mmengine's rule, and mmengine itself where it is there
    assert [name for name in losses if "loss" in name] == ["loss_dsct"]
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.model import BaseModel
        from mmengine.registry import MODELS

        assert type(MODELS.build({"type": "DSCTDistillLoss"})).__name__ == "DSCTDistillLoss"
        summed, log = BaseModel.parse_losses(None, losses)
        torch.testing.assert_close(summed, total)
        assert {"loss", "loss_dsct", "ce", "matched", "jaccard"} <= log.keys()
