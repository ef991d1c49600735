"""The methods of a comparison: cross-entropy, and terms that learn from the teacher or the labels beside it."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsct_kernels import cafd_loss, dsct_loss, jaccard_loss, matched_cafd_loss, tnkd_loss

from . import candidates, data, models, rivals


@dataclass
class Batch:
    """What the two networks said of one batch of crops, and what is known about it."""

    student: models.Output
    teacher: models.Output
    target: torch.Tensor  # (N, H, W) uint8, 255 is ignored
    frequency: torch.Tensor  # (K,) share of each class in the labelled pixels of the training tiles


def _logits(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.logits, b.teacher.logits, **settings)


def _labelled(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.logits, b.teacher.logits, b.target, **settings)


def _features(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.features, b.teacher.features, **settings)


def _condensed(b: Batch, *, temperature: float = 4.0) -> torch.Tensor:
    pair = rivals.same_size(b.student.logits, b.teacher.logits)
    return temperature**2 * cafd_loss(*pair, spatial_temperature=temperature)


def _shipped(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(
        b.student.logits, b.teacher.logits, b.target, ignore_index=data.IGNORE, **settings
    )


def _dsct(*logits_and_target: torch.Tensor, **settings: Any) -> torch.Tensor:
    return dsct_loss(*logits_and_target, ce_weight=0.0, **settings).total


@dataclass(frozen=True)
class Term:
    """One loss that a method may add to the cross-entropy."""

    call: Callable[..., torch.Tensor]
    reads: Callable[..., Any]  # whose keyword arguments are the settings of the term
    weight: float = 1.0
    features: bool = False
    teacher: bool = True


TERMS: dict[str, Term] = {
    "kd": Term(_labelled(rivals.kd), rivals.kd),
    "dkd": Term(_labelled(rivals.dkd), rivals.dkd),
    "cwd": Term(_logits(rivals.cwd), rivals.cwd, weight=3.0),
    "cwd_features": Term(lambda b, **s: b, rivals.cwd, features=True),  # owns a convolution: see Objective
    "at": Term(_features(rivals.at), rivals.at, weight=500.0, features=True),
    "uniform": Term(
        lambda b, **s: rivals.uniform(b.student.features, **s), rivals.uniform, features=True, teacher=False
    ),
    "tnkd": Term(_shipped(tnkd_loss), tnkd_loss),
    "cafd": Term(_features(cafd_loss), cafd_loss, features=True),
    "dsct": Term(_shipped(_dsct), dsct_loss),
    "condensed": Term(_condensed, _condensed, weight=3.0),
    "matched": Term(_shipped(matched_cafd_loss), matched_cafd_loss, weight=3.0),
    "over_positions": Term(_labelled(candidates.over_positions), candidates.over_positions, weight=3.0),
    "rows": Term(_logits(candidates.rows_kl), candidates.rows_kl, weight=3.0),
    "centred": Term(_logits(candidates.centred), candidates.centred, weight=3.0),
    "local": Term(_logits(candidates.local), candidates.local, weight=3.0),
    "jaccard": Term(_shipped(jaccard_loss), jaccard_loss, weight=3.0),
    "jaccard_labels": Term(
        lambda b, **s: rivals.jaccard_labels(b.student.logits, b.target, **s),
        rivals.jaccard_labels,
        weight=3.0,
        teacher=False,
    ),
    "regress": Term(
        lambda b, **s: candidates.regress(b.student.logits, b.teacher.logits, b.target, b.frequency, **s),
        candidates.regress,
        weight=3.0,
    ),
    "aligned": Term(_labelled(candidates.aligned), candidates.aligned, weight=3.0),
    "affinity": Term(_features(candidates.affinity), candidates.affinity, features=True),
    "balanced_kd": Term(
        lambda b, **s: candidates.balanced_kd(b.student.logits, b.teacher.logits, b.target, b.frequency, **s),
        candidates.balanced_kd,
    ),
}


@dataclass(frozen=True)
class Part:
    term: str
    weight: float
    anneal: str  # "no", "cosine" (to 0 at the last step), "linear"
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Method:
    """`alone`, or terms joined by +, each with its settings: `balanced+cwd:temperature=4:weight=3`."""

    text: str
    parts: tuple[Part, ...]
    balance: float  # cross-entropy weighs a class 1 / frequency^balance
    unlabelled: float = 0.0  # weight of the same objective on as many crops again that only the teacher labels

    @property
    def features(self) -> bool:
        return any(TERMS[part.term].features for part in self.parts)

    @property
    def teacher(self) -> bool:
        return any(TERMS[part.term].teacher for part in self.parts)


NOT_SETTINGS = ("ignore_index", "num_items", "backend", "reduction", "align_corners", "ce_weight", "class_weight",
                "cafd_weight", "spatial_temperature")  # fmt: skip


def method_settings(name: str) -> dict[str, Any]:
    """What may be set in a method's part, with the defaults."""
    if name == "alone":
        return {}
    if name == "balanced":
        return {"power": 0.5}
    if name == "unlabelled":
        return {"weight": 1.0}
    keywords = inspect.signature(TERMS[name].reads).parameters.values()
    known = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    known = {k: v for k, v in known.items() if k not in NOT_SETTINGS}
    return {"weight": TERMS[name].weight, "anneal": "no", **known}


def method(text: str) -> Method:
    parts: list[Part] = []
    balance = unlabelled = 0.0
    for piece in text.split("+"):
        name, *changes = piece.split(":")
        pairs = dict(change.partition("=")[::2] for change in changes)
        if name not in ("alone", "balanced", "unlabelled", *TERMS):
            names = ", ".join(("alone", "balanced", "unlabelled", *TERMS))
            raise ValueError(f"method {text!r}: {name!r} is none of {names}")
        known = method_settings(name)
        for key, value in pairs.items():
            if key not in known:
                raise ValueError(
                    f"method {text!r}: {name} has no setting {key!r}; it has: {', '.join(known) or 'none'}"
                )
            try:
                known[key] = value if isinstance(known[key], str) else float(value)
            except ValueError as error:
                raise ValueError(f"method {text!r}: {key} of {name} must be a number, got {value!r}") from error
            if not isinstance(known[key], str) and not 0 <= known[key] < math.inf:
                raise ValueError(f"method {text!r}: {key} of {name} must be finite and not negative, got {value!r}")
        if name == "balanced":
            balance = known["power"]
        elif name == "unlabelled":
            unlabelled = known["weight"]
        elif name != "alone":
            weight, anneal = known.pop("weight"), known.pop("anneal")
            if anneal not in ANNEAL:
                raise ValueError(f"method {text!r}: anneal must be one of {', '.join(ANNEAL)}, got {anneal!r}")
            parts.append(Part(name, weight, anneal, tuple(sorted(known.items()))))
    if unlabelled and not any(TERMS[part.term].teacher for part in parts):
        raise ValueError(f"method {text!r}: unlabelled needs a term that learns from the teacher, as unlabelled+dsct")
    return Method(text, tuple(parts), balance, unlabelled)


ANNEAL: dict[str, Callable[[float], float]] = {
    "no": lambda _done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "late": lambda done: min(1.0, 2 * done),
}


class Objective(nn.Module):
    """Cross-entropy and the terms of a method. A term that learns something (cwd_features) keeps it here."""

    def __init__(self, method: Method, frequency: torch.Tensor, student: models.Output, teacher: models.Output | None):
        super().__init__()
        self.method = method
        self.frequency: torch.Tensor
        self.class_weight: torch.Tensor | None
        self.register_buffer("frequency", frequency)
        weight = frequency.clamp(min=1e-6).pow(-method.balance)
        self.register_buffer("class_weight", weight / weight.mean() if method.balance else None)
        self.project = nn.ModuleList()
        if teacher is not None and any(part.term == "cwd_features" for part in method.parts):
            pairs = zip(student.features, teacher.features, strict=True)
            self.project.extend(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False) for s, t in pairs)

    def forward(
        self, student: models.Output, teacher: models.Output | None, target: torch.Tensor, done: float
    ) -> torch.Tensor:
        logits = rivals.at_labels(student.logits, target)
        labels = target.long()
        if self.class_weight is None:
            valid = (target != data.IGNORE).sum().clamp(min=1)
            total = F.cross_entropy(logits, labels, ignore_index=data.IGNORE, reduction="sum") / valid
        else:
            total = F.cross_entropy(logits, labels, weight=self.class_weight, ignore_index=data.IGNORE)
        batch = Batch(student, teacher or student, target, self.frequency)
        for part in self.method.parts:
            settings = dict(part.settings)
            if part.term == "cwd_features":
                pairs = zip(self.project, student.features, batch.teacher.features, strict=True)
                values = [rivals.cwd(conv(s.float()), t, **settings) for conv, s, t in pairs]
                value = torch.stack(values).mean()
            else:
                value = TERMS[part.term].call(batch, **settings)
            total = total + part.weight * ANNEAL[part.anneal](done) * value
        return total
