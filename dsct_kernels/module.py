"""The losses as modules: their keywords stand in the signature of the function, and nowhere else."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, overload

import torch
from torch import nn

from . import backends, checks
from .values import CHECKS, DEFAULT_IGNORE_INDEX

P = ParamSpec("P")
Init = Callable[..., None]
InitOf = Callable[[Init], Callable[Concatenate[Any, P], None]]


class LossModule(nn.Module):
    """A loss whose keywords are attributes: given once (see `keywords_of`), set at any step, also when compiled.

    Values are checked as they are set. Beside each number lies the same as a 0-d tensor: of an int among a module's
    attributes torch.compile makes a constant, and compiles again for every other.
    """

    _checks: ClassVar[dict[str, Callable[[str, object], Any] | None]] = {}  # of every keyword; None: it is no value
    _boxed: dict[str, Any]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._checks = getattr(cls.__init__, "checks", cls._checks)

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        if "reduction" in keywords:
            checks.reduction(keywords["reduction"])
        backends.known(keywords["backend"])
        for name, value in keywords.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        if check is not None:
            boxed = value if value is DEFAULT_IGNORE_INDEX else check(name, value)
            if isinstance(boxed, (int, float)):
                dtype = torch.int64 if isinstance(boxed, int) else torch.float64
                boxed = torch.tensor(boxed, dtype=dtype, device="cpu")
            self.__dict__.setdefault("_boxed", {})[name] = boxed
            value = 255 if value is DEFAULT_IGNORE_INDEX else value
        super().__setattr__(name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __prepare_scriptable__(self) -> "LossModule":
        """What torch.jit.script asks every module within its argument for."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script: TorchScript knows neither keyword-only "
            "arguments nor values that are numbers or tensors; script the network alone and call the loss outside of "
            "it, or torch.compile the step"
        )

    def extra_repr(self) -> str:
        shown = [name for name in self._checks if name not in self._buffers]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def keywords(self) -> dict[str, Any]:
        """The keywords for the function: as they were set, or, for a compiled graph, values as tensors."""
        compiled = torch.compiler.is_compiling()
        boxed = {name: x for name, x in self._boxed.items() if compiled or x is DEFAULT_IGNORE_INDEX}
        return {name: boxed[name] if name in boxed else getattr(self, name) for name in self._checks}


@overload
def keywords_of(function: Callable[Concatenate[Any, Any, Any, Any, Any, P], Any]) -> InitOf[P]: ...
@overload
def keywords_of(function: Callable[Concatenate[Any, Any, Any, P], Any]) -> InitOf[P]: ...
@overload
def keywords_of(function: Callable[Concatenate[Any, Any, P], Any]) -> InitOf[P]: ...
def keywords_of(function: Callable[..., Any]) -> Any:
    """Decorates the `__init__` of a LossModule: it takes the keywords of `function`, defaults and types included.

    All but num_items, which belongs to a call. (The overloads are for a type checker, which takes off the arguments
    that come by position: two networks' features; logits and labels; all five.)
    """
    parameters = inspect.signature(function).parameters
    own = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name != "num_items"}

    def decorated(init: Init) -> Init:
        @functools.wraps(init)
        def taking(self: LossModule, **given: Any) -> None:
            for name in given:
                if name not in own:
                    raise TypeError(f"{name}: {type(self).__name__} has no such keyword; expected {', '.join(own)}")
            init(self, **{name: given.get(name, p.default) for name, p in own.items()})

        of_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taking.__signature__ = inspect.Signature([of_self, *own.values()])  # type: ignore[attr-defined]
        taking.checks = {name: CHECKS.get(p.annotation) for name, p in own.items()}  # type: ignore[attr-defined]
        return taking

    return decorated
