"""Teachers and students: transformers models by preset name or by folder, and what the losses read from them."""

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .files import DataError, read_json, write_json

Builder = Callable[..., nn.Module]


class Normalisation(NamedTuple):
    """How samples become a network's input: divided by `maximum`, less `mean`, divided by `std`, band by band."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: float = 255.0


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _segformer(depths: Sequence[int], widths: Sequence[int], decoder: int) -> Builder:
    def build(bands: int, **labels: Any) -> nn.Module:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        config = SegformerConfig(
            depths=list(depths), hidden_sizes=list(widths), decoder_hidden_size=decoder, num_channels=bands, **labels
        )
        return SegformerForSemanticSegmentation(config)

    return build


def _upernet(depths: Sequence[int], widths: Sequence[int], hidden: int) -> Builder:
    def build(bands: int, **labels: Any) -> nn.Module:
        from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

        stages = [f"stage{i + 1}" for i in range(len(depths))]
        backbone = ResNetConfig(  # type: ignore[call-arg,unused-ignore]
            num_channels=bands,
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=list(depths),
            layer_type="basic",
            out_features=stages,
        )
        config = UperNetConfig(backbone_config=backbone, hidden_size=hidden, use_auxiliary_head=False, **labels)
        return UperNetForSemanticSegmentation(config)

    return build


def _mobilenet(depth: float) -> Builder:
    def build(bands: int, **labels: Any) -> nn.Module:
        from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

        config = MobileNetV2Config(
            num_channels=bands, depth_multiplier=depth, output_stride=8, finegrained_output=False, **labels
        )
        return MobileNetV2ForSemanticSegmentation(config)

    return build


PRESETS = {
    "segformer-tiny": _segformer((2, 2, 2, 2), (24, 48, 96, 128), 96),
    "segformer-b0": _segformer((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "segformer-b1": _segformer((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "segformer-b2": _segformer((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "upernet-tiny": _upernet((1, 1, 1, 1), (8, 16, 32, 64), 16),
    "upernet-small": _upernet((1, 1, 1, 1), (16, 32, 64, 128), 32),
    "upernet-18": _upernet((2, 2, 2, 2), (64, 128, 256, 512), 128),
    "mobilenet-0.25": _mobilenet(0.25),
    "mobilenet-0.5": _mobilenet(0.5),
}


def build(
    name: str, classes: tuple[str, ...], whole: bool = True, normalisation: Normalisation = IMAGENET
) -> nn.Module:
    """A preset with fresh weights, or a folder saved by `save_pretrained`. Input normalisation rides along: that of the
    data, for a network that starts from nothing; a folder brings its own."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    if name in PRESETS:
        return with_normalisation(PRESETS[name](len(normalisation.mean), **labels), *normalisation)
    if not (Path(name) / "config.json").is_file():
        raise DataError(f"{name}: neither a model folder (no config.json in it) nor one of {', '.join(PRESETS)}")
    return load(name, classes, whole, normalisation)


def load(
    folder: str | Path, classes: tuple[str, ...], whole: bool = True, normalisation: Normalisation = IMAGENET
) -> nn.Module:
    """A model folder. `whole`: every weight must be there, else those that are missing start afresh.

    `normalisation` is that of the data: its maximum is what images are divided by before they reach `forward`, its mean
    and deviation serve where the folder does not say any.
    """
    from transformers import AutoModelForSemanticSegmentation

    folder = Path(folder)
    refuse_code(folder)
    try:
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    except Exception as error:  # transformers raises many kinds here; all of them are about this folder
        raise DataError(f"{folder}: cannot be loaded as a semantic segmentation model ({error})") from error
    if whole and info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(f"{folder}: {len(missing)} weights are missing, {missing[0]} for one")
    unnamed = all(n == f"LABEL_{i}" for i, n in enumerate(names))
    if len(names) != len(classes) or not (unnamed or names == tuple(classes)):
        raise DataError(
            f"{folder}: its classes are {', '.join(map(str, names))} ({len(names)}), "
            f"but the data has {', '.join(classes)} ({len(classes)})"
        )
    bands, read = len(normalisation.mean), _bands(model)
    if read != bands:
        raise DataError(f"{folder}: it reads images of {read} bands, but those of the data have {bands}; see --bands")
    mean: Sequence[float]
    std: Sequence[float]
    mean, std, maximum = normalisation if bands != 3 or normalisation.maximum != 255 else IMAGENET
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        saved = read_json(preprocessor)
        mean, std = saved.get("image_mean", mean), saved.get("image_std", std)
        for name, values in (("image_mean", mean), ("image_std", std)):
            numbers = isinstance(values, (list, tuple)) and all(type(v) in (int, float) for v in values)
            if not numbers or len(values) != bands or (name == "image_std" and min(values) <= 0):
                raise DataError(f"{preprocessor}: {name}: expected {bands} numbers, got {values!r}")
        factor = saved.get("rescale_factor", 1 / maximum)
        if type(factor) not in (int, float) or factor <= 0:
            raise DataError(f"{preprocessor}: rescale_factor: expected a number above 0, got {factor!r}")
        if "image_mean" in saved and factor != 1 / maximum:  # it was trained with samples divided by another number
            mean, std = ([v / (maximum * factor) for v in values] for values in (mean, std))
    return with_normalisation(model, mean, std, maximum)


def _bands(model: Any) -> int:
    """Bands of the images that a loaded model reads."""
    config = model.config
    for one in (config, getattr(config, "backbone_config", None)):
        bands = getattr(one, "num_channels", None)
        if isinstance(bands, int):
            return bands
    return 3


# Each makes transformers fetch or run what a folder brings along, or load weights that are pickles.
CODE = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "quantization_config",
    "use_pretrained_backbone",
    "use_timm_backbone",
)


def refuse_code(folder: Path) -> None:
    """A model folder is weights in safetensors and a config.json that names one of transformers' own models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as KNOWN

    config = folder / "config.json"
    content = read_json(config)
    for key, value in _settings(content):
        kernels = key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value)
        if (key in CODE and value) or kernels:
            raise DataError(f"{config}: {key} {str(value)[:80]!r} would run code or read files from elsewhere; refused")
    if content.get("model_type") not in KNOWN:
        raise DataError(
            f"{config}: cannot be loaded: model_type {content.get('model_type')!r} is none of {', '.join(KNOWN)}"
        )
    if (folder / "adapter_config.json").exists():
        raise DataError(f"{folder / 'adapter_config.json'}: adapters are not loaded; merge it into the model")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = read_json(index).get("weight_map")
        for part in parts.values() if isinstance(parts, dict) else [parts]:
            if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
                raise DataError(f"{index}: expected names of .safetensors files in this folder, got {part!r}")
    elif not (folder / "model.safetensors").is_file():
        pickles = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5"))
        instead = f"{pickles[0]}: pickles can run code and are not read" if pickles else f"{folder}: no weights"
        raise DataError(f"{instead}; expected model.safetensors")


def _settings(content: Any) -> list[tuple[str, Any]]:
    """Every key and value of a JSON tree."""
    if isinstance(content, dict):
        return [*content.items(), *(pair for value in content.values() for pair in _settings(value))]
    return [pair for value in content for pair in _settings(value)] if isinstance(content, list) else []


def with_normalisation(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], maximum: float = 255.0
) -> nn.Module:
    """Non-persistent buffers, so that they follow the model to its device and stay out of its folder's weights."""
    model.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
    model.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)
    model.register_buffer("pixel_maximum", torch.tensor(maximum), persistent=False)
    return model


def bands_of(model: nn.Module) -> int:
    return len(model.get_buffer("pixel_mean"))


def save(model: nn.Module, folder: Path) -> None:
    """Written beside and moved file by file, so a kill leaves no half file."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pretrained: Any = model
    pretrained.save_pretrained(temporary)
    write_json(
        temporary / "preprocessor_config.json",
        {
            "image_processor_type": "SegformerImageProcessor",
            "do_resize": False,
            "do_rescale": True,
            "rescale_factor": 1 / model.get_buffer("pixel_maximum").item(),
            "do_normalize": True,
            "image_mean": model.get_buffer("pixel_mean").flatten().tolist(),
            "image_std": model.get_buffer("pixel_std").flatten().tolist(),
        },
    )
    folder.mkdir(exist_ok=True)
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()


@dataclass
class Output:
    logits: torch.Tensor  # (N, K, h, w), any resolution
    features: list[torch.Tensor]  # one (N, C, h, w) per stride asked for


def forward(model: nn.Module, images: torch.Tensor, strides: tuple[int, ...] = ()) -> Output:
    """images: (N, bands, H, W) in 0..1. A feature map is the deepest hidden state at (about) the stride asked for."""
    inner = getattr(model, "module", model)  # under DistributedDataParallel
    images = (images - inner.get_buffer("pixel_mean")) / inner.get_buffer("pixel_std")
    out = model(pixel_values=images, output_hidden_states=bool(strides))
    features = []
    if strides:
        maps = [m for m in (_as_map(h, images.shape) for h in out.hidden_states) if m is not None]
        if not maps:
            raise DataError(f"{type(inner).__name__}: no hidden state is a feature map, so CAFD has nothing to match")
        for stride in strides:
            wanted = images.shape[-1] / stride
            nearest = min(abs(m.shape[-1] - wanted) for m in maps)
            features.append([m for m in maps if abs(m.shape[-1] - wanted) == nearest][-1])
    return Output(out.logits, features)


def _as_map(hidden: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A hidden state as (N, C, h, w): tokens (N, L, C), with or without a class token, are viewed, not copied."""
    if hidden.dim() == 4:
        return hidden
    for patch in (4, 8, 14, 16, 32):
        h, w = shape[-2] // patch, shape[-1] // patch
        if hidden.dim() == 3 and hidden.shape[1] in (h * w, h * w + 1):
            return hidden[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))
    return None


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def gflops(model: nn.Module, size: int) -> float:
    """Forward multiply-adds, counted as two, of one size x size image."""
    from torch.utils.flop_counter import FlopCounterMode

    # A copy on the CPU: the counter does not know every attention kernel that a GPU would choose.
    model = copy.deepcopy(model).cpu().eval()
    counter = FlopCounterMode(display=False)
    with counter:
        forward(model, torch.zeros(1, bands_of(model), size, size))
    return counter.get_total_flops() / 1e9
