"""Every rival against its paper's formula, written out with loops; and the losses of our own that were tried."""

import math

import numpy as np
import pytest
import torch

from dsct_kernels import tnkd_loss
from dsct_kernels.distill import candidates, rivals

SIZES = [(1, 2, 3, 4), (2, 5, 4, 4), (3, 7, 1, 6)]  # two classes, the usual case, a single row


def pair(size: tuple[int, ...], scale: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(size, generator=g) for _ in range(2))  # type: ignore[return-value]


def labels(size: tuple[int, ...], seed: int = 1, ignored: float = 0.2) -> torch.Tensor:
    n, k, h, w = size
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n, h, w), generator=g)
    return torch.where(torch.rand((n, h, w), generator=g) < ignored, 255, y).to(torch.uint8)


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_is_hintons_divergence_at_every_labelled_pixel(size, tau):
    s, t = pair(size)
    y = labels(size)
    terms = [
        tau**2 * kl(softmax(t[n, :, i, j].double().numpy() / tau), softmax(s[n, :, i, j].double().numpy() / tau))
        for n, i, j in (y != 255).nonzero().tolist()
    ]
    assert rivals.kd(s, t, y, temperature=tau).item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("alpha", "beta", "tau"), [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0)])
def test_dkd_is_the_weighted_sum_of_target_and_non_target_divergence(size, alpha, beta, tau):
    s, t = pair(size)
    y = labels(size)
    terms = []
    for n, i, j in (y != 255).nonzero().tolist():
        k = int(y[n, i, j])
        p_s, p_t = (softmax(z[n, :, i, j].double().numpy() / tau) for z in (s, t))
        rest_s, rest_t = (np.delete(p, k) / (1 - p[k]) for p in (p_s, p_t))
        target = kl(np.array([p_t[k], 1 - p_t[k]]), np.array([p_s[k], 1 - p_s[k]]))
        terms.append(tau**2 * (alpha * target + beta * kl(rest_t, rest_s)))
    found = rivals.dkd(s, t, y, alpha=alpha, beta=beta, temperature=tau).item()
    assert found == pytest.approx(np.mean(terms), rel=1e-4)
    ours = tnkd_loss(s, t, y, alpha=alpha, beta=beta, temperature=tau).item()
    assert found == pytest.approx(ours, rel=1e-4), "TNKD is DKD without the mask"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd_is_the_mean_over_channels_of_divergences_between_position_distributions(size, tau):
    s, t = pair(size)
    n, k, _, _ = size
    terms = [
        tau**2
        * kl(softmax(t[a, c].double().flatten().numpy() / tau), softmax(s[a, c].double().flatten().numpy() / tau))
        for a in range(n)
        for c in range(k)
    ]
    assert rivals.cwd(s, t, temperature=tau).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_cwd_takes_maps_of_two_sizes_at_the_smaller_one():
    s, t = pair((2, 3, 8, 4))
    small = t.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    cells = s.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert rivals.cwd(s, small).item() == pytest.approx(rivals.cwd(cells, small).item(), rel=1e-5)


def test_at_compares_energy_maps_of_unit_length_whatever_the_channels():
    g = torch.Generator().manual_seed(0)
    s = [torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 5, 2, 2, generator=g)]
    t = [torch.randn(2, 6, 4, 4, generator=g), torch.randn(2, 2, 2, 2, generator=g)]
    expected = 0.0
    for a, b in zip(s, t, strict=True):
        squares = []
        for n in range(2):
            q = [(m[n].double() ** 2).sum(0).flatten().numpy() for m in (a, b)]
            q_s, q_t = (v / np.sqrt((v**2).sum()) for v in q)
            squares.append(((q_s - q_t) ** 2).mean())
        expected += np.mean(squares)
    assert rivals.at(s, t).item() == pytest.approx(expected, rel=1e-5)
    assert rivals.at(s, [3 * m for m in s]).item() == pytest.approx(0, abs=1e-9), "the length of a map says nothing"


def test_uniform_is_nothing_for_flat_features_and_grows_as_they_stare_at_one_position():
    flat = torch.ones(2, 4, 3, 3)
    assert rivals.uniform([flat]).item() == pytest.approx(0, abs=1e-6)
    values = []
    for height in (2.0, 6.0):
        stare = torch.zeros(2, 4, 3, 3)
        stare[:, :, 1, 1] = height
        a = softmax(np.array([height] + [0.0] * 8))
        values.append(rivals.uniform([stare]).item())
        mixed = (1 - 1e-6) * a + 1e-6 / 9
        assert values[-1] == pytest.approx(kl(np.full(9, 1 / 9), mixed), rel=1e-4)
    assert values[1] > values[0]


@pytest.mark.parametrize("loss", [rivals.kd, rivals.dkd])
def test_ignored_pixels_count_for_nothing_and_a_map_of_them_gives_zero(loss):
    s, t = pair((2, 5, 4, 4))
    y = labels((2, 5, 4, 4))
    s2 = torch.where((y == 255)[:, None], s + 7 * torch.randn_like(s), s)
    assert loss(s2, t, y).item() == pytest.approx(loss(s, t, y).item(), rel=1e-6)
    assert loss(s, t, torch.full_like(y, 255)).item() == 0


# ------------------------------------------------------------------------------------------------ our own


@pytest.mark.parametrize("size", SIZES)
def test_tnkd_over_positions_with_cwds_weights_is_cwd(size):
    """beta_in = b^T and beta_out = 1 - b^T give back the divergence of the whole row: the algebra of the split."""
    s, t = pair(size)
    y = labels(size, ignored=0.0)
    tau = 2.0
    n, k, _, _ = size
    expected = []
    for a in range(n):
        for c in range(k):
            mine = (y[a] == c).flatten().numpy()
            p_s, p_t = (softmax(z[a, c].double().flatten().numpy() / tau) for z in (s, t))
            total = 0.0
            for part, beta in ((mine, 0.25), (~mine, 2.0)):
                if part.any():
                    total += beta * kl(p_t[part] / p_t[part].sum(), p_s[part] / p_s[part].sum())
            if mine.any() and not mine.all():
                b_s, b_t = p_s[mine].sum(), p_t[mine].sum()
                total += 0.5 * kl(np.array([b_t, 1 - b_t]), np.array([b_s, 1 - b_s]))
            expected.append(tau**2 * total)
    found = candidates.over_positions(s, t, y, alpha=0.5, beta_in=0.25, beta_out=2.0, temperature=tau)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_balanced_kd_is_tnkd_where_all_classes_weigh_the_same(size):
    s, t = pair(size)
    y = labels(size)
    frequency = torch.rand(size[1]) + 0.1
    same = candidates.balanced_kd(s, t, y, frequency, alpha=0.7, beta=1.5, temperature=2.0, power=0.0)
    assert same.item() == pytest.approx(tnkd_loss(s, t, y, alpha=0.7, beta=1.5, temperature=2.0).item(), rel=1e-4)


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_the_split_by_squares_with_the_teachers_masses_adds_up_to_cwd(windows):
    s, t = pair((2, 5, 8, 4))
    whole = candidates.local(s, t, temperature=2.0, windows=windows, mass=1, between=1).item()
    assert whole == pytest.approx(rivals.cwd(s, t, temperature=2.0).item(), rel=1e-4)


@pytest.mark.parametrize(("which", "dim"), [({"positions": 1.0}, (2, 3)), ({"positions": 0.0, "classes": 1.0}, (1,))])
def test_centred_squares_are_what_cwd_and_kd_become_as_the_temperature_grows(which, dim):
    s, t = pair((2, 5, 4, 4))
    d = (s - t).double()
    expected = 0.5 * (d - d.mean(dim, keepdim=True)).square().mean()
    assert candidates.centred(s, t, **which).item() == pytest.approx(expected.item(), rel=1e-5)
    y = torch.zeros(2, 4, 4, dtype=torch.uint8)
    limit = rivals.cwd(s, t, temperature=100.0) if dim == (2, 3) else rivals.kd(s, t, y, temperature=100.0)
    assert limit.item() == pytest.approx(expected.item(), rel=0.05)


def test_a_fixed_teacher_says_the_label_and_all_else_as_before():
    s, t = pair((2, 5, 4, 4))
    y = labels((2, 5, 4, 4), ignored=0.0)
    flat = torch.full((5,), 0.2)
    fixed = t.clone()
    for n, i, j in (y != 255).nonzero().tolist():
        k = int(y[n, i, j])
        others = max(t[n, c, i, j].item() for c in range(5) if c != k)
        fixed[n, k, i, j] = max(t[n, k, i, j].item(), others + 1.5)
    for centre in ("positions", "classes", "both", "no"):
        found = candidates.regress(s, t, y, flat, fix=1.5, centre=centre).item()
        assert found == pytest.approx(candidates.regress(s, fixed, y, flat, centre=centre).item(), rel=1e-5)
    assert (fixed.argmax(1) == y).all()
    plain = candidates.regress(s, t, y, flat).item()
    assert plain == pytest.approx(candidates.centred(s, t).item(), rel=1e-5)


def test_aligned_tnkd_does_not_see_what_is_added_to_a_class_of_a_whole_sample():
    s, t = pair((2, 5, 4, 4))
    y = labels((2, 5, 4, 4))
    moved = s + 3 * torch.randn(2, 5, 1, 1)
    assert candidates.aligned(moved, t, y).item() == pytest.approx(candidates.aligned(s, t, y).item(), rel=1e-4)
    assert candidates.aligned(t + torch.randn(2, 5, 1, 1), t, y).item() == pytest.approx(0, abs=1e-6)
    assert tnkd_loss(moved, t, y).item() != pytest.approx(tnkd_loss(s, t, y).item(), rel=0.02)


def test_jaccard_of_a_certain_student_is_one_minus_its_mean_iou():
    a = torch.randint(4, (2, 6, 6), generator=torch.Generator().manual_seed(3))
    y = labels((2, 4, 6, 6))
    s = 60.0 * torch.nn.functional.one_hot(a, 4).movedim(-1, 1)
    right = [((a == k) & (y == k)).sum() / (((a == k) & (y != 255)) | (y == k)).sum() for k in range(4)]
    assert rivals.jaccard_labels(s, y).item() == pytest.approx(1 - np.mean(right), abs=1e-5)


def test_shares_say_how_much_of_a_cell_is_which_class():
    y = torch.tensor([[[0, 1, 2, 255], [0, 0, 255, 255]]], dtype=torch.uint8)
    share = rivals.shares(y, 3, (1, 2))
    assert share[0, :, 0, 0].tolist() == [0.75, 0.25, 0.0]
    assert share[0, :, 0, 1].tolist() == [0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, y: rivals.kd(s, t, y),
        lambda s, t, y: rivals.dkd(s, t, y),
        lambda s, t, y: rivals.cwd(s, t),
        lambda s, t, y: candidates.over_positions(s, t, y),
        lambda s, t, y: candidates.over_positions(s, t, y, rows="log_probabilities", weights="present"),
        lambda s, t, y: candidates.rows_kl(s, t, over="batch", weights="mass"),
        lambda s, t, y: candidates.balanced_kd(s, t, y, torch.full((5,), 0.2)),
        lambda s, t, y: candidates.local(s, t, windows=2),
        lambda s, t, y: candidates.centred(s, t),
        lambda s, t, y: candidates.aligned(s, t, y),
        lambda s, t, y: candidates.affinity([s], [t], attention=1),
    ],
    ids=[
        "kd",
        "dkd",
        "cwd",
        "over_positions",
        "over_log_probabilities",
        "rows",
        "balanced_kd",
        "local",
        "centred",
        "aligned",
        "affinity",
    ],
)
def test_a_student_that_says_what_the_teacher_says_has_no_loss_and_no_gradient(loss):
    _, t = pair((2, 5, 4, 4))
    s = t.clone().requires_grad_()
    y = labels((2, 5, 4, 4))
    y[0] = 3  # one class everywhere, and four that are absent
    value = loss(s, t, y)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert s.grad.abs().max().item() < 1e-5
