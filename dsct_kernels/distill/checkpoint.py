"""checkpoint.pt: everything that the next step of a phase depends on, as tensors and plain values that cannot run code."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import DataError, replace_file

KINDS: dict[str, tuple[type, ...]] = {
    "phase": (str,),
    "step": (int,),
    "model": (dict,),
    "optimizer": (dict,),
    "scaler": (dict, type(None)),
    "sums": (torch.Tensor,),
    "rng": (dict,),
    "metrics_bytes": (int,),
}


def write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any] | None:
    """None where there is none. `weights_only` refuses every pickle that would call something."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, struct and torch each raise kinds of their own
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{path}: damaged or no checkpoint of this trainer; delete it to start the phase again "
                        f"({lines[0][:200]})") from error  # fmt: skip
    if not isinstance(state, dict) or set(state) != set(KINDS):
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise DataError(f"{path}: no checkpoint of this trainer, expected {', '.join(KINDS)}, got {found}")
    for key, kinds in KINDS.items():
        if not isinstance(state[key], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{path}: {key}: expected {expected}, got {type(state[key]).__name__}")
    return state


def rng_state() -> dict[str, Any]:
    """Of all the generators that a model may draw from (dropout, stochastic depth)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    numpy = (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest)  # uint32 needs int64
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
