"""Budgets as users write them: understood, or refused with the rule before any work."""

import re

import pytest

from hf_kdprune import apply_plan, find_sites
from hf_kdprune.prune.budget import Budget

BAD = [
    *("", "macs", "macs=", "=0.5", "0.5", "mac=0.5", "latency=2", "MACS=0.5", "macs:0.5", "macs=half", "macs=50%"),
    *("macs=0", "macs=-1", "macs=-0.5", "macs=nan", "macs=inf", "macs=2", "macs=1e9", "macs=1e400", "macs=0.5.5"),
    *("params=0K", "params=0.0005K", "params=12m", "params=12 M B", "heads=0", "heads=3", "heads=0.5M", "ffn=2"),
    *("latency=12", "latency=0ms", "latency=-1ms", "latency=12s", "latency=12M", "latency=50%", "latency=0.5,macs=0.5"),
    *("loss=0", "loss=2", "loss=-0.1", "loss=100%", "loss=1ms", "loss=1M", "loss=%", "loss=0.1,macs=0.5", "macs=5ms"),
    *("heads=0.5,heads=0.2", "macs=0.5,params=0.5", "heads=0.5,macs=0.5", "macs=0.5,", ",", "heads=0.5;ffn=0.5"),
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_budget_is_refused_with_the_rule(text):
    with pytest.raises(ValueError, match=re.escape(f"; got {text!r}")) as refusal:
        Budget.parse(text)
    assert 'a budget is "macs="' in str(refusal.value) and '"params=12M"' in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "share"),
    [("macs=0.5", 0.5), ("macs=.5", 0.5), (" macs = 0.25 ", 0.25), ("macs=1", 1), ("macs=1.0", 1), ("macs=5e-1", 0.5)],
)
def test_a_share_is_of_the_model_as_given(tiny, text, share):
    sites = find_sites(tiny())
    (limit,) = Budget.parse(text).limits
    assert limit.allowed(sites) == share * sites.macs()


@pytest.mark.parametrize(
    ("text", "number"), [("params=12M", 12e6), ("params=1.5K", 1500), ("macs=2G", 2e9), ("macs=0.5M", 5e5)]
)
def test_an_absolute_number_is_taken_as_it_is(tiny, text, number):
    (limit,) = Budget.parse(text).limits
    assert limit.allowed(find_sites(tiny())) == number


@pytest.mark.parametrize(
    ("text", "counts", "value", "unit"),
    [
        ("latency=0.6", "latency", 0.6, ""),
        ("latency=12ms", "latency", 12, "ms"),
        (" latency = 0.5 ms ", "latency", 0.5, "ms"),
        ("loss=0.1", "loss", 0.1, ""),
        ("loss=1%", "loss", 0.01, "%"),
        ("loss=0%", "loss", 0, "%"),
    ],
)
def test_time_and_loss(tiny, text, counts, value, unit):
    budget = Budget.parse(text)
    (limit,) = budget.limits
    assert (limit.counts, limit.value, limit.unit) == (counts, pytest.approx(value), unit)
    assert budget.measured and not Budget.parse("macs=0.5").measured
    budget.check(find_sites(tiny()))  # what was not measured yet cannot be refused


@pytest.mark.parametrize("text", ["heads=0.5,ffn=0.25", "ffn=0.25, heads=0.5"])
def test_heads_and_neurons_apart(tiny, text):
    sites = find_sites(tiny())
    allowed = {limit.counts: limit.allowed(sites) for limit in Budget.parse(text).limits}
    assert allowed == {"heads": 4, "ffn": 32}


@pytest.mark.parametrize("text", ["macs=0.001", "params=0.01", "params=0.001M", "params=999M", "macs=9G"])
def test_a_budget_out_of_reach_says_what_is_in_reach(tiny, text):
    sites = find_sites(tiny(), seq_len=12)
    with pytest.raises(ValueError, match="when every head and neuron is gone: choose a share between") as refusal:
        Budget.parse(text).check(sites)
    least = re.search(r"between ([\d.]+) and 1$", str(refusal.value))[1]
    Budget.parse(f"{text.split('=')[0]}={least}").check(sites)  # the next step that it names works


def test_heads_of_a_model_that_has_lost_them_all(tiny, keep):
    model = tiny()
    sites = find_sites(model)
    apply_plan(model, keep(sites, {s.name: [] for s in sites if s.kind == "attention"}))
    with pytest.raises(ValueError, match="counts heads; this model has none"):
        Budget.parse("heads=0.5,ffn=0.5").check(find_sites(model))
