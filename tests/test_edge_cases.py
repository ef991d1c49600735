"""Every row of the specification's two edge-case tables, through the public functions, on every usable backend."""

import pytest
import torch

from dsct_kernels import channel_attention_map
from tests.helpers import skip_unless_tnkd_serves, strided_copy
from tests.oracle import cafd, check_cafd, check_tnkd, features, problem, tnkd

NAN, INF = float("nan"), float("inf")
LABEL_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


# --- TNKD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype,magnitude", [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e4)]
)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0])
def test_extreme_logits_stay_finite_and_exact(device, backend, dtype, magnitude, temperature):
    student, teacher, target = problem(device, dtype=dtype)
    skip_unless_tnkd_serves(backend, student)
    for x in (student, teacher):
        x.copy_((x.double() / x.double().abs().max() * magnitude).to(dtype))
    loss, grad = check_tnkd(student, teacher, target, backend, temperature=temperature)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype,magnitude", [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4)])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_equal_extremes_keep_their_digits(device, backend, dtype, magnitude, temperature):
    """Many classes at the same extreme: their share is lost where logits of 6e6 meet a logarithm of size 1."""
    student, teacher, target = problem(device, (2, 9, 3, 4), dtype=dtype)
    student, teacher = student.sign() * magnitude, teacher.sign() * magnitude
    loss, grad = tnkd(student, teacher, target, backend, temperature=temperature)
    truth = tnkd(student.double(), teacher.double(), target, "reference", temperature=temperature)
    torch.testing.assert_close(loss.double(), truth[0], rtol=2e-6, atol=0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert (grad.double() - truth[1]).norm() <= tolerance * truth[1].norm()


@pytest.mark.parametrize("margin", [18.0, 110.0, 1000.0, 5000.0])
def test_confident_target_and_large_offset(device, backend, margin):
    """The margins at which one_hot / -1000 mask / log(softmax) forms give inf, NaN, or drop NCKD."""
    student, teacher, target = problem(device)
    for x in (student, teacher):
        x.scatter_add_(1, target.unsqueeze(1), torch.full_like(x[:, :1], margin))
    check_tnkd(student, teacher, target, backend)
    check_tnkd(student + 3 * margin, teacher - 2 * margin, target, backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_gives_zero(device, backend, reduction):
    student, teacher, target = problem(device)
    loss, grad = tnkd(student, teacher, torch.full_like(target, 255), backend, reduction=reduction)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (0, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_gives_zero(device, backend, shape, reduction):
    student, teacher, target = problem(device, shape)
    loss, grad = tnkd(student, teacher, target, backend, reduction=reduction)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert (loss == 0).all() and grad.shape == student.shape


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_data_pixels_contribute_exactly_nothing(device, backend, poison, reduction):
    student, teacher, target = problem(device)
    target[0, 1, 2] = target[1, 2, 3] = 255
    clean = tnkd(student, teacher, target, backend, reduction=reduction)
    student[0, :, 1, 2] = poison
    teacher[1, :, 2, 3] = poison
    loss, grad = tnkd(student, teacher, target, backend, reduction=reduction)
    assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1])
    assert (grad[0, :, 1, 2] == 0).all() and (grad[1, :, 2, 3] == 0).all()


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("at_target", [True, False])
def test_nan_at_a_valid_pixel_is_not_hidden(device, backend, network, at_target):
    student, teacher, target = problem(device)
    x = student if network == "student" else teacher
    klass = (target[0, 1, 2] + (0 if at_target else 1)) % x.shape[1]
    x[0, klass, 1, 2] = NAN
    assert tnkd(student, teacher, target, backend)[0].isnan()
    per_pixel = tnkd(student, teacher, target, backend, reduction="none")[0]
    assert per_pixel.isnan().sum() == 1 and per_pixel[0, 1, 2].isnan()


@pytest.mark.parametrize("classes", [6, 19, 150])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_teachers_nan_is_not_hidden_without_labels(device, backend, classes, layout):
    """It is no argmax that anyone should compare with."""
    student, teacher, _ = problem(device, (1, classes, 4, 8))
    for poisoned in (1, classes - 1):
        bad = strided_copy(teacher.clone(), layout)
        bad[0, poisoned, 1, 2] = NAN
        per_pixel = tnkd(strided_copy(student, layout), bad, None, backend, reduction="none")[0]
        assert per_pixel[0, 1, 2].isnan() and per_pixel.isnan().sum() == 1


@pytest.mark.parametrize("absent", ["other", "target", "all others"])
def test_class_at_minus_infinity_in_both_is_absent(device, backend, absent):
    student, teacher, target = problem(device)
    index = target.unsqueeze(1) if absent == "target" else (target.unsqueeze(1) + 1) % 5
    for x in (student, teacher):
        if absent == "all others":
            x.masked_fill_(torch.ones_like(x, dtype=torch.bool).scatter_(1, target.unsqueeze(1), False), -INF)
        else:
            x.scatter_(1, index, -INF)
    loss, grad = check_tnkd(student, teacher, target, backend)
    assert loss.isfinite() and grad.isfinite().all()
    if absent == "other":  # the same loss as with the class taken out: here always class 4
        five, four = (problem(device, seed=1)[i][:, :5].clone() for i in (0, 1))
        target = target % 4
        without = tnkd(five[:, :4], four[:, :4], target, backend)[0]
        five[:, 4] = four[:, 4] = -INF
        torch.testing.assert_close(tnkd(five, four, target, backend)[0], without)


@pytest.mark.parametrize("ignore_index", [0, -1, -100, 255, None])
@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_every_ignore_index_and_label_dtype(device, backend, ignore_index, dtype):
    student, teacher, target = problem(device)
    fits = ignore_index is None or torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    if ignore_index is not None and fits:
        target[:, 0] = ignore_index
    loss, grad = check_tnkd(student, teacher, target.to(dtype), backend, ignore_index=ignore_index)
    if ignore_index is not None and fits:
        assert (grad[:, :, 0] == 0).all()
        rest = tnkd(student[:, :, 1:], teacher[:, :, 1:], target[:, 1:], backend, ignore_index=ignore_index)[0]
        torch.testing.assert_close(loss, rest)


@pytest.mark.parametrize("label", [5, -1, 127, -128])
def test_label_out_of_range(device, backend, label, monkeypatch):
    student, teacher, target = problem(device)
    target[1, 2, 0] = label
    message = rf"target: label {label} at position \(1, 2, 0\) is outside \[0, 5\)"
    for dtype in (torch.int8, torch.int64):
        if device == "cpu" and backend != "triton":
            with pytest.raises(ValueError, match=message):
                tnkd(student, teacher, target.to(dtype), backend)
        elif device == "cuda":
            assert tnkd(student, teacher, target.to(dtype), backend)[0].isnan()
            per_pixel = tnkd(student, teacher, target.to(dtype), backend, reduction="none")[0]
            assert per_pixel.isnan().sum() == 1
            monkeypatch.setenv("DSCT_KERNELS_CHECK", "1")
            with pytest.raises(ValueError, match=message):
                tnkd(student, teacher, target.to(dtype), backend)
            monkeypatch.delenv("DSCT_KERNELS_CHECK")


def test_two_classes_have_no_nckd(device, backend):
    student, teacher, target = problem(device, (2, 2, 3, 4))
    loss, grad = tnkd(student, teacher, target, backend, alpha=0.0, beta=7.0)
    assert loss == 0 and (grad == 0).all()
    check_tnkd(student, teacher, target, backend)


def test_identical_networks_have_no_loss(device, backend):
    student, _, target = problem(device)
    loss, grad = tnkd(student, student.clone(), target, backend)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


def test_without_labels_the_teacher_decides_and_ties_go_to_the_smallest_index(device, backend):
    student, teacher, _ = problem(device)
    teacher[:, 3] = teacher[:, 1] = teacher.amax(1)  # a tie for the largest
    target = teacher.argmax(1)
    assert ((target == 1) | (target < 1)).all()
    unlabelled = tnkd(student, teacher, None, backend, ignore_index=1)  # ignore_index does not apply
    labelled = tnkd(student, teacher, target, backend, ignore_index=None)
    assert torch.equal(unlabelled[0], labelled[0]) and torch.equal(unlabelled[1], labelled[1])


# --- CAFD ------------------------------------------------------------------------------------------------------------


def test_all_zero_features(device, backend):
    zero, other = torch.zeros(2, 6, 5, 4, device=device), features(device)[0]
    uniform = torch.full((2, 5, 4), 1 / 20, device=device)
    torch.testing.assert_close(channel_attention_map(zero, backend=backend), uniform)
    check_cafd(zero, other, backend)
    check_cafd(other, zero, backend)
    assert abs(cafd(zero, zero.clone(), backend)[0]) <= 1e-6


@pytest.mark.parametrize(
    "dtype,magnitude", [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e4)]
)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_extreme_features_stay_finite_and_exact(device, backend, dtype, magnitude, temperature):
    student, teacher = features(device, dtype=dtype)
    if backend == "triton":
        skip_unless_tnkd_serves(backend, student)
    for x in (student, teacher):
        x.copy_((x.double() / x.double().abs().max() * magnitude).to(dtype))
    loss, grad = check_cafd(student, teacher, backend, channel_temperature=temperature, spatial_temperature=temperature)
    assert loss.isfinite() and grad.isfinite().all()


def test_one_hot_attention(device, backend):
    student, teacher = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 3, 4, 4, device=device)
    student[:, :, 0, 0] = teacher[:, :, 3, 3] = 500.0
    loss, grad = check_cafd(student, teacher, backend)
    assert loss.isfinite() and grad.isfinite().all() and loss > 10


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 6, 1, 1), (2, 1, 1, 1), (0, 6, 5, 4)])
def test_degenerate_shapes(device, backend, shape):
    student, teacher = features(device, shape)
    loss, grad = check_cafd(student, teacher, backend) if shape[0] else cafd(student, teacher, backend)
    assert grad.shape == student.shape
    if shape[0] == 0 or shape[2:] == (1, 1):
        assert abs(loss) <= 1e-6
    assert cafd(student, teacher, backend, reduction="none")[0].shape == (shape[0],)
    assert cafd(student, teacher, backend, reduction="sum")[0].shape == ()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("network", [0, 1])
def test_nan_and_inf_in_features_are_not_hidden(device, backend, poison, network):
    pair = features(device)
    pair[network][1, 2, 3, 1] = poison
    assert cafd(*pair, backend)[0].isnan()
    per_sample = cafd(*pair, backend, reduction="none")[0]
    assert per_sample[1].isnan() and per_sample[0].isfinite()


def test_identical_features_have_no_loss(device, backend):
    student = features(device)[0]
    loss, grad = cafd(student, student.clone(), backend)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


def test_channel_order_does_not_matter(device, backend):
    student, teacher = features(device)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    loss = cafd(student, teacher, backend)[0]
    torch.testing.assert_close(cafd(student[:, order], teacher, backend)[0], loss)
    torch.testing.assert_close(cafd(student, teacher[:, order], backend)[0], loss)


def test_teacher_tokens_are_read_in_place(device, backend):
    student, teacher = features(device)
    tokens = teacher.flatten(2).transpose(1, 2).contiguous()  # (N, L, C)
    viewed = tokens.transpose(1, 2).unflatten(2, (5, 4))
    assert viewed.data_ptr() == tokens.data_ptr()
    check_cafd(student, viewed, backend)
    torch.testing.assert_close(cafd(student, viewed, backend)[0], cafd(student, teacher, backend)[0])


def test_features_of_one_column(device, backend):
    """Width 1, whose stride says nothing: tokens as (N, C, L, 1), and a column of a channels_last picture."""
    student, teacher = (x.repeat(1, 8, 1, 1)[:, :8] for x in features(device))
    tokens = student.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(-1)
    assert tokens.stride(1) == tokens.stride(3) == 1
    check_cafd(tokens, teacher.flatten(2).unsqueeze(-1), backend)
    pictures = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    check_cafd(*(x[..., 1:2] for x in pictures), backend)


@pytest.mark.parametrize("student_size,teacher_size", [((6, 6), (3, 3)), ((3, 5), (7, 4)), ((4, 4), (5, 9))])
def test_maps_of_different_sizes(device, backend, student_size, teacher_size):
    student = features(device, (2, 3, *student_size))[0]
    teacher = features(device, (2, 8, *teacher_size), seed=1)[0]
    check_cafd(student, teacher, backend)
