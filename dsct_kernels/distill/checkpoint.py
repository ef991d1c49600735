"""What a run goes on from. checkpoint.pt: all that the next step of a phase depends on, as tensors and plain values, no
code, with older ones beside it as checkpoint-STEP.pt; results.json: the phases that are done."""

import io
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import DataError, read_json, replace_file

KINDS: dict[str, tuple[type, ...]] = {
    "phase": (str,),
    "step": (int,),
    "model": (dict,),
    "optimizer": (dict,),
    "scaler": (dict, type(None)),
    "average": (dict, type(None)),
    "best": (float, type(None)),
    "sums": (torch.Tensor,),
    "rng": (list,),
    "metrics_bytes": (int,),
}


def write(path: Path, state: dict[str, Any], before: int, keep: int) -> None:
    """`before` is the step of the checkpoint that is there, if any; of this phase the last `keep` stay."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    older = path.with_name(f"{path.stem}-{before}{path.suffix}")
    if keep > 1 and path.is_file() and not older.exists():
        os.link(path, older)  # another name for what is there, which the next line takes this one from
    replace_file(path, buffer.getvalue())
    for one in olds(path)[: -(keep - 1) or None]:
        one.unlink(missing_ok=True)


def olds(path: Path) -> list[Path]:
    """Checkpoints older than `path`, oldest first."""
    found = [(p.stem[len(path.stem) + 1 :], p) for p in path.parent.glob(f"{path.stem}-*{path.suffix}")]
    return [p for _, p in sorted((int(step), p) for step, p in found if step.isdecimal())]


def remove(path: Path) -> None:
    for one in (path, *olds(path), path.with_name(path.name + ".tmp")):
        one.unlink(missing_ok=True)


def read(path: Path, phases: Mapping[str, int], processes: int) -> dict[str, Any] | None:
    """None where there is none; `phases` are those of the run, with their steps. `weights_only` refuses every pickle
    that would call something."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, struct and torch each raise kinds of their own
        lines = str(error).splitlines() or [type(error).__name__]
        instead = f"put {olds(path)[-1].name} in its place" if olds(path) else "delete it to start the phase again"
        raise DataError(f"{path}: damaged or no checkpoint of this trainer; {instead} ({lines[0][:200]})") from error
    if isinstance(state, dict) and isinstance(state.get("rng"), dict):  # as one process wrote it before there were more
        state = {**state, "rng": [state["rng"]], "average": None, "best": None}
    if not isinstance(state, dict) or set(state) != set(KINDS):
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise DataError(f"{path}: no checkpoint of this trainer, expected {', '.join(KINDS)}, got {found}")
    for key, kinds in KINDS.items():
        if not isinstance(state[key], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{path}: {key}: expected {expected}, got {type(state[key]).__name__}")
    phase, step, logged = state["phase"], state["step"], state["metrics_bytes"]
    if phase not in phases:
        raise DataError(f"{path}: phase {phase!r} is not of this run: {', '.join(phases)}")
    if not 0 <= step <= phases[phase] or logged < 0:
        raise DataError(f"{path}: step {step} of {phases[phase]}, {logged} bytes logged")
    if len(state["rng"]) != processes:
        count = len(state["rng"])
        raise DataError(f"{path}: written by {count} processes, this run has {processes}; go on with as many")
    return state


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Around what a checkpoint is loaded into: of the many kinds of error that torch and numpy have, one."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path}: does not fit this run ({error})") from error


RESULT: dict[str, tuple[type, ...]] = {
    "miou": (float, int, type(None)),
    "iou": (list,),
    "accuracy": (float, int, type(None)),
    "parameters": (int,),
    "gflops": (float, int),
    "images_per_s": (float, int),
    "train_seconds": (float, int),
}
COST: dict[str, tuple[type, ...]] = {"teacher_ms": (float, int), "teacher_share": (float, int)}  # of a student taught


def read_results(path: Path, phases: Sequence[str], classes: int) -> dict[str, dict[str, Any]]:
    """Results by phase; none where there is no file."""
    if not path.is_file():
        return {}
    results = read_json(path)
    for phase, result in results.items():
        if phase not in phases:
            raise DataError(f"{path}: {phase!r} is no phase of this run, which has {', '.join(phases)}")
        cost = COST if isinstance(result, dict) and COST.keys() & result.keys() else {}
        for key, kinds in {**RESULT, **cost}.items():
            if not isinstance(result, dict) or key not in result:
                raise DataError(f"{path}: {phase}: {key} is missing")
            if not isinstance(result[key], kinds) or isinstance(result[key], bool):
                raise DataError(f"{path}: {phase}: {key}: got {result[key]!r}, expected {kinds[0].__name__}")
        scores = [v for v in result["iou"] if v is not None]
        if len(result["iou"]) != classes or not all(type(v) in (int, float) for v in scores):
            raise DataError(f"{path}: {phase}: iou: got {result['iou']!r}, expected a number or null per class")
    return results


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
