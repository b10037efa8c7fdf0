"""A plan is for the weights that were ranked; it is read, edited, saved and replayed."""

import copy

import pytest
import torch

from hf_kdprune import Plan, apply_plan, find_sites, gated, score_units
from hf_kdprune.prune.fingerprint import fingerprint
from hf_kdprune.prune.schedule import restate
from hf_kdprune.prune.sites import ranges


@pytest.fixture
def ranked(tiny, ragged):
    """A model and a plan for it."""
    model = tiny()
    return model, score_units(model, None, ragged(2, 4)).plan("macs=0.5")


def test_a_plan_remembers_its_weights_through_a_file(ranked, tmp_path):
    model, plan = ranked
    assert plan.weights == fingerprint(model, find_sites(model)) and len(plan.weights) == 64
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    other = copy.deepcopy(model)
    apply_plan(other, loaded)


@pytest.mark.parametrize("path", ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.1.output.dense"])
def test_other_weights_are_refused_and_left_alone(ranked, path):
    model, plan = ranked
    with torch.no_grad():
        model.get_submodule(path).weight += 1e-3
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="made for other weights .*: rank again"):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match="made for other weights .*: rank again"), gated(model, plan):
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_same_architecture_fine_tuned_otherwise_is_refused(ranked, tiny):
    with pytest.raises(ValueError, match="rank again"):
        apply_plan(tiny(seed=1), ranked[1])


def test_a_plan_that_names_no_weights_fits_any(tiny, ranked):
    plan = Plan.random(find_sites(tiny()), "macs=0.5")
    assert plan.weights == ""
    apply_plan(tiny(seed=1), plan)
    ranked[1].weights = ""  # as the message says
    apply_plan(tiny(seed=1), ranked[1])


def test_a_plan_of_an_earlier_version_has_no_fingerprint(ranked, tmp_path):
    ranked[1].weights = ""
    ranked[1].save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text().replace(', "weights": ""', "")
    assert "weights" not in text
    (tmp_path / "plan.json").write_text(text)
    assert Plan.load(tmp_path / "plan.json") == ranked[1]


def test_half_precision_and_adapters_have_fingerprints_too(tiny, ragged, lora):
    model = lora(tiny()).to(torch.bfloat16)
    plan = score_units(model, None, ragged(2, 4), "magnitude").plan("macs=0.7")
    assert plan.weights
    apply_plan(model, plan)


def test_a_plan_edited_by_hand_is_replayed_and_says_what_it_reaches(ranked, tmp_path):
    model, plan = ranked
    sites = find_sites(model, seq_len=plan.budget["seq_len"])
    plan.sites[0].kept, plan.sites[1].kept = [1, 2], list(range(0, 64, 2))
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    restate(plan, model, None)
    assert plan.budget["reached"] == sites.macs({n: len(k) for n, k in plan.kept.items()}) / sites.macs()
    apply_plan(model, plan)
    assert model.config.kdprune["sites"][plan.sites[0].name]["units"] == 2
    assert model.config.kdprune["sites"][plan.sites[1].name]["units"] == 32


def test_a_plan_prints_as_a_table(ranked):
    _, plan = ranked
    plan.sites[0].kept = [0, 1, 3]
    plan.sites[2].kept = []
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(plan.sites) and "macs=0.5" in lines[0] and "feature_loss" in lines[0]
    assert lines[2].split() == ["0", "attention", "3", "of", "4", "bert.encoder.layer.0.attention", "0-1,", "3"]
    assert lines[4].split() == ["1", "attention", "0", "of", "4", "bert.encoder.layer.1.attention", "none"]
    assert len({line.index("bert.") for line in lines[2:]}) == 1 and max(map(len, lines)) < 128


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], "none"),
        ([4], "4"),
        ([0, 1, 2], "0-2"),
        ([0, 2, 3, 9], "0, 2-3, 9"),
        (range(0, 100, 2), "0, 2, 4, 6, 8, 10, 12, ..., 98"),
    ],
)
def test_indices_are_abbreviated(indices, text):
    assert ranges(list(indices)) == text
