"""Your own images and masks: a folder with a small YAML, `data.yaml`, that says what is what."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import DataError
from ..images import shape_of
from .dubai import LARGE
from .tile import IGNORE, Colour, Dataset, Key, Pair, Tile, choose, code, folder_of, nothing, opened

if TYPE_CHECKING:
    from ..config import Config

YAML = "data.yaml"
KEYS = ("name", "image", "label", "classes", "ignored", "train", "val", "bands", "group")
MOST_CLASSES = 254  # 254 and 255 mark unknown and ignored pixels


@dataclass(frozen=True)
class Description:
    """What a data.yaml says."""

    name: str
    image: str  # "images/{name}.tif", also with {side} for a folder called train or val
    label: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    key: Key
    sides: dict[str, str] | None  # name of an image to train or val
    bands: tuple[str, ...] | None
    group: str | None  # a regular expression: what it finds in a name is the group


def describe(root: Path) -> Description:
    """Raises DataError for anything in data.yaml that is not as it must be."""
    import yaml

    path = root / YAML

    def wrong(what: str) -> DataError:
        return DataError(f"{path}: {what}")

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror}); docs/data-sets.md shows one") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise wrong(f"is no YAML (a text that starts with {{ needs quotes: {error})") from error
    if not isinstance(content, dict):
        raise wrong(f"expected {', '.join(KEYS[1:4])}, ..., got {content!r}")
    for name in content:
        if name not in KEYS:
            raise wrong(f"unknown entry {name!r}; there are: {', '.join(KEYS)}")
    for name in ("image", "label", "classes"):
        if name not in content:
            raise wrong(f"{name} is missing")
    for name in ("image", "label"):
        text = content[name]
        if not isinstance(text, str) or text.count("{name}") != 1 or text.count("{side}") > 1:
            raise wrong(f"{name}: expected one {{name}} in it, as in images/{{name}}.tif, got {text!r}")
        if ("{side}" in text) != ("{side}" in str(content["image"])):
            raise wrong("{side} must stand in both image and label, or in neither")
    classes, palette, known, in_colours = _classes(content["classes"], wrong)
    for value in _list(content.get("ignored"), "ignored", wrong):
        number = code(_colour(value, "ignored", wrong)) if in_colours else _number(value, "ignored", wrong)
        if number in known:
            raise wrong(f"ignored: {value!r} is also a class")
        known[number] = IGNORE
    bands = _names(content["bands"], "bands", wrong) if "bands" in content else None
    group = content.get("group")
    try:
        re.compile(group or "")
    except (re.error, TypeError) as error:
        raise wrong(f"group: expected a regular expression, got {group!r} ({error})") from error
    return Description(
        str(content.get("name", root.resolve().name)), content["image"], content["label"], classes, palette,
        Key(known, in_colours), _sides(content, root, wrong), bands, group,
    )  # fmt: skip


Wrong = Callable[[str], DataError]


def _classes(entries: Any, wrong: Wrong) -> tuple[tuple[str, ...], tuple[Colour, ...], dict[int, int], bool]:
    """Names, colours, what stands for each class in the files, and whether that is its colour or its number."""
    if not isinstance(entries, list) or not 2 <= len(entries) <= MOST_CLASSES:
        raise wrong(f"classes: expected a list of 2 to {MOST_CLASSES}, got {entries!r}")
    for entry in entries:
        if not isinstance(entry, dict) or not {"name", "colour"} <= set(entry) <= {"name", "colour", "value"}:
            raise wrong(f"classes: expected name, colour and perhaps value, got {entry!r}")
    numbered = [entry for entry in entries if "value" in entry]
    if numbered and len(numbered) < len(entries):
        bare = next(entry for entry in entries if "value" not in entry)
        raise wrong(f"classes: {bare['name']} has no value; give one to every class, or to none if labels are colours")
    names, palette, known = [], [], {}
    for k, entry in enumerate(entries):
        name, colour = str(entry["name"]), _colour(entry["colour"], "classes", wrong)
        value = _number(entry["value"], "classes", wrong) if numbered else code(colour)
        if name in names or value in known:
            raise wrong(f"classes: {name} has the name, colour or value of another class")
        names.append(name)
        palette.append(colour)
        known[value] = k
    return tuple(names), tuple(palette), known, not numbered


def _colour(value: Any, where: str, wrong: Wrong) -> Colour:
    if isinstance(value, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value):
        return value[0], value[1], value[2]
    raise wrong(f'{where}: expected a colour as "#FF8800", with the quotes, or [255, 136, 0], got {value!r}')


def _number(value: Any, where: str, wrong: Wrong) -> int:
    if type(value) is not int or not 0 <= value <= 255:
        raise wrong(f"{where}: expected a number from 0 to 255, got {value!r}")
    return value


def _list(value: Any, where: str, wrong: Wrong) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise wrong(f"{where}: expected a list, got {value!r}")
    return value or []


def _names(value: Any, where: str, wrong: Wrong) -> tuple[str, ...]:
    names = tuple(map(str, _list(value, where, wrong)))
    if not names or len(set(names)) < len(names):
        raise wrong(f"{where}: expected different names, got {value!r}")
    return names


def _sides(content: dict[str, Any], root: Path, wrong: Wrong) -> dict[str, str] | None:
    """Names of images to their side. A text names a file with one name a line."""
    given = [side for side in ("train", "val") if side in content]
    if not given:
        return None
    if "{side}" in content["image"]:
        raise wrong(f"{given[0]}: the split is already said by {{side}} in image")
    sides: dict[str, str] = {}
    for side in given:
        names = content[side]
        if isinstance(names, str):
            try:
                names = (root / names).read_text().split()
            except OSError as error:
                raise wrong(f"{side}: {root / names} cannot be read ({error.strerror})") from error
        for name in _names(names, side, wrong):
            if name in sides:
                raise wrong(f"{side}: {name} stands in both train and val")
            sides[name] = side
    if "val" not in given:
        raise wrong("val is missing: which images validate")
    return sides


def pairs(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "folder", YAML)
    this = describe(root)
    found = _found(root, this.image)
    labels = _found(root, this.label)
    if not found:
        raise nothing(root, f"{this.image}, as {root / YAML} says")
    if this.sides is not None:
        unknown = sorted(set(this.sides) - {name for _, name in found})
        if unknown:
            raise DataError(f"{root / YAML}: train or val names {unknown[0]!r}, but there is no such image")
    first = shape_of(next(iter(found.values())))
    there = this.bands or tuple(map(str, range(1, first.bands + (first.mask != "alpha"))))
    bands = choose(cfg.bands, there, YAML)
    result = []
    for side, name in sorted({*found, *labels}):
        image, label = found.get((side, name)), labels.get((side, name))
        if this.sides is not None:
            if name not in this.sides and "train" in this.sides.values():
                continue  # in neither list
            side = this.sides.get(name, "train")
        pattern = this.image if image is None else this.label
        group = name
        if this.group is not None:
            match = re.search(this.group, name)
            if match is None:
                raise DataError(f"{root / YAML}: group: {this.group!r} finds nothing in the name {name!r}")
            group = match[match.lastindex or 0]
        lacks = root / pattern.format(name=name, side=side)
        if "{side}" in this.image:
            name, group = f"{side}/{name}", f"{side}/{group}"
        result.append(Pair(name, group, image, label, this.key, side, bands, lacks, alpha=this.bands is None))
    return result


def _found(root: Path, pattern: str) -> dict[tuple[str, str], Path]:
    """Files that a pattern with {name}, and perhaps {side}, stands for."""
    found: dict[tuple[str, str], Path] = {}
    for side in ("train", "val") if "{side}" in pattern else ("",):
        here = pattern.replace("{side}", side)
        parts = [re.escape(part).replace(r"\*", "[^/]*") for part in here.split("{name}")]
        expression = re.compile("([^/]+)".join(parts))
        for path in sorted(root.glob(here.replace("{name}", "*"))):
            match = expression.fullmatch(path.relative_to(root).as_posix())
            if match is not None and path.is_file():
                if (side, match[1]) in found:
                    raise DataError(f"{path}: {found[side, match[1]]} has the same name {match[1]!r}; rename one")
                found[side, match[1]] = path
    return found


def tiles(cfg: "Config") -> list[Tile]:
    return opened(pairs(cfg))


def at(cfg: "Config") -> Dataset:
    """The record of one folder."""
    this = describe(folder_of(cfg.root, "folder", YAML))
    return replace(DATASET, classes=this.classes, palette=this.palette)


DATASET = Dataset(
    name="folder",
    classes=(),
    palette=(),
    tiles=tiles,
    pairs=pairs,
    at=at,
    split="train and val of data.yaml, or {side} in its patterns; without either every third group validates",
    ignored="whatever ignored in data.yaml lists; nodata, alpha and masks of the images, as in every set",
    bands=(),
    layout="data.yaml: image and label patterns, classes with colours or numbers",
    defaults=LARGE,
)
