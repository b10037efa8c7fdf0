"""The first loss as a whole: its terms on padded batches, its weights, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from hf_kdprune.distill.head import Head, counts_of
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


MATCHES = [LayerMatch(1, 1, 2 * torch.ones(8)), LayerMatch(2, 2, 4 * torch.ones(8))]
HEAD = Head("single_label")


def batch_of(mask):
    return {"input_ids": torch.ones_like(mask, dtype=torch.long), "attention_mask": mask.long()}


def features(objective, student, teacher, mask, matches=MATCHES):
    batch = batch_of(mask)
    return objective.features_term(student, teacher, matches, batch, counts_of(HEAD, batch))


def test_features_are_squared_differences_over_variance_at_real_positions(outputs):
    student, teacher, mask = outputs
    by_hand = [
        (student.hidden_states[i] - teacher.hidden_states[i])[mask].square().mean() / variance
        for i, variance in ((1, 2.0), (2, 4.0))
    ]
    found = features(Objective(WEIGHTS), student, teacher, mask)
    assert found.item() == pytest.approx(float(sum(by_hand) / 2), rel=1e-6)


@pytest.mark.parametrize("feature_loss", ["mse", "cosine", "relations", "cka"])
def test_padding_does_not_matter(outputs, feature_loss):
    student, teacher, mask = outputs
    objective = Objective(WEIGHTS, feature_loss=feature_loss)
    before = features(objective, student, teacher, mask)
    student.hidden_states[1][0, 3] += 100
    teacher.hidden_states[2][0, 2] -= 100
    assert features(objective, student, teacher, mask) == before


def test_a_part_is_counted_against_the_whole(outputs):
    """Two micro-batches add up to what one batch of both gives."""
    student, teacher, mask = outputs
    batch, objective = batch_of(mask), Objective(WEIGHTS)
    counts = {name: 2 * n for name, n in counts_of(HEAD, batch).items()}
    half = objective.features_term(student, teacher, MATCHES, batch, counts)
    assert half.item() == pytest.approx(features(objective, student, teacher, mask).item() / 2)
    half = objective.logits_term(HEAD, student, teacher, batch, counts)
    assert half.item() == pytest.approx(objective.logits_term(HEAD, student, teacher, batch, counts_of(HEAD, batch)).item() / 2)


def test_a_term_of_weight_zero_needs_no_teacher():
    assert not Objective({"task": 1.0}).needs_teacher and Objective({"logits": 1.0}).needs_teacher
    assert Objective({"auxiliary": 1.0}).needs_features and not Objective({"logits": 1.0}).needs_features


def test_total_is_the_weighted_sum():
    terms = {"task": torch.tensor(3.0), "logits": torch.tensor(5.0), "features": torch.tensor(7.0)}
    assert Objective(WEIGHTS).total(terms).item() == pytest.approx(3 + 2.5 + 14)


def test_teacher_of_other_width_is_projected(outputs):
    student, _, mask = outputs
    draw = torch.Generator().manual_seed(1)
    projection = torch.randn(7, 8, generator=draw)
    wide = torch.randn(3, 4, 6, generator=draw)
    student.hidden_states = (student.hidden_states[0], wide @ projection[:-1] + projection[-1])
    teacher = SimpleNamespace(logits=student.logits, hidden_states=(wide, wide))
    match = [LayerMatch(1, 1, torch.ones(8), projection)]
    assert features(Objective(WEIGHTS), student, teacher, mask, match).item() < 1e-10


def test_a_vocabulary_padded_to_another_size_is_compared_where_both_have_words(outputs):
    student, teacher, mask = outputs
    batch, objective = batch_of(mask), Objective(WEIGHTS)
    counts = counts_of(HEAD, batch)
    expected = objective.logits_term(HEAD, student, teacher, batch, counts)
    teacher.logits = torch.cat([teacher.logits, torch.full((3, 3), 9.0)], 1)
    assert torch.equal(objective.logits_term(HEAD, student, teacher, batch, counts), expected)


def test_judge_leaves_auxiliary_out_and_is_never_empty():
    assert not Objective({**WEIGHTS, "auxiliary": 1.0}).judge().uses("auxiliary")
    assert Objective({"task": 0.0, "auxiliary": 1.0}).judge().uses("task")
