"""find_sites: the right heads and neurons on models that differ, a reason on those that do not fit, nothing changed."""

import copy

import pytest
import torch
from families import build
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PerceiverConfig,
    PerceiverForSequenceClassification,
)

from hf_kdprune import Plan, apply_plan, find_sites
from hf_kdprune.prune.discovery import say_once, trace_sites

SUPPORTED = ["bert", "roberta", "electra", "distilbert", "deberta_v2", "opt", "llama"]


def linears_of_blocks(model):
    """Paths of the linear layers in the two blocks."""
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".0." in n or ".1." in n)}


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_block_has_its_heads_and_its_neurons(tiny, name):
    model = tiny(name)
    sites = find_sites(model)
    assert [(s.kind, s.layer) for s in sites] == [("attention", 0), ("ffn", 0), ("attention", 1), ("ffn", 1)]
    assert [(s.total, s.width, s.hidden) for s in sites] == [(4, 8, 32), (64, 1, 32)] * 2
    gated = 2 if name == "llama" else 1
    assert [len(s.producers) for s in sites] == [3, gated] * 2
    assert {p for s in sites for p in (*s.producers, *s.consumers)} == linears_of_blocks(model)
    assert len({s.name for s in sites}) == 4
    assert sites[0].units[3].index == 3 and len(sites[1].units) == 64


@pytest.mark.parametrize("name", SUPPORTED)
def test_parameters_add_up_before_and_after_pruning(tiny, name):
    model = tiny(name)
    sites = find_sites(model)
    assert sites.params() == model.num_parameters()
    plan = Plan.random(sites, "macs=0.6", seed=3)
    predicted = sites.params({site: len(kept) for site, kept in plan.kept.items()})
    apply_plan(model, plan)
    assert model.num_parameters() == predicted < sites.params()
    again = find_sites(model)
    assert again.params() == predicted
    assert {s.name: s.total for s in again} == {name: len(kept) for name, kept in plan.kept.items() if kept}


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_any_head_will_do(tiny, auto):
    model = tiny("bert", auto=auto)
    sites = find_sites(model)
    assert [s.total for s in sites] == [4, 64, 4, 64]
    assert sites.params() == model.num_parameters()  # tied weights count once


def test_tied_language_model(tiny):
    model = tiny("opt", auto=AutoModelForCausalLM)
    assert find_sites(model).params() == model.num_parameters()


@pytest.mark.parametrize(("heads", "neurons"), [(1, 1), (1, 3), (16, 60)])
def test_odd_sizes(tiny, heads, neurons):
    sites = find_sites(tiny(num_hidden_layers=1, num_attention_heads=heads, intermediate_size=neurons))
    assert [(s.kind, s.total, s.width) for s in sites] == [("attention", heads, 32 // heads), ("ffn", neurons, 1)]


def test_sdpa_and_eager_see_the_same(tiny):
    assert find_sites(tiny(attention="sdpa")) == find_sites(tiny(attention="eager"))


def test_a_dead_relu_at_the_edge_hides_no_neuron(tiny):
    model = tiny("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias[[0, -1]] = -50
    assert [s.total for s in find_sites(model)] == [4, 64, 4, 64]


def test_real_minilm(minilm_shared, banking):
    sites = find_sites(minilm_shared)
    assert [(s.kind, s.total, s.width, s.layer) for s in sites] == [
        row for i in range(6) for row in (("attention", 12, 32, i), ("ffn", 1536, 1, i))
    ]
    assert sites.params() == minilm_shared.num_parameters()
    assert find_sites(minilm_shared, banking(1, 4)[0], seq_len=8) == sites


def test_a_batch_with_padding_and_labels_serves_as_well_as_the_dummy(tiny, ragged):
    model, batch = tiny(), ragged(1, 4)[0]
    batch = {"labels": torch.zeros(4, dtype=torch.long), **{k: v.flip(0) for k, v in batch.items()}}
    assert find_sites(model, batch) == find_sites(model, seq_len=12)


def test_a_model_whose_input_cannot_be_made_up_asks_for_a_batch():
    config = PerceiverConfig(num_latents=4, d_latents=32, d_model=32, num_self_attends_per_block=2, num_self_attention_heads=4)
    with pytest.raises(ValueError, match="'inputs'.*give batch=, one real batch"):
        find_sites(PerceiverForSequenceClassification(config))


def test_a_model_without_linear_layers_in_its_blocks_is_refused(caplog):
    model = build("squeezebert").train()
    with pytest.raises(ValueError, match="SqueezeBert.* no prunable site.*Give a transformer, or batch="):
        find_sites(model)
    assert model.training and hooks(model) == 0


def test_heads_that_the_whole_model_counts_stay_and_it_is_said(caplog):
    say_once.cache_clear()
    model = build("bloom")  # its position bias has a slope for each head of the config
    assert [s.kind for s in find_sites(model)] == ["ffn", "ffn"]
    assert "h.0.attention and its like stay as they are: a smaller one would not compute the same" in caplog.text


def test_a_model_without_blocks_is_refused(tiny):
    model = tiny(num_hidden_layers=0)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no prunable site"):
        find_sites(model)
    fixed = trace_sites(model)  # it can still be measured
    assert not fixed and fixed.params() == model.num_parameters()


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_a_wrapped_model_is_refused(tiny, wrap):
    with pytest.raises(ValueError, match=f"not {wrap.__name__}: unwrap it first.*model.module"):
        find_sites(wrap(tiny()))


def test_adapters_go_with_the_layers_that_they_adapt(lora):
    model = lora(build("bert"))
    sites = find_sites(model)
    assert [(s.kind, s.total, s.width) for s in sites] == [("attention", 4, 8), ("ffn", 64, 1)] * 2
    assert any("lora_B" in cut.path for cut in sites[0].cuts) and any("lora_A" in cut.path for cut in sites[1].cuts)


def test_grouped_keys_are_one_unit_with_their_queries():
    sites = find_sites(build("llama"))
    assert [(s.kind, s.total, s.width) for s in sites] == [("attention", 2, 16), ("ffn", 64, 1)] * 2


def test_the_one_key_of_all_queries_stays():
    sites = find_sites(build("llama_mqa"))
    assert [(s.kind, s.total, s.width) for s in sites] == [("attention", 4, 8), ("ffn", 64, 1)] * 2
    assert all(not cut.path.endswith(("k_proj", "v_proj")) for s in sites for cut in s.cuts)


def hooks(model):
    """How many hooks are on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiny, training):
    model = tiny().train(training)
    model.bert.embeddings.requires_grad_(False)
    weights = copy.deepcopy(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    find_sites(model)
    assert all(m.training is training for m in model.modules())
    assert hooks(model) == 0
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)  # a seeded run stays what it was
