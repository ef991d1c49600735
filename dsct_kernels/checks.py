"""Argument checks: every error names the argument, what was expected and what came."""

import os
from typing import Literal

import torch
from torch import Tensor

from .values import DEFAULT_IGNORE_INDEX, Number, readable, weight

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
Reduction = Literal["none", "mean", "sum"]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {str(x.dtype).removeprefix('torch.')}")
    if type(x) is not Tensor and type(x).__name__ == "DTensor" and not torch.compiler.is_compiling():
        raise TypeError(
            f"{name}: DTensor is not supported, since the mean of shards is not the mean over the valid pixels of "
            "all; expected a Tensor: pass .to_local() of logits sharded along the batch with reduction='sum', and "
            "divide by the number of valid pixels summed over the shards"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {str(x.layout).removeprefix('torch.')}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def reduction(value: object) -> int:
    """0, 1 or 2 for "none", "mean" or "sum", as the ops take it."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {value!r}")
    return REDUCTIONS[value]


def num_items(value: object, reduction: str) -> Number | None:
    """What a mean is divided by in place of the number of valid pixels, or None."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_items: expected None, since only reduction='mean' divides, got reduction={reduction!r}")
    return weight("num_items", value)


def ignore_index_is_no_class(value: object, classes: int, target: Tensor | None) -> None:
    """With more than 255 classes the default, 255, is one of them: nobody asked for it to be left out."""
    if value is DEFAULT_IGNORE_INDEX and target is not None and classes > 255:
        raise ValueError(
            f"ignore_index: with {classes} classes the default, 255, is a class; expected it to be given: a label to "
            "ignore (255 is obeyed), or None to ignore nothing"
        )


def logit_pair(student_logits: Tensor, teacher_logits: Tensor, classes: int = 2) -> None:
    """Checks all of two logit maps but that their spatial sizes go together."""
    tensor("student_logits", student_logits, FLOATS)
    tensor("teacher_logits", teacher_logits, FLOATS)
    s, t = student_logits.shape, teacher_logits.shape
    if len(s) < 2:
        raise ValueError(f"student_logits: expected shape (N, K) or (N, K, *spatial), got {tuple(s)}")
    if len(t) != len(s) or t[0] != s[0] or t[1] != s[1]:
        raise ValueError(
            f"teacher_logits: expected the batch, classes and number of dimensions of student_logits {tuple(s)}, "
            f"got {tuple(t)}"
        )
    if s[1] < classes:
        raise ValueError(f"student_logits: expected at least {classes} classes in dimension 1, got shape {tuple(s)}")
    same_device("teacher_logits", teacher_logits, "student_logits", student_logits)


def label_map(target: Tensor, student_logits: Tensor) -> None:
    """Checks all of a label map but its spatial size."""
    s = student_logits.shape
    tensor("target", target, LABELS)
    if target.dim() != len(s) - 1 or target.shape[0] != s[0]:
        expected = ", ".join([str(s[0]), *["any"] * (len(s) - 2)]) + ("," if len(s) == 2 else "")
        raise ValueError(
            f"target: expected shape ({expected}) to go with student_logits {tuple(s)}, got {tuple(target.shape)}"
        )
    same_device("target", target, "student_logits", student_logits)


def label_size(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> list[int]:
    """The resolution of a TNKD call: the labels', or, without them, the larger of the two networks'."""
    if target is not None:
        return list(target.shape[1:])
    # Dynamo turns max into sym_max where sizes are symbols; of ints torch 2.10 cannot trace sym_max itself.
    larger = max if torch.compiler.is_dynamo_compiling() else torch.sym_max
    return [larger(a, b) for a, b in zip(student_logits.shape[2:], teacher_logits.shape[2:])]


def logits(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> None:
    """Checks the three tensors of a TNKD call."""
    logit_pair(student_logits, teacher_logits)
    s, t = student_logits.shape, teacher_logits.shape
    if target is not None:
        label_map(target, student_logits)
    size = label_size(student_logits, teacher_logits, target)
    for name, shape in (("student_logits", s), ("teacher_logits", t)):
        for have, want in zip(shape[2:], size):
            if have == want:
                continue
            got = f"got {tuple(shape)}"
            if have > want:
                raise ValueError(f"{name}: expected at most the size of target, {tuple(size)}, {got}")
            where = f"{tuple(size)} of {'target' if target is not None else 'the larger network'}"
            if len(shape) != 4:
                raise ValueError(f"{name}: expected the size {where}, since only (N, K, H, W) is upsampled, {got}")
            if have == 0:
                raise ValueError(f"{name}: expected at least one row and one column to upsample to {where}, {got}")


def overlaid(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, classes: int = 2) -> list[int]:
    """Checks the three tensors of a loss at the logits' own resolution and returns it: the smaller of the two."""
    logit_pair(student_logits, teacher_logits, classes)
    s, t = student_logits.shape, teacher_logits.shape
    size = [min(a, b) for a, b in zip(s[2:], t[2:])]
    if s[2:] != t[2:] and (len(s) != 4 or 0 in size):
        why = "an empty map has no average" if len(s) == 4 else "(N, K, H, W) logits alone may differ in size"
        raise ValueError(f"teacher_logits: expected the size of student_logits, {tuple(s)}, got {tuple(t)}; {why}")
    if target is None:
        return size
    label_map(target, student_logits)
    labels = list(target.shape[1:])
    if labels != size and (len(s) != 4 or 0 in size or any(have < want for have, want in zip(labels, size))):
        wanted = f"({', '.join(map(str, (s[0], *size)))}{',' if not size else ''})"
        larger = " or larger, to go with (N, K, H, W) logits" if len(s) == 4 else ""
        raise ValueError(f"target: expected shape {wanted}{larger}, got {tuple(target.shape)}")
    return size


def labels(target: Tensor, classes: int, ignored: int | Tensor | None) -> None:
    """Raises for the first label outside [0, classes) that is not ignored. Reads the labels: waits for a GPU."""
    target = target.long()  # an int8 tensor compared with the number 255 would find it equal to -1
    bad = (target < 0) | (target >= classes)
    if ignored is not None:
        bad &= target != ignored
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"target: label {target[tuple(position)].item()} at position ({', '.join(map(str, position))}) is outside "
            f"[0, {classes}) and is not ignore_index={ignored}"
        )


def label_checks_asked_for() -> bool:
    return os.environ.get("DSCT_KERNELS_CHECK", "0") not in ("", "0")


def class_weights(value: Tensor | None, student_logits: Tensor) -> None:
    """The student's logits are checked already. Looks at the numbers on CPU, where that costs no wait."""
    if value is None:
        return
    tensor("class_weight", value, FLOATS)
    if value.dim() != 1 or value.shape[0] != student_logits.shape[1]:
        raise ValueError(f"class_weight: expected shape ({student_logits.shape[1]},), got {tuple(value.shape)}")
    same_device("class_weight", value, "student_logits", student_logits)
    no_negative_class_weight(value)


def no_negative_class_weight(value: Tensor) -> None:
    if not readable(value):
        return
    negative = value < 0
    if negative.any():
        k = int(negative.nonzero()[0])
        raise ValueError(f"class_weight: expected numbers >= 0, got {value[k].item()} for class {k}")


def features(name: str, x: Tensor) -> None:
    tensor(name, x, FLOATS)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected shape (N, C, H, W), got {tuple(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: expected at least one channel and one position, got {tuple(x.shape)}")
