"""scripts/benchmarks/peers: each peer by its own formula on a small case, and all of them within a budget."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from families import build
from torch import nn

from hf_kdprune import apply_plan
from hf_kdprune.layers import real_positions

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

from peers import PEERS
from peers.common import activations, channels, frozen_copy, gate_gradients, limit_of, plan_of, prunable, task_losses
from peers.flap import compensate, fluctuations, input_moments, standardised
from peers.kprune import LAMBDA, divergence, knowledge, reconstruction, survivors
from peers.kwon import rearranged, sample_gradients, search
from peers.kwon_tuning import rescale, scales
from peers.minitron import activation_norms
from peers.streams import sublayer_sums

FAMILIES = ["bert", "llama"]


@pytest.fixture
def labelled(ragged):
    """Batches with labels of three classes for BERT, and without for Llama, which makes its own."""

    def make(name, count=3, size=16):
        batches, draw = ragged(count, size), torch.Generator().manual_seed(1)
        if name == "llama":
            return batches
        return [{**b, "labels": torch.randint(0, 3, (size,), generator=draw)} for b in batches]

    return make


def inputs(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def one(batch, row):
    """One sample without its padding, with the labels that its model computes a loss from."""
    length = int(batch["attention_mask"][row].sum())
    sample = {k: v[row : row + 1, :length] for k, v in inputs(batch).items()}
    labels = batch["labels"][row : row + 1] if "labels" in batch else sample["input_ids"]
    return {**sample, "labels": labels}


def gated_gradients(model, site, batches):
    """Derivative of the model's own loss by gates of one site, a sample at a time: (samples, units)."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            gate = torch.ones(site.total, requires_grad=True)
            hook = model.get_submodule(site.consumers[0]).register_forward_pre_hook(
                lambda module, args, gate=gate: (args[0] * gate.repeat_interleave(site.width),)
            )
            (gradient,) = torch.autograd.grad(model(**one(batch, row)).loss, gate)
            hook.remove()
            found.append(gradient)
    return torch.stack(found)


@pytest.mark.parametrize("budget", ["macs=0.6", "params=0.85"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_meets_a_budget_and_leaves_the_model(labelled, name, family, budget):
    if name == "torch_pruning":
        pytest.importorskip("torch_pruning")
    if (name, family) == ("torch_pruning", "llama"):
        pytest.skip("refused, see below")
    model, batches = build(family, attention="sdpa"), labelled(family)
    before = copy.deepcopy(model.state_dict())
    at = PEERS[name](model, batches, seed=0)
    smaller = at(budget)
    assert all(torch.equal(before[key], now) for key, now in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not hasattr(model, "kdprune_plan")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    counts, share = budget.split("=")
    sites = prunable(model, batches)
    left = getattr(sites, counts)({s.name: len(s.kept) for s in smaller.kdprune_plan.sites}) / getattr(sites, counts)()
    assert left == pytest.approx(smaller.kdprune_plan.budget["reached"]) and 0.9 * float(share) < left <= float(share)
    if counts == "params":
        added = sum(p.numel() for n, p in smaller.named_parameters() if n not in before)  # FLAP's biases in Llama
        assert sum(p.numel() for p in smaller.parameters()) - added == sites.params(
            {s.name: len(s.kept) for s in smaller.kdprune_plan.sites}
        )
    assert bool(smaller(**inputs(batches[0])).logits.isfinite().all())
    again = at(budget)
    assert all(torch.equal(x, y) for x, y in zip(smaller.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", [n for n in PEERS if n != "torch_pruning"])
def test_what_stands_in_padding_does_not_matter(labelled, name):
    model, batches = build("bert"), labelled("bert")
    filled = [{**b, "input_ids": b["input_ids"] + 77 * (1 - b["attention_mask"])} for b in batches]
    smaller, other = (PEERS[name](model, b, seed=0)("macs=0.6") for b in (batches, filled))
    assert smaller.kdprune_plan.kept == other.kdprune_plan.kept
    for x, y in zip(smaller.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(x, y, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_single_samples(labelled, family):
    model, batches = build(family), labelled(family, 2, 5)
    sites = prunable(model, batches)
    gradients = sample_gradients(model, sites, batches)
    for site in sites:
        expected = gated_gradients(model, site, batches).double()
        assert torch.allclose(gradients[site.name], expected, atol=1e-5 * float(expected.abs().max()) + 1e-7)


def test_search_is_the_best_of_all_pairs_of_numbers(labelled):
    model, batches = build("bert"), labelled("bert")
    sites = prunable(model, batches)
    fisher = {name: g.square().sum(0) for name, g in sample_gradients(model, sites, batches).items()}
    limit = limit_of("macs=0.6", sites)
    kept = search(sites, fisher, limit)
    worth = sum(float(fisher[name][units].sum()) for name, units in kept.items())
    heads, neurons = (
        torch.cat([fisher[s.name] for s in sites if s.kind == kind]).sort(descending=True).values
        for kind in ("attention", "ffn")
    )
    costs = [next(s.unit_macs for s in sites if s.kind == kind) for kind in ("attention", "ffn")]
    room = limit.allowed(sites) - sites.other_macs
    pairs = [(h, n) for h in range(len(heads) + 1) for n in range(len(neurons) + 1) if h * costs[0] + n * costs[1] <= room]
    assert worth == pytest.approx(max(float(heads[:h].sum() + neurons[:n].sum()) for h, n in pairs))
    assert sites.macs({name: len(units) for name, units in kept.items()}) <= limit.allowed(sites)


def test_rearrangement_removes_what_cancels_out():
    gradients = torch.tensor([[1.0, -1.1, 1.05, 0.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    assert rearranged(gradients, [1, 3]) == [0, 3]  # 0 and 2 are the least by themselves; 1 and 2 undo each other
    assert rearranged(gradients, []) == [] and rearranged(gradients, [0, 1, 2, 3]) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_finds_the_scale_of_a_unit(labelled, family):
    model, batches = build(family), labelled(family, 4, 32)
    sites, other = prunable(model, batches), frozen_copy(model)
    for site, unit in ((sites[2], 1), (sites[3], 7)):
        other.get_submodule(site.consumers[0]).weight[:, channels([unit], site.width)] *= 0.25
        weight = other.get_submodule(site.consumers[0]).weight
        values = scales(sublayer_sums(other, model, batches, site.parts[0]), weight, site, list(range(site.total)))
        expected = torch.ones(site.total, dtype=torch.float64)
        expected[unit] = 4
        off = (values - expected).abs()  # LSMR stops early where a neuron hardly ever fires
        assert float(off[unit]) < 0.05 and float(off.median()) < 0.002
        weight[:, channels([unit], site.width)] *= 4
    weight = other.get_submodule(sites[2].consumers[0]).weight
    weight[:, channels([1], sites[2].width)] *= 0.05  # 20 is out of range
    sums = sublayer_sums(other, model, batches, sites[2].parts[0])
    assert scales(sums, weight, sites[2], list(range(sites[2].total))) is None


def test_tuning_leaves_removed_units_at_zero_and_the_first_attention_alone(labelled, keep):
    model, batches = build("bert"), labelled("bert")
    sites, tuned = prunable(model, batches), frozen_copy(model)
    plan = keep(sites, {sites[0].name: [0, 2], sites[3].name: range(10, 64)})
    rescale(tuned, model, batches, sites, plan)
    first, last = (tuned.get_submodule(sites[i].consumers[0]).weight for i in (0, 3))
    assert not first[:, 8:16].any() and torch.equal(first[:, :8], model.get_submodule(sites[0].consumers[0]).weight[:, :8])
    assert not last[:, :10].any()
    ratio = last[:, 10:] / model.get_submodule(sites[3].consumers[0]).weight[:, 10:]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4) and not torch.allclose(ratio, torch.ones(()), atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_knowledge_is_its_formula(labelled, family):
    model, batches = build(family), labelled(family, 2, 4)
    sites, other = prunable(model, batches), frozen_copy(model)
    other.get_submodule(sites[1].consumers[0]).weight[:, :32] = 0  # something to diverge by
    teacher = frozen_copy(model)
    scores = knowledge(other, teacher, sites, batches)
    rows = [row for b in batches for row in [{k: v[i : i + 1] for k, v in b.items()} for i in range(4)]]
    for site in sites:
        linear = other.get_submodule(site.consumers[0])
        gates, seen = [], []
        for row in rows:
            gate = torch.ones(site.total * site.width, requires_grad=True)

            def multiply(module, args, gate=gate, row=row, seen=seen):
                seen.append(args[0].detach()[real_positions(row)])
                return (args[0] * gate,)

            hook = linear.register_forward_pre_hook(multiply)
            gates.append(torch.autograd.grad(divergence(other, teacher, row).sum(), gate)[0])
            hook.remove()
        predicted = torch.stack(gates).mean(0).square() / (2 * len(rows))  # 8 samples are one group
        represented = torch.cat(seen).square().mean(0) * linear.weight.square().mean(0)
        expected = (predicted + LAMBDA * represented).unflatten(0, (site.total, site.width)).sum(1).double()
        assert torch.allclose(scores[site.name], expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_nothing_removed_has_no_predictive_knowledge_to_lose(labelled):
    model, batches = build("bert"), labelled("bert")
    sites, teacher = prunable(model, batches), frozen_copy(model)
    found = gate_gradients(model, sites, batches, lambda batch: divergence(model, teacher, batch))
    assert max(float(g.abs().max()) for _, _, gradients in found for g in gradients.values()) < 1e-5


def test_survivors_are_above_one_threshold(labelled):
    sites = prunable(build("bert"), labelled("bert"))
    scores = {s.name: torch.arange(s.total).double() * s.unit_macs for s in sites}  # density: the index
    limit = limit_of("macs=0.6", sites)
    assert survivors(sites, scores, limit, sum(s.unit_macs * s.total for s in sites)) == [0, 1, 2, 3]
    assert survivors(sites, scores, limit, 2 * sites[1].unit_macs * 50) == []
    assert survivors(sites, scores, limit, 2 * sites[1].unit_macs * 60 + sites[0].unit_macs * 2) == [3]


@pytest.mark.parametrize("family", FAMILIES)
def test_least_squares_makes_up_for_a_duplicate(labelled, family):
    model, batches = build(family), labelled(family, 4, 16)
    sites = prunable(model, batches)
    with torch.no_grad():  # neurons 0 and 5 compute the same
        for path in sites[3].producers:
            producer = model.get_submodule(path)
            for tensor in (producer.weight, *([producer.bias] if producer.bias is not None else [])):
                tensor[5] = tensor[0]
    other, kept = frozen_copy(model), channels([i for i in range(64) if i != 5], 1)
    weight = other.get_submodule(sites[3].consumers[0]).weight
    weight[:, 5] = 0
    weight.copy_(reconstruction(sublayer_sums(other, model, batches, sites[3].parts[0]), kept))
    assert not weight[:, 5].any()
    expected, got = model(**inputs(batches[0])).logits, other(**inputs(batches[0])).logits
    real = real_positions(batches[0]) if expected.dim() == 3 else slice(None)
    assert torch.allclose(expected[real], got[real], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_unit_does_not_fluctuate_and_its_bias_makes_up_for_it(labelled, keep, family):
    model, batches = build(family), labelled(family)
    sites = prunable(model, batches)
    with torch.no_grad():
        for path in sites[1].producers:
            producer = model.get_submodule(path)
            producer.weight[3] = 0
            if producer.bias is not None:  # in Llama the constant is 0
                producer.bias[3] = 0.7
    moments = input_moments(model, sites, batches)
    scores = fluctuations(model, sites[1], moments[sites[1].name])
    assert float(scores[3]) == pytest.approx(0, abs=1e-12) and int((scores > 1e-6).sum()) == 63
    assert int(standardised(scores, sites[1]).argmin()) == 3
    plan = keep(sites, {sites[1].name: [i for i in range(64) if i != 3]})
    smaller = copy.deepcopy(model)
    apply_plan(smaller, plan)
    compensate(smaller, model, sites, plan, moments)
    assert torch.allclose(model(**inputs(batches[0])).logits, smaller(**inputs(batches[0])).logits, atol=1e-5)


def test_fluctuation_is_its_formula(labelled):
    model, batches = build("llama"), labelled("llama")
    sites = prunable(model, batches)
    moments, site = input_moments(model, sites, batches), sites[2]
    reads = activations(model, sites, batches)
    seen = torch.cat([r[site.name][real_positions(b)] for b, r in zip(batches, reads, strict=True)]).double()
    weight = model.get_submodule(site.consumers[0]).weight.detach().double()
    expected = seen.var(0) * weight.square().sum(0)
    scores = fluctuations(model, site, moments[site.name])
    assert torch.allclose(scores, expected) and torch.allclose(moments[site.name].mean, seen.mean(0))
    squared = expected.square()
    heads = ((squared - squared.mean()) / squared.std()).view(site.total, site.width).mean(1)
    assert torch.allclose(standardised(scores, site), heads)


def test_flap_gives_llama_the_biases_it_needs(labelled):
    model, batches = build("llama"), labelled("llama")
    smaller = PEERS["flap"](model, batches, seed=0)("macs=0.6")
    assert any(isinstance(smaller.get_submodule(s.consumers[0]).bias, nn.Parameter) for s in prunable(model, batches))
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("family", FAMILIES)
def test_minitron_is_its_formula_and_layers_are_alike(labelled, family):
    model, batches = build(family), labelled(family)
    sites = prunable(model, batches)
    norms = activation_norms(model, sites, batches)
    for site in sites:
        each = [
            torch.stack(
                [x[m].view(-1, site.total, site.width).square().sum((0, 2)).sqrt() for x, m in zip(r, mask, strict=True)]
            )
            for r, mask in (
                (reads[site.name], real_positions(b))
                for b, reads in zip(batches, activations(model, sites, batches), strict=True)
            )
        ]
        assert torch.allclose(norms[site.name], torch.cat(each).mean(0).double(), rtol=1e-5)
    plan = PEERS["minitron"](model, batches, seed=0)("macs=0.6").kdprune_plan
    assert all(len({len(s.kept) for s in plan.sites if s.kind == kind}) == 1 for kind in ("attention", "ffn"))
    for site in plan.sites:
        assert site.kept == sorted(norms[site.name].topk(len(site.kept)).indices.tolist())


def test_torch_pruning_keeps_what_taylor_says(labelled):
    pytest.importorskip("torch_pruning")
    model, batches = build("bert"), labelled("bert")
    plan = PEERS["torch_pruning"](model, batches, seed=0)("macs=0.6").kdprune_plan
    for batch in batches:
        task_losses(model, batch).mean().backward()
    for site in prunable(model, batches):
        producers = [model.get_submodule(path).weight for path in site.producers]
        out = model.get_submodule(site.consumers[0]).weight
        taylor = sum((w * w.grad).abs().sum(1) for w in producers) + (out * out.grad).abs().sum(0)
        each = taylor.view(site.total, site.width).mean(1)
        kept = plan[site.name].kept
        assert kept == sorted(each.topk(len(kept)).indices.tolist())
    assert len({tuple(len(s.kept) for s in plan.sites if s.layer == layer) for layer in (0, 1)}) == 1


def test_torch_pruning_is_not_for_groups_of_queries(labelled):
    with pytest.raises(ValueError, match="needs query, key and value of one size and an FFN of two layers"):
        PEERS["torch_pruning"](build("llama"), labelled("llama"), seed=0)


def test_what_cannot_be_compared_is_refused(labelled, ragged):
    model, batches = build("bert"), labelled("bert")
    for at in (PEERS[name](model, batches, seed=0) for name in ("kwon", "kprune", "flap", "minitron")):
        with pytest.raises(ValueError, match='compared at budgets in "macs=" or "params="'):
            at("heads=0.5,ffn=0.5")
    with pytest.raises(ValueError, match='batches need "labels"'):
        PEERS["kwon"](model, ragged(2, 4), seed=0)


def test_a_plan_says_what_is_left(labelled):
    model, batches = build("bert"), labelled("bert")
    sites = prunable(model, batches)
    plan = plan_of(sites, {s.name: list(range(s.total // 2)) for s in sites}, "macs=0.9", "x")
    assert plan.budget["reached"] == pytest.approx(sites.macs({s.name: s.total // 2 for s in sites}) / sites.macs())
