"""The first loss as a whole: its terms on padded batches, its weights, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from hf_kdprune.distill.auxiliary import AuxiliaryClassifiers
from hf_kdprune.distill.objective import Objective
from hf_kdprune.layers import LayerMatch

WEIGHTS = {"task": 1.0, "logits": 0.5, "features": 2.0, "auxiliary": 0.0}


@pytest.fixture
def outputs():
    """Student and teacher outputs of a batch of 3 x 4 positions, the last two of row 0 padding."""
    draw = torch.Generator().manual_seed(0)

    def one():
        states = tuple(torch.randn(3, 4, 8, generator=draw) for _ in range(3))
        return SimpleNamespace(logits=torch.randn(3, 5, generator=draw), hidden_states=states)

    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    return one(), one(), mask


MATCHES = [LayerMatch(1, 1, 2 * torch.eye(8)), LayerMatch(2, 2, 4 * torch.eye(8))]


def test_features_are_squared_differences_over_variance_at_real_positions(outputs):
    student, teacher, mask = outputs
    terms = Objective(WEIGHTS).taught_terms(student, teacher, MATCHES, mask)
    by_hand = [
        (student.hidden_states[i] - teacher.hidden_states[i])[mask].square().mean() / variance
        for i, variance in ((1, 2.0), (2, 4.0))
    ]
    assert terms["features"].item() == pytest.approx(float(sum(by_hand) / 2), rel=1e-6)


@pytest.mark.parametrize("feature_loss", ["mse", "cosine"])
def test_padding_does_not_matter(outputs, feature_loss):
    student, teacher, mask = outputs
    objective = Objective(WEIGHTS, feature_loss=feature_loss)
    before = objective.taught_terms(student, teacher, MATCHES, mask)
    student.hidden_states[1][0, 3] += 100
    teacher.hidden_states[2][0, 2] -= 100
    after = objective.taught_terms(student, teacher, MATCHES, mask)
    assert after["features"] == before["features"]


def test_terms_without_weight_are_not_computed(outputs):
    student, teacher, mask = outputs
    objective = Objective({**WEIGHTS, "features": 0.0})
    student.hidden_states = None
    assert set(objective.taught_terms(student, teacher, MATCHES, mask)) == {"logits"}
    assert not Objective({"task": 1.0}).needs_teacher


def test_total_is_the_weighted_sum():
    terms = {"task": torch.tensor(3.0), "logits": torch.tensor(5.0), "features": torch.tensor(7.0)}
    assert Objective(WEIGHTS).total(terms).item() == pytest.approx(3 + 2.5 + 14)


def test_teacher_of_other_width_is_projected(outputs):
    student, _, mask = outputs
    draw = torch.Generator().manual_seed(1)
    projection = torch.randn(7, 8, generator=draw)
    wide = torch.randn(3, 4, 6, generator=draw)
    student.hidden_states = (None, wide @ projection[:-1] + projection[-1])
    teacher = SimpleNamespace(logits=student.logits, hidden_states=(None, wide))
    match = [LayerMatch(1, 1, torch.eye(8), projection)]
    assert Objective(WEIGHTS).taught_terms(student, teacher, match, mask)["features"].item() < 1e-10


def test_judge_leaves_auxiliary_out_and_is_never_empty():
    assert not Objective({**WEIGHTS, "auxiliary": 1.0}).judge().uses("auxiliary")
    assert Objective({"task": 0.0, "auxiliary": 1.0}).judge().uses("task")


def test_auxiliary_classifiers_read_real_positions_only(outputs):
    student, _, mask = outputs
    classifiers = AuxiliaryClassifiers(2, 8, 5)
    before = classifiers(student.hidden_states[1:], mask)
    assert before.shape == (2, 3, 5)
    student.hidden_states[1][0, 2:] = 1e6
    assert torch.equal(classifiers(student.hidden_states[1:], mask), before)
