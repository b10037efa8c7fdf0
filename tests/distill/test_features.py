"""Losses between features: each against its definition in float64, sample by sample, and what padding must not do to it."""

import math
from itertools import product

import pytest
import torch

from hf_kdprune.distill.features import FEATURE_LOSSES

LENGTHS = {"whole": [7, 7, 7, 7, 7], "ragged": [7, 3, 0, 1, 4]}  # real positions of each sample
VARIANCE = 2.5
CASES = [
    (name, widths)
    for name in FEATURE_LOSSES
    for widths in ([(24, 24)] if FEATURE_LOSSES[name].projected else [(24, 24), (20, 36)])
]
RELATION_HEADS = {(24, 24): 12, (20, 36): 4}


def drawn(widths=(24, 24), dtype=torch.float32, lengths="ragged"):
    """Student and teacher features that are alike, and a mask whose padding is on either side."""
    draw = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(5, 7, width, generator=draw, dtype=torch.float64) for width in widths)
    teacher = 0.5 * student[..., torch.arange(widths[1]) % widths[0]] + noise
    count, column = torch.tensor(LENGTHS[lengths])[:, None], torch.arange(7)
    mask = torch.where(torch.arange(5)[:, None] % 2 == 0, column >= 7 - count, column < count)
    return student.to(dtype), teacher.to(dtype), mask


def by_definition(name, student, teacher):
    """The loss of one sample without padding: (seq, hidden) each, float64."""
    if name == "mse":
        return sum(((s - t) ** 2).sum() / len(s) for s, t in zip(student, teacher, strict=True)) / VARIANCE
    if name == "cosine":
        return sum(1 - s @ t / (s @ s * (t @ t)) ** 0.5 for s, t in zip(student, teacher, strict=True))
    if name == "cka":
        if len(student) < 2:
            return 0.0
        x, y = student - student.mean(0), teacher - teacher.mean(0)
        return 1 - (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    heads, loss = RELATION_HEADS[student.shape[1], teacher.shape[1]], 0.0
    for s, t in zip(student.tensor_split(heads, 1), teacher.tensor_split(heads, 1), strict=True):
        p, q = ((x @ x.T / math.sqrt(x.shape[1])).softmax(1) for x in (t, s))
        loss = loss + (p * (p / q).log()).sum() / heads
    return loss


def derivative(loss, student, *rest):
    """The value and the gradient by the student."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest)
    return value.detach(), torch.autograd.grad(value, student)[0]


def expected(name, student, teacher, mask):
    """Value and gradient by definition, float64."""

    def formula(x):
        samples = zip(x, teacher.double(), mask, strict=True)
        return sum((by_definition(name, s[real], t[real]) for s, t, real in samples if real.any()), x.sum() * 0)

    return derivative(formula, student.double())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name, widths", CASES)
def test_it_is_its_definition_summed_over_items(name, widths, lengths):
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        student, teacher, mask = drawn(widths, dtype, lengths)
        value, gradient = derivative(FEATURE_LOSSES[name].loss, student, teacher, mask, VARIANCE)
        wanted, by_autograd = expected(name, student, teacher, mask)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.shape == ()
        assert value.item() == pytest.approx(wanted.item(), rel=near) and wanted > 0.1
        rounding = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else near
        torch.testing.assert_close(gradient.double(), by_autograd, rtol=rounding, atol=near * float(by_autograd.abs().max()))


@pytest.mark.parametrize("name, widths", CASES)
def test_a_batch_is_the_sum_of_its_rows_one_at_a_time(name, widths):
    student, teacher, mask = drawn(widths)
    loss = FEATURE_LOSSES[name].loss
    value, gradient = derivative(loss, student, teacher, mask, VARIANCE)
    alone = 0.0
    for i, real in enumerate(mask):
        rows = (x[i : i + 1, real] for x in (student, teacher, mask))
        part, mine = derivative(loss, *rows, VARIANCE)
        torch.testing.assert_close(gradient[i, real], mine[0], rtol=1e-5, atol=1e-6)
        alone += part.item()
    assert value.item() == pytest.approx(alone, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name, widths", CASES)
def test_padding_may_hold_anything(name, widths):
    student, teacher, mask = drawn(widths)
    loss = FEATURE_LOSSES[name].loss
    value, gradient = derivative(loss, student, teacher, mask, VARIANCE)
    for junk, other in product((math.nan, math.inf, -1e30), repeat=2):
        student[~mask], teacher[~mask] = junk, other
        again, now = derivative(loss, student, teacher, mask, VARIANCE)
        assert torch.equal(again, value) and torch.equal(now, gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_without_a_real_position_it_is_zero_and_has_a_graph(name):
    student, teacher, mask = drawn()
    value, gradient = derivative(FEATURE_LOSSES[name].loss, student, teacher, mask & False, VARIANCE)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_equal_features_are_at_the_minimum(name):
    for dtype in (torch.float32, torch.bfloat16):
        student, _, mask = drawn(dtype=dtype)
        value, gradient = derivative(FEATURE_LOSSES[name].loss, student, student, mask, VARIANCE)
        assert abs(value.item()) <= 1e-6 * int(mask.sum()) and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_the_gradient_goes_to_the_student_alone(name):
    student, teacher, mask = drawn()
    student.requires_grad_(), teacher.requires_grad_()
    FEATURE_LOSSES[name].loss(student, teacher, mask, VARIANCE).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_autocast_does_not_lower_its_precision(name):
    student, teacher, mask = drawn()
    value, gradient = derivative(FEATURE_LOSSES[name].loss, student, teacher, mask, VARIANCE)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert (student[0] @ student[0].T).dtype == torch.bfloat16
        again = FEATURE_LOSSES[name].loss(student, teacher, mask, VARIANCE)
    again.backward()
    assert torch.equal(again, value) and torch.equal(student.grad, gradient)


def test_mse_is_over_the_variance_and_the_others_have_none():
    student, teacher, mask = drawn()
    for name, (loss, *_) in FEATURE_LOSSES.items():
        one, four = (loss(student, teacher, mask, variance).item() for variance in (1.0, 4.0))
        assert four == pytest.approx(one / 4 if name == "mse" else one)


def changed(name, change):
    """The loss before and after a change of the student's features, float64."""
    student, teacher, mask = drawn(dtype=torch.float64)
    return tuple(FEATURE_LOSSES[name].loss(s, teacher, mask, VARIANCE).item() for s in (student, change(student)))


def rotation(width):
    draw = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0]


STRETCH = torch.linspace(0.1, 3, 24, dtype=torch.float64)
SAME = {  # change -> the losses that do not see it
    "rotated": (lambda x: x @ rotation(24), {"cka"}),
    "rotated in each relation head": (lambda x: x @ torch.block_diag(*[rotation(2)] * 12), {"cka", "relations"}),
    "scaled": (lambda x: 3 * x, {"cka", "cosine"}),
    "moved": (lambda x: x + 1, {"cka"}),
    "stretched": (lambda x: x * STRETCH, set()),
}


@pytest.mark.parametrize("name, change", list(product(FEATURE_LOSSES, SAME)))
def test_what_it_does_not_see(name, change):
    before, after = changed(name, SAME[change][0])
    if name in SAME[change][1]:
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert abs(after - before) > 1e-3 * before


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_cka_is_safe_at_any_scale(scale):
    student, teacher, mask = drawn()
    value, gradient = derivative(FEATURE_LOSSES["cka"].loss, scale * student, scale * teacher, mask, VARIANCE)
    wanted, plain = expected("cka", student, teacher, mask)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(scale * gradient.double(), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_cka_of_features_that_do_not_vary():
    student, teacher, mask = drawn(lengths="whole")
    loss, alike = FEATURE_LOSSES["cka"].loss, lambda x: (100 * x[:, :1]).expand_as(x).contiguous()  # its mean rounds
    value, gradient = derivative(loss, student, alike(teacher), mask, VARIANCE)
    assert value == 0 and (gradient == 0).all()  # of which nothing can be learnt
    value, gradient = derivative(loss, alike(student), teacher, mask, VARIANCE)
    assert value == len(mask) and (gradient == 0).all()


def test_relations_of_outliers_are_finite():
    student, teacher, mask = drawn()
    student[:, ::2] *= 1e4
    value, gradient = derivative(FEATURE_LOSSES["relations"].loss, student, teacher, mask, VARIANCE)
    assert value.isfinite() and gradient.isfinite().all() and value > 100
