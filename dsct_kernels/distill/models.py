"""Teachers and students: transformers models by preset name or by folder, and what the losses read from them."""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dsct_kernels.taps import FeatureTap, grids, token_grid, tokens_as_map, unwrapped

from .files import DataError, read_json, write_json
from .presets import PRESETS

Maps = list[tuple[str, torch.Tensor]]  # feature maps (N, C, h, w) with their names


class Normalisation(NamedTuple):
    """How samples become a network's input: divided by `maximum`, less `mean`, divided by `std`, band by band."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: float = 255.0


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def build(
    name: str, classes: tuple[str, ...], whole: bool = True, normalisation: Normalisation = IMAGENET, **sizes: Any
) -> nn.Module:
    """A preset with fresh weights, a folder saved by `save_pretrained`, or what `package.module:function` makes of the
    number of classes, behind the adapter. Input normalisation rides along: that of the data, for a preset; a folder and
    an adapter bring their own. `sizes` take the place of a preset's."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    if name in PRESETS:
        network = PRESETS[name].builder(len(normalisation.mean), labels, **sizes)
        return with_normalisation(network, *normalisation)
    if is_function(name):
        from .adapter import from_function

        if len(normalisation.mean) != 3:
            raise DataError(f"{name} reads images of 3 bands, but those of the data have {len(normalisation.mean)}")
        try:
            return from_function(name, len(classes))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{name}: {error}") from error
    if not (Path(name) / "config.json").is_file():
        raise DataError(f"{name}: neither a model folder (no config.json in it) nor one of {', '.join(PRESETS)}")
    return load(name, classes, whole, normalisation)


def is_function(name: str) -> bool:
    """Whether a network is named as `package.module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


def starts_afresh(name: str) -> bool:
    """Whether a teacher of this name has to be trained first, where a folder holds one that is ready."""
    return name in PRESETS or is_function(name)


def finished(name: str, folder: Path, classes: tuple[str, ...], normalisation: Normalisation = IMAGENET) -> nn.Module:
    """The network that `build` made of this name, with the weights that `save` left of it in the folder."""
    if not is_function(name):
        return load(folder, classes, normalisation=normalisation)
    from safetensors.torch import load_model

    network = build(name, classes, normalisation=normalisation)
    try:
        load_model(network, folder / "model.safetensors")
    except Exception as error:  # of safetensors' own kinds and torch's
        raise DataError(f"{folder}: its weights are not those of {name} ({error})") from error
    return network


def load(
    folder: str | Path, classes: tuple[str, ...], whole: bool = True, normalisation: Normalisation = IMAGENET
) -> nn.Module:
    """A model folder. `whole`: every weight must be there, else those that are missing start afresh. A whole network
    keeps the dtype that its weights are stored in; one to be trained is float32.

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
    if not whole:
        model = model.float()  # to be trained: half precision would lose its updates
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


MASKS = (
    "it predicts a set of masks with a class each (Mask2Former, MaskFormer, OneFormer, EoMT, DETR), not logits "
    "(N, K, h, w) of every class at every pixel, which the losses here read; sums of its masks are probabilities of no "
    "softmax. Refused: distil from a network that classifies pixels"
)

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
    from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES as UNIVERSAL

    config = folder / "config.json"
    content = read_json(config)
    for key, value in _settings(content):
        kernels = key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value)
        if (key in CODE and value) or kernels:
            raise DataError(f"{config}: {key} {str(value)[:80]!r} would run code or read files from elsewhere; refused")
    if content.get("model_type") in UNIVERSAL:
        raise DataError(f"{config}: model_type {content['model_type']!r}: {MASKS}")
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
    if hasattr(model, "save_pretrained"):
        pretrained.save_pretrained(temporary)
    else:  # behind the adapter: the weights alone, since no file says what code they belong to
        from safetensors.torch import save_model

        temporary.mkdir(parents=True)
        save_model(model, str(temporary / "model.safetensors"))
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
    features: list[torch.Tensor]  # one (N, C, h, w) per stride asked for, or per name of a tap

    def part(self, first: int, last: int | None) -> "Output":
        """Of these samples."""
        return Output(self.logits[first:last], [maps[first:last] for maps in self.features])


def forward(model: nn.Module, images: torch.Tensor, features: Sequence[int] | FeatureTap = ()) -> Output:
    """images: (N, bands, H, W) in 0..1. The features are at these strides, or those of a tap on the network.

    At a stride it is the network's deepest feature map there: the deepest of those whose width is nearest.
    The images are cast to the network's dtype.
    """
    if isinstance(features, FeatureTap):
        out = _called(model, images)
        return Output(out.logits, features.pop())
    out = _called(model, images, output_hidden_states=bool(features))
    if not features:
        return Output(out.logits, [])
    return Output(out.logits, [m for _, m in at_strides(model, _maps(model, out, images), images, features)])


def _called(model: nn.Module, images: torch.Tensor, **keywords: Any) -> Any:
    inner = unwrapped(model)
    images = (images - inner.get_buffer("pixel_mean")) / inner.get_buffer("pixel_std")
    return model(pixel_values=images.to(dtype_of(inner)), **keywords)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its weights."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def feature_maps(model: nn.Module, images: torch.Tensor) -> Maps:
    """Every feature map (N, C, h, w) that the network shows of images (N, bands, H, W), with its name, in the order in
    which they come about: a Hugging Face network's hidden states, an adapter's taps."""
    return _maps(model, _called(model, images, output_hidden_states=True), images)


def _maps(model: nn.Module, out: Any, images: torch.Tensor) -> Maps:
    if hasattr(out, "names"):
        return list(zip(out.names, out.hidden_states, strict=True))
    registers = getattr(getattr(unwrapped(model), "config", None), "num_register_tokens", None) or 0
    size = (images.shape[2], images.shape[3])
    maps = []
    for i, hidden in enumerate(out.hidden_states):
        # transformers' maps have channels first; one that would not be a map then (a backbone with channels last) is
        # left out, as are tokens that are no map.
        grid = token_grid(hidden.shape[1], size, (1 + registers,)) if hidden.dim() == 3 else None
        if grid is not None:
            maps.append((f"hidden_states[{i}]", tokens_as_map(hidden, grid)))
        elif hidden.dim() == 4 and tuple(hidden.shape[2:]) in grids(size):
            maps.append((f"hidden_states[{i}]", hidden))
    return maps


def at_strides(model: nn.Module, maps: Maps, images: torch.Tensor, strides: Sequence[int]) -> Maps:
    """For each stride the deepest of the maps whose width is nearest to that of the images at this stride."""
    if strides and not maps:
        name = type(unwrapped(model)).__name__
        raise DataError(f"{name}: no hidden state is a feature map, so CAFD has nothing to match")
    found = []
    for stride in strides:
        wanted = images.shape[-1] / stride
        nearest = min(abs(m.shape[-1] - wanted) for _, m in maps)
        found.append([one for one in maps if abs(one[1].shape[-1] - wanted) == nearest][-1])
    return found


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
