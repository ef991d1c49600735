"""The trainer needs the extra `[train]`; without it these tests skip and say so."""

import os
from pathlib import Path

import pytest
import torch

for name in ("transformers", "accelerate", "torchmetrics", "rasterio", "rich", "matplotlib", "tensorboard", "yaml"):
    pytest.importorskip(name, reason=f"the trainer's extra [train] is not installed: no {name}")


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dubai_root() -> Path:
    """The real tiles: DSCT_DATA, or ../shared/data/dubai beside the repository."""
    root = Path(os.environ.get("DSCT_DATA", Path(__file__).parents[3] / "shared" / "data" / "dubai"))
    if not root.is_dir():
        pytest.skip(f"no real tiles at {root} (set DSCT_DATA to the folder that holds 'Tile 1', 'Tile 2', ...)")
    return root
