"""What models and units cost, by formula against torch's counter; plans as data."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_kdprune import Plan, apply_plan, find_sites
from hf_kdprune.prune.discovery import trace_sites

SUPPORTED = ["bert", "roberta", "electra", "distilbert", "deberta_v2", "opt", "llama"]


@torch.no_grad()
def counted(model, seq_len):
    """MACs of one pass over one sample, as torch counts them."""
    ids = torch.full((1, seq_len), 7)
    with FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("seq_len", [5, 21])  # sites are traced at 8
def test_macs_are_what_torch_counts(tiny, name, seq_len):
    model = tiny(name)
    assert find_sites(model, seq_len=seq_len).macs() == counted(model, seq_len)


@pytest.mark.parametrize("name", SUPPORTED)
def test_macs_of_a_pruned_model_are_what_torch_counts(tiny, name):
    model = tiny(name)
    sites = find_sites(model, seq_len=21)
    plan = Plan.random(sites, "macs=0.6", seed=3)
    apply_plan(model, plan)
    assert sites.macs(kept={site: len(kept) for site, kept in plan.kept.items()}) == counted(model, 21)
    assert find_sites(model, seq_len=21).macs() == counted(model, 21)


def test_macs_of_an_emptied_model_are_what_torch_counts(tiny, keep):
    model = tiny()
    sites = find_sites(model, seq_len=21)
    apply_plan(model, keep(sites, {s.name: [] for s in sites}))
    left = trace_sites(model, seq_len=21)
    assert left.macs() == sites.macs({s.name: 0 for s in sites}) == counted(model, 21)
    assert left.params() == model.num_parameters()


@pytest.mark.parametrize(("name", "auto"), [("bert", AutoModelForMaskedLM), ("llama", AutoModelForCausalLM)])
def test_macs_of_a_head_that_runs_at_each_token(tiny, name, auto):
    model = tiny(name, auto=auto)
    assert find_sites(model, seq_len=21).macs() == counted(model, 21)


def test_macs_do_not_depend_on_the_attention_implementation(tiny):
    assert find_sites(tiny(attention="sdpa"), seq_len=21).macs() == counted(tiny(attention="eager"), 21)


def test_macs_of_the_real_minilm(minilm_copy):
    minilm_copy.set_attn_implementation("eager")
    assert find_sites(minilm_copy, seq_len=17).macs() == counted(minilm_copy, 17)


def test_price_of_a_unit_as_the_method_states_it(tiny):
    s, d, d_h = 21, 32, 8
    head, neuron = find_sites(tiny(), seq_len=s)[:2]
    gated = find_sites(tiny("llama"), seq_len=s)[1]
    assert head.unit_macs == s * 4 * d * d_h + 2 * s**2 * d_h
    assert neuron.unit_macs == 2 * s * d
    assert gated.unit_macs == 3 * s * d


@pytest.mark.parametrize("name", ["bert", "llama", "deberta_v2"])
@pytest.mark.parametrize("index", [0, 1])
def test_one_unit_less_costs_one_unit_less(tiny, keep, name, index):
    model = tiny(name)
    site = find_sites(model, seq_len=13)[index]
    params, macs = model.num_parameters(), counted(model, 13)
    apply_plan(model, keep(find_sites(model), {site.name: range(1, site.total)}))
    assert params - model.num_parameters() == site.unit_params
    assert macs - counted(model, 13) == site.unit_macs


def test_a_plan_is_read_as_it_was_written(tiny, tmp_path):
    plan = Plan.random(find_sites(tiny()), "macs=0.5")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    for site in plan.sites:
        assert sorted(site.kept + site.removed) == list(range(site.total))
        assert plan[site.name] is site


def test_a_plan_of_a_newer_version_is_refused(tiny, tmp_path):
    path = tmp_path / "plan.json"
    Plan.random(find_sites(tiny()), "macs=0.5").save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match=r"plan\.json has plan version 2; this hf_kdprune reads up to 1: upgrade"):
        Plan.load(path)


def test_a_random_plan_follows_its_seed(tiny):
    sites = find_sites(tiny())
    first, again, other = (Plan.random(sites, "macs=0.5", seed=s) for s in (0, 0, 1))
    assert first == again and first.kept != other.kept
    assert first.importance == "random" and 0.45 < first.budget["reached"] <= 0.5


def test_a_random_plan_spares_neither_heads_nor_neurons(tiny):
    sites = find_sites(tiny())
    plans = [Plan.random(sites, "macs=0.5", seed=seed) for seed in range(40)]
    for kind in ("attention", "ffn"):
        kept = [len(s.kept) / s.total for plan in plans for s in plan.sites if s.kind == kind]
        assert 0.35 < sum(kept) / len(kept) < 0.65
