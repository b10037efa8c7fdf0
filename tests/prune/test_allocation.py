"""Scores and a budget make a plan: it holds, it wastes nothing, and it loses as little as can be."""

import itertools
import re

import pytest
import torch

from hf_kdprune import Scores, find_sites
from hf_kdprune.prune.rules import Rules

BUDGETS = ["macs=0.9", "macs=0.5", "macs=0.17", "params=0.8", "params=0.6", "heads=0.5", "ffn=0.3", "heads=0.7,ffn=0.4"]
COUNT = {  # what a budget counts, from a plan's kept units
    "macs": lambda sites, kept: sites.macs(kept=kept),
    "params": lambda sites, kept: sites.params(kept),
    "heads": lambda sites, kept: sum(kept[s.name] for s in sites if s.kind == "attention"),
    "ffn": lambda sites, kept: sum(kept[s.name] for s in sites if s.kind == "ffn"),
}


@pytest.fixture
def scored(tiny):
    """Build scores drawn by lot, long-tailed as real ones are: scored(seed=0, **config)."""

    def build(seed=0, **changes):
        sites = find_sites(tiny(**changes), seq_len=12)
        draw = torch.Generator().manual_seed(seed)
        values = {s.name: torch.randn(s.total, generator=draw).double().exp() * s.unit_params for s in sites}
        return Scores(sites, values, {n: torch.zeros_like(v) for n, v in values.items()}, "drawn")

    return build


def counts(plan):
    return {site.name: len(site.kept) for site in plan.sites}


def lost(scores, kept):
    """The score that goes if each site keeps so many of its best units."""
    return sum(float(scores.values[n].sort().values[: len(scores.values[n]) - k].sum()) for n, k in kept.items())


@pytest.mark.parametrize("neurons", [64, 60])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("text", BUDGETS)
def test_a_budget_holds_and_is_missed_by_less_than_one_step(scored, text, round_to, neurons):
    scores = scored(intermediate_size=neurons)
    sites, kept = scores.sites, counts(scores.plan(text, round_to))
    for part in text.split(","):
        name, share = part.split("=")
        allowed = float(share) * COUNT[name](sites, {s.name: s.total for s in sites})
        assert COUNT[name](sites, kept) <= allowed
        for site in (s for s in sites if kept[s.name] < s.total):
            step = 1 if site.kind == "attention" else round_to
            more = kept | {site.name: min(kept[site.name] + step, site.total)}
            if COUNT[name](sites, more) > COUNT[name](sites, kept):
                assert COUNT[name](sites, more) > allowed, f"{site.name} could have kept {more[site.name]}"


@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("neurons", [64, 60, 5])
def test_widths_are_multiples(scored, neurons, round_to):
    for text in ("macs=0.9", "macs=0.5", "macs=0.2"):
        scores = scored(intermediate_size=neurons)
        for site in scores.plan(text, round_to).sites:
            untouched = len(site.kept) == site.total
            assert site.kind == "attention" or untouched or len(site.kept) % round_to == 0


@pytest.mark.parametrize("text", BUDGETS)
def test_each_site_keeps_its_best_units(scored, text):
    scores = scored()
    for site in scores.plan(text).sites:
        values = scores.values[site.name]
        assert site.kept == sorted(site.kept)
        assert not site.removed or not site.kept or values[site.removed].max() < values[site.kept].min()
        assert site.scores == pytest.approx(values.tolist(), rel=1e-5)


def test_a_budget_of_heads_leaves_neurons_alone_and_the_other_way_round(scored):
    kept = counts(scored().plan("heads=0.5"))
    assert [v for k, v in kept.items() if k.endswith("ffn")] == [64, 64]
    assert sum(v for k, v in kept.items() if k.endswith("attention")) == 4
    kept = counts(scored().plan("ffn=0.25"))
    assert [v for k, v in kept.items() if k.endswith("attention")] == [4, 4]
    assert sum(v for k, v in kept.items() if k.endswith("ffn")) == 32


def test_all_of_the_budget_changes_nothing(scored):
    for text in ("macs=1", "params=1", "heads=1,ffn=1"):
        assert all(not site.removed for site in scored(intermediate_size=60).plan(text).sites)


def test_a_site_may_be_emptied(scored):
    scores = scored()
    scores.values[scores.sites[0].name] *= 1e-9
    scores.values[scores.sites[1].name] *= 1e-9
    kept = counts(scores.plan("macs=0.5"))
    assert list(kept.values())[:2] == [0, 0]


def test_a_plan_states_what_is_reached(scored):
    scores = scored()
    plan = scores.plan("params=0.7")
    kept = counts(plan)
    assert plan.budget == {
        "asked": "params=0.7",
        "reached": scores.sites.params(kept) / scores.sites.params(),
        "seq_len": 12,
    }
    assert scores.plan("heads=0.5,ffn=0.25").budget["reached"] == {"heads": 0.5, "ffn": 0.25}


def test_a_price_in_macs_depends_on_the_length(tiny):
    model = tiny(num_attention_heads=16, max_position_embeddings=512)
    for seq_len, spared in ((12, "attention"), (500, "ffn")):  # a long text makes attention products, so heads, dear
        sites = find_sites(model, seq_len=seq_len)
        worth = {s.name: torch.full((s.total,), 1.0 if s.kind == "attention" else 0.1).double() for s in sites}
        values = {name: w + 1e-3 * torch.rand(len(w), dtype=torch.float64) for name, w in worth.items()}
        plan = Scores(sites, values, {}, "by hand").plan("macs=0.9", least=0)
        assert all(not site.removed for site in plan.sites if site.kind == spared)
        assert plan.budget["seq_len"] == seq_len


@pytest.mark.parametrize("text", ["macs={}", "params={}"])
@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_loses_no_more(scored, text, seed):
    scores = scored(seed)
    losses = [lost(scores, counts(scores.plan(text.format(share), 1))) for share in (0.6, 0.7, 0.8, 0.9, 1)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_near_the_best_of_all_plans(scored, seed):
    scores = scored(seed)
    sites = scores.sites
    steps = [range(5) if s.kind == "attention" else range(0, 65, 16) for s in sites]
    names = [s.name for s in sites]
    for share in (0.4, 0.7):
        allowed = share * sites.macs()
        plans = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*steps)]
        best = min(lost(scores, kept) for kept in plans if sites.macs(kept=kept) <= allowed)
        mine = counts(scores.plan(f"macs={share}", 16))
        dearest = max(lost(scores, mine) - lost(scores, mine | {s.name: s.total}) for s in sites)
        assert best <= lost(scores, mine) <= min(best + dearest, 1.25 * best)


def test_ties_go_by_position_so_that_every_process_plans_alike(scored):
    scores = scored()
    name = scores.sites[0].name
    scores.values[name] = torch.tensor([1e-9, 1e-9, 5.0, 5.0], dtype=torch.float64)
    plan = scores.plan("heads=0.9")
    assert plan[name].removed == [0]
    assert plan == scores.plan("heads=0.9")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(scored, value):
    scores = scored()
    scores.values[scores.sites[2].name][1] = value
    with pytest.raises(ValueError, match=r"layer\.1\.attention: scores must be finite"):
        scores.plan("macs=0.5")


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_scores_that_rank_nothing_are_refused(scored, value):
    scores = scored()
    scores.values[scores.sites[1].name][:] = value
    with pytest.raises(ValueError, match=r"layer\.0\.ffn: all 64 units have the same score.*choose another"):
        scores.plan("macs=0.5")


def test_a_site_of_one_unit_needs_no_order(scored):
    scores = scored(num_attention_heads=1)
    assert counts(scores.plan("macs=0.5"))


def test_a_budget_that_cannot_be_reached_is_refused_before_planning(scored):
    with pytest.raises(ValueError, match="when every head and neuron is gone"):
        scored().plan("params=0.05")


# ---------------------------------------------------------------------------------------------- what must stay

FIRST = "bert.encoder.layer.0.attention"
KEPT = [  # keep-list, least, and what each site keeps at the very least
    ([FIRST], 0),
    (["bert.encoder.layer.1"], 0),
    ([f"{FIRST}:1", "bert.encoder.layer.0.ffn:0-4,60"], 0),
    ([], 2),
    ([], 0.25),
    ([f"{FIRST}:0,3", "bert.encoder.layer.1.ffn:7"], 1),
]


def must_stay(sites, keep, least):
    """Site name -> units that a plan has to keep, by the words of the README."""
    stay = {s.name: set() for s in sites}
    for entry in keep:
        name, _, units = entry.partition(":")
        for site in (s for s in sites if s.name == name or s.name.startswith(name + ".")):
            for part in units.split(",") if units else [f"0-{site.total - 1}"]:
                first, _, last = part.partition("-")
                stay[site.name] |= set(range(int(first), int(last or first) + 1))
    return stay, {s.name: min(s.total, -(-least * s.total // 1) if least < 1 else least) for s in sites}


@pytest.mark.parametrize(("keep", "least"), KEPT)
@pytest.mark.parametrize("text", ["macs=0.75", "macs=0.6", "params=0.85", "heads=0.6,ffn=0.7"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_what_must_stay_stays_and_the_budget_is_missed_by_less_than_one_step(scored, text, keep, least, round_to):
    scores = scored(seed=3)
    plan = scores.plan(text, round_to, keep=keep, least=least)
    sites, kept = scores.sites, counts(plan)
    stay, fewest = must_stay(sites, keep, least)
    for site in sites:
        assert stay[site.name] <= set(plan[site.name].kept)
        assert kept[site.name] >= fewest[site.name]
        assert kept[site.name] % round_to == 0 or site.kind == "attention"
        free = scores.values[site.name][sorted(set(plan[site.name].kept) - stay[site.name])]
        gone = scores.values[site.name][plan[site.name].removed]
        assert not len(free) or not len(gone) or gone.max() < free.min()  # of the others, the best
    for part in text.split(","):
        name, share = part.split("=")
        allowed = float(share) * COUNT[name](sites, {s.name: s.total for s in sites})
        assert COUNT[name](sites, kept) <= allowed
        for site in (s for s in sites if kept[s.name] < s.total):
            more = kept | {site.name: min(kept[site.name] + (1 if site.kind == "attention" else round_to), site.total)}
            if COUNT[name](sites, more) > COUNT[name](sites, kept):
                assert COUNT[name](sites, more) > allowed, f"{site.name} could have kept {more[site.name]}"


def test_nothing_to_keep_is_the_plan_without_rules(scored):
    scores = scored()
    for text in BUDGETS:
        assert scores.plan(text, keep=[], least=0) == scores.plan(text)


@pytest.mark.parametrize("counted", ["macs", "params"])
@pytest.mark.parametrize(("keep", "least"), KEPT)
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_a_budget_out_of_reach_says_what_is_in_reach_with_what_must_stay(scored, counted, keep, least, shapes):
    scores = scored()
    with pytest.raises(ValueError, match=r"round_to=8 lets go: choose a share between") as refusal:
        scores.plan(f"{counted}=0.01", 8, shapes, keep, least)
    assert not keep or repr(keep) in str(refusal.value)
    share = re.search(r"between ([\d.]+) and 1$", str(refusal.value))[1]
    plan = scores.plan(f"{counted}={share}", 8, shapes, keep, least)  # the next step that it names works
    assert plan.budget["reached"] == pytest.approx(float(share), abs=1e-3)


def test_uniform_layers_keep_single_units_among_their_best(scored):
    scores = scored()
    worst = [int(scores.values[FIRST].argmin()), int(scores.values["bert.encoder.layer.1.ffn"].argmin())]
    keep = [f"{FIRST}:{worst[0]}", f"bert.encoder.layer.1.ffn:{worst[1]}"]
    plan = scores.plan("macs=0.5", 8, "uniform", keep)
    assert len({len(s.kept) for s in plan.sites if s.kind == "attention"}) == 1
    assert worst[0] in plan[FIRST].kept and worst[1] in plan["bert.encoder.layer.1.ffn"].kept


@pytest.mark.parametrize("shapes", ["uniform", "stock"])
def test_a_whole_site_kept_in_uniform_layers_keeps_all_of_its_kind(scored, shapes):
    scores = scored()
    plan = scores.plan("macs=0.7", 8, shapes, [FIRST])
    assert [len(s.kept) for s in plan.sites if s.kind == "attention"] == [4, 4]
    assert all(len(s.kept) < 64 for s in plan.sites if s.kind == "ffn")
    with pytest.raises(ValueError, match=r"all is gone that keep=\['bert\.encoder\.layer\.0\.attention'\], shapes="):
        scores.plan("macs=0.3", 8, shapes, [FIRST])


def test_the_lowest_share_is_the_least_that_can_be_planned(scored):
    for keep, least in KEPT:
        for shapes in ("free", "uniform"):
            scores, rules = scored(), Rules(8, shapes, keep, least)
            share = scores.lowest("macs", rules)
            plan = scores.plan(f"macs={min(1, share + 1e-6):.7f}", 8, shapes, keep, least)
            assert plan.budget["reached"] == pytest.approx(share)
            with pytest.raises(ValueError, match="choose a"):
                scores.plan(f"macs={share - 1e-3:.7f}", 8, shapes, keep, least)


@pytest.mark.parametrize("text", ["loss=0.1", "loss=1%"])
def test_scores_alone_cannot_bound_a_loss(scored, text):
    with pytest.raises(ValueError, match=r'KDPruneConfig\(budget="loss=\.\.\."\), or call plan_for_loss'):
        scored().plan(text)


def test_scores_alone_know_no_latency(scored):
    with pytest.raises(ValueError, match=r"scores\.latency = time_sites\(model, batch, scores\.sites\)"):
        scored().plan("latency=0.6")


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_no_site_loses_more_than_twice_the_share_of_all(scored, share):
    scores = scored(0)
    name = scores.sites[-1].name
    scores.values[name] *= 1e-9  # a site that would go whole
    free, trusted = (scores.plan(f"macs={share}", round_to=1, least=least) for least in (0, None))
    lost = {site.name: len(site.removed) / site.total for site in trusted.sites}
    everything = sum(scores.sites.macs() - scores.sites.macs({s.name: 0}) for s in scores.sites)
    mean = (1 - share) * scores.sites.macs() / everything
    widest = max(1 / site.total for site in scores.sites)
    assert len(free.kept[name]) < len(trusted.kept[name])
    assert max(lost.values()) <= 2 * mean * 1.25 + widest
    assert trusted.budget["reached"] <= share


def test_half_the_model_and_less_is_taken_as_the_scores_say(scored):
    scores = scored(1)
    assert scores.plan("macs=0.4").kept == scores.plan("macs=0.4", least=0).kept
