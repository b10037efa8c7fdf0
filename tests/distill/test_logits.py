"""Losses between logits: known values, equality, and the size of the gradient."""

import math

import pytest
import torch

from hf_kdprune.distill.logits import LOGITS_LOSSES, forward_kl, js, reverse_kl


@pytest.fixture
def pair():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=draw).double(), torch.randn(5, 7, generator=draw).double()


@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_zero_at_equality_and_positive_elsewhere(name, pair):
    student, teacher = pair
    loss = LOGITS_LOSSES[name]
    assert loss(student, teacher, 2.0).shape == (5,)
    assert torch.allclose(loss(student, student + 3.0, 2.0), torch.zeros(5).double(), atol=1e-6)  # shifts change nothing
    assert (loss(student, teacher, 2.0) > 0).all()


def test_forward_kl_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_reverse_is_forward_with_roles_exchanged(pair):
    student, teacher = pair
    assert torch.allclose(reverse_kl(student, teacher, 3.0), forward_kl(teacher, student, 3.0))


def test_js_is_symmetric_and_bounded(pair):
    student, teacher = pair
    assert torch.allclose(js(student, teacher, 2.0), js(teacher, student, 2.0), atol=1e-6)
    assert (js(100 * student, 100 * teacher, 1.0) <= math.log(2) + 1e-5).all()


def test_gradient_keeps_its_size_as_temperature_grows(pair):
    """T^2 KL tends to the squared difference of centred logits over twice the classes (Hinton 2015, section 2.1)."""
    student, teacher = pair
    difference = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    limit = difference.square().sum(-1) / 2 / 7
    assert torch.allclose(forward_kl(student, teacher, 1000.0), limit, rtol=2e-2)
