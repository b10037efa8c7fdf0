"""Scores that see labels, outputs or activations, each against its definition."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_kdprune import find_sites, gated, score_units
from hf_kdprune.layers import hidden_states, match_layers, real_positions

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def labelled(batches, tokens=False):
    """With labels: one of 3 classes for a sample, or for each position, -100 at padding."""
    draw = torch.Generator().manual_seed(3)
    for batch in batches:
        shape = batch["input_ids"].shape if tokens else (len(batch["input_ids"]),)
        labels = torch.randint(0, 3, shape, generator=draw)
        yield {**batch, "labels": labels.masked_fill(~real_positions(batch), -100) if tokens else labels}


def gradients_one_by_one(model, batches, loss_of):
    """(samples, units) for each site: the derivative of `loss_of(output, row)` by gates that are set by hand."""
    sites, rows = find_sites(model), {}
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            row = {k: v[i : i + 1] for k, v in batch.items()}
            gates = {s.name: torch.ones(s.total, requires_grad=True) for s in sites}
            hooks = [
                model.get_submodule(s.consumers[0]).register_forward_pre_hook(
                    lambda module, args, s=s, gates=gates: (args[0] * gates[s.name].repeat_interleave(s.width), *args[1:])
                )
                for s in sites
            ]
            found = torch.autograd.grad(loss_of(model(**row), row), [gates[s.name] for s in sites])
            for hook in hooks:
                hook.remove()
            for site, gradient in zip(sites, found, strict=True):
                rows.setdefault(site.name, []).append(gradient.double())
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize(
    ("auto", "tokens"), [(AutoModelForSequenceClassification, False), (AutoModelForTokenClassification, True)]
)
def test_labels_are_seen_a_sample_at_a_time(tiny, ragged, auto, tokens):
    model, batches = tiny(auto=auto, **SIZES), list(labelled(ragged(2, 5), tokens))
    count = lambda row: int((row["labels"] != -100).sum())  # noqa: E731
    rows = gradients_one_by_one(model, batches, lambda output, row: output.loss * count(row))
    taylor, fisher = (score_units(model, None, batches, name) for name in ("taylor", "fisher"))
    for name, found in rows.items():
        torch.testing.assert_close(taylor.values[name], found.abs().sum(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(fisher.values[name], found.square().sum(0), rtol=1e-3, atol=1e-8)
        assert bool((fisher.errors[name] > 0).all()) and bool((taylor.errors[name] > 0).all())


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
def test_labels_are_asked_for(tiny, ragged, importance):
    with pytest.raises(ValueError, match="gives none for a batch of .*add labels to the batches, or rank by 'feature_loss'"):
        score_units(tiny(), None, ragged(1, 4), importance)


@pytest.mark.parametrize(
    ("auto", "problem"),
    [
        (AutoModelForSequenceClassification, None),
        (AutoModelForSequenceClassification, "multi_label_classification"),
        (AutoModelForSequenceClassification, "regression"),
        (AutoModelForMaskedLM, None),
    ],
)
def test_the_outputs_add_the_curvature_of_their_divergence(tiny, ragged, auto, problem):
    """Twice the KL between the outputs with a gate a little off and on, over the square of the step."""
    model, batches = tiny(auto=auto, problem_type=problem, vocab_size=200, **SIZES), ragged(2, 12, seq=6)
    matches = match_layers(model, None, batches)
    many = batches * 60
    both, features = (score_units(model, None, many, name, matches=matches) for name in ("feature_loss+logits", "feature_loss"))
    total = sum(float(v.sum()) for v in features.values.values())
    mine = torch.cat([both.values[s.name] - features.values[s.name] / total for s in both.sites])
    exact = torch.cat([torch.stack([divergence(model, batches, both.sites, s, u) for u in range(s.total)]) for s in both.sites])
    assert float((mine / (exact / exact.sum()) - 1).abs().median()) < 0.1
    assert float(sum(v.sum() for v in both.values.values())) == pytest.approx(2)


@torch.no_grad()
def divergence(model, batches, sites, site, unit, step=0.05):
    """Of the outputs with one gate a little below 1 from those as they are, summed over rows."""
    total = 0.0
    for batch in batches:
        p = model(**batch).logits.double()
        factor = torch.ones(site.total)
        factor[unit] -= step
        hook = model.get_submodule(site.consumers[0]).register_forward_pre_hook(
            lambda module, args, factor=factor: (args[0] * factor.repeat_interleave(site.width), *args[1:])
        )
        q = model(**batch).logits.double()
        hook.remove()
        kind = model.config.problem_type
        if kind == "regression":
            rows = (p - q).square().sum(-1) / 2
        elif kind == "multi_label_classification":
            rows = (
                p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
            ).sum(-1)
        else:
            rows = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        total += rows[real_positions(batch)].sum() if rows.dim() > 1 else rows.sum()
    return total


def test_a_model_without_outputs_says_so(tiny, ragged):
    from transformers import AutoModel

    with pytest.raises(ValueError, match="needs logits, and .* has none: rank by 'feature_loss'"):
        score_units(tiny(auto=AutoModel), None, ragged(1, 4), "feature_loss+logits")


@pytest.mark.parametrize("other", [False, True])
def test_ablation_is_the_rise_of_the_second_loss(tiny, ragged, keep, feature_loss, other):
    model, batches = tiny(**SIZES), ragged(2, 6)
    teacher = tiny(seed=1, **SIZES) if other else model
    matches = match_layers(model, teacher if other else None, batches)
    scores = score_units(model, teacher if other else None, batches, "ablation", matches=matches)
    targets = [[hidden_states(teacher, b)[m.teacher].detach() for m in matches] for b in batches]
    whole = feature_loss(model, batches, matches, targets)
    for site in scores.sites:
        for unit in range(0, site.total, 5):
            plan = keep(scores.sites, {site.name: [u for u in range(site.total) if u != unit]})
            with gated(model, plan, scores.sites):
                rise = feature_loss(model, batches, matches, targets) - whole
            assert float(scores.values[site.name][unit]) == pytest.approx(rise, rel=1e-3, abs=1e-7)


@torch.no_grad()
def test_activation_is_the_norm_of_what_a_unit_hands_on(tiny, ragged):
    model, (batch,) = tiny(**SIZES), ragged(1, 6)
    scores = score_units(model, None, [batch], "activation")
    for site in scores.sites:
        reads = []
        hook = model.get_submodule(site.consumers[0]).register_forward_pre_hook(lambda m, a, reads=reads: reads.append(a[0]))
        model(**batch)
        hook.remove()
        units = reads[0].unflatten(-1, (site.total, site.width)) * batch["attention_mask"][..., None, None]
        torch.testing.assert_close(
            scores.values[site.name].float(), units.square().sum((1, 3)).sqrt().sum(0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("importance", ["feature_loss+logits", "taylor", "fisher", "ablation", "activation"])
def test_a_score_makes_a_plan_and_leaves_the_model(tiny, ragged, importance):
    model, batches = tiny("llama", **SIZES).train(), list(labelled(ragged(2, 4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = score_units(model, None, batches, importance)
    assert scores.plan("macs=0.6").importance == importance == scores.importance
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
