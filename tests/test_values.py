"""Weights, temperatures and ignore_index are values: any kind of number, at every step, in one compiled graph."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dsct_kernels import CAFDLoss, DSCTLoss, TNKDLoss, cafd_loss, channel_attention_map, dsct_loss, tnkd_loss

INF = float("inf")


def problem(k=5, size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(2, k, size, size, generator=g) for _ in range(2))
    y = torch.randint(0, k, (2, size, size), generator=g)
    y[0, 0] = 255
    return s.requires_grad_(), t, y


def features():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 5, 5, generator=g).requires_grad_(), torch.randn(2, 7, 3, 3, generator=g)


KINDS = {
    "float": float,
    "float32": np.float32,
    "float64": np.float64,
    "tensor": torch.tensor,
    "tensor64": lambda x: torch.tensor(x, dtype=torch.float64),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_gives_the_same_loss(backend, kind):
    s, t, y = problem()
    fs, ft = features()
    numbers = {"ce_weight": 0.5, "tnkd_weight": 0.25, "cafd_weight": 2.0, "alpha": 0.75, "beta": 1.5,
               "temperature": 3.0, "channel_temperature": 0.5, "spatial_temperature": 2.0}  # fmt: skip
    want = dsct_loss(s, t, y, fs, ft, **numbers, backend=backend)
    got = dsct_loss(s, t, y, fs, ft, **{k: KINDS[kind](v) for k, v in numbers.items()}, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "ignored", [255, np.int64(255), np.uint8(255), torch.tensor(255), torch.tensor(255, dtype=torch.uint8)]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_kind_of_ignore_index_gives_the_same_loss(backend, ignored):
    s, t, y = problem()
    assert torch.equal(tnkd_loss(s, t, y, ignore_index=ignored, backend=backend), tnkd_loss(s, t, y, backend=backend))


@pytest.mark.parametrize("value,error,match", [
    (True, TypeError, "alpha: expected a number, got bool"),
    ("1", TypeError, "alpha: expected a number, got str"),
    (None, TypeError, "alpha: expected a number, got NoneType"),
    (torch.ones(1), TypeError, r"alpha: expected a number or a 0-d tensor, got a tensor of shape \(1,\)"),
    (torch.tensor(True), TypeError, "alpha: .* got a tensor of shape .*bool"),
    (torch.tensor(-1.0), ValueError, "alpha: expected a finite number >= 0"),
    (np.float32("nan"), ValueError, "alpha: expected a finite number >= 0"),
    (torch.tensor(1.0, requires_grad=True), ValueError, "alpha: .*gradient.*detach"),
])  # fmt: skip
def test_what_is_no_weight_is_refused_by_name(value, error, match):
    s, t, y = problem()
    with pytest.raises(error, match=match):
        tnkd_loss(s, t, y, alpha=value)
    with pytest.raises(error, match=match):
        TNKDLoss(alpha=value)


# --- compiled: one graph for all values ------------------------------------------------------------------------------


def counted(function, dynamic=None):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=frames, fullgraph=True, dynamic=dynamic), frames


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_of_weights_and_temperatures_compiles_once(backend, as_tensor):
    s, t, y = problem()
    y = y.clamp(max=4)
    fs, ft = features()

    def step(w, tau, ignored):
        weights = {"tnkd_weight": w, "cafd_weight": w, "ce_weight": w, "alpha": w}
        temperatures = {"temperature": tau, "channel_temperature": tau, "spatial_temperature": tau}
        return dsct_loss(s, t, y, fs, ft, **weights, **temperatures, ignore_index=ignored, backend=backend).total

    compiled, frames = counted(step)
    for i in range(5):
        values = (0.1 * (i + 1), 1 + 0.3 * i, 255 if i % 2 else i)
        given = [torch.tensor(v) for v in values] if as_tensor else values
        got = torch.autograd.grad(compiled(*given), (s, fs))
        want = torch.autograd.grad(step(*values), (s, fs))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert frames.frame_count <= (
        1 if as_tensor else 2
    )  # of plain numbers torch.compile takes the first for a constant


def test_a_compiled_graph_of_tnkd_alone_has_no_cross_entropy():
    """Where its numbers lie on a GPU nobody can look at a weight, and cross-entropy of weight 0 would be computed."""
    s, t, y = problem()
    seen = []

    def keep(graph, _):
        seen.extend(node for node in graph.graph.nodes if "dsct_kernels.tnkd." in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    for loss in (tnkd_loss, lambda *args: dsct_loss(*args, matched_weight=0, jaccard_weight=0).total):
        torch.compile(loss, backend=keep, fullgraph=True)(s, t, y)
    values = [node.all_input_nodes[3].meta["example_value"] for node in seen]
    assert [tuple(x.shape) for x in values] == [(3,), (4,)]


def test_a_module_whose_attributes_change_compiles_once_even_for_ints():
    s, t, y = problem()
    fs, ft = features()
    criterion = DSCTLoss()
    compiled, frames = counted(criterion)
    for i in range(12):
        criterion.tnkd_weight, criterion.cafd_weight, criterion.temperature = i, 0.1 * i, i + 1
        criterion.ignore_index = i % 5
        got = compiled(s, t, y.clamp(max=4), fs, ft).total
        torch.testing.assert_close(got, criterion(s, t, y.clamp(max=4), fs, ft).total, rtol=1e-5, atol=1e-6)
    assert frames.frame_count <= 2


def test_what_eager_refuses_a_compiled_graph_refuses_too():
    s, t, y = problem()

    def step(w, tau, c):
        return dsct_loss(s, t, y, tnkd_weight=1.0, alpha=w, temperature=tau, class_weight=c, backend="native").total

    ones = torch.ones(5)
    for bad, match in [
        ((-1.0, 2.0, ones), "alpha"),
        ((1.0, 0.0, ones), "temperature"),
        ((1.0, 2.0, -ones), "class_weight"),
    ]:
        compiled, _ = counted(step)
        with pytest.raises(ValueError, match=match):
            compiled(*bad)


def test_features_of_any_size_compile_into_a_bounded_number_of_graphs():
    compiled, frames = counted(lambda a, b: cafd_loss(a, b), dynamic=True)
    for i in range(8):
        a, b = torch.randn(2, 4, 5 + i, 6 + i).requires_grad_(), torch.randn(2, 3, 4 + i, 9 + 2 * i)
        compiled(a, b).backward()
    assert frames.frame_count <= 2


# --- modules ---------------------------------------------------------------------------------------------------------


def test_a_module_checks_an_attribute_as_it_is_set_and_keeps_what_was_set():
    criterion = CAFDLoss(channel_temperature=np.float32(0.5))
    criterion.spatial_temperature = 3
    assert criterion.spatial_temperature == 3 and not criterion.state_dict()
    with pytest.raises(ValueError, match="spatial_temperature: expected a finite number > 0, got -1"):
        criterion.spatial_temperature = -1
    assert copy.deepcopy(criterion).spatial_temperature == 3


def test_modules_are_made_on_meta_and_keep_their_numbers():
    with torch.device("meta"):
        criterion = DSCTLoss(class_weight=torch.tensor([1.0, 2.0]), tnkd_weight=0.5)
    assert criterion.class_weight.is_meta and criterion.tnkd_weight == 0.5
    s, t, y = problem()
    plain = TNKDLoss(temperature=4.0)
    assert torch.equal(plain(s, t, y), tnkd_loss(s, t, y, temperature=4.0))


def test_modules_are_made_under_accelerates_empty_weights():
    accelerate = pytest.importorskip("accelerate", reason="the trainer's extra [train] is not installed")
    with accelerate.init_empty_weights(include_buffers=True):
        criterion = torch.nn.ModuleList([DSCTLoss(class_weight=torch.tensor([1.0, 2.0])), TNKDLoss(), CAFDLoss()])
    assert criterion[0].class_weight.is_meta and criterion[0].matched_temperature == 4.0


# --- traced, faked, mapped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fake_tensors_go_forward_and_backward(backend):
    with FakeTensorMode():
        s = torch.randn(2, 5, 6, 6, requires_grad=True)
        fs = torch.randn(2, 5, 6, 6, requires_grad=True)
        y = torch.zeros(2, 12, 12, dtype=torch.long)
        weights = {"class_weight": torch.ones(5), "alpha": torch.tensor(0.5)}
        dsct_loss(s, s.detach(), y, fs, fs.detach(), **weights, backend=backend).total.backward()
        assert s.grad.shape == s.shape and fs.grad.shape == fs.shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(reduction):
    s, t, y = problem()
    loss = tnkd_loss(s, t, y, reduction=reduction)
    upstream = torch.rand(3, *loss.shape)
    (got,) = torch.autograd.grad(loss, s, upstream, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(loss, s, u, retain_graph=True)[0] for u in upstream])
    torch.testing.assert_close(got, want)


def test_make_fx_of_forward_and_backward_keeps_a_weight_as_an_input():
    s, t, y = problem()
    run = lambda s, w: torch.autograd.grad(tnkd_loss(s, t, y, alpha=w), s)[0]  # noqa: E731
    graph = make_fx(run)(s, torch.tensor(0.5))
    torch.testing.assert_close(graph(s, torch.tensor(2.0)), run(s, torch.tensor(2.0)))


def test_vmap_over_class_weights():
    s, t, y = problem()
    weights = torch.rand(3, 5)
    got = torch.func.vmap(lambda w: dsct_loss(s.detach(), t, y, class_weight=w).total)(weights)
    want = torch.stack([dsct_loss(s.detach(), t, y, class_weight=w).total for w in weights])
    torch.testing.assert_close(got, want)


# --- upstream, second derivatives, the default of ignore_index, features in any form ----------------------------------


@pytest.mark.parametrize("upstream", [INF, -INF, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ignored_pixels_get_nothing_of_an_upstream_that_is_not_finite(backend, reduction, dtype, upstream):
    s, t, y = problem()
    for retain in (False, True):
        leaf = s.detach().to(dtype).requires_grad_()
        loss = tnkd_loss(leaf, t.to(dtype), y, reduction=reduction, backend=backend)
        loss.backward(torch.full_like(loss, upstream), retain_graph=retain)
        ignored = (y == 255).unsqueeze(1).expand_as(leaf)
        assert not leaf.grad[ignored].any() and not leaf.grad[~ignored].isfinite().any()


SECOND = {
    "tnkd": lambda x: tnkd_loss(x, x.detach().flip(0), None),
    "tnkd none": lambda x: tnkd_loss(x, x.detach().flip(0), None, reduction="none").sum(),
    "cafd": lambda x: cafd_loss(x, x.detach().flip(0)),
    "map": lambda x: channel_attention_map(x).square().sum(),
    "dsct": lambda x: dsct_loss(x, x.detach().flip(0), None, x, x.detach().flip(0)).total,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_is_an_error_never_a_gap(name, compiled):
    torch._dynamo.reset()
    run = torch.compile(SECOND[name], fullgraph=True, backend="aot_eager") if compiled else SECOND[name]
    for upstream in (lambda leaf: leaf, lambda leaf: leaf * 2):
        leaf = torch.randn(2, 4, 3, 3).requires_grad_()
        (g,) = torch.autograd.grad(run(upstream(leaf)), leaf, create_graph=True)
        for allow_unused in (True, False):
            with pytest.raises(RuntimeError, match=r"first derivative only|double backward"):
                torch.autograd.grad(g.pow(2).sum(), leaf, allow_unused=allow_unused, retain_graph=True)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_makes_no_second_tensor_of_the_gradients_size(compiled, upstream):
    torch._dynamo.reset()
    s, t, y = problem(size=64)
    run = torch.compile(tnkd_loss, fullgraph=True) if compiled else tnkd_loss
    for _ in range(2):  # the second is compiled already
        loss = run(s, t, y)
        with torch.profiler.profile(profile_memory=True) as profile:
            (grad,) = torch.autograd.grad(loss, s, torch.tensor(upstream))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < grad.numel() * grad.element_size() / 4


def test_the_loss_may_be_changed_in_place_and_its_gradient_is_right():
    s, t, y = problem()
    loss = tnkd_loss(s, t, y)
    loss /= 4
    loss.backward()
    torch.testing.assert_close(s.grad, torch.autograd.grad(tnkd_loss(s, t, y) / 4, s)[0])


@pytest.mark.parametrize("classes", [256, 257, 1000])
def test_where_the_default_of_ignore_index_is_a_class_it_has_to_be_given(classes):
    s, t = torch.randn(4, classes), torch.randn(4, classes)
    y = torch.tensor([255, 1, 2, 255])
    for call in (lambda **kw: tnkd_loss(s, t, y, **kw), lambda **kw: dsct_loss(s, t, y, **kw).total,
                 lambda **kw: TNKDLoss(**kw)(s, t, y), lambda **kw: DSCTLoss(**kw)(s, t, y).total):  # fmt: skip
        with pytest.raises(ValueError, match=r"ignore_index: .*255, is a class"):
            call()
        assert call(ignore_index=255).isfinite() and call(ignore_index=None).isfinite()
    given = tnkd_loss(s, t, y, ignore_index=255)
    torch.testing.assert_close(given, tnkd_loss(s[1:3], t[1:3], y[1:3], ignore_index=None))
    assert tnkd_loss(s, t).isfinite()  # without labels nothing is ignored
    assert tnkd_loss(s[:, :255], t[:, :255], y).isfinite() and TNKDLoss().ignore_index == 255


def test_features_come_in_any_iterable_and_mappings_go_together_by_key():
    fs, ft = features()
    a, b = [fs, fs * 2], [ft, ft * 3]
    want = cafd_loss(a, b)
    keyed = {"x": a[0], "y": a[1]}, {"y": b[1], "x": b[0]}
    for s, t in [(tuple(a), b), (iter(a), (f for f in b)), ({"x": a[0], "y": a[1]}.values(), b), keyed]:
        assert torch.equal(cafd_loss(s, t), want)
    with pytest.raises(ValueError, match=r"teacher_features: expected the keys of student_features, \['x', 'y'\], got"):
        cafd_loss(keyed[0], {"x": b[0]})
    with pytest.raises(TypeError, match="student_features: got a mapping beside features without keys"):
        cafd_loss(keyed[0], b)


def test_dtensors_are_refused_with_what_to_do_instead(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    s, t, y = (x.detach() for x in problem())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        s, t, y, f = (distribute_tensor(x, mesh, [Shard(0)]) for x in (s, t, y, features()[0].detach()))
        for call in (lambda: tnkd_loss(s, t, y), lambda: dsct_loss(s, t, y), lambda: TNKDLoss()(s, t, y)):
            with pytest.raises(TypeError, match=r"student_logits: DTensor .*to_local"):
                call()
        with pytest.raises(TypeError, match=r"student_features: DTensor .*to_local"):
            cafd_loss(f, f)
        local = tnkd_loss(s.to_local(), t.to_local(), y.to_local(), reduction="sum")
        assert local.isfinite()
    finally:
        torch.distributed.destroy_process_group()
