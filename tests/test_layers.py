"""Features and padding, and what the teacher's features look like."""

import pytest
import torch

from hf_kdprune.layers import (
    enough,
    hidden_states,
    inputs_of,
    match_layers,
    project_features,
    real_positions,
    target_features,
)
from hf_kdprune.moments import joint_moments, projected


def test_labels_are_no_inputs(tiny, ragged):
    model, batch = tiny(), ragged(1, 4)[0]
    labelled = {**batch, "labels": torch.tensor([99, -7, 0, 1])}  # these would break the model's loss
    assert inputs_of(labelled).keys() == batch.keys()
    with torch.no_grad():
        states = hidden_states(model, labelled)
    assert [s.shape for s in states] == [(4, 12, 32)] * 3


def test_positions_without_a_mask_are_all_real(ragged):
    batch = ragged(1, 4)[0]
    assert torch.equal(real_positions(batch), batch["attention_mask"].bool())
    assert real_positions({"labels": torch.zeros(4), "input_ids": batch["input_ids"]}).tolist() == [[True] * 12] * 4


@pytest.mark.parametrize("width", [1, 3, 10, 40])
def test_enough_is_enough(ragged, width):
    batches = sorted(ragged(12, 3), key=lambda b: int(b["attention_mask"].sum()))  # short ones first, as in training
    tokens, taken = (sum(int(real_positions(b).sum()) for b in part) for part in (batches, enough(batches, width)))
    assert min(5 * width, tokens) * 0.8 <= taken <= tokens
    assert taken < tokens / 2 or 5 * width > tokens / 3


@torch.no_grad()
def features(model, batches, layer):
    return torch.cat([hidden_states(model, b)[layer][real_positions(b)] for b in batches]).double()


def test_variances_are_those_of_the_real_positions(tiny, ragged):
    model, batches = tiny(), ragged(2, 6)
    for match in match_layers(model, None, batches):
        expected = features(model, batches, match.teacher).var(0, correction=0)
        assert torch.allclose(match.variances.double(), expected, rtol=1e-5)
        assert match.variance == pytest.approx(float(expected.mean()), rel=1e-5)
        assert match.projection is None


def test_another_teacher_of_the_same_width_is_measured_itself(tiny, ragged):
    model, teacher, batches = tiny(), tiny(num_hidden_layers=4, seed=1), ragged(2, 6)
    matches = match_layers(model, teacher, batches, "uniform")
    assert [(m.student, m.teacher) for m in matches] == [(1, 2), (2, 4)]
    expected = features(teacher, batches, 4).var(0, correction=0)
    assert torch.allclose(matches[1].variances.double(), expected, rtol=1e-5)
    targets = target_features(teacher, batches[0], matches)
    with torch.no_grad():
        assert torch.equal(targets[1], hidden_states(teacher, batches[0])[4])


def test_a_wider_teacher_is_brought_into_the_students_space(tiny, ragged):
    model, teacher, batches = tiny(), tiny(hidden_size=48, seed=1), ragged(8, 16)
    matches = match_layers(model, teacher, batches)
    taken = enough(batches, 48)
    for i, match in enumerate(matches):
        wanted, given = features(model, taken, match.student), in_students_space(teacher, taken, matches, i)
        assert given.shape == wanted.shape
        # Random models share nothing but the words that they read; a constant would leave the variance.
        assert float((given - wanted).square().mean()) < 0.9 * float(wanted.var(0, correction=0).mean())
        assert torch.allclose(match.variances.double(), given.var(0, correction=0), rtol=1e-3, atol=1e-5)


def in_students_space(teacher, batches, matches, i):
    """The teacher's features of one mapped layer in the student's space, (tokens, hidden)."""
    return torch.cat([target_features(teacher, b, matches)[i][real_positions(b)] for b in batches]).double()


def test_a_linear_relation_is_found():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=draw, dtype=torch.float64) * 3
    a = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    y = x @ a + 2
    variances, projection = projected(joint_moments(x, y), 6)
    assert variances.shape == (4,) and projection.shape == (7, 4)
    got = projection[:-1].double(), projection[-1].double()
    assert torch.allclose(got[0], a, atol=0.1) and torch.allclose(got[1], torch.full((4,), 2.0).double(), atol=0.2)
    assert torch.allclose(variances.double(), y.var(0, correction=0), rtol=0.05, atol=0.5)


def test_equal_widths_need_no_projection(tiny, ragged):
    model, batches = tiny(), ragged(2, 6)
    matches = match_layers(model, tiny(seed=1), batches, "last")
    with torch.no_grad():
        states = hidden_states(model, batches[0])
    (target,) = project_features(states, matches)
    assert target is states[2]


def test_both_models_keep_their_mode_and_dropout_does_not_reach_the_features(tiny, ragged):
    model, teacher, batches = tiny(), tiny(hidden_size=48), ragged(2, 6)
    expected = match_layers(model, teacher, batches)
    model.train()
    teacher.train()
    for a, b in zip(match_layers(model, teacher, batches), expected, strict=True):
        assert torch.equal(a.variances, b.variances) and torch.equal(a.projection, b.projection)
    assert model.training and teacher.training


def test_features_that_are_no_numbers_are_refused_and_the_mode_is_kept(tiny, ragged):
    teacher = tiny(seed=1).train()
    model = tiny().train()
    with torch.no_grad():
        teacher.bert.encoder.layer[0].output.dense.bias[0] = float("inf")
    with pytest.raises(ValueError, match="layer 1 gave NaN or infinity: check the model"):
        match_layers(model, teacher, ragged(1, 4))
    assert model.training and teacher.training
