"""The trainer needs the extra `[train]`; without it these tests skip and say so."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

for name in ("transformers", "accelerate", "torchmetrics", "rasterio", "rich", "matplotlib", "tensorboard", "yaml"):
    pytest.importorskip(name, reason=f"the trainer's extra [train] is not installed: no {name}")


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def throughput_is_measured_once() -> Iterator[None]:
    """One batch says images/s, where a run takes half a second for each of its networks."""
    from dsct_kernels.distill import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "images_per_second", partial(evaluate.images_per_second, seconds=0))
        yield


@pytest.fixture(scope="session")
def dubai_root() -> Path:
    """The real tiles: DSCT_DATA, or ../shared/data/dubai beside the repository."""
    root = Path(os.environ.get("DSCT_DATA", Path(__file__).parents[3] / "shared" / "data" / "dubai"))
    if not root.is_dir():
        pytest.skip(f"no real tiles at {root} (set DSCT_DATA to the folder that holds 'Tile 1', 'Tile 2', ...)")
    return root
