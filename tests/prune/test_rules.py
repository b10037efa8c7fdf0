"""What must stay, as users write it: understood by name, path or unit, or refused with what to write instead."""

import re

import pytest
from transformers import AutoModelForSeq2SeqLM, T5Config

from hf_kdprune import find_sites
from hf_kdprune.prune.rules import Rules

BLOCK = "bert.encoder.layer"
ALL = [f"{BLOCK}.{layer}.{kind}" for layer in (0, 1) for kind in ("attention", "ffn")]


@pytest.fixture
def sites(tiny):
    return find_sites(tiny())


def protected(sites, *keep):
    return {name: sorted(units) for name, units in Rules(keep=keep).bounds(sites).protected.items() if units}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (f"{BLOCK}.0.attention", {ALL[0]: [0, 1, 2, 3]}),
        (f" {BLOCK}.1 ", {ALL[2]: [0, 1, 2, 3], ALL[3]: list(range(64))}),
        (f"{BLOCK}.1.attention:2", {ALL[2]: [2]}),
        (f"{BLOCK}.1.attention:3,0", {ALL[2]: [0, 3]}),
        (f"{BLOCK}.0.ffn: 0-3, 9, 62-63", {ALL[1]: [0, 1, 2, 3, 9, 62, 63]}),
    ],
)
def test_sites_layers_and_units_by_name(sites, entry, expected):
    assert protected(sites, entry) == expected


def test_a_layer_is_no_prefix_of_another_number(tiny):
    sites = find_sites(tiny(num_hidden_layers=12))
    assert set(protected(sites, f"{BLOCK}.1")) == {f"{BLOCK}.1.attention", f"{BLOCK}.1.ffn"}


def test_entries_add_up(sites):
    assert protected(sites, f"{BLOCK}.0.attention:1", f"{BLOCK}.0.attention:3", ALL[3]) == {
        ALL[0]: [1, 3],
        ALL[3]: list(range(64)),
    }


def test_a_layer_that_shares_its_heads_with_others_keeps_them():
    """T5 hands one position bias from block to block: its blocks lose the same heads, under the name of the first."""
    small = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = AutoModelForSeq2SeqLM.from_config(T5Config(**small, decoder_start_token_id=0)).eval()
    sites = find_sites(model)
    shared = next(s for s in sites if len(s.parts) > 1 and "encoder" in s.consumers[1])
    assert protected(sites, "encoder.block.1")[shared.name] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (["bert.encoder.layer.7"], r"no site or layer of this model: near are .*bert\.encoder\.layer\.[01]"),
        (["bert.encoder.layer.0.atention"], r"near are bert\.encoder\.layer\.0\.attention"),
        (["cheese"], "near are bert.encoder.layer.0.attention"),
        ([f"{ALL[0]}:4"], r"has the units 0 to 3"),
        ([f"{ALL[0]}:0-4"], r"has the units 0 to 3"),
        ([f"{ALL[0]}:3-1"], r"the lower first"),
        ([f"{ALL[0]}:1,1"], r"layer\.0\.attention:1 twice"),
        ([f"{ALL[0]}:0-2", f"{ALL[0]}:2"], r"layer\.0\.attention:2 twice"),
        ([f"{BLOCK}.0:1"], "names units of 2 sites: choose one of"),
        ([f"{ALL[0]}:"], "keep is a list"),
        ([f"{ALL[0]}:x"], "keep is a list"),
        ([f"{ALL[0]}:1,,2"], "keep is a list"),
        ([""], "keep is a list"),
        ("bert.encoder.layer.0", "give a list"),
        ([3], "give a list"),
    ],
)
def test_what_names_nothing_is_refused(sites, keep, match):
    with pytest.raises(ValueError, match=match) as refusal:
        Rules(keep=keep).bounds(sites)
    assert "keep is a list of what must stay" in str(refusal.value)


@pytest.mark.parametrize(
    ("least", "heads", "neurons"), [(0, 0, 0), (1, 1, 1), (3, 3, 3), (10, 4, 10), (0.25, 1, 16), (0.26, 2, 17), (0.1, 1, 7)]
)
def test_least_is_a_share_or_a_number_and_no_more_than_there_are(sites, least, heads, neurons):
    floors = Rules(least=least).bounds(sites).floors
    assert [floors[name] for name in ALL] == [heads, neurons] * 2


@pytest.mark.parametrize("least", [-1, -0.1, 1.5, float("nan"), float("inf")])
def test_what_is_no_least_is_refused(least):
    with pytest.raises(ValueError, match=re.escape(f"a whole number of units, 0 or more; got {least!r}")):
        Rules(least=least)
