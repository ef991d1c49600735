"""Feature maps by module name: layouts, wrappers, and what a tap keeps alive."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsct_kernels import FeatureTap, cafd_loss
from dsct_kernels.taps import token_grid

IMAGES = torch.rand(2, 3, 16, 24)


class Net(nn.Module):
    """Stride 2 and 4, channels first; then the same map as tokens; logits at stride 4."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stages = nn.ModuleDict({"deep": nn.Conv2d(4, 6, 3, stride=2, padding=1)})
        self.mix = nn.Linear(6, 6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, pixel_values):
        deep = self.stages["deep"](self.stem(pixel_values).relu())
        tokens = self.mix(deep.flatten(2).transpose(1, 2))
        return self.head(tokens.transpose(1, 2).unflatten(2, deep.shape[2:]))


class Emits(nn.Module):
    """A network that calls `body` on the images and then emits what `wrap` makes of it, from the module "body"."""

    def __init__(self, body, wrap=lambda x: x):
        super().__init__()
        self.body = body
        self.hook = body.register_forward_hook(lambda _module, _args, out: wrap(out))

    def forward(self, images):
        return self.body(images)


def the_map(body, wrap=lambda x: x, images=IMAGES, **keywords):
    """The map that a tap takes of `body`, whose output `wrap` changes."""
    net = Emits(body, wrap)
    try:
        with FeatureTap(net, ["body"], **keywords) as tap:
            net(images)
            (found,) = tap.pop()
    finally:
        net.hook.remove()
    return found


def conv(channels=6, stride=4):
    return nn.Conv2d(3, channels, 3, stride=stride, padding=1)


class Last(nn.Module):
    """(N, h, w, C), as Swin and others make it: a convolution, a layer norm."""

    def __init__(self, channels=6, norm=True):
        super().__init__()
        self.conv, self.norm = conv(channels), nn.LayerNorm(channels) if norm else nn.Identity()

    def forward(self, images):
        return self.norm(self.conv(images).permute(0, 2, 3, 1))


def test_maps_come_in_the_order_of_the_names_and_carry_the_gradient():
    net = Net()
    tap = FeatureTap(net, ["stages.deep", "stem"])
    net(IMAGES)
    deep, stem = tap.pop()
    assert (deep.shape, stem.shape) == ((2, 6, 4, 6), (2, 4, 8, 12))
    torch.testing.assert_close(stem, net.stem(IMAGES))
    deep.square().sum().backward()
    expected = torch.autograd.grad(net.stages["deep"](net.stem(IMAGES).relu()).square().sum(), net.stem.weight)[0]
    torch.testing.assert_close(net.stem.weight.grad, expected)


def test_a_teachers_maps_are_detached_and_the_tap_adds_no_parameter():
    net = Net()
    before = [id(p) for p in net.parameters()]
    tap = FeatureTap(net, ["stem"], detach=True)
    net(IMAGES)
    (stem,) = tap.pop()
    assert not stem.requires_grad and stem.grad_fn is None
    assert [id(p) for p in net.parameters()] == before and list(net.state_dict()) == list(Net().state_dict())


def test_remove_takes_every_hook_off_and_so_does_the_end_of_a_with_block():
    net = Net()
    with pytest.raises(KeyError), FeatureTap(net, ["stem", "mix"]) as tap:
        net(IMAGES)
        raise KeyError
    tap.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net(IMAGES)
    with pytest.raises(RuntimeError, match="none since the last pop"):
        tap.pop()


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_channels_last_are_turned_by_the_type_of_the_layers():
    """A square map of as many channels as columns: the shape itself says nothing."""
    images = torch.rand(2, 3, 24, 24)
    body = nn.Sequential(Last(6, norm=False), nn.LayerNorm(6))
    found = the_map(body, images=images)
    assert found.shape == (2, 6, 6, 6)
    torch.testing.assert_close(found, body(images).permute(0, 3, 1, 2))
    assert found.stride(1) == 1, "a view"
    first = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(1))
    torch.testing.assert_close(the_map(first.eval(), images=images), first(images))


def test_a_block_of_both_kinds_is_known_by_its_channels_or_asked_for():
    body = Last(7)
    torch.testing.assert_close(the_map(body), body(IMAGES).permute(0, 3, 1, 2))
    square = torch.rand(2, 3, 24, 24)
    with pytest.raises(ValueError, match=r"body \(Last\) emits \(2, 6, 6, 6\).*give layout=\{'body': 'NCHW'\}"):
        the_map(Last(6), images=square)
    torch.testing.assert_close(the_map(body := Last(6), images=square, layout="NHWC"), body(square).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="does not say by its type"):
        the_map(nn.Identity(), images=square)
    assert the_map(nn.Identity(), images=square, layout={"body": "NCHW"}).shape == square.shape


def test_convolutions_whose_output_was_turned_are_found_out_or_refused():
    """What a detection head does: by its type channels first, by its channel count not."""
    with pytest.raises(ValueError, match=r"by its type NCHW, and its channel counts, \[5\], do not settle it"):
        the_map(conv(5), lambda x: x.permute(0, 2, 3, 1))


def test_timms_output_fmt_counts_before_the_types():
    class Format(str):
        pass

    body = Last(6)
    body.output_fmt = Format("NHWC")
    square = torch.rand(2, 3, 24, 24)
    assert the_map(body, images=square).stride(1) == 1
    net = Emits(nn.Sequential(body))
    net.output_fmt = "NCHW"  # of the network around it: further away
    with FeatureTap(net, ["body.0"]) as tap:
        net(square)
        torch.testing.assert_close(tap.pop()[0], body(square).permute(0, 3, 1, 2))


@pytest.mark.parametrize("family", ["convnext", "swin", "swin stage", "segformer", "resnet"])
def test_stages_of_transformers_backbones_are_read_without_being_told(family):
    """Each with as many channels as columns where it can be, so that only what is declared tells them apart."""
    transformers = pytest.importorskip("transformers")
    square = torch.rand(1, 3, 64, 64)
    if family == "convnext":
        net = transformers.ConvNextModel(transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[16, 8], num_stages=2))
        names, expected = ["encoder.stages.0", "encoder.stages.1"], [(1, 16, 16, 16), (1, 8, 8, 8)]
    elif family == "resnet":
        net = transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 8], depths=[1, 1], layer_type="basic")  # type: ignore[call-arg]
        )
        names, expected = ["encoder.stages.0", "encoder.stages.1"], [(1, 16, 16, 16), (1, 8, 8, 8)]
    elif family == "segformer":
        config = transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=8)
        net = transformers.SegformerForSemanticSegmentation(config)
        names = [n for n, m in net.named_modules() if type(m).__name__ == "SegformerLayer"][:2]  # they emit tokens
        expected = [(1, 8, 16, 16), (1, 16, 8, 8)]
    else:
        net = transformers.SwinModel(
            transformers.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        )
        if family == "swin":  # within a stage: tokens
            names, expected = (
                ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0"],
                [(1, 8, 16, 16), (1, 16, 8, 8)],
            )
        else:  # a stage: a tuple, its first entry after the next stage's downsampling
            names, expected = ["encoder.layers.0", "encoder.layers.1"], [(1, 16, 8, 8), (1, 16, 8, 8)]
    with FeatureTap(net.eval(), names) as tap:
        net(square)
        assert [tuple(f.shape) for f in tap.pop()] == expected


@pytest.mark.parametrize("extra", [0, 1])
def test_tokens_become_the_map_that_they_were_by_the_images_size(extra):
    def tokens(x):
        return torch.cat([torch.zeros(2, extra, 6), x.flatten(2).transpose(1, 2)], 1)

    body = conv()
    plain = body(IMAGES)
    found = the_map(body, tokens)
    torch.testing.assert_close(found, plain)
    assert found.stride(1) == 1, "a view of the tokens"


def test_tokens_whose_map_is_not_certain_need_a_size():
    body = conv()

    def five_more(x):
        return torch.cat([torch.zeros(2, 5, 6), x.flatten(2).transpose(1, 2)], 1)

    with pytest.raises(ValueError, match=r"body emits 29 tokens.*images of \(16, 24\).*give size=\(h, w\)"):
        the_map(body, five_more)
    plain = body(IMAGES)
    torch.testing.assert_close(the_map(body, five_more, size=(4, 6)), plain)
    body.num_prefix_tokens = 5  # timm's way
    torch.testing.assert_close(the_map(body, five_more), plain)
    with pytest.raises(ValueError, match=r"size: body emits 29 tokens, which \(4, 8\) does not fit"):
        the_map(body, five_more, size=(4, 8))


@pytest.mark.parametrize(
    "tokens,images,extra,expected",
    [
        (24, (64, 96), (), (4, 6)),
        (25, (64, 96), (), (4, 6)),  # a class token
        (24, (60, 90), (), (4, 6)),  # padded to the patch
        (1369, (518, 518), (), (37, 37)),
        (1374, (518, 518), (5,), (37, 37)),  # and four registers
        (1374, (518, 518), (), None),
        (11, (64, 96), (), None),
        (2, (32, 32), (), (1, 1)),
        (6, (64, 96), (), (2, 3)),
        (1, (64, 64), (), (1, 1)),
        (7, (64, 96), (), (2, 3)),
    ],
)
def test_the_grid_of_tokens_is_the_one_that_fits_a_stride_or_none(tokens, images, extra, expected):
    assert token_grid(tokens, images, extra) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x.mean()), lambda x: [x], lambda x: {"out": x, "aux": -x}, lambda x: {"features": x},
        lambda x: {"attentions": -x, "last_hidden_state": x}, lambda x: ((x, -x), -x),
    ],
    ids=["a tuple", "a list", "a dict with out", "a dict of one", "last_hidden_state", "a tuple in a tuple"],
)  # fmt: skip
def test_the_tensor_is_found_in(wrap):
    body = conv()
    plain = body(IMAGES)
    torch.testing.assert_close(the_map(body, wrap), plain)


def test_a_model_output_is_read_by_last_hidden_state():
    outputs = pytest.importorskip("transformers").modeling_outputs
    body = conv()
    plain = body(IMAGES)
    torch.testing.assert_close(
        the_map(body, lambda x: outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(-x,))), plain
    )


@pytest.mark.parametrize(
    "wrap,error,said",
    [
        (lambda x: {"a": x, "b": x}, TypeError, r"body: expected one tensor .* found \['a', 'b'\]"),
        (lambda x: "map", TypeError, "body: expected a tensor, .* got str"),
        (lambda x: (), TypeError, "body: expected a tensor, .* got tuple"),
        (lambda x: x.mean((2, 3)), ValueError, r"body: expected a map .*got \(2, 6\)"),
        (lambda x: x[None], ValueError, r"body: expected a map .*got \(1, 2, 6, 4, 6\)"),
    ],
)
def test_an_output_that_is_no_map_is_refused_by_name(wrap, error, said):
    with pytest.raises(error, match=said):
        the_map(conv(), wrap)


@pytest.mark.parametrize(
    "keywords,error,said",
    [
        ({"names": "stem"}, TypeError, "names: expected a sequence of module names, got 'stem'"),
        ({"names": []}, TypeError, "names: expected a sequence"),
        ({"names": [3]}, TypeError, "names: expected a sequence"),
        ({"names": [""]}, ValueError, "names: Net has no module ''"),
        ({"names": ["stages.dep"]}, ValueError, r"names: Net has no module 'stages.dep'.*'stages.deep'"),
        ({"names": ["stem", "stem"]}, ValueError, "names: 'stem' stands there twice"),
        ({"layout": "NWHC"}, ValueError, "layout: expected NCHW, NHWC or NLC, got 'NWHC'"),
        ({"layout": {"head": "NCHW"}}, ValueError, "layout: 'head' is none of the names"),
        ({"size": 4}, ValueError, r"size: expected \(h, w\).*got 4"),
        ({"size": (0, 4)}, ValueError, r"size: expected \(h, w\).*got \(0, 4\)"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
        ({"model": nn.DataParallel(Net())}, TypeError, "DataParallel, whose replicas .*DistributedDataParallel"),
    ],
)
def test_bad_arguments_are_refused_by_name(keywords, error, said):
    with pytest.raises(error, match=said):
        FeatureTap(**{"model": Net(), "names": ["stem"], **keywords})


def test_a_layout_of_other_dimensions_than_the_output_is_refused():
    with pytest.raises(ValueError, match=r"layout: body emits \(2, 6, 4, 6\), which is not NLC"):
        the_map(conv(), layout="NLC")


# --- forward passes --------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_last_forward_pass_and_are_handed_over_once():
    net = Net()
    tap = FeatureTap(net, ["stem"])
    net(IMAGES)
    net(IMAGES[:1])
    assert tap.pop()[0].shape[0] == 1
    with pytest.raises(RuntimeError, match="none since the last pop"):
        tap.pop()
    net.stem(IMAGES)  # not the network
    with pytest.raises(RuntimeError, match="none since the last pop"):
        tap.pop()


def test_a_module_that_did_not_run_or_ran_twice_is_an_error_not_a_stale_map():
    class Some(Net):
        def forward(self, images, times=0):
            for _ in range(times):
                self.stages["deep"](self.stem(images))
            return super().forward(images) if not times else self.stem(images)

    net = Some()
    net.spare = nn.Conv2d(1, 1, 1)
    tap = FeatureTap(net, ["stem", "spare"])
    net(IMAGES)
    with pytest.raises(RuntimeError, match="spare did not run in it"):
        tap.pop()
    tap = FeatureTap(net, ["stages.deep"])
    net(IMAGES, times=2)
    with pytest.raises(RuntimeError, match=r"stages.deep ran more than once"):
        tap.pop()
    net(IMAGES)
    assert tap.pop()[0].shape == (2, 6, 4, 6)


def test_nothing_is_kept_when_a_forward_pass_raises_nor_after_pop():
    net = Net()
    tap = FeatureTap(net, ["stem"])
    seen = []

    def note(_module, _args, out):
        seen.append(weakref.ref(out))

    net.stem.register_forward_hook(note)
    stop = net.head.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            net(IMAGES)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    with pytest.raises(RuntimeError, match="none since the last pop"):
        tap.pop()
    stop.remove()
    net(IMAGES)
    (found,) = tap.pop()
    assert seen[-1]() is found
    del found
    gc.collect()
    assert seen[-1]() is None


def test_a_forward_pass_that_returns_nothing_is_no_failure():
    class Nothing(Net):
        def forward(self, images):
            self.stem(images)

    net = Nothing()
    tap = FeatureTap(net, ["stem"])
    assert net(IMAGES) is None
    assert tap.pop()[0].shape == (2, 4, 8, 12)


class Checkpointed(Net):
    reentrant = False

    def forward(self, images):
        return checkpoint(super().forward, images, use_reentrant=self.reentrant)


def test_activation_checkpointing_gives_the_same_gradient_and_leaves_nothing_behind():
    net = Checkpointed()
    tap = FeatureTap(net, ["stages.deep"])
    net(IMAGES)
    (deep,) = tap.pop()
    deep.square().sum().backward()  # runs the modules again
    expected = torch.autograd.grad(net.stages["deep"](net.stem(IMAGES).relu()).square().sum(), net.stem.weight)[0]
    torch.testing.assert_close(net.stem.weight.grad, expected)
    assert not tap._raw
    net.reentrant = True
    with pytest.raises(RuntimeError, match=r"stages.deep runs without gradients .*use_reentrant=False"):
        net(IMAGES.clone().requires_grad_())
    with torch.no_grad():
        net(IMAGES)
    assert tap.pop()[0].shape == (2, 6, 4, 6)


def test_a_copy_of_the_network_has_a_tap_of_its_own_and_no_maps():
    net = Net()
    net.tap = FeatureTap(net, ["stem"])
    net(IMAGES)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not again.tap._raw and again.tap.model is again
        with torch.no_grad():
            again.stem.weight.add_(1)
        again(IMAGES)
        torch.testing.assert_close(again.tap.pop()[0], again.stem(IMAGES))
        again.tap.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())
    torch.testing.assert_close(net.tap.pop()[0], net.stem(IMAGES))


def test_inference_mode_and_autocast_are_taken_as_they_are():
    net = Net()
    tap = FeatureTap(net, ["stem"], detach=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        net(IMAGES)
    (stem,) = tap.pop()
    assert stem.is_inference() and stem.dtype == torch.bfloat16


# --- wrappers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _one_process(tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch.distributed is not built")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("order", ["tap first", "wrapper first"])
def test_under_ddp_the_gradient_is_that_of_the_bare_network(order):
    net = Net()
    bare = copy.deepcopy(net)
    teacher = torch.rand(2, 3, 4, 6)
    tap = FeatureTap(net, ["stages.deep"]) if order == "tap first" else None
    wrapped = nn.parallel.DistributedDataParallel(net)
    tap = tap or FeatureTap(wrapped, ["stages.deep"])
    for network, taps in ((wrapped, tap), (bare, FeatureTap(bare, ["stages.deep"]))):
        (network(pixel_values=IMAGES).square().mean() + cafd_loss(taps.pop(), [teacher])).backward()
    for one, two in zip(net.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.usefixtures("_one_process")
def test_under_fsdp_the_gradient_is_that_of_the_bare_network():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, mesh, teacher = Net(), init_device_mesh("cpu", (1,)), torch.rand(2, 3, 4, 6)
    bare = copy.deepcopy(net)
    for module in (net.stages["deep"], net):
        fully_shard(module, mesh=mesh)
    for network in (net, bare):
        tap = FeatureTap(network, ["stages.deep"])
        (network(pixel_values=IMAGES).square().mean() + cafd_loss(tap.pop(), [teacher])).backward()
    for one, two in zip(net.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), two.grad)


def test_under_torch_compile_maps_come_out_of_one_graph_and_carry_the_gradient():
    net = Net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    tap = FeatureTap(compiled, ["stages.deep", "mix"])
    for height in (16, 32):
        images = torch.rand(2, 3, height, 24)
        compiled(images)
        deep, mix = tap.pop()
        assert deep.shape == mix.shape == (2, 6, height // 4, 6)
        torch.testing.assert_close(deep, net.stages["deep"](net.stem(images).relu()))
        net.zero_grad()
        mix.square().sum().backward()
        assert net.stem.weight.grad.abs().sum() > 0


def test_a_network_compiled_and_run_before_the_tap_says_so_and_what_helps():
    net = torch.compile(Net(), backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default
        net(IMAGES)
        with FeatureTap(net, ["stem"]) as tap:
            net(IMAGES)
            with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False"):
                tap.pop()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        net(IMAGES)
        with FeatureTap(net, ["stem"]) as tap:
            net(IMAGES)
            torch.testing.assert_close(tap.pop()[0], net._orig_mod.stem(IMAGES))


def test_wrappers_within_the_network_are_left_out_of_the_names():
    net = Net()
    net.stages["deep"] = torch.compile(net.stages["deep"], backend="eager")
    tap = FeatureTap(net, ["stages.deep"])
    net(IMAGES)
    torch.testing.assert_close(tap.pop()[0], net.stages["deep"]._orig_mod(net.stem(IMAGES).relu()))


def test_the_images_size_is_that_of_the_first_tensor_of_four_dimensions():
    class Masked(Net):
        def forward(self, mask, pixel_values, target=None):
            return super().forward(pixel_values)

    net = Masked()
    tap = FeatureTap(net, ["mix"])
    net(torch.ones(2, 16, 24), pixel_values=IMAGES, target=SimpleNamespace())
    assert tap.pop()[0].shape == (2, 6, 4, 6)


def test_how_a_module_emits_its_maps_is_found_out_once_for_each_shape(monkeypatch):
    net = Net()
    tap, walks = FeatureTap(net, ["stages.deep", "mix"]), []
    original = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *a, **k: walks.append(self) or original(self, *a, **k))
    for size, known in ((16, False), (16, True), (32, False), (16, True)):
        walks.clear()
        net(torch.rand(2, 3, size, 24))
        assert [tuple(x.shape) for x in tap.pop()] == [(2, 6, size // 4, 6)] * 2
        assert bool(walks) != known
