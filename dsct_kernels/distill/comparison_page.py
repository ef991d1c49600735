"""report.html of `dsct-distill compare`: what every method gained, on which seeds, and what it cost."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from . import card, page
from .compare import read_rows
from .datasets import REGISTRY
from .files import DataError
from .methods import method
from .table import Difference, Rows, chart, paired


def build(folder: Path) -> bytes:
    rows = read_rows(folder / "runs.jsonl")
    if not rows:
        raise DataError(f"{folder / 'runs.jsonl'}: no run is finished, so there is nothing to report")
    body = [f"<h1>{page.text(folder.resolve().name)}</h1>"]
    body.append(
        page.paragraph(
            "Every method trained the same student from the same weights on the same crops for the same number of "
            "steps. Differences are paired: same fold, same seed. They are given with their standard error; clear "
            "means three pairs or more, and beyond twice the error."
        )
    )
    for some in _compared(rows):
        body += _group(some)
    body.append(
        page.section(
            "Versions", page.paragraph("Of the process that wrote this page."), page.pairs(card.versions().items())
        )
    )
    return page.document(f"{folder.resolve().name}: dsct-distill compare", body)


OF_METHOD = ("parts", "balance", "strides", "unlabelled")  # settings


def _compared(rows: Rows) -> Iterator[Rows]:
    """Runs that differ in nothing but the method, the fold and the seed; those without a teacher stand beside those of
    each."""
    students: dict[str, dict[str, Rows]] = {}
    for row in rows:
        free = (*OF_METHOD, "seed", "val_tiles")
        kept = {k: v for k, v in row["settings"].items() if k not in free and not k.startswith("teacher")}
        teacher = {k: v for k, v in row["settings"].items() if k.startswith("teacher")}
        student = json.dumps({**kept, "student": row["student"], "steps": row["steps"]}, sort_keys=True)
        students.setdefault(student, {}).setdefault(json.dumps(teacher, sort_keys=True), []).append(row)
    for by_teacher in students.values():
        alone = by_teacher.pop(json.dumps({}), [])
        yield from ([*alone, *taught] for taught in by_teacher.values() or [[]])


def _group(rows: Rows) -> Iterator[str]:
    data, student, steps = rows[0]["settings"]["data"], rows[0]["student"], rows[0]["steps"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    against = "alone" if "alone" in names else names[0]
    classes = REGISTRY[data].classes if data in REGISTRY else ()
    count = len(rows[0]["iou"])
    classes = classes if len(classes) == count else tuple(f"class {k}" for k in range(count))
    teacher = rows[-1]["settings"].get("teacher")  # those without one come first
    labelled = rows[0]["settings"].get("labelled", 1)
    known = f", {labelled:.0%} of the labels" if labelled < 1 else ""
    by = f", taught by {teacher}" if teacher else ""
    yield f"<h2>{page.text(f'{student}, {steps:,} steps, {data}{known}{by}')}</h2>"
    best = max(names, key=lambda n: statistics.fmean(r["miou"] for r in rows if r["method"] == n))
    gain = paired(rows, best, against, lambda r: r["miou"])
    facts = [("teacher", teacher or "none"), ("runs", str(len(rows))), ("best on average", best)]
    yield page.facts([*facts, (f"against {against}", _gain(gain))] if best != against else facts)
    yield _methods(rows, names, against)
    figure = chart(rows, names, against)
    if figure is not None:
        yield page.plot(figure)
    yield f"<h3>{page.text(f'IoU of every class, against {against}')}</h3>"
    yield _per_class(rows, names, against, classes)
    yield "<details><summary>Every run</summary>"
    yield page.table(
        ("method", "fold", "seed", "mIoU", "accuracy", "ms / step", "MiB kept"),
        (
            [
                page.cell(r["method"]), page.cell(r["fold"]), page.cell(r["seed"]), page.cell(f"{r['miou']:.4f}"),
                page.cell(f"{r['accuracy']:.4f}"), *(page.cell(r.get(k, "-")) for k in ("ms_per_step", "kept_mb")),
            ]
            for r in sorted(rows, key=lambda r: (names.index(r["method"]), r["fold"], r["seed"]))
        ),
    )  # fmt: skip
    yield "</details><details><summary>Settings</summary>"
    yield page.pairs(_settings(rows))
    yield "</details>"


def _gain(found: Difference) -> str:
    if not found.pairs:
        return "-"
    return f"{found.mean:+.3f}" + (f" ± {found.error:.3f}" if len(found.pairs) > 1 else "")


def _methods(rows: Rows, names: list[str], against: str) -> str:
    lines = []
    for name in names:
        mine = [r for r in rows if r["method"] == name]
        difference = paired(rows, name, against, lambda r: r["miou"])
        cost = [[r[key] for r in mine if r.get(key) is not None] for key in ("ms_per_step", "kept_mb")]
        sign = "up" if difference.pairs and difference.mean > 0 else "down"
        lines.append([
            page.cell(name), page.cell(len(mine)), page.cell(f"{statistics.fmean(r['miou'] for r in mine):.4f}"),
            page.cell("-") if name == against else page.cell(_gain(difference), sign if difference.clear else ""),
            page.cell("-" if name == against else "yes" if difference.clear else "no"),
            *(page.cell(f"{statistics.median(v):.0f}" if v else "-") for v in cost),
            page.cell("" if not _teaches(name) else "yes"),
        ])  # fmt: skip
    heads = (
        "cross-entropy and",
        "runs",
        "mean mIoU",
        f"against {against}",
        "clear",
        "ms / step",
        "MiB kept",
        "teacher",
    )
    return page.table(
        heads, lines, "ms and MiB: medians; what the teacher says is computed once and kept, and is not in them"
    )


def _teaches(name: str) -> bool:
    try:
        return method(name).teacher
    except ValueError:  # a method of another version
        return True


def _per_class(rows: Rows, names: list[str], against: str, classes: tuple[str, ...]) -> str:
    lines = []
    for name in names:
        if name != against:
            found = [paired(rows, name, against, lambda r, k=k: r["iou"][k]) for k in range(len(classes))]  # type: ignore[misc]
            lines.append([page.cell(name), *(page.signed(d.mean if d.pairs else None) for d in found)])
    base = [r for r in rows if r["method"] == against]
    means = [[r["iou"][k] for r in base if r["iou"][k] is not None] for k in range(len(classes))]
    first = [page.cell(f"{against}, itself"), *(page.cell(f"{statistics.fmean(v):.3f}" if v else "-") for v in means)]
    return page.table(("", *classes), [first, *lines])


def _settings(rows: Rows) -> Iterator[tuple[object, object]]:
    """Those of every run; where they differ, each value that there is."""
    names = dict.fromkeys(key for row in rows for key in row["settings"] if key not in (*OF_METHOD, "seed"))
    for name in names:
        values = dict.fromkeys(str(row["settings"][name]) for row in rows if name in row["settings"])
        yield name, "; ".join(values)
