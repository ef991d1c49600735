"""What a run folder is written and read with: whole files or none, strict JSON, one writer at a time."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DataError(Exception):
    """Something is wrong with the input; the message names the file."""


def replace_file(path: Path, content: bytes) -> None:
    """Written beside and renamed, so a kill never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    replace_file(path, (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; the NaN that earlier versions wrote is None."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:  # torn, empty, not UTF-8, nested without end
        raise DataError(f"{path}: damaged, expected JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged, expected a JSON object, got {type(content).__name__}")
    return content


def read_metrics(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and rows of metrics.jsonl. A last line that a kill tore is left out; any other damage is an error."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().splitlines(True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            whole = isinstance(row, dict) and isinstance(row.get("phase"), str) and type(row.get("step")) is int
        except ValueError:
            whole = False
        if whole and line.endswith(b"\n"):
            rows.append((line, row))
        elif number < len(lines):
            raise DataError(f"{path}: line {number} is damaged, expected a JSON object with phase and step")
    return rows


# Locks of this process. A forked child (a worker that decodes tiles) must not keep one alive after its parent's death.
_held: set[int] = set()


def _drop_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be) against other processes; a second writer gets a DataError.

    The operating system drops the lock when the process ends, however it ends, so a killed run leaves nothing to clean
    up: the file `.lock` stays, and says nothing. Of several processes of one run the first holds it for all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror})") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder}: another process is writing this run; wait until it ends or stop it") from error
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)
