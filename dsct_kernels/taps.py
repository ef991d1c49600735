"""Feature maps out of a network, by module name: what `cafd_loss` compares, without touching the network's code."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Layout = Literal["NCHW", "NHWC", "NLC"]
LAYOUTS = ("NCHW", "NHWC", "NLC")
Size = tuple[int, int]
T = TypeVar("T")


class FeatureTap:
    """Takes the outputs of named modules as feature maps (N, C, h, w), by forward hooks, whenever the network runs.

    An output that is a tuple or list stands for its first entry, a mapping or `ModelOutput` for `last_hidden_state`,
    "out", or its only tensor. Maps are views of what the module emitted: no copy, its dtype and device.

    A tap has no parameters and holds maps only from a forward pass to `pop`. It lets go of them if the forward pass
    raises, and ignores what activation checkpointing runs again in backward. `remove`, or the end of a `with` block,
    takes the hooks off.

    Args:
        model: any `torch.nn.Module`. DistributedDataParallel, FSDP and `torch.compile` wrappers are looked through, in
            names too: it is "layer3", not "module._orig_mod.layer3". `nn.DataParallel` is refused: its replicas would
            all write to one tap. A compiled network sees no hook that is added after its first call (`pop` says so).
        names: of modules, as `named_modules` has them: one or more, in the order in which `pop` returns their maps.
        layout: what the modules emit: "NCHW" (N, C, h, w), "NHWC" (N, h, w, C), "NLC" tokens (N, L, C); for all names,
            or a mapping from name to layout. Where it is not given it is read from what is declared, never guessed:

            - three dimensions are tokens;
            - of four, `output_fmt`, with which timm marks its networks, on the module or the nearest one around it;
            - else the types of the layers inside: convolutions, batch and group norm and pooling have channels first,
              linear layers and layer norm last; a block of ConvNeXt, which has both, is known by its name;
            - else the channel counts of those layers: one of them stands at one end of the shape only.

            Where these say nothing, or the channel counts contradict the types, `pop` raises and asks for `layout`.
        size: (h, w) of token maps, or a mapping from name to it. Where it is not given it is that of the images (the
            first tensor (N, C, H, W) that the network is called with) by a common stride. Further tokens (class,
            registers) are taken to stand in front: up to 8 where `size` is given; else none, one, or timm's
            `num_prefix_tokens`.
        detach: cut the maps from the graph as they are taken, for a teacher.

    Raises:
        ValueError: a name is no module, a layout or size is none.
        TypeError: an argument is of another type.
        RuntimeError: from the forward pass, where a module that is not detached runs without gradients in a network
            that runs with them (reentrant checkpointing), since its map would teach nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from dsct_kernels import FeatureTap, cafd_loss
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1))
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        >>> taught, teaching = FeatureTap(student, ["0"]), FeatureTap(teacher, ["0"], detach=True)
        >>> images = torch.rand(2, 3, 16, 24)
        >>> student_logits, teacher_logits = student(images), teacher(images)
        >>> features, teacher_features = taught.pop(), teaching.pop()
        >>> [tuple(f.shape) for f in features + teacher_features]
        [(2, 4, 8, 12), (2, 8, 4, 6)]
        >>> cafd_loss(features, teacher_features).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        layout: Layout | Mapping[str, Layout] | None = None,
        size: Size | Mapping[str, Size] | None = None,
        detach: bool = False,
    ):
        self.model = unwrapped(model)
        self.names = tuple(names) if not isinstance(names, str) else ()
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names: expected a sequence of module names, got {names!r}")
        modules = find_modules(self.model, self.names, "names")
        self.detach = detach
        self._layouts: dict[str, Layout] = _per_name("layout", layout, self.names, _is_layout, "NCHW, NHWC or NLC")
        self._sizes: dict[str, Size] = _per_name("size", size, self.names, _is_size, "(h, w), two whole numbers >= 1")
        self._known: dict[Any, tuple[Layout, Size | None]] = {}  # how an output of this name and shape is read
        self._raw: dict[str, Any] = {}  # as emitted, of the last forward pass
        self._again: set[str] = set()
        self._images: Size | None = None
        self._running = self._finished = self._grad = False
        # What a hook stores is turned into a map in `pop`, outside of what torch.compile traces.
        self._handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            *(module.register_forward_hook(_Take(self, name)) for name, module in zip(self.names, modules)),
            self.model.register_forward_hook(self._finish),
            self.model.register_forward_hook(self._end, always_call=True),  # after an exception, too
        ]

    def pop(self) -> list[Tensor]:
        """The maps (N, C, h, w) of the last forward pass, in the order of `names`; the tap forgets them.

        Raises RuntimeError where there was no forward pass since the last `pop`, or a module did not run in it, or ran
        more than once; ValueError or TypeError where an output is no map, or its layout or size is not known.
        """
        raw, self._raw = self._raw, {}
        missing = [name for name in self.names if name not in raw]
        of = type(self.model).__name__
        if missing:
            why = f"{', '.join(missing)} did not run in it" if raw else "there was none since the last pop()"
            raise RuntimeError(
                f"{of}: no maps of the last forward pass: {why}. Under torch.compile: make the tap before the first "
                "call of this network, or of another of its class, or set torch._dynamo.config."
                "skip_nnmodule_hook_guards = False first; else it runs what it compiled without the tap"
            )
        if self._again:
            raise RuntimeError(
                f"{of}: {', '.join(sorted(self._again))} ran more than once in a forward pass, so there is no one map "
                "of it; tap a module that runs once"
            )
        return [self._map(name, raw[name]) for name in self.names]

    def remove(self) -> None:
        """Take the hooks off and let go of the maps. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._raw = [], {}

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureTap({type(self.model).__name__}, {list(self.names)}, detach={self.detach})"

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the network, as of an average of weights, which take their hooks along: not the maps."""
        return {**self.__dict__, "_raw": {}, "_again": set(), "_running": False}

    # ------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._raw, self._again = {}, set()
        self._running, self._finished, self._grad = True, False, torch.is_grad_enabled()
        self._images = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4:
                self._images = (value.shape[2], value.shape[3])
                break

    def _take(self, name: str, output: Any) -> None:
        if not self._running:  # the module called by itself, or run again by checkpointing
            return
        if name in self._raw:
            self._again.add(name)
        if not self.detach and self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} runs without gradients in a network that runs with them, so its map would teach nothing: "
                "checkpoint with use_reentrant=False, or give detach=True to a teacher"
            )
        output = _tensor_in(output, name)
        self._raw[name] = output.detach() if self.detach else output

    def _finish(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._finished = True

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._running = False
        if not self._finished:  # the forward pass raised
            self._raw = {}

    # -------------------------------------------------------------------------------------------------------- maps

    def _map(self, name: str, x: Tensor) -> Tensor:
        key = (name, x.shape[1:], self._images)
        if key not in self._known:  # found out by walking through the network, once and not at every step
            layout = self._layouts.get(name) or declared_layout(self.model, name, x.shape)
            if x.dim() != len(layout):
                raise ValueError(f"layout: {name} emits {tuple(x.shape)}, which is not {layout}")
            self._known[key] = layout, self._grid(name, x.shape[1]) if layout == "NLC" else None
        layout, grid = self._known[key]
        if grid is not None:
            return tokens_as_map(x, grid)
        return x if layout == "NCHW" else x.permute(0, 3, 1, 2)

    def _grid(self, name: str, tokens: int) -> Size:
        size = self._sizes.get(name)
        if size is not None:
            if not 0 <= tokens - size[0] * size[1] <= 8:
                raise ValueError(f"size: {name} emits {tokens} tokens, which {size} does not fit")
            return size
        extra = _nearest(self.model, name, "num_prefix_tokens", int)
        found = token_grid(tokens, self._images, () if extra is None else (extra,)) if self._images else None
        if found is None:
            raise ValueError(
                f"{name} emits {tokens} tokens, which for images of {self._images} are no map at one stride that is "
                "certain; give size=(h, w)"
            )
        return found


class _Take:
    """The hook of one module: an object, so that it can be pickled and copied with the network."""

    def __init__(self, tap: FeatureTap, name: str):
        self.tap, self.name = tap, name

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.tap._take(self.name, output)


# ------------------------------------------------------------------------------------------------ wrappers and names

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within `torch.compile`, DistributedDataParallel and FSDP. Raises TypeError for anything else that is
    no module, and for `nn.DataParallel`."""
    while True:
        if not isinstance(model, nn.Module) or isinstance(model, nn.DataParallel):
            why = ", whose replicas would all write to one tap: use DistributedDataParallel"
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}"
                + (why if isinstance(model, nn.DataParallel) else "")
            )
        inner = next((model._modules[key] for key in WRAPPED if key in model._modules), None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def find_modules(model: nn.Module, names: Sequence[str], argument: str) -> list[nn.Module]:
    """The modules of these names, wrappers on the way left out of the names. Raises ValueError that has `argument`."""
    known: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        clean = ".".join(part for part in name.split(".") if part not in WRAPPED)
        known.setdefault(clean, module)  # the outermost: it runs once, whatever its wrapper does within
    for name in names:
        if name not in known or not name:
            close = difflib.get_close_matches(name, known, 5)
            near = list(dict.fromkeys([*close, *(n for n in known if n and n.count(".") < 2)]))[:20]
            raise ValueError(f"{argument}: {type(model).__name__} has no module {name!r}; some of its own: {near}")
        if names.count(name) > 1:
            raise ValueError(f"{argument}: {name!r} stands there twice")
    return [known[name] for name in names]


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module of this name, then what it lies in, out to the network."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        yield find_modules(model, [".".join(parts[:n])], "names")[0]
    yield model


def _nearest(model: nn.Module, name: str, attribute: str, kind: type[T]) -> T | None:
    """An attribute of the module, or of the nearest one around it that has it."""
    for module in _around(model, name):
        value = getattr(module, attribute, None)
        if isinstance(value, kind):
            return value
    return None


# ----------------------------------------------------------------------------------------------------------- layouts

FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
# Channels last within (layer norm, linear layers), first outside: in transformers, timm and torchvision.
CONVNEXT = (
    *("ConvNextLayer", "ConvNextStage", "ConvNextV2Layer", "ConvNextV2Stage"),
    *("ConvNeXtBlock", "ConvNeXtStage", "CNBlock"),
)


def declared_layout(model: nn.Module, name: str, shape: torch.Size) -> Layout:
    """What the module's types and channel counts say of an output of this shape. Raises ValueError where they don't."""
    if len(shape) == 3:
        return "NLC"
    if len(shape) != 4:
        raise ValueError(
            f"{name}: expected a map (N, C, h, w) or (N, h, w, C), or tokens (N, L, C), got {tuple(shape)}"
        )
    (module,) = find_modules(model, [name], "names")
    declared = _nearest(model, name, "output_fmt", str) or _layout_of(module)
    counts = {count for layer in module.modules() if (count := _channels(layer)) is not None}
    fits = {"NCHW": shape[1] in counts, "NHWC": shape[3] in counts}
    if declared in fits:
        other = "NHWC" if declared == "NCHW" else "NCHW"
        if fits[declared] or not fits[other]:
            return "NCHW" if declared == "NCHW" else "NHWC"
    elif fits["NCHW"] != fits["NHWC"]:
        return "NCHW" if fits["NCHW"] else "NHWC"
    said = f"is by its type {declared}" if declared in fits else "does not say by its type"
    raise ValueError(
        f"{name} ({type(module).__name__}) emits {tuple(shape)}: whether this is (N, C, h, w) or (N, h, w, C) it "
        f"{said}, and its channel counts, {sorted(counts)}, do not settle it; "
        f"give layout={{{name!r}: 'NCHW'}} or 'NHWC'"
    )


def _layout_of(module: nn.Module) -> Layout | None:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if type(module).__name__ in CONVNEXT:
        return "NCHW"
    kinds = {kind for layer in module.modules() if (kind := _kind(layer)) is not None}
    return kinds.pop() if len(kinds) == 1 else None


def _kind(layer: nn.Module) -> Layout | None:
    if isinstance(layer, FIRST):
        return "NCHW"
    if isinstance(layer, nn.LayerNorm):
        first = getattr(layer, "data_format", None) == "channels_first" or type(layer).__name__ == "LayerNorm2d"
        return "NCHW" if first else "NHWC"
    return "NHWC" if isinstance(layer, LAST) else None


def _channels(layer: nn.Module) -> int | None:
    """Channels that a layer emits, where it declares them."""
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    value = None
    for attribute in ("out_channels", "num_features", "num_channels", "out_features"):
        if _kind(layer) is not None and value is None:
            value = getattr(layer, attribute, None)
    return value if isinstance(value, int) else None


# ------------------------------------------------------------------------------------------------------------ tokens

STRIDES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 64)


def token_grid(tokens: int, images: Size, extra: Sequence[int] = ()) -> Size | None:
    """(h, w) of a sequence of tokens of images of this size, with none, one or `extra` tokens more in front: at one of
    the usual strides, rounded up or down. None where there is no such, or there are two."""
    fits = [(h, w) for h, w in grids(images) if any(tokens == h * w + more for more in (0, 1, *extra))]
    return fits[0] if len(fits) == 1 else None


def grids(images: Size) -> set[Size]:
    """The sizes of maps of images of this size, at the usual strides, rounded up or down."""
    both = {(images[0] // s, images[1] // s) for s in STRIDES} | {
        (-(-images[0] // s), -(-images[1] // s)) for s in STRIDES
    }
    return {(h, w) for h, w in both if h and w}


def tokens_as_map(tokens: Tensor, size: Size) -> Tensor:
    """Tokens (N, L, C), the last h * w of them, as (N, C, h, w): a view."""
    return tokens[:, tokens.shape[1] - size[0] * size[1] :].transpose(1, 2).unflatten(2, size)


# ----------------------------------------------------------------------------------------------------------- arguments


def _tensor_in(output: Any, name: str) -> Tensor:
    """The tensor that a module's output stands for."""
    found = output
    while isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, Mapping):
        tensors = [value for value in found.values() if isinstance(value, Tensor)]
        for key in ("last_hidden_state", "out"):
            if isinstance(found.get(key), Tensor):
                return found[key]
        if len(tensors) != 1:
            raise TypeError(f"{name}: expected one tensor in its output, or last_hidden_state, found {list(found)}")
        found = tensors[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: expected a tensor, or a tuple or mapping with one, got {type(output).__name__}")
    return found


def _is_layout(value: Any) -> bool:
    return value in LAYOUTS


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _per_name(argument: str, given: Any, names: Sequence[str], good: Any, expected: str) -> dict[str, Any]:
    """An argument that is one value for all names or a mapping from name to value, as the latter."""
    if given is None:
        return {}
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{argument}: {name!r} is none of the names {list(names)}")
        if not good(value):
            raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
