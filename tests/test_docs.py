"""What the documents say, held against the code: snippets run, files that are named exist, ops take what is listed."""

import doctest
import importlib
import itertools
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import dsct_kernels
from dsct_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dsct_kernels.__file__).parent
PAGES = sorted(["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{i}")
    for page in PAGES
    for i, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    )
]
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
FOLDERS = ("csrc/", "dsct_kernels/", "docs/", "tests/", "tools/", "benchmarks/")
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


# --- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize(
    "name,backend",
    [
        *itertools.product(["tnkd", "cafd", "attention_map", "attention_map_backward"], ["native", "triton"]),
        ("matched_cafd", "native"),
        ("matched_cafd_backward", "native"),
    ],
)
def test_the_page_of_the_ops_lists_the_arguments_and_results_that_they_have(name, backend):
    schema = getattr(torch.ops.dsct_kernels, name if backend == "native" else f"{name}_triton").default._schema
    takes = ", ".join(a.name + ("?" if isinstance(a.type, torch.OptionalType) else "") for a in schema.arguments)
    gives = [r.name for r in schema.returns]
    signature = f"({takes}) -> {gives[0] or 'grad' if len(gives) == 1 else '(' + ', '.join(gives) + ')'}"
    text = (ROOT / "docs/ops.md").read_text()
    assert f"`{name}{signature}`" in text or f"## {name}\n\n`{signature}`" in text, signature
