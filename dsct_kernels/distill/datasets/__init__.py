"""Every data set by name. To add one, add a file and a row: docs/add-a-data-set.md."""

from typing import TYPE_CHECKING, Any

from ..files import DataError
from . import dubai, folder, gid, loveda, potsdam, synthetic, vaihingen
from .tile import Dataset, Tile, downscaled

if TYPE_CHECKING:
    from ..config import Config

REGISTRY: dict[str, Dataset] = {
    one.name: one
    for one in (
        synthetic.DATASET,
        dubai.DATASET,
        potsdam.DATASET,
        vaihingen.DATASET,
        gid.DATASET,
        gid.DATASET_15,
        loveda.DATASET,
        folder.DATASET,
    )
}


def dataset_of(cfg: "Config") -> Dataset:
    """The data set of a run, with the classes that its folder says where only that can say them."""
    one = REGISTRY[cfg.data]
    return one if one.at is None else one.at(cfg)


def tiles_of(cfg: "Config") -> list[Tile]:
    return downscaled(REGISTRY[cfg.data].tiles(cfg), cfg.downscale)


def check_choices(cfg: "Config") -> None:
    """ValueError for a choice of bands or labels that the data set does not have."""
    one = REGISTRY[cfg.data]
    for option, value, there in (("--bands", cfg.bands, one.bands), ("--labels", cfg.labels, one.labels)):
        if value is None or (option == "--bands" and one.at is not None):
            continue
        if value not in there:
            has = f"has {', '.join(there)}" if there else "has one kind"
            raise ValueError(f"{option} {value}: {cfg.data} {has}")


def identity(cfg: "Config") -> dict[str, Any]:
    """What the numbers of a run depend on beyond the settings that every data set has. Nothing for the oldest two, so
    that their finished runs are known again."""
    found: dict[str, Any] = {k: v for k, v in (("bands", cfg.bands), ("labels", cfg.labels)) if v is not None}
    if REGISTRY[cfg.data].at is not None and cfg.root is not None:
        root = folder.folder_of(cfg.root, cfg.data, folder.YAML)
        try:
            found.update(root=str(root.resolve()), description=(root / folder.YAML).read_text())
        except OSError as error:
            raise DataError(f"{root / folder.YAML}: cannot be read ({error.strerror})") from error
    return found
