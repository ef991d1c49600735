"""Presets of every family, folders of every Hugging Face network, and what is no network for these losses."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.models.detr.modeling_detr import DetrSegmentationOutput
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.oneformer.modeling_oneformer import OneFormerForUniversalSegmentationOutput

from dsct_kernels import dsct_loss
from dsct_kernels.distill import adapter, models
from dsct_kernels.distill.files import DataError
from dsct_kernels.distill.teacher import Teacher

CLASSES = ("a", "b", "c")
DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"

# One of each family, with sizes that are quick; and the strides at which it has features.
SMALLER: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "SegFormer": ("segformer-b0", {"depths": (1,) * 4, "widths": (8, 16, 40, 64), "decoder": 8}, (4, 8, 16, 32)),
    "UPerNet on ResNet": (
        "upernet-resnet-50", {"depths": (1,) * 4, "widths": (16, 32, 64, 128), "hidden": 8, "stem": 8}, (4, 8, 16, 32),
    ),
    "UPerNet on Swin": (
        "upernet-swin-tiny",
        {"depths": (1,) * 4, "width": 8, "heads": (1, 2, 2, 4), "hidden": 8, "window": 4},
        (4, 8, 16, 32),
    ),
    "UPerNet on ConvNeXt": (
        "upernet-convnext-tiny", {"depths": (1,) * 4, "widths": (8, 16, 32, 64), "hidden": 8}, (4, 8, 16, 32),
    ),
    "DeepLabV3+ on MobileNetV2": ("mobilenet-1.0", {"depth": 0.25}, (4, 8)),
}  # fmt: skip


def small(family: str) -> nn.Module:
    name, sizes, _ = SMALLER[family]
    return models.build(name, CLASSES, **sizes)


def test_every_family_of_the_presets_is_tested_here():
    assert {preset.family for preset in models.PRESETS.values()} == set(SMALLER)


@pytest.mark.parametrize("family", SMALLER)
def test_a_network_of_each_family_has_features_at_the_strides_claimed_and_survives_its_folder(family, tmp_path):
    network = small(family).eval()
    images = torch.rand(1, 3, 64, 96)
    strides = SMALLER[family][2]
    out = models.forward(network, images, strides)
    assert out.logits.shape[:2] == (1, 3)
    assert [tuple(f.shape[2:]) for f in out.features] == [(64 // s, 96 // s) for s in strides]
    assert sorted({96 // m.shape[3] for _, m in models.feature_maps(network, images)} - {2}) == list(strides)
    models.save(network, tmp_path / "folder")
    again = models.load(tmp_path / "folder", CLASSES).eval()
    torch.testing.assert_close(models.forward(again, images).logits, out.logits)


@pytest.mark.parametrize(
    "teacher,student",
    [
        ("SegFormer", "UPerNet on ResNet"), ("UPerNet on ResNet", "SegFormer"),
        ("UPerNet on Swin", "DeepLabV3+ on MobileNetV2"), ("DeepLabV3+ on MobileNetV2", "UPerNet on Swin"),
        ("UPerNet on Swin", "UPerNet on ConvNeXt"), ("UPerNet on ConvNeXt", "SegFormer"),
    ],
)  # fmt: skip
def test_transformers_teach_cnns_and_the_reverse_and_no_parameter_is_added(student, teacher):
    """One step: what the optimiser updates is what a student alone has, and the teacher stays as it was."""
    images, target = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    learner, network = small(student).train(), small(teacher)
    alone = {id(p) for p in learner.parameters()}
    one = Teacher(network, learner, torch.zeros(1, 3, 64, 64), taps=("auto",))
    assert len(one.says) == 1 and "student hidden_states[" in one.says[0]
    before = torch.get_rng_state()
    said = one(images)
    assert torch.equal(before, torch.get_rng_state()) and not network.training
    out = models.forward(learner, images, one.asks)
    stride = 8 if "MobileNetV2" in student + teacher else 32
    assert [f.shape[-1] for f in (*out.features, *said.features)] == [64 // stride] * 2
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    weights = [p.detach().clone() for p in learner.parameters()]
    dsct_loss(out.logits, said.logits, target, out.features, said.features, tnkd_weight=1.0).total.backward()
    optimizer.step()
    assert (
        {id(p) for p in learner.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]} == alone
    )
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights, learner.parameters(), strict=True))


# --- parameters ------------------------------------------------------------------------------------------------------


def counted(name: str, classes: int) -> int:
    with torch.device("meta"):
        return models.parameters(models.build(name, tuple(map(str, range(classes)))))


# In millions: with ADE20k's 150 classes, as the papers print them; UPerNet's with the auxiliary head left out here
# (a 3x3 convolution to 256 channels, a norm and the classes).
SHIPPED = {name: one for name, one in models.PRESETS.items() if isinstance(one.builder, partial)}  # not another test's
PAPERS = {
    "segformer-b0": 3.8, "segformer-b1": 13.7, "segformer-b2": 27.5, "segformer-b3": 47.3, "segformer-b4": 64.1,
    "segformer-b5": 84.7, "upernet-swin-tiny": 60, "upernet-swin-small": 81, "upernet-swin-base": 121,
    "upernet-convnext-tiny": 60, "upernet-convnext-small": 82, "upernet-convnext-base": 122,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_presets_have_as_many_parameters_as_their_papers_say(name):
    channels = {"upernet": 512 if name.endswith("base") else 384}.get(name.partition("-")[0], 0)
    auxiliary = channels * 256 * 9 + 2 * 256 + 257 * 150 if channels else 0
    printed = PAPERS[name]
    tolerance = 0.06 if isinstance(printed, float) else 0.6
    assert (counted(name, 150) + auxiliary) / 1e6 == pytest.approx(printed, abs=tolerance)


def test_the_table_in_the_docs_lists_every_preset_with_its_family_and_parameters():
    rows = re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \| ([\d.]+) \|$", DOCS.read_text(), re.MULTILINE)
    expected = [(name, one.family, f"{counted(name, 6) / 1e6:.1f}") for name, one in SHIPPED.items()]
    assert rows == expected, "\n".join(f"| `{name}` | {family} | {count} |" for name, family, count in expected)


# --- folders ---------------------------------------------------------------------------------------------------------

VIT = {"image_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}


def beit() -> nn.Module:
    config = transformers.BeitConfig(**VIT, out_indices=[1, 2, 3, 4], use_auxiliary_head=False, **LABELS)
    return transformers.BeitForSemanticSegmentation(config)


def data2vec() -> nn.Module:
    config = transformers.Data2VecVisionConfig(**VIT, out_indices=[0, 1, 2, 3], use_auxiliary_head=False, **LABELS)
    return transformers.Data2VecVisionForSemanticSegmentation(config)


def dpt() -> nn.Module:
    sizes = {"backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 8, "neck_hidden_sizes": [8] * 4}
    config = transformers.DPTConfig(**VIT, **sizes, use_auxiliary_head=False, **LABELS)
    return transformers.DPTForSemanticSegmentation(config)


def mobilevit() -> nn.Module:
    sizes = {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "aspp_out_channels": 8}
    config = transformers.MobileViTConfig(image_size=64, **sizes, num_attention_heads=2, **LABELS)
    return transformers.MobileViTForSemanticSegmentation(config)


def mobilevitv2() -> nn.Module:
    sizes = {
        "base_attn_unit_dims": [16] * 3,
        "width_multiplier": 0.25,
        "aspp_out_channels": 8,
        "n_attn_blocks": [1] * 3,
    }
    config = transformers.MobileViTV2Config(image_size=64, **sizes, **LABELS)
    return transformers.MobileViTV2ForSemanticSegmentation(config)


FOLDERS: dict[Callable[[], nn.Module], int] = {beit: 16, data2vec: 16, dpt: 16, mobilevit: 32, mobilevitv2: 32}


@pytest.mark.parametrize("make", FOLDERS)
def test_a_folder_of_another_hugging_face_network_teaches(make, tmp_path):
    made = make()
    made.save_pretrained(tmp_path)
    teacher = models.load(tmp_path, CLASSES)
    student = small("UPerNet on ResNet").train()
    one = Teacher(teacher, student, torch.zeros(1, 3, 64, 64), taps=("auto",))
    images = torch.rand(2, 3, 64, 64)
    said, out = one(images), models.forward(student, images, one.asks)
    assert [f.shape[-1] for f in (*out.features, *said.features)] == [64 // FOLDERS[make]] * 2
    losses = dsct_loss(out.logits, said.logits, torch.randint(0, 3, (2, 64, 64)), out.features, said.features)
    assert losses.total.isfinite() and losses.cafd > 0
    losses.total.backward()


def test_the_tokens_of_a_transformer_are_its_map_in_the_right_order():
    """Against the network's own arrangement: BEiT's neck turns its hidden states into maps itself."""
    network = models.with_normalisation(beit(), *models.IMAGENET).eval()
    images = torch.rand(1, 3, 64, 64)
    seen = []
    network.fpn.fpn1.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    maps = dict(models.feature_maps(network, images))
    torch.testing.assert_close(maps["hidden_states[0]"], seen[0])


def test_hidden_states_that_are_no_maps_with_channels_first_are_left_out():
    """As of a backbone with channels last, and of a decoder's queries."""
    shapes = [(1, 16, 24, 8), (1, 8, 16, 24), (1, 8, 12, 16), (1, 100, 8), (1, 16, 8, 12), (1, 8)]

    class Mixed(nn.Module):
        def forward(self, pixel_values, output_hidden_states=False):
            return SimpleNamespace(logits=pixel_values, hidden_states=[torch.zeros(shape) for shape in shapes])

    mixed = models.with_normalisation(Mixed(), *models.IMAGENET)
    names = [name for name, _ in models.feature_maps(mixed, torch.zeros(1, 3, 64, 96))]
    assert names == ["hidden_states[1]", "hidden_states[4]"]


def test_weights_in_half_precision_stay_so_in_a_teacher_and_not_in_a_student(tmp_path):
    models.save(small("SegFormer").half(), tmp_path / "half")
    assert models.dtype_of(models.load(tmp_path / "half", CLASSES)) == torch.float16
    assert models.dtype_of(models.load(tmp_path / "half", CLASSES, whole=False)) == torch.float32


# --- what is no such network -----------------------------------------------------------------------------------------

MASKS, QUERIES = torch.rand(1, 5, 16, 16), torch.rand(1, 5, 4)
BOTH = {"class_queries_logits": QUERIES, "masks_queries_logits": MASKS}


@pytest.mark.parametrize(
    "output",
    [
        Mask2FormerForUniversalSegmentationOutput(**BOTH), MaskFormerForInstanceSegmentationOutput(**BOTH),
        OneFormerForUniversalSegmentationOutput(**BOTH), EomtForUniversalSegmentationOutput(**BOTH),
        DetrSegmentationOutput(logits=QUERIES, pred_masks=MASKS), BOTH,
    ],
    ids=lambda output: type(output).__name__,
)  # fmt: skip
def test_masks_with_a_class_each_are_refused_with_the_reason(output):
    class Universal(nn.Module):
        def forward(self, images):
            return output

    with pytest.raises(
        TypeError, match=r"Universal returned .*set of masks with a class each.*not logits \(N, K, h, w\)"
    ):
        models.forward(adapter.Adapter(Universal()), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "oneformer", "eomt", "detr"])
def test_a_folder_of_such_a_network_is_refused_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(DataError, match=rf"config.json: model_type '{kind}': it predicts a set of masks"):
        models.load(tmp_path, CLASSES)
