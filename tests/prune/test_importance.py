"""Scores against their definition and against real ablation; what must not matter to them does not."""

import copy
from contextlib import contextmanager

import pytest
import torch
from families import build as family

from hf_kdprune import find_sites, gated, score_units
from hf_kdprune.layers import hidden_states, match_layers
from hf_kdprune.prune.importance import Asked
from hf_kdprune.prune.importance.feature_loss import under_covariance
from hf_kdprune.prune.importance.probe import derivatives
from hf_kdprune.prune.importance.realised import site_losses


def table(scores, kind=None):
    """All scores of a kind in one row."""
    return torch.cat([scores.values[s.name] for s in scores.sites if kind in (None, s.kind)])


def rank_correlation(a, b):
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


def same(a, b):
    return all(torch.equal(a.values[name], b.values[name]) for name in a.values)


def hooks(model):
    """How many hooks are on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tiny_with_features(tiny, batches):
    """A model that was asked for its features once: transformers leaves hooks of its own on it."""
    model = tiny()
    hidden_states(model, batches[0])
    return model


@contextmanager
def gates(model, sites, values):
    """Every unit's output times its gate; `values` is site name -> (units,)."""

    def scale(site):
        factor = values[site.name].repeat_interleave(site.width)
        return lambda module, args: (args[0] * factor, *args[1:])

    hooks = [model.get_submodule(s.consumers[0]).register_forward_pre_hook(scale(s)) for s in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def nudged(sites, site, unit, by):
    """All gates 1 but that of one unit."""
    values = {s.name: torch.ones(s.total) for s in sites}
    values[site.name][unit] += by
    return values


@torch.no_grad()
def targets_of(model, batches, matches):
    """The model's own features of the mapped layers."""
    return [[hidden_states(model, b)[m.teacher] for m in matches] for b in batches]


def exact_curvature(model, batches, sites, matches, feature_loss, metric):
    """(J^T J)_uu by central differences: the loss between the features with the gate a little up and a little down."""
    step, out = 0.05, {}
    for site in sites:
        units = []
        for unit in range(site.total):
            with gates(model, sites, nudged(sites, site, unit, -step)):
                down = targets_of(model, batches, matches)
            with gates(model, sites, nudged(sites, site, unit, step)):
                units.append(feature_loss(model, batches, matches, down, metric) / (2 * step) ** 2)
        out[site.name] = torch.tensor(units, dtype=torch.float64)
    return out


# ---------------------------------------------------------------------------------------------- what a score is


@pytest.mark.parametrize("importance", ["feature_loss", "feature_loss:plain"])
@pytest.mark.parametrize("name", ["bert", "opt"])  # OPT joins batch and seq in its FFN
def test_the_mean_over_probes_is_the_exact_curvature(tiny, ragged, feature_loss, name, importance):
    model, batches = tiny(name, intermediate_size=16, ffn_dim=16), ragged(1, 24, seq=6)
    matches = match_layers(model, None, batches)
    mean = score_units(model, None, batches * 60, importance, matches=matches)
    metric = "plain" if ":" in importance else "covariance"
    exact = exact_curvature(model, batches, mean.sites, matches, feature_loss, metric)
    a, b = table(mean), torch.cat([exact[s.name] for s in mean.sites])
    assert float(a.sum() / b.sum()) == pytest.approx(1, abs=0.05)
    assert float((a / b - 1).abs().median()) < 0.06
    off = (a - b) / torch.cat([mean.errors[s.name] for s in mean.sites])  # in standard errors
    assert 0.5 < float(off.square().mean().sqrt()) < 1.5
    assert float(off.abs().max()) < 4.5


def test_the_first_order_term_is_the_derivative_of_the_loss(tiny, ragged, feature_loss):
    model, teacher, batches = tiny(), tiny(seed=1), ragged(2, 6)
    matches = match_layers(model, teacher, batches)
    scores = score_units(model, teacher, batches, matches=matches, seed=5)
    sites, targets, step = scores.sites, targets_of(teacher, batches, matches), 0.02
    features = under_covariance(model, teacher, batches, Asked(sites, matches, seed=5))
    slopes, curvatures = derivatives(model, batches, Asked(sites, seed=5), features.watch, 2)
    for site in (sites[0], sites[1], sites[2], sites[3]):
        expected = curvatures.second[site.name] - slopes.first[site.name]
        torch.testing.assert_close(scores.values[site.name], expected)
        for unit in range(4):
            losses = []
            for by in (step, -step):
                with gates(model, sites, nudged(sites, site, unit, by)):
                    losses.append(feature_loss(model, batches, matches, targets))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert float(slopes.first[site.name][unit]) == pytest.approx(slope, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_copy_of_the_student_as_teacher_adds_exactly_nothing(tiny, ragged, attention):
    model, batches = tiny(attention=attention).train(), ragged(3, 4)
    alone = score_units(model, None, batches, seed=2)
    assert same(alone, score_units(model, copy.deepcopy(model), batches, seed=2))
    assert same(alone, score_units(model, model, batches, seed=2))


def test_a_dead_unit_scores_zero_and_goes_first(tiny, ragged):
    model, batches = tiny(), ragged(2, 6)
    sites = find_sites(model)
    dead = {sites[0].name: 2, sites[3].name: 41}
    with torch.no_grad():
        for site in (sites[0], sites[3]):
            columns = slice(dead[site.name] * site.width, (dead[site.name] + 1) * site.width)
            model.get_submodule(site.consumers[0]).weight[:, columns] = 0
    scores = score_units(model, None, batches)
    assert {name: scores.values[name].argmin() for name in dead} == dead
    assert all(scores.values[name][unit] == 0 for name, unit in dead.items())
    assert int((table(scores) == 0).sum()) == 2
    price = sum(s.unit_macs for s in sites if s.name in dead)
    plan = scores.plan(f"macs={1 - price / scores.sites.macs() + 1e-9:.9f}", round_to=1)
    assert {s.name: s.removed for s in plan.sites if s.removed} == {name: [unit] for name, unit in dead.items()}


@pytest.mark.parametrize("teacher", [{"num_hidden_layers": 4}, {"hidden_size": 48}, {"num_hidden_layers": 3, "seed": 1}])
def test_another_teacher(tiny, ragged, teacher):
    model, batches = tiny(), ragged(2, 6)
    scores = score_units(model, tiny(**teacher), batches)
    assert not same(scores, score_units(model, None, batches))
    plan = scores.plan("macs=0.5")
    with gated(model, plan), torch.no_grad():
        assert model(**batches[0]).logits.isfinite().all()


# ---------------------------------------------------------------------------------------------- what must not matter


def test_labels_are_not_looked_at(tiny, ragged):
    model, batches = tiny(), ragged(2, 4)
    labelled = [{**b, "labels": torch.tensor([99, -7, 0, 1])} for b in batches]  # these would break the model's loss
    assert same(score_units(model, tiny(seed=1), batches), score_units(model, tiny(seed=1), labelled))
    assert all("labels" in b for b in labelled)


def test_what_stands_in_padding_does_not_matter(tiny, ragged):
    model, batches = tiny(), ragged(2, 6)
    filled = [{**b, "input_ids": b["input_ids"] + 77 * (1 - b["attention_mask"])} for b in batches]
    assert same(score_units(model, None, batches), score_units(model, None, filled))


def test_more_padding_changes_nothing_but_the_draw(tiny, ragged):
    model, batches = tiny(intermediate_size=16), ragged(1, 12)
    padded = [{k: torch.nn.functional.pad(v, (0, 8)) for k, v in b.items()} for b in batches]
    matches = match_layers(model, None, batches)
    for a, b in zip(matches, match_layers(model, None, padded), strict=True):
        torch.testing.assert_close(a.variances, b.variances, rtol=1e-4, atol=1e-6)
    a, b = (table(score_units(model, None, data * 60, matches=matches, seed=1)) for data in (batches, padded))
    assert float(a.sum() / b.sum()) == pytest.approx(1, abs=0.06)
    assert float((a / b).log().abs().median()) < 0.1
    assert score_units(model, None, padded).sites.seq_len == score_units(model, None, batches).sites.seq_len


def test_the_seed_is_all_the_chance_there_is(tiny, ragged):
    model, batches = tiny(), ragged(2, 4)
    torch.manual_seed(1)
    first = score_units(model, None, batches, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, score_units(model, None, batches, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, score_units(model, None, batches, seed=4))


def test_dropout_and_the_mode_do_not_matter_and_the_model_stays_as_it_was(tiny, ragged):
    model, teacher, batches = tiny(), tiny(seed=1), ragged(2, 4)
    expected = score_units(model, teacher, batches)
    found = hooks(tiny_with_features(tiny, batches))
    model.train()
    teacher.train()
    model.bert.embeddings.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = [copy.deepcopy(m.state_dict()) for m in (model, teacher)]
    assert same(expected, score_units(model, teacher, batches))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    for before, m in zip(weights, (model, teacher), strict=True):
        assert all(part.training for part in m.modules())
        assert hooks(m) == found
        assert all(p.grad is None for p in m.parameters())
        assert all(torch.equal(before[name], now) for name, now in m.state_dict().items())


def test_a_model_that_fails_half_way_is_left_as_it_was(tiny, ragged):
    model = tiny().train()
    good = ragged(1, 4)
    bad = {"input_ids": torch.full((4, 12), 10_000), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    matches = match_layers(model, None, good)
    with pytest.raises(IndexError):
        score_units(model, None, [*good, bad], matches=matches)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert hooks(model) == hooks(tiny_with_features(tiny, good))


# ---------------------------------------------------------------------------------------------- refusals


def test_a_site_that_the_features_do_not_see_is_refused(tiny, ragged):
    model = tiny()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    scores = score_units(model, None, ragged(2, 4))
    with pytest.raises(ValueError, match=r"layer\.1\.ffn: all 64 units have the same score 0, which ranks nothing"):
        scores.plan("macs=0.5")


def test_features_that_are_no_numbers_are_refused(tiny, ragged):
    model = tiny().train()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="must give finite outputs, and gives NaN or infinity: look at its weights"):
        score_units(model, None, ragged(2, 4))
    assert model.training


def test_what_is_no_importance_and_no_data_is_refused(tiny, ragged):
    with pytest.raises(ValueError, match="importance must be one of .*'feature_loss'.*got 'guess'"):
        score_units(tiny(), None, ragged(1, 4), "guess")
    with pytest.raises(ValueError, match="at least one batch"):
        score_units(tiny(), None, [])
    padded = [{**batch, "attention_mask": 0 * batch["attention_mask"]} for batch in ragged(2, 4)]
    with pytest.raises(ValueError, match="all of the 2 batches are padded throughout: look at their attention_mask"):
        score_units(tiny(), None, padded)


# ---------------------------------------------------------------------------------------------- what it costs


def test_one_scoring_serves_all_budgets(tiny, ragged):
    model, batches = tiny(), ragged(2, 4)
    scores, passes = score_units(model, None, batches), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for budget in ("macs=0.8", "params=0.7", "heads=0.5,ffn=0.5"):
        scores.plan(budget)
    assert passes == []


@pytest.mark.parametrize("importance", ["feature_loss", "feature_loss:plain"])
def test_ranking_takes_one_pass_over_the_data(tiny, ragged, importance):
    model, batches, passes = tiny(), ragged(16, 4), []
    note = lambda module, args, kwargs, output: passes.append(len(kwargs["input_ids"]))  # noqa: E731
    model.register_forward_hook(note, with_kwargs=True)
    score_units(model, None, batches, importance)
    assert sum(size == 4 for size in passes) <= 2 * 16  # discovery runs single rows


# ---------------------------------------------------------------------------------------------- the baselines


@torch.no_grad()
def test_magnitude_is_the_sum_of_squares_of_what_a_unit_owns(tiny, ragged):
    model = tiny()
    scores = score_units(model, None, ragged(1, 4), "magnitude")
    block = model.bert.encoder.layer[0]
    head = [getattr(block.attention.self, n).weight[8:16].flatten() for n in ("query", "key", "value")]
    head = torch.cat([*head, block.attention.output.dense.weight[:, 8:16].flatten()])
    assert float(scores.values["bert.encoder.layer.0.attention"][1]) == pytest.approx(float(head.square().sum()))
    neuron = torch.cat([block.intermediate.dense.weight[5], block.output.dense.weight[:, 5]])
    assert float(scores.values["bert.encoder.layer.0.ffn"][5]) == pytest.approx(float(neuron.square().sum()))


# ---------------------------------------------------------------------------------------------- the real MiniLM


def test_two_seeds_agree(minilm_shared, banking):
    batches = banking(8, 16)
    matches = match_layers(minilm_shared, None, batches)
    a, b = (score_units(minilm_shared, None, batches, matches=matches, seed=seed) for seed in (0, 1))
    for kind in ("attention", "ffn"):
        assert rank_correlation(table(a, kind), table(b, kind)) >= 0.9


def test_scores_rank_the_heads_as_ablation_does(minilm_shared, banking, keep, feature_loss):
    batches = banking(1, 10)
    matches = match_layers(minilm_shared, None, banking(8, 16))
    targets = targets_of(minilm_shared, batches, matches)
    scores = score_units(minilm_shared, None, batches * 24, matches=matches)  # 24 probes
    sites, exact = scores.sites, []
    for site in (s for s in sites if s.kind == "attention"):
        for head in range(site.total):
            plan = keep(sites, {site.name: [i for i in range(site.total) if i != head]})
            with gated(minilm_shared, plan, sites):
                exact.append(feature_loss(minilm_shared, batches, matches, targets))
    exact = torch.tensor(exact, dtype=torch.float64)
    estimate = table(scores, "attention")
    assert rank_correlation(estimate, exact) >= 0.95
    # A whole head is no small step, and the curvature is that of a small one: near, not equal.
    assert float(estimate.sum() / exact.sum()) == pytest.approx(1, abs=0.25)


def test_each_site_costs_about_what_was_predicted(minilm_shared, banking):
    batches = banking(8, 16)
    scores = score_units(minilm_shared, None, batches)
    plan = scores.plan("macs=0.8")
    found = site_losses(minilm_shared, None, batches, plan)
    assert set(found) == {site.name for site in plan.sites if site.removed}
    predicted, realised = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    assert 0.5 < realised / predicted < 2
    for name, (mine, _) in found.items():
        assert mine == pytest.approx(float(scores.values[name][plan[name].removed].sum()), rel=1e-4)  # a plan rounds


def test_what_is_no_loss_predicts_none(tiny, ragged):
    model, batches = tiny(), ragged(2, 4)
    assert site_losses(model, None, batches, score_units(model, None, batches, "magnitude").plan("macs=0.5")) == {}
    assert site_losses(model, None, batches, score_units(model, None, batches).plan("macs=1")) == {}


@pytest.mark.parametrize("importance", ["feature_loss", "taylor"])
def test_padded_audio_and_labels_of_a_decoder_are_understood(importance):
    """By hand, without a Trainer: which frames are padding, and what the decoder reads, follow from the batch."""
    speech, masks = family("wav2vec2", feat_extract_norm="layer"), torch.ones(4, 96, dtype=torch.long)
    masks[2:, 48:] = 0
    audio = {"input_values": torch.randn(4, 96) * masks, "attention_mask": masks, "labels": torch.tensor([[4, 5]] * 4)}
    text = {"input_ids": torch.randint(5, 200, (4, 6)), "labels": torch.randint(5, 200, (4, 3))}
    for model, batch in ((speech, audio), (family("t5"), text)):
        scores = score_units(model, None, [batch] * 2, importance)
        assert all(bool((values != values[0]).any()) for values in scores.values.values() if len(values) > 1)
