"""report.html of a run."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from . import page, pictures
from .card import Card
from .config import DEFAULTS, Config, Loss, arm_loss
from .datasets import dataset_of
from .files import DataError
from .pictures import WORTH, Attention, Seen, Shown, label

Results = dict[str, dict[str, Any]]


def build(
    folder: Path,
    cfg: Config,
    results: Results,
    seen: Seen | None,
    tiles: list[Shown],
    attention: list[Attention],
    card: Card | None,
    missing: list[str],
) -> bytes:
    classes = seen.classes if seen else _classes(cfg, results)
    other = pictures.taught(list(results))
    body = [f"<h1>{page.text(folder.resolve().name)}</h1>", page.paragraph(_what(cfg))]
    body.append(page.facts(_facts(results, other)))
    body += [page.paragraph(f"Left out: {why}") for why in missing]
    body.append(page.section("Scores on the validation tiles", _scores(results, classes, other)))
    if tiles and seen:
        body.append(page.section("Predictions and errors", *_predictions(seen, tiles, other)))
    body.append(page.section("Confusion", *_confusion(results, classes)))
    figure = pictures.drawn_curves(folder)
    if figure is not None:
        body.append(page.section("Training", page.plot(figure)))
    if attention:
        body.append(page.section("Where the networks look", *_attention(attention)))
    body.append(page.section("Cost", _cost(cfg, results)))
    body.append(page.section("Settings", *_settings(cfg)))
    if card is not None and card.trained_with:
        body.append(page.section("Versions", page.pairs(card.trained_with.items())))
    return page.document(f"{folder.resolve().name}: dsct-distill", body)


def _classes(cfg: Config, results: Results) -> tuple[str, ...]:
    try:
        return dataset_of(cfg).classes
    except DataError:  # an own folder that is no longer there
        return tuple(f"class {k}" for k in range(len(next(iter(results.values()))["iou"])))


def _what(cfg: Config) -> str:
    return (
        f"Data: {cfg.data}. A {cfg.teacher} taught a {cfg.student}; every student had the same first weights and saw "
        f"the same crops of {cfg.crop} x {cfg.crop} for {cfg.student_steps:,} steps."
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _facts(results: Results, other: str | None) -> list[tuple[str, str]]:
    found = [(f"mIoU, {label(phase)}", _number(r["miou"])) for phase, r in results.items()]
    if other:
        gain = _minus(results[other]["miou"], results["alone"]["miou"])
        if gain is not None:
            found.append(("what the teacher was worth", f"{gain:+.3f}"))
        elder = results.get("teacher")
        if elder:
            found.append(("smaller than the teacher", f"{elder['parameters'] / results[other]['parameters']:.0f}x"))
    return found


def _scores(results: Results, classes: tuple[str, ...], other: str | None) -> str:
    """mIoU, accuracy and the IoU of every class, with what the teacher was worth to each."""
    heads = ["", *map(label, results), *(["difference"] if other else [])]
    rows = []
    entries: list[tuple[str, Any]] = [("mean IoU", lambda r: r["miou"]), ("accuracy", lambda r: r["accuracy"])]
    entries += [(f"IoU, {name}", lambda r, k=k: r["iou"][k]) for k, name in enumerate(classes)]
    for name, value in entries:
        scores = {phase: value(r) for phase, r in results.items()}
        students = [v for phase, v in scores.items() if phase != "teacher" and v is not None]
        row = [page.cell(name)]
        for phase, v in scores.items():
            best = len(students) > 1 and max(students) > 0 and phase != "teacher" and v == max(students)
            row.append(page.cell(_number(v), "best" if best else ""))
        if other:
            row.append(page.signed(_minus(scores[other], scores["alone"])))
        rows.append(row)
    caption = "The best student in bold. A class that is nowhere in the labels and never said has no IoU."
    if other:
        caption += f" Difference: {label(other)} against {label('alone')}."
    return page.table(heads, rows, caption)


def _predictions(seen: Seen, tiles: list[Shown], other: str | None) -> Iterator[str]:
    yield page.key(zip(seen.classes, seen.palette, strict=True))
    yield page.paragraph(
        "Errors: where a network is wrong, the colour of what it said; elsewhere the image in pale grey. Pixels "
        "without a label count as neither."
    )
    if other:
        yield page.paragraph(
            f"What the teacher was worth: {label(other)} against {label('alone')}, pixel by pixel. Fixed: only the "
            "taught student is right. Broken: only the student alone was."
        )
        yield page.key([*WORTH.items(), ("no label", pictures.UNLABELLED)])
    for shown in tiles:
        figures = [page.picture(shown.picture, "image", photo=True)]
        figures.append(page.picture(pictures.painted(shown.truth, seen.palette), "label"))
        for phase, said in shown.said.items():
            figures.append(page.picture(pictures.painted(said, seen.palette), label(phase)))
        below = [page.GAP]  # so that a network's errors stand below what it said
        if other:
            picture, counts = pictures.worth(shown, "alone", other)
            total = max(1, sum(counts.values()))
            fixed, broken = counts["fixed"] / total, counts["broken"] / total
            caption = f"what the teacher was worth: {fixed:.1%} fixed, {broken:.1%} broken"
            below.append(page.picture(picture, caption))
        else:
            below.append(page.GAP)
        for phase in shown.said:
            caption = f"errors of {label(phase)}: {pictures.wrong_share(shown, phase):.1%}"
            below.append(page.picture(pictures.errors(shown, phase, seen.palette), caption))
        yield f"<h3>{page.text(shown.name)}</h3>"
        yield page.tiles([*figures, *below], len(figures))


def _confusion(results: Results, classes: tuple[str, ...]) -> Iterator[str]:
    if not any(r.get("confusion") for r in results.values()):
        yield page.paragraph("Not kept by the version that made this run.")
        return
    yield page.paragraph(
        "Rows: labels. Columns: what the network said, in percent of the row; the diagonal is the recall of a class."
    )
    for phase, r in results.items():
        if not r.get("confusion") or r["miou"] is None:
            continue
        matrix = np.array(r["confusion"], float)
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        rows = [
            [
                page.cell(name),
                *(page.heat(float(v), f"{100 * v:.1f}") for v in share[k]),
                page.cell(f"{int(matrix[k].sum()):,}"),
            ]
            for k, name in enumerate(classes)
        ]
        yield f"<h3>{page.text(label(phase))}</h3>"
        yield page.table(["label", *classes, "pixels"], rows)


def _attention(found: list[Attention]) -> Iterator[str]:
    import matplotlib

    yield page.paragraph(
        "The attention maps that the losses compare, each stretched to its own range. Nats: how far a map is from "
        "looking everywhere alike; one of 0 has nothing to teach."
    )
    colours = matplotlib.colormaps["magma"]
    grid: list[str] = []
    for one in found:
        figures = [page.picture(one.picture, f"image, {one.of}", photo=True)]
        for phase, values in one.maps.items():
            span = float(values.max() - values.min()) or 1.0
            shown = (255 * colours((values - values.min()) / span)[..., :3]).round().astype(np.uint8)
            figures.append(page.picture(shown, f"{label(phase)}: {one.nats(phase):.2g} nats"))
        grid += figures
    yield page.tiles(grid, 1 + len(found[0].maps))


def _cost(cfg: Config, results: Results) -> str:
    rows = [
        [
            page.cell(label(phase)), page.cell(f"{r['parameters']:,}"), page.cell(f"{r['gflops']:.2f}"),
            page.cell(f"{r['images_per_s']:.0f}"), page.cell(f"{r['train_seconds']:,.0f}"),
        ]
        for phase, r in results.items()
    ]  # fmt: skip
    caption = f"GFLOPs and images/s: forward, {cfg.crop} x {cfg.crop}, batches of {cfg.batch}, where it was trained"
    return page.table(("", "parameters", "GFLOPs", "images/s", "training, s"), rows, caption)


def _settings(cfg: Config) -> Iterator[str]:
    """Those that were chosen first, then all."""
    usual = asdict(Config(**DEFAULTS[cfg.data]))
    mine = asdict(cfg)
    names = [f.name for f in fields(Config) if f.name != "loss"]
    chosen = [(name, _shown(mine[name])) for name in names if mine[name] != usual[name]]
    chosen += [(name, _shown(v)) for name, v in mine["loss"].items() if v != usual["loss"][name]]
    yield page.paragraph(
        "Different from the defaults of the data set:" if chosen else "All are the defaults of the data set."
    )
    if chosen:
        yield page.pairs(chosen)
    arms = {arm: asdict(arm_loss(arm, cfg.loss)) for arm in cfg.arms}
    rows = [[page.cell(f.name), *(page.cell(_shown(loss[f.name])) for loss in arms.values())] for f in fields(Loss)]
    yield "<details><summary>The loss of every student</summary>"
    yield page.table(("", *map(label, arms)), rows)
    yield "</details><details><summary>All settings</summary>"
    yield page.pairs((name, _shown(mine[name])) for name in names)
    yield "</details>"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)
