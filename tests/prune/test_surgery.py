"""Surgery: the smaller model is the gated one, or nothing has happened."""

import copy
import json

import pytest
import torch
from torch import nn

from hf_kdprune import Plan, apply_plan, find_sites, gated
from hf_kdprune.layers import hidden_states, real_positions

SUPPORTED = [  # with each attention that the class has
    *((name, way) for name in ("bert", "roberta", "electra", "distilbert") for way in ("eager", "sdpa")),
    *((name, way) for name in ("opt", "llama") for way in ("eager", "sdpa")),
    ("deberta_v2", "eager"),
]
LOSSES = {  # what of MiniLM's sites goes: (layer, kind) -> whether all of the site does, beside a random half
    "free shapes": lambda layer, kind: False,
    "no heads in one layer": lambda layer, kind: layer == 2 and kind == "attention",
    "no neurons in one layer": lambda layer, kind: layer == 0 and kind == "ffn",
    "neither in two layers": lambda layer, kind: layer in (1, 5),
    "nothing anywhere": lambda layer, kind: True,
}


@torch.no_grad()
def everything(model, batch):
    """Features of every layer and the logits."""
    return [*hidden_states(model, batch), model(**batch).logits]


def assert_close(got, expected, batch):
    """To 1e-5 of their scale, at real positions."""
    mask = real_positions(batch)
    for a, b in zip(got, expected, strict=True):
        a, b = (x[mask] if x.dim() == 3 else x for x in (a, b))
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def snapshot(model):
    """All that surgery could change: tensors by identity and value, shapes, attributes, modules, hooks, config."""
    return {
        "parameters": [(n, id(p), p.requires_grad, p.shape) for n, p in model.named_parameters()],
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "numbers": [(n, k, v) for n, m in model.named_modules() for k, v in vars(m).items() if type(v) in (int, bool)],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "plan": hasattr(model, "kdprune_plan"),
    }


def half(sites, seed=0):
    """A plan that keeps a random half of each site, so that shapes are odd."""
    return Plan.random(sites, "heads=0.5,ffn=0.49", seed=seed)


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("loss", LOSSES)
def test_real_minilm_is_the_gated_one(minilm_copy, banking, keep, loss, attention):
    model, batch = minilm_copy, banking(1, 6)[0]
    model.set_attn_implementation(attention)
    sites = find_sites(model)
    drawn = Plan.random(sites, "macs=0.5", seed=1).kept
    plan = keep(sites, {s.name: [] if LOSSES[loss](s.layer, s.kind) else drawn[s.name] for s in sites})
    before = everything(model, batch)
    with gated(model, plan, sites):
        expected = everything(model, batch)
    assert float((before[-1] - expected[-1]).abs().max()) > 1e-3  # what goes matters
    apply_plan(model, plan, batch)
    assert_close(everything(model, batch), expected, batch)
    assert model.num_parameters() == sites.params({name: len(kept) for name, kept in plan.kept.items()})


@pytest.mark.parametrize(("name", "attention"), SUPPORTED)
def test_any_model_is_the_gated_one(tiny, ragged, keep, name, attention):
    model, batch = tiny(name, attention), ragged(1, 5)[0]
    sites = find_sites(model)
    drawn = half(sites).kept
    for empty in ((), (0,), (3,), (0, 1, 2, 3)):
        copied = copy.deepcopy(model)
        plan = keep(sites, {s.name: [] if i in empty else drawn[s.name] for i, s in enumerate(sites)})
        with gated(copied, plan, sites):
            expected = everything(copied, batch)
        apply_plan(copied, plan)
        assert_close(everything(copied, batch), expected, batch)


def test_nothing_removed_is_the_same_to_the_last_bit(tiny, ragged, keep):
    model, batch = tiny(), ragged(1, 5)[0]
    before = everything(model, batch)
    apply_plan(model, keep(find_sites(model), {}), batch)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, batch), before, strict=True))


def test_pruned_again(tiny, ragged):
    model, batch = tiny(), ragged(1, 5)[0]
    first = half(find_sites(model))
    apply_plan(model, first)
    sites = find_sites(model)
    second = half(sites, seed=1)
    with gated(model, second, sites):
        expected = everything(model, batch)
    apply_plan(model, second, batch)
    assert_close(everything(model, batch), expected, batch)
    assert find_sites(model).params() == model.num_parameters()
    for site in second.sites:
        assert model.config.kdprune["sites"][site.name]["units"] == len(site.kept)


def test_pruned_again_after_a_layer_was_emptied(tiny, ragged, keep):
    model, batch = tiny(), ragged(1, 5)[0]
    sites = find_sites(model)
    apply_plan(model, keep(sites, {sites[0].name: [], sites[3].name: []}))
    left = find_sites(model)
    assert [s.name for s in left] == [sites[1].name, sites[2].name]
    plan = half(left)
    with gated(model, plan, left):
        expected = everything(model, batch)
    apply_plan(model, plan, batch)
    assert_close(everything(model, batch), expected, batch)
    units = {name: entry["units"] for name, entry in model.config.kdprune["sites"].items()}
    assert units == {sites[0].name: 0, sites[3].name: 0, **{n: len(k) for n, k in plan.kept.items()}}


def test_a_plan_edited_by_hand_is_honoured(tiny, ragged, tmp_path):
    model, batch = tiny(), ragged(1, 5)[0]
    sites = find_sites(model)
    path = tmp_path / "plan.json"
    half(sites).save(path)
    data = json.loads(path.read_text())
    data["sites"][0]["kept"] = [3, 1]  # in no order
    data["sites"][1]["kept"] = [5, 6, 60]
    path.write_text(json.dumps(data, indent=1))
    plan = Plan.load(path)
    with gated(model, plan):
        expected = everything(model, batch)
    weight = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    query = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    apply_plan(model, plan)
    assert_close(everything(model, batch), expected, batch)
    block = model.bert.encoder.layer[0]
    assert torch.equal(block.output.dense.weight, weight[:, [5, 6, 60]])
    assert torch.equal(block.attention.self.query.weight, torch.cat([query[8:16], query[24:32]]))


# ---------------------------------------------------------------------------------------------- still a model


def test_gradients_reach_all_that_is_left(tiny, ragged, keep):
    model, batch = tiny().train(), ragged(1, 5)[0]
    sites = find_sites(model)
    drawn = half(sites).kept
    apply_plan(model, keep(sites, {sites[0].name: [], sites[1].name: drawn[sites[1].name], sites[3].name: []}))
    assert all(m.training for m in model.modules())
    model(**batch, labels=torch.arange(5) % 3).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name
        # A key's bias shifts all scores of a row alike, and softmax forgets it.
        assert not p.numel() or bool(p.grad.any()) or name.endswith("key.bias"), name


def test_frozen_stays_frozen(tiny):
    model = tiny()
    model.bert.encoder.layer[0].requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_plan(model, half(find_sites(model)))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(tiny, training):
    model = tiny().train(training)
    apply_plan(model, half(find_sites(model)))
    assert all(m.training is training for m in model.modules())


def test_shapes_and_numbers_of_the_modules_are_true(tiny, keep):
    model = tiny()
    sites = find_sites(model)
    apply_plan(model, keep(sites, {sites[0].name: [1, 2, 3], sites[1].name: range(9)}))
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (3, 24, 8)
    assert model.kdprune_plan.kept[sites[0].name] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------- refused


def test_a_plan_of_another_model_is_refused(tiny):
    model = tiny()
    untouched = snapshot(model)
    for other in ({"intermediate_size": 56}, {"num_hidden_layers": 3}, {"num_attention_heads": 2}, {"name": "electra"}):
        plan = half(find_sites(tiny(**other)))
        with pytest.raises(ValueError, match="the plan is for another model: .* make a plan for this model"):
            apply_plan(model, plan)
        with pytest.raises(ValueError, match="the plan is for another model"), gated(model, plan):
            pass
    assert snapshot(model) == untouched


@pytest.mark.parametrize("kept", [[0, 0], [4], [-1], [1.5]])
def test_units_that_do_not_exist_are_refused(tiny, keep, kept):
    model = tiny()
    before, sites = snapshot(model), find_sites(model)
    with pytest.raises(ValueError, match=r"layer\.0\.attention: kept must be distinct indices below 4"):
        apply_plan(model, keep(sites, {sites[0].name: kept}))
    assert snapshot(model) == before


def broken(model):
    """Make the model compute something else as soon as its shapes change."""
    dense = model.bert.encoder.layer[1].output.dense
    error = 1e-3 * torch.arange(32)  # no constant: the norm behind would take it out
    return dense.register_forward_hook(lambda module, args, out: out if args[0].shape[-1] == 64 else out + error)


@pytest.mark.parametrize("empty", [False, True])
def test_when_the_check_fails_nothing_has_happened(tiny, ragged, keep, empty):
    model, batch = tiny().train(), ragged(1, 5)[0]
    model.bert.embeddings.requires_grad_(False)
    sites = find_sites(model)
    plan = keep(sites, {s.name: [] for s in sites}) if empty else half(sites)
    hook = broken(model)
    expected = everything(model.eval(), batch)
    model.train()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"surgery must be exact: .* allowed are .*The model was left as it was"):
        apply_plan(model, plan, batch)
    assert snapshot(model) == before
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(everything(model.eval(), batch), expected, strict=True))
    hook.remove()
    apply_plan(model, plan, batch)  # and it can be done for good


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_that_amplifies_the_last_bit_is_told_from_one_that_is_wrong(tiny, ragged, wrong):
    model, batch = tiny(), ragged(1, 5)[0]
    model.classifier.register_forward_hook(lambda module, args, out: torch.sin(3e4 * out))
    if wrong:
        broken(model)
        with pytest.raises(RuntimeError, match="surgery must be exact"):
            apply_plan(model, half(find_sites(model)), batch)
    else:
        apply_plan(model, half(find_sites(model)), batch)


def test_outputs_that_are_no_numbers_do_not_pass(tiny, ragged):
    model = tiny()
    plan = half(find_sites(model))
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="BertForSequenceClassification must give finite outputs"):
        apply_plan(model, plan)


def test_an_interrupt_half_way_leaves_nothing_half_done(tiny, ragged):
    model = tiny()
    plan = half(find_sites(model))

    def interrupt(module, args):
        if args[0].shape[-1] < 64:
            raise KeyboardInterrupt

    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(interrupt)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan)
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------- gates


def test_gates_are_gone_behind_the_context(tiny, ragged):
    model, batch = tiny(), ragged(1, 5)[0]
    full, plan = everything(model, batch), half(find_sites(model))
    before = snapshot(model)
    with gated(model, plan):
        assert not torch.allclose(model(**batch).logits, full[-1], atol=1e-3)
    with pytest.raises(ZeroDivisionError), gated(model, plan):
        raise ZeroDivisionError
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(everything(model, batch), full, strict=True))
