"""Repair: the refit brings the features back on text that it has not seen, and does nothing where it cannot help."""

import copy
import re

import pytest
import torch
from families import build
from torch import nn

from hf_kdprune import Plan, apply_plan, find_sites, repair, score_units
from hf_kdprune.inputs import made_up_inputs
from hf_kdprune.layers import hidden_states, match_layers


def pruned(model, budget="macs=0.5", seed=0):
    """A smaller copy and its sites."""
    smaller = copy.deepcopy(model)
    apply_plan(smaller, Plan.random(find_sites(model), budget, seed=seed))
    return smaller


@torch.no_grad()
def loss_of(feature_loss, smaller, model, batches):
    """The plain feature loss of the smaller model against the other."""
    matches = match_layers(model, None, batches)
    targets = [[hidden_states(model, b)[m.teacher] for m in matches] for b in batches]
    return feature_loss(smaller, batches, matches, targets, "plain")


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_real_minilm_comes_back_on_held_out_sentences(minilm_shared, minilm_copy, banking, feature_loss):
    batches = banking(16, 16)
    fresh = banking(2, 16, start=1000)
    plan = score_units(minilm_shared, None, batches[::4]).plan("macs=0.5")
    apply_plan(minilm_copy, plan, batches[0])
    before = loss_of(feature_loss, minilm_copy, minilm_shared, fresh)
    records = repair(minilm_copy, minilm_shared, batches)
    after = loss_of(feature_loss, minilm_copy, minilm_shared, fresh)
    assert after < 0.7 * before
    assert [r.site for r in records] == [s.name for s in plan.sites]
    for record in records:
        assert not record.accepted or record.after < record.before


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta_v2", "opt", "llama"])
def test_features_come_back_on_any_model(tiny, ragged, feature_loss, name):
    model = tiny(name, num_hidden_layers=1)
    smaller = pruned(model)
    fresh = ragged(4, 16, seed=9)
    before = loss_of(feature_loss, smaller, model, fresh)
    records = repair(smaller, model, ragged(24, 16))
    after = loss_of(feature_loss, smaller, model, fresh)
    assert after < 0.9 * before
    assert len(records) == 2 and any(r.accepted for r in records)


@pytest.mark.parametrize("name", ["albert", "mpnet", "gpt_neox", "falcon", "t5", "bart", "dinov2", "swin", "clip", "wav2vec2"])
@torch.no_grad()
def test_shared_parallel_scaled_and_crossed_projections_come_back_too(name):
    """Layers that run twice, attention beside FFN, a scaled output, an encoder and a decoder, two towers."""
    model = build(name, "eager")
    batches = [drawn_inputs(model, seed) for seed in range(9)]
    smaller = copy.deepcopy(model)
    apply_plan(smaller, Plan.random(find_sites(model), "params=0.85", seed=1))

    def apart():
        pairs = zip(hidden_states(smaller, batches[-1]), hidden_states(model, batches[-1]), strict=True)
        return sum(float((a - b).square().mean() / b.var()) for a, b in pairs)

    before = apart()
    records = repair(smaller, model, batches)
    assert any(r.accepted for r in records) and apart() < 0.7 * before


def drawn_inputs(model, seed):
    """Random inputs of the model's kind: 8 samples."""
    draw, batch = torch.Generator().manual_seed(seed), made_up_inputs(model, 12, 8)
    for name, value in batch.items():
        if value.is_floating_point():
            batch[name] = torch.randn(value.shape, generator=draw)
        elif name.endswith("input_ids"):
            batch[name] = torch.randint(5, 190, value.shape, generator=draw)
    return batch


def test_each_model_runs_once_over_each_batch(tiny, ragged):
    model, passes = tiny(num_hidden_layers=4), []
    smaller = pruned(model)
    for m in (model, smaller):  # passes over single samples look for the sites
        m.bert.embeddings.register_forward_hook(lambda module, args, output, m=m: passes.append((m is model, len(output))))
    repair(smaller, model, ragged(8, 4))
    assert passes.count((True, 4)) == passes.count((False, 4)) == 8


def test_what_fails_half_way_leaves_no_hook_behind(tiny, ragged):
    model, batches = tiny(), ragged(8, 4)
    smaller = pruned(model)
    batches[5] = {**batches[5], "input_ids": batches[5]["input_ids"] + 10**6}
    with pytest.raises(IndexError):
        repair(smaller, model, batches)
    assert all(not part._forward_hooks and not part._forward_pre_hooks for m in (smaller, model) for part in m.modules())


def test_what_another_unit_can_do_as_well_is_made_up_for(tiny, ragged, keep):
    model, batches = tiny(), ragged(16, 16)
    block = model.bert.encoder.layer[1]
    with torch.no_grad():  # neurons 0 and 1 compute the same
        block.intermediate.dense.weight[1] = block.intermediate.dense.weight[0]
        block.intermediate.dense.bias[1] = block.intermediate.dense.bias[0]
    smaller, sites = copy.deepcopy(model), find_sites(model)
    apply_plan(smaller, keep(sites, {sites[3].name: range(1, 64)}))
    (record,) = [r for r in repair(smaller, model, batches) if r.site == sites[3].name]
    assert record.accepted and record.after < 0.05 * record.before


def test_nothing_removed_changes_next_to_nothing(tiny, ragged, keep):
    model, batches = tiny(), ragged(8, 8)
    same = copy.deepcopy(model)
    apply_plan(same, keep(find_sites(same), {}))
    records = repair(same, model, batches)
    for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    assert all(abs(r.before) < 1e-6 and abs(r.after) < 1e-6 for r in records)


def test_a_refit_that_does_not_help_is_not_taken(tiny, ragged, keep):
    model = tiny()
    sites, smaller = find_sites(model), copy.deepcopy(model)
    apply_plan(smaller, keep(sites, {sites[1].name: range(1, 64), sites[3].name: range(1, 64)}))
    before = copy.deepcopy(smaller)
    odd = torch.full((2, 3), 7)  # all that the fit sees is one word; what judges it is language
    batches = [{"input_ids": odd, "attention_mask": torch.ones_like(odd)}] * 7 + ragged(1, 16)
    records = repair(smaller, model, batches)
    refused = [r for r in records if not r.accepted]
    assert sites[3].name in [r.site for r in refused if r.before > 1e-3]
    for record in refused:
        assert record.reason == "the error on held-out tokens did not fall" and not record.after < record.before
        path = next(s.consumers[0] for s in sites if s.name == record.site)
        assert same_weights(before.get_submodule(path), smaller.get_submodule(path))


def test_only_output_projections_change_and_in_place(tiny, ragged):
    model = tiny().train()
    smaller = pruned(model)
    before = copy.deepcopy(smaller)
    parameters = {name: (id(p), p.requires_grad) for name, p in smaller.named_parameters()}
    teacher = copy.deepcopy(model)
    repair(smaller, model, ragged(8, 8))
    assert same_weights(teacher, model)
    assert smaller.training and model.training
    assert {name: (id(p), p.requires_grad) for name, p in smaller.named_parameters()} == parameters
    consumers = {s.consumers[0] for s in find_sites(model)}
    for (name, a), b in zip(before.state_dict().items(), smaller.state_dict().values(), strict=True):
        assert torch.equal(a, b) or name.rsplit(".", 1)[0] in consumers, name
    for m in (smaller, model):
        assert all(not part._forward_hooks and not part._forward_pre_hooks for part in m.modules())


def test_dropout_does_not_reach_the_fit(tiny, ragged):
    model, batches = tiny(), ragged(8, 8)
    smaller = pruned(model)
    trained = copy.deepcopy(smaller).train()
    repair(smaller, model, batches)
    repair(trained, copy.deepcopy(model).train(), batches)
    assert same_weights(smaller, trained)


def test_a_bias_is_never_invented(tiny, ragged):
    model = tiny("llama")
    smaller = pruned(model)
    assert any(r.accepted for r in repair(smaller, model, ragged(24, 16)))
    assert all(m.bias is None for m in smaller.model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_what_stands_in_padding_does_not_matter(tiny, ragged, name):
    model, batches = tiny(name), ragged(8, 8)
    filled = [{**b, "input_ids": b["input_ids"] + 77 * (1 - b["attention_mask"])} for b in batches]
    a = pruned(model)
    b = copy.deepcopy(a)
    repair(a, model, batches)
    repair(b, model, filled)
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(x, y, atol=1e-6), key


def test_labels_are_not_looked_at(tiny, ragged):
    model, batches = tiny(), ragged(8, 4)
    a = pruned(model)
    b = copy.deepcopy(a)
    repair(a, model, batches)
    repair(b, model, [{**x, "labels": torch.tensor([99, -7, 0, 1])} for x in batches])
    assert same_weights(a, b)


def test_an_emptied_model_gets_the_best_biases(tiny, ragged, keep, feature_loss):
    model, batches = tiny(), ragged(8, 16)
    smaller, sites = copy.deepcopy(model), find_sites(model)
    apply_plan(smaller, keep(sites, {s.name: [] for s in sites}))
    before = loss_of(feature_loss, smaller, model, batches)
    assert all(r.accepted for r in repair(smaller, model, batches))
    assert loss_of(feature_loss, smaller, model, batches) < before


def test_nothing_is_left_to_refit_without_a_bias(tiny, ragged, keep):
    model = tiny("llama")
    smaller, sites = copy.deepcopy(model), find_sites(model)
    apply_plan(smaller, keep(sites, {sites[1].name: []}))
    record = repair(smaller, model, ragged(8, 8))[1]
    assert not record.accepted and record.reason == "nothing is left to refit"


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_batches_are_refused(tiny, ragged, count):
    model = tiny()
    with pytest.raises(ValueError, match=f"at least 2 calibration batches, one to judge the other, got {count}"):
        repair(pruned(model), model, ragged(count, 8))


@pytest.mark.parametrize("other", [{"hidden_size": 48}, {"num_hidden_layers": 3}])
def test_a_teacher_of_another_shape_is_refused(tiny, ragged, other):
    smaller = pruned(tiny())
    before = copy.deepcopy(smaller)
    with pytest.raises(ValueError, match="repair refits towards the model before surgery.*give repair a copy"):
        repair(smaller, tiny(**other), ragged(8, 8))
    assert same_weights(before, smaller)


def test_too_few_tokens_are_said(tiny, ragged, caplog):
    model = tiny()
    smaller = pruned(model)
    repair(smaller, model, ragged(2, 2))
    assert re.search(r"repair has \d+ tokens for projections of up to \d+ inputs, and wants \d+ .*as many samples", caplog.text)
    caplog.clear()
    repair(smaller, model, ragged(16, 16))
    assert "tokens for projections" not in caplog.text


def test_what_adapters_add_is_not_fitted_twice(tiny, ragged, keep, lora):
    model = lora(tiny())
    same, batches = copy.deepcopy(model), ragged(8, 8)
    apply_plan(same, keep(find_sites(same), {}))
    records = repair(same, model, batches)
    assert all(abs(r.before) < 1e-6 for r in records)
    for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
