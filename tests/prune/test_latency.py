"""Budgets in milliseconds: a table of times predicts plans, and what was planned is timed."""

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from hf_kdprune import Scores, find_sites, score_units
from hf_kdprune.measure import macs_of
from hf_kdprune.prune import latency, schedule
from hf_kdprune.prune.latency import sizes, smaller, time_sites
from hf_kdprune.prune.latency_table import LatencyTable, monotone
from hf_kdprune.prune.rules import Rules
from hf_kdprune.prune.schedule import Pruning, plan_for_latency

HEADS = [[0, 0.0], [1, 0.2], [2, 0.5], [3, 0.5], [4, 1.0]]  # ms of one attention: steps, as hardware has them
NEURONS = [[0, 0.0], [16, 1.0], [32, 1.0], [48, 3.0], [64, 4.0]]


def table_of(sites, heads=HEADS, neurons=NEURONS, whole=20.0):
    kinds = {s.name: s.kind for s in sites}
    return LatencyTable(32, 12, "a device", whole, {"attention": heads, "ffn": neurons}, kinds)


@pytest.fixture
def scored(tiny):
    """Scores drawn by lot, with a table of times made by hand."""

    def build(seed=0, **curves):
        sites = find_sites(tiny(), seq_len=12)
        draw = torch.Generator().manual_seed(seed)
        values = {s.name: torch.randn(s.total, generator=draw).double().exp() * s.unit_params for s in sites}
        scores = Scores(sites, values, {n: torch.zeros_like(v) for n, v in values.items()}, "drawn")
        scores.latency = table_of(sites, **curves)
        return scores

    return build


def test_a_table_predicts_by_lines_between_what_was_timed(scored):
    table = scored().latency
    names = list(table.classes)
    assert table.model_ms() == table.whole == 20
    assert table.site_ms(names[1], 24) == 1.0 and table.site_ms(names[1], 40) == 2.0 and table.site_ms(names[1], 56) == 3.5
    assert table.model_ms({names[0]: 2, names[1]: 40}) == pytest.approx(20 - 0.5 - 2)
    assert table.model_ms(dict.fromkeys(names, 0)) == pytest.approx(20 - 10)


def test_a_table_is_data(scored):
    table = scored().latency
    assert LatencyTable(**json.loads(json.dumps(asdict(table)))) == table


@pytest.mark.parametrize("seed", range(20))
def test_times_are_made_monotone_by_the_nearest_rising_sequence(seed):
    values = np.random.default_rng(seed).normal(size=8)
    made = monotone(list(values))
    assert made == sorted(made) and sum(made) == pytest.approx(sum(values))
    assert monotone(made) == pytest.approx(made)
    best = sum((np.array(made) - values) ** 2)
    for rising in np.sort(np.random.default_rng(seed + 1).normal(size=(2000, 8)), axis=1):
        assert best <= sum((rising - values) ** 2) + 1e-12


def sum_of_scores(scores, kept):
    return sum(float(v.sort().values[: len(v) - kept[n]].sum()) for n, v in scores.values.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", ["latency=0.9", "latency=0.75", "latency=0.6", "latency=13ms"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_predicted_time_holds_and_is_missed_by_less_than_one_step(scored, seed, text, round_to):
    scores = scored(seed)
    plan = scores.plan(text, round_to)
    kept = {s.name: len(s.kept) for s in plan.sites}
    allowed = 13 if "ms" in text else float(text.split("=")[1]) * 20
    assert scores.latency.model_ms(kept) <= allowed + 1e-9
    for site in (s for s in scores.sites if kept[s.name] < s.total):
        more = kept | {site.name: kept[site.name] + (1 if site.kind == "attention" else round_to)}
        assert scores.latency.model_ms(more) > allowed, f"{site.name} could have kept {more[site.name]}"


def test_units_that_win_no_time_stay(scored):
    flat = [[0, 0.0], [16, 0.0], [32, 0.0], [48, 1.0], [64, 4.0]]
    scores = scored(neurons=flat)
    for site in scores.plan("latency=0.5").sites:
        assert site.kind == "attention" or len(site.kept) >= 32


def test_time_that_falls_late_is_reached(scored):
    """The first half of the neurons wins nothing, the second does: they go together, if at all."""
    late = [[0, 0.0], [16, 2.0], [32, 4.0], [48, 4.0], [64, 4.0]]
    scores = scored(neurons=late, heads=[[0, 0.0], [4, 0.0]])
    for share in (0.9, 0.6):
        plan = scores.plan(f"latency={share}", 1)
        assert scores.latency.model_ms({s.name: len(s.kept) for s in plan.sites}) == pytest.approx(20 * share, abs=0.13)


def test_a_latency_plan_says_on_what_it_rests(scored):
    plan = scored().plan("latency=0.8", keep=["bert.encoder.layer.0"], least=1)
    facts = {"asked": "latency=0.8", "batch": 32, "seq_len": 12, "device": "a device"}
    assert facts.items() <= plan.budget.items()
    assert plan.budget["predicted"] == plan.budget["reached"] <= 0.8
    assert len(plan.sites[0].kept) == 4 and len(plan.sites[1].kept) == 64


@pytest.mark.parametrize("text", ["latency=0.3", "latency=3ms", "latency=30ms"])
def test_a_latency_out_of_reach_says_what_is_in_reach(scored, text):
    with pytest.raises(ValueError, match=r"this model has 20 ms and 10 ms when every head .* share between 0\.500 and 1"):
        scored().plan(text)


def test_uniform_layers_in_time(scored):
    scores = scored()
    plan = scores.plan("latency=0.7", 8, "uniform")
    assert len({(s.kind, len(s.kept)) for s in plan.sites}) == 2 and plan.budget["reached"] <= 0.7
    assert scores.lowest("latency", Rules()) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------- the measurement


@pytest.fixture
def brief(monkeypatch):
    """Time for a moment, not seconds."""
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "ROUNDS", 5)


def test_a_smaller_copy_shares_what_was_not_cut_and_leaves_the_model(tiny, ragged):
    model, batch = tiny(), ragged(1, 3)[0]
    sites = find_sites(model)
    before, out = copy.deepcopy(model.state_dict()), model(**batch).logits
    made = smaller(model, {sites[1].name: range(8)}, sites)
    assert made.bert.encoder.layer[0].output.dense.weight.shape == (32, 8)
    assert made.bert.embeddings.word_embeddings.weight is model.bert.embeddings.word_embeddings.weight
    assert made.bert.encoder.layer[1].output.dense.weight is model.bert.encoder.layer[1].output.dense.weight
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**batch).logits, out)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "albert"])
def test_a_real_table_has_every_site_and_rises(tiny, ragged, name):
    model = tiny(name).train()
    sites, before = find_sites(model, seq_len=9), copy.deepcopy(model.state_dict())
    table = time_sites(model, ragged(1, 3)[0], sites, 4)
    assert (table.batch, table.seq_len) == (4, 9) and table.device and table.whole > 0
    assert set(table.classes) == {s.name for s in sites}
    for site in sites:
        curve = table.curves[table.classes[site.name]]
        assert [n for n, _ in curve] == [*sizes(site), site.total]
        ms = [t for _, t in curve]
        assert ms[0] == 0 and ms == sorted(ms)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wider_is_slower(tiny, ragged, monkeypatch):
    """On a device whose time is MACs, the table finds those of each FFN, and in proportion."""
    monkeypatch.setattr(latency, "timed", lambda models, rows: [tuple(float(macs_of(m, rows, 32)) for m in models)])
    model = tiny(hidden_size=64, intermediate_size=4096, num_hidden_layers=2)
    sites = find_sites(model, seq_len=32)
    table = time_sites(model, ragged(1, 4, seq=32)[0], sites, 16)
    assert table.whole == sites.macs()
    for site in sites:
        assert table.site_ms(site.name, site.total) == pytest.approx(site.unit_macs * site.total)
        assert table.site_ms(site.name, site.total // 2) == pytest.approx(site.unit_macs * site.total / 2)


@pytest.fixture
def timed(monkeypatch, scored, tiny):
    """plan_for_latency with a table by hand and a device whose models take `overhead` more than it says."""

    def build(text, overheads):
        scores = scored()
        asked, left = [], list(overheads)

        def share(model, batch, sites, plan, batch_size):
            asked.append(plan.budget["reached"])
            return plan.budget["reached"] * (left.pop(0) if len(left) > 1 else left[0])

        monkeypatch.setattr(schedule, "time_sites", lambda *_: table_of(scores.sites))
        monkeypatch.setattr(schedule, "share_of_latency", share)
        return plan_for_latency(tiny(), scores, {}, Pruning(text, round_to=1)), asked

    return build


@pytest.mark.parametrize("text", ["latency=0.7", "latency=14ms"])
def test_a_latency_that_holds_is_planned_once(timed, caplog, text):
    plan, asked = timed(text, [1.02])
    assert len(asked) == 1 and asked[0] == pytest.approx(0.7, abs=0.02)
    assert plan.budget["asked"] == text and plan.budget["reached"] == asked[0] * 1.02
    assert plan.budget["predicted"] == asked[0] and not caplog.records


def test_a_latency_that_is_missed_is_planned_again_for_less(timed, caplog):
    plan, asked = timed("latency=0.7", [1.2])
    assert len(asked) == 2 and asked[1] <= asked[0] / 1.15
    assert plan.budget["reached"] <= 0.7 * 1.03 and not caplog.records


def test_a_latency_that_stays_missed_is_said(timed, caplog):
    plan, asked = timed("latency=0.55", [1.5])
    assert 1 < len(asked) <= 3 and plan.budget["reached"] == min(asked) * 1.5
    assert "missed: 0.550 of the model's time was asked for, 0.7" in caplog.text


@pytest.mark.usefixtures("brief")
def test_a_real_latency_is_measured_and_recorded(tiny, ragged):
    model, batches = tiny(intermediate_size=256), ragged(2, 4)
    scores = score_units(model, None, batches, "magnitude")
    before = copy.deepcopy(model.state_dict())
    plan = plan_for_latency(model, scores, batches[0], Pruning("latency=0.95", latency_batch=8))
    assert set(plan.budget) == {"asked", "reached", "predicted", "batch", "seq_len", "device"}
    assert 0 < plan.budget["reached"] < 2 and plan.budget["batch"] == 8 and scores.latency.batch == 8
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
