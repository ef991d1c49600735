"""What the documents say, held against the code: snippets run, files that are named exist, ops take what is listed."""

import doctest
import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsct_kernels
from dsct_kernels import backends, jaccard_loss, matched_cafd_loss

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dsct_kernels.__file__).parent
PAGES = sorted(["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])


def blocks(page: str) -> list[tuple[str, str]]:
    """(heading above it, text) of each block of Python on a page."""
    found, heading = [], ""
    for title, block in re.findall(
        r"^## ([^\n]+)$|^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    ):
        heading = title or heading
        if block:
            found.append((heading, block))
    return found


SNIPPETS = [pytest.param(block, id=f"README.md-{i}") for i, (_, block) in enumerate(blocks("README.md"))]
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# --- snippets --------------------------------------------------------------------------------------------------------


def training_step(labels: torch.dtype, shrunk: int, dtype: torch.dtype) -> dict[str, object]:
    """What a training loop has at hand where a snippet of the README starts, as the paragraph below it promises."""
    size, generator = 32, torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    target = torch.randint(0, 6, (2, size, size), generator=generator).to(labels)
    target[:, :3] = 255 if labels != torch.int8 else 0
    return {
        "student_logits": tensor(2, 6, size // shrunk, size // shrunk).requires_grad_(),
        "teacher_logits": tensor(2, 6, size // 2, size // 2),
        "student_features": tensor(2, 5, 8, 8).requires_grad_(),
        "teacher_features": tensor(2, 7, 4, 4),
        "target": target,
        "task_loss": torch.zeros((), requires_grad=True),
    }


def test_the_readme_has_snippets():
    assert sum(str(snippet.id).startswith("README") for snippet in SNIPPETS) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shrunk", [1, 4])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_trains_with_any_labels_and_with_logits_smaller_than_them(snippet, labels, shrunk, dtype):
    names = training_step(labels, shrunk, dtype)
    exec(compile(snippet, "snippet", "exec"), names)
    for leaf in ("student_logits", "student_features"):
        grad = names[leaf].grad  # type: ignore[attr-defined]
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, f"{leaf} learns nothing"


def test_the_whole_objective_of_the_readme_is_the_sum_that_it_says():
    """`dsct_loss` on labels that F.cross_entropy takes is F.cross_entropy and the other losses."""
    names = training_step(torch.int64, 1, torch.float32)
    first, second = (snippet.values[0] for snippet in SNIPPETS if str(snippet.id).startswith("README"))
    exec(first, names)
    one = names["student_logits"].grad.clone()  # type: ignore[attr-defined]
    names["student_logits"].grad = None  # type: ignore[attr-defined]
    names["task_loss"] = torch.nn.functional.cross_entropy(
        names["student_logits"],  # type: ignore[arg-type]
        names["target"],  # type: ignore[arg-type]
        ignore_index=255,
    )
    exec(second, names)
    torch.testing.assert_close(names["loss"], names["losses"].total)  # type: ignore[attr-defined]
    torch.testing.assert_close(names["student_logits"].grad, one)  # type: ignore[attr-defined]


# --- snippets of the other pages -------------------------------------------------------------------------------------


def enlarged(logits: Tensor, target: Tensor, align_corners: bool = False) -> Tensor:
    return F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)


def rows(maps: Tensor) -> Tensor:
    """(N, K, H, W) as (pixels, K)."""
    return maps.movedim(1, -1).flatten(0, -2)


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of the softmax, for each row."""
    log_s, log_t = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)


def dkd(student: Tensor, teacher: Tensor, y: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """DKD for each row, the other classes taken out and not pushed down."""
    others = torch.arange(student.shape[1]) != y[:, None]
    binary = []
    for logits in (student, teacher):
        p = (logits / temperature).softmax(1).gather(1, y[:, None])
        binary.append(torch.cat([p, 1 - p], 1).log())
    nckd = kd(student[others].view(len(y), -1), teacher[others].view(len(y), -1), temperature)
    return alpha * kd(binary[0] * temperature, binary[1] * temperature, temperature) + beta * nckd


def mdistiller(at: dict[str, Any]) -> Tensor:
    student, teacher, y = at["logits_student"], at["logits_teacher"], at["labels"]
    return F.cross_entropy(student, y) + 5 / 20 * dkd(student, teacher, y, 1.0, 8.0, 4.0).mean()


def mmrazor_cwd(at: dict[str, Any]) -> Tensor:
    student, teacher = (x.flatten(2).flatten(0, 1) for x in (at["student_logits"], at["teacher_logits"]))
    return 3.0 * kd(student, teacher, 4.0).mean()  # a row is a channel


def valid_dkd(student: Tensor, teacher: Tensor, labels: Tensor, ignored: int, *settings: float) -> Tensor:
    counts = labels.flatten() != ignored
    return dkd(rows(student)[counts], rows(teacher)[counts], labels.flatten()[counts], *settings)


def mmrazor_dkd(at: dict[str, Any]) -> Tensor:
    student, teacher = (enlarged(at[name], at["target"]) for name in ("student_logits", "teacher_logits"))
    return 0.5 * valid_dkd(student, teacher, at["target"], 255, 1.0, 8.0, 4.0).sum()


def seg_gdkd_small(at: dict[str, Any]) -> Tensor:
    step = at["target"].shape[-1] // at["student_logits"].shape[-1]
    small = at["target"][:, ::step, ::step]
    return valid_dkd(at["student_logits"], at["teacher_logits"], small, 255, 1.0, 2.0, 1.0).mean()


def seg_gdkd_large(at: dict[str, Any]) -> Tensor:
    student, teacher = (enlarged(at[name], at["target"], True) for name in ("student_logits", "teacher_logits"))
    return valid_dkd(student, teacher, at["target"], 255, 1.0, 2.0, 1.0).mean()


def cirkd(at: dict[str, Any]) -> Tensor:
    return kd(rows(at["student_logits"]), rows(at["teacher_logits"]), 2.0).mean()


def objective(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """dsct_loss by its parts."""
    parts = (part(student, teacher, target, backend="reference") for part in (matched_cafd_loss, jaccard_loss))
    return F.cross_entropy(enlarged(student, target), target, ignore_index=255) + 3 * sum(parts)


def plain(at: dict[str, Any]) -> Tensor:
    return objective(at["student_logits"], at["teacher_logits"], at["target"])


def hugging_face(at: dict[str, Any]) -> Tensor:
    """Called as the Trainer calls it, with networks that emit the logits at hand."""
    trainer = SimpleNamespace(teacher=lambda **_: SimpleNamespace(logits=at["teacher_logits"]))
    inputs = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": at["target"]}
    network = at["student_logits"]
    at["loss"] = at["Distilling"].compute_loss(trainer, lambda pixel_values: SimpleNamespace(logits=network), inputs)
    assert at["Distilling"].loss_is_scaled_for_ga is False
    return plain(at)


def two_heads(at: dict[str, Any]) -> Tensor:
    student, rest = at["student_logits"], (at["teacher_logits"], at["target"])
    return objective(student, *rest) + 0.4 * objective(student * 0.5, *rest)


def one_logit(at: dict[str, Any]) -> Tensor:
    target, road = at["target"], (at["target"] == 3).float()
    of_one = enlarged(at["student_logits"][:, :1], target)[:, 0]
    ce = F.binary_cross_entropy_with_logits(of_one[target != 255], road[target != 255])
    torch.testing.assert_close(at["losses"].ce, ce)
    return objective(at["two_student"], at["two_teacher"], at["road"])


# By the heading above a snippet and its place below it; every snippet has one.
THEIRS: dict[str, list[Callable[[dict[str, Any]], Tensor]]] = {
    "mdistiller": [mdistiller],
    "mmrazor": [mmrazor_cwd, mmrazor_dkd],
    "seg-gdkd": [seg_gdkd_small, seg_gdkd_large],
    "CIRKD": [cirkd],
    "Hugging Face Trainer": [hugging_face],
    "Lightning": [plain],
    "mmengine and mmsegmentation": [plain],
    "Warm-up and schedules": [plain],
    "Several outputs, or one": [two_heads, one_logit],
}


def test_a_snippet_for_those_who_come_from_elsewhere_is_their_formula():
    page = blocks("docs/coming-from.md")
    assert [heading for heading, _ in page] == [heading for heading, theirs in THEIRS.items() for _ in theirs]
    for (heading, block), theirs in zip(page, itertools.chain(*THEIRS.values())):
        if "kd_loss" in re.findall(r"import (\w+)", block) and not hasattr(dsct_kernels, "kd_loss"):
            continue
        names: dict[str, Any] = {**training_step(torch.int64, 2, torch.float32), "torch": torch}
        exec(compile(block, heading, "exec"), names)
        expected = theirs(names)  # HF's makes the loss
        student = names["student_logits"]
        ours, right = (torch.autograd.grad(loss, student)[0] for loss in (names["loss"], expected))
        torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{heading}: {m}")  # noqa: B023
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6, msg=lambda m: f"{heading}: {m}")  # noqa: B023


def test_the_snippets_of_all_other_pages_run():
    for page in PAGES:
        for heading, block in blocks(page) if page not in ("README.md", "docs/coming-from.md") else ():
            names = {**training_step(torch.int64, 2, torch.float32), "torch": torch}
            exec(compile(block, f"{page}, {heading}", "exec"), names)


def test_every_public_function_and_module_has_an_example():
    lacking = [name for name in dsct_kernels.__all__ if ">>>" not in (getattr(dsct_kernels, name).__doc__ or "")]
    assert lacking == ["DSCTLosses"], lacking  # what dsct_loss returns, whose example shows it


def test_every_example_in_every_docstring_runs():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    ran = 0
    for found in pkgutil.walk_packages([str(PACKAGE)], "dsct_kernels."):
        source = importlib.util.find_spec(found.name).origin  # type: ignore[union-attr]
        if not source.endswith(".py") or ">>>" not in Path(source).read_text():  # type: ignore[union-attr, arg-type]
            continue
        for test in finder.find(importlib.import_module(found.name), found.name):
            ran += len(test.examples)
            test.globs = {"__name__": "__main__"}  # as a user's: an example imports what it needs
            runner.run(test)
    assert ran > 20 and runner.summarize().failed == 0


# --- the files and names that are named ------------------------------------------------------------------------------

SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".sh")
FOLDERS = ("csrc/", "dsct_kernels/", "docs/", "examples/", "tests/", "tools/", "benchmarks/")
NAMES = ("tnkd", "cafd")  # what NAME stands for


def spans(page: str) -> list[str]:
    """What stands between backticks, fenced blocks left out."""
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    )


def matches(pattern: str) -> list[Path]:
    """The files that `pattern` names: from the root where it has a folder, else anywhere."""
    folder, _, rest = pattern.partition("/")
    if folder == "dsct_kernels":  # installed, it may be anywhere
        return list(PACKAGE.glob(rest)) if rest else [PACKAGE]
    if "/" in pattern:
        return list(ROOT.glob(pattern.rstrip("/")))
    return [p for top in (PACKAGE, *(ROOT / f for f in FOLDERS)) for p in top.rglob(pattern)] + list(ROOT.glob(pattern))


def wrong(pattern: str) -> list[str]:
    """For each loss that NAME may stand for, what `pattern` then names without being there."""
    each = [pattern.replace("NAME", name) for name in NAMES] if "NAME" in pattern else [pattern]
    return [name for name in each if not matches(name)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    named = [
        s for s in spans(page) if s.endswith(SUFFIXES) or (s.startswith(FOLDERS) and re.fullmatch(r"[\w./*-]+", s))
    ]
    named = [s for s in named if re.fullmatch(r"[\w./*-]+", s)]
    assert named, f"{page} names no file: is the test looking?"
    assert not [name for pattern in named for name in wrong(pattern)]


@pytest.mark.parametrize(
    "pattern,found",
    [
        ("csrc/NAME/cpu/*.cpp", True),
        ("csrc/NAME/NAME.cpp", False),
        ("dsct_kernels/*/triton.py", True),
        ("dsct_kernels/NAME/fake.py", False),
        ("pixel_math.h", True),
        ("pixel_maths.h", False),
        ("benchmarks/results/", True),
        ("tests/NAME/", True),
    ],
)
def test_that_search_tells_what_is_there_from_what_is_not(pattern, found):
    assert (not wrong(pattern)) == found


def test_what_a_page_says_to_stand_in_a_file_stands_there():
    claims = [
        (page, word, pattern)
        for page in PAGES
        for word, pattern in re.findall(r"`(\w[\w.]*)`\)? in\s+`([\w./*-]+\.\w+)`", (ROOT / page).read_text())
    ]
    assert len(claims) >= 3, claims
    for page, word, pattern in claims:
        texts = [path.read_text() for path in matches(pattern)]
        assert any(re.search(rf"\b{re.escape(word.split('.')[-1])}\b", text) for text in texts), (page, word, pattern)


# --- the site --------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_site_and_it_builds_without_the_net_and_fetches_nothing(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")):
        pytest.skip("the site's tools are not installed: extra [docs]")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in [*(p.stem for p in (ROOT / "docs").glob("*.md")), "documents", "changelog"]:
        html = (tmp_path / f"{page}.html").read_text()
        fetched = re.findall(r'<(?:link|script|img|iframe)\b[^>]*\b(?:href|src)="((?:https?:)?//[^"]*)"', html)
        assert not fetched, f"{page} fetches {fetched}"
        assert "arithmatex" not in html and ":math:" not in html, f"{page}: a formula was left as it is written"
    api = (tmp_path / "api.html").read_text()
    assert "<blockquote>" not in api, "a docstring without the headings Args, Returns, Raises, Example"
    assert not [name for name in dsct_kernels.__all__ if f'id="dsct_kernels.{name}"' not in api]


# --- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize(
    "name,backend",
    [
        *itertools.product(
            [
                "tnkd",
                "cafd",
                "attention_map",
                "attention_map_backward",
                "matched_cafd",
                "matched_cafd_backward",
                "jaccard",
                "jaccard_backward",
            ],
            ["native", "triton"],
        ),
    ],
)
def test_the_page_of_the_ops_lists_the_arguments_and_results_that_they_have(name, backend):
    schema = getattr(torch.ops.dsct_kernels, name if backend == "native" else f"{name}_triton").default._schema
    takes = ", ".join(a.name + ("?" if isinstance(a.type, torch.OptionalType) else "") for a in schema.arguments)
    gives = [r.name for r in schema.returns]
    signature = f"({takes}) -> {gives[0] or 'grad' if len(gives) == 1 else '(' + ', '.join(gives) + ')'}"
    text = (ROOT / "docs/ops.md").read_text()
    assert f"`{name}{signature}`" in text or f"## {name}\n\n`{signature}`" in text, signature
