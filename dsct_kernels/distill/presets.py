"""Networks by name, each made of a transformers configuration with fresh weights: a family and its sizes a line."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

Labels = dict[str, Any]  # id2label and label2id
Sizes = Sequence[int]
ALL = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}  # what UPerNet reads of its backbone


class Preset(NamedTuple):
    """`builder` takes (bands, labels), and sizes by name that take the place of the preset's own."""

    family: str
    builder: Callable[..., nn.Module]


def segformer(bands: int, labels: Labels, depths: Sizes, widths: Sizes, decoder: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes: Any = {"depths": list(depths), "hidden_sizes": list(widths), "decoder_hidden_size": decoder}
    return SegformerForSemanticSegmentation(SegformerConfig(num_channels=bands, **sizes, **labels))


def upernet(backbone: Any, hidden: int, labels: Labels) -> nn.Module:
    """Without the auxiliary head, which serves training by labels alone."""
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = UperNetConfig(backbone_config=backbone, hidden_size=hidden, use_auxiliary_head=False, **labels)
    return UperNetForSemanticSegmentation(config)


def resnet(
    bands: int, labels: Labels, depths: Sizes, widths: Sizes, hidden: int, stem: int = 64, layer: str = "basic"
) -> nn.Module:
    from transformers import ResNetConfig

    sizes: Any = {
        "depths": list(depths),
        "hidden_sizes": list(widths),
        "embedding_size": stem,
        "layer_type": layer,
        **ALL,
    }
    return upernet(ResNetConfig(num_channels=bands, **sizes), hidden, labels)


def swin(
    bands: int, labels: Labels, depths: Sizes, width: int, heads: Sizes, hidden: int = 512, window: int = 7
) -> nn.Module:
    from transformers import SwinConfig

    sizes: Any = {"embed_dim": width, "depths": list(depths), "num_heads": list(heads), "window_size": window, **ALL}
    return upernet(SwinConfig(num_channels=bands, **sizes), hidden, labels)


def convnext(bands: int, labels: Labels, depths: Sizes, widths: Sizes, hidden: int = 512) -> nn.Module:
    from transformers import ConvNextConfig

    sizes: Any = {"depths": list(depths), "hidden_sizes": list(widths), **ALL}
    return upernet(ConvNextConfig(num_channels=bands, **sizes), hidden, labels)


def mobilenet(bands: int, labels: Labels, depth: float) -> nn.Module:
    """DeepLabV3+ as transformers has it, and its authors' MobileNetV2 weights are: output stride 8, image pooling and
    a 1x1 convolution, without atrous rates and without a decoder."""
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    sizes: Any = {"depth_multiplier": depth, "output_stride": 8, "finegrained_output": False}
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(num_channels=bands, **sizes, **labels))


def _family(family: str, builder: Callable[..., nn.Module], **presets: dict[str, Any]) -> dict[str, Preset]:
    """Rows of the table; `_` in a name stands for `-`."""
    return {name.replace("_", "-"): Preset(family, partial(builder, **sizes)) for name, sizes in presets.items()}


B0, B1 = (32, 64, 160, 256), (64, 128, 320, 512)  # widths of SegFormer-B0, and of B1 to B5
RESNET, RESNET50 = (64, 128, 256, 512), (256, 512, 1024, 2048)
TINY, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)  # widths of ConvNeXt: tiny and small, base

PRESETS = {
    **_family(
        "SegFormer", segformer,
        segformer_tiny={"depths": (2, 2, 2, 2), "widths": (24, 48, 96, 128), "decoder": 96},
        segformer_b0={"depths": (2, 2, 2, 2), "widths": B0, "decoder": 256},
        segformer_b1={"depths": (2, 2, 2, 2), "widths": B1, "decoder": 256},
        segformer_b2={"depths": (3, 4, 6, 3), "widths": B1, "decoder": 768},
        segformer_b3={"depths": (3, 4, 18, 3), "widths": B1, "decoder": 768},
        segformer_b4={"depths": (3, 8, 27, 3), "widths": B1, "decoder": 768},
        segformer_b5={"depths": (3, 6, 40, 3), "widths": B1, "decoder": 768},
    ),
    **_family(
        "UPerNet on ResNet", resnet,
        upernet_tiny={"depths": (1, 1, 1, 1), "widths": (8, 16, 32, 64), "hidden": 16, "stem": 8},
        upernet_small={"depths": (1, 1, 1, 1), "widths": (16, 32, 64, 128), "hidden": 32, "stem": 16},
        upernet_18={"depths": (2, 2, 2, 2), "widths": RESNET, "hidden": 128},
        upernet_resnet_50={"depths": (3, 4, 6, 3), "widths": RESNET50, "hidden": 512, "layer": "bottleneck"},
        upernet_resnet_101={"depths": (3, 4, 23, 3), "widths": RESNET50, "hidden": 512, "layer": "bottleneck"},
    ),
    **_family(
        "UPerNet on Swin", swin,
        upernet_swin_tiny={"depths": (2, 2, 6, 2), "width": 96, "heads": (3, 6, 12, 24)},
        upernet_swin_small={"depths": (2, 2, 18, 2), "width": 96, "heads": (3, 6, 12, 24)},
        upernet_swin_base={"depths": (2, 2, 18, 2), "width": 128, "heads": (4, 8, 16, 32)},
    ),
    **_family(
        "UPerNet on ConvNeXt", convnext,
        upernet_convnext_tiny={"depths": (3, 3, 9, 3), "widths": TINY},
        upernet_convnext_small={"depths": (3, 3, 27, 3), "widths": TINY},
        upernet_convnext_base={"depths": (3, 3, 27, 3), "widths": BASE},
    ),
    **_family(
        "DeepLabV3+ on MobileNetV2", mobilenet,
        **{f"mobilenet-{depth}": {"depth": depth} for depth in (0.25, 0.5, 1.0)},
    ),
}  # fmt: skip
