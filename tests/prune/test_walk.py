"""The smallest model that loses no more than asked: found by trying, and what is returned was measured to hold."""

import copy
import math

import pytest
import torch

from hf_kdprune import Plan, apply_plan, find_sites, score_units
from hf_kdprune.layers import match_layers, target_features
from hf_kdprune.prune.judge import feature_error, feature_judge, metric_judge
from hf_kdprune.prune.schedule import Pruning, plan_for_loss, realise
from hf_kdprune.prune.walk import Step, smallest, tightened


def walked(value, allowed, lowest=0.1):
    """Run a walk over a made-up loss; returns the step and the shares that were tried."""
    tried = []

    def attempt(share):
        tried.append(share)
        return Step(share, value(share), None)

    return smallest(attempt, Step(1.0, 0.0, None), allowed, lowest), tried


@pytest.mark.parametrize("edge", [0.1, 0.11, 0.37, 0.5, 0.98, 0.99])
def test_the_smallest_share_that_holds_is_found_in_seven_tries(edge):
    step, tried = walked(lambda share: float(share < edge - 1e-9), 0.5)
    assert step.share == pytest.approx(edge) and step.value == 0
    assert len(tried) <= 7 and len(set(tried)) == len(tried)


def test_a_loss_that_holds_everywhere_goes_to_the_lowest_that_can_be_made():
    step, tried = walked(lambda share: 0.0, 0.5, lowest=0.234)
    assert step.share == pytest.approx(0.24) and min(tried) >= 0.234


def test_a_loss_that_holds_nowhere_keeps_every_unit_and_says_so(caplog):
    step, tried = walked(lambda share: 1.0, 0.5)
    assert step.share == 1 and max(tried) == pytest.approx(0.99)
    assert "nothing can be removed" in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_what_is_returned_was_measured_to_hold_also_where_the_loss_is_ragged(seed):
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(101, generator=draw)
    step, _ = walked(lambda share: 1 - share + 0.3 * float(noise[round(100 * share)]), 0.5)
    assert step.value <= 0.5


def test_nothing_is_tried_where_nothing_can_be_made_smaller():
    step, tried = walked(lambda share: 0.0, 0.5, lowest=1.0)
    assert step.share == 1 and tried == []


def test_a_target_is_tightened_by_what_was_missed():
    asked = []

    def attempt(share):
        asked.append(share)
        return Step(share, 1.25 * share, None)

    assert tightened(attempt, 0.5, 0.1).share == pytest.approx(0.4) and asked == pytest.approx([0.5, 0.4])


def test_a_target_is_never_below_what_can_be_made(caplog):
    step = tightened(lambda share: Step(share, 0.9, None), 0.5, 0.45)
    assert step.share in (0.5, 0.45) and "0.500 of the model's time was asked for, 0.900 was measured" in caplog.text


# ---------------------------------------------------------------------------------------------- what is measured


def test_feature_error_is_its_definition(tiny, ragged, feature_loss):
    model, batches = tiny(), ragged(3, 4)
    matches = match_layers(model, None, batches)
    targets = [target_features(model, batch, matches) for batch in batches]
    smaller = copy.deepcopy(model)
    apply_plan(smaller, Plan.random(find_sites(model), "macs=0.6"))
    expected = feature_loss(smaller, batches, matches, targets, "plain")
    assert feature_error(smaller, model, batches, matches) == pytest.approx(expected, rel=1e-5) and expected > 0.01
    assert feature_error(model, model, batches, matches) == 0


def test_a_teacher_of_another_width_is_brought_into_the_students_space(tiny, ragged):
    model, teacher, batches = tiny(), tiny(hidden_size=48, seed=1), ragged(6, 8)
    matches = match_layers(model, teacher, batches)
    judge = feature_judge(model, teacher, batches, matches)
    assert 0 < judge.before < math.inf and judge.loss(model) == judge.before


@pytest.mark.parametrize(
    ("before", "after", "greater", "loss"),
    [(0.8, 0.76, True, 0.05), (0.8, 0.9, True, -0.125), (2.0, 2.1, False, 0.05), (-4.0, -5.0, True, 0.25)],
)
def test_the_loss_of_a_metric_is_its_relative_change_for_the_worse(before, after, greater, loss):
    judge = metric_judge(lambda model: after, "score", before, greater)
    assert judge.loss(None) == pytest.approx(loss) and judge.before == 0
    assert judge.facts == {"metric": "score", "before": before}


@pytest.mark.parametrize("before", [0.0, float("nan")])
def test_a_metric_of_nothing_has_no_share(before):
    with pytest.raises(ValueError, match="choose another metric_for_best_model"):
        metric_judge(lambda model: 0.0, "score", before, True)


# ---------------------------------------------------------------------------------------------- the whole walk


@pytest.fixture
def ground(tiny, ragged):
    """A model, its scores, calibration batches, and a judge on other batches."""
    model, batches = tiny(), ragged(8, 8)
    matches = match_layers(model, None, batches)
    judge = feature_judge(model, None, ragged(3, 8, seed=1), matches)
    return model, score_units(model, None, batches, matches=matches), batches, judge


@pytest.mark.parametrize("allowed", [0.1, 0.4])
def test_the_smallest_model_within_a_feature_loss(ground, allowed):
    model, scores, batches, judge = ground
    before = copy.deepcopy(model.state_dict())
    pruning = Pruning(f"loss={allowed}", keep=["bert.encoder.layer.0.attention:2"], least=1)
    plan = plan_for_loss(model, scores, batches, pruning, judge)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plan.budget["asked"] == f"loss={allowed}" and plan.budget["loss"] <= allowed
    assert plan.budget["reached"] < 1 and 2 in plan.sites[0].kept and all(s.kept for s in plan.sites)
    smaller = copy.deepcopy(model)
    realise(smaller, model, batches, plan, pruning)
    assert judge.loss(smaller) == pytest.approx(plan.budget["loss"], rel=1e-6)  # the plan that was measured, no other
    tighter = copy.deepcopy(model)
    realise(tighter, model, batches, scores.plan(f"macs={plan.budget['reached'] - 0.04:.4f}"), pruning)
    assert judge.loss(tighter) > 0.9 * allowed  # there was not much left to win


def test_a_looser_loss_makes_a_smaller_model(ground):
    model, scores, batches, judge = ground
    tight, loose = (plan_for_loss(model, scores, batches, Pruning(f"loss={x}"), judge) for x in (0.05, 0.5))
    assert loose.budget["reached"] < tight.budget["reached"]


def test_a_loss_that_another_teacher_exceeds_already_is_refused(ground, tiny, ragged):
    model, scores, batches, _ = ground
    matches = match_layers(model, tiny(seed=3), batches)
    judge = feature_judge(model, tiny(seed=3), batches, matches)
    with pytest.raises(ValueError, match=r"allows a loss of 0\.1; the model as given has .* leave teacher out"):
        plan_for_loss(model, scores, batches, Pruning("loss=0.1"), judge)
