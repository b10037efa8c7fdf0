"""Half precision: the plan is that of float32, what is small is not lost, and a refit keeps the type of the weights."""

import copy

import pytest
import torch

from hf_kdprune import apply_plan, find_sites, repair, score_units
from hf_kdprune.layers import states_of
from hf_kdprune.prune.importance import Asked
from hf_kdprune.prune.importance.probe import derivatives

HALVES = [torch.bfloat16, torch.float16]


def agreed(a, b):
    """Share of the units that both plans keep or both remove."""
    apart = sum(len(set(site.kept) ^ set(b[site.name].kept)) for site in a.sites)
    return 1 - apart / sum(site.total for site in a.sites)


def test_the_real_minilm_gets_its_plan_in_bfloat16_too(minilm_shared, banking):
    batches = banking(4, 16)
    plans = [score_units(m, None, batches).plan("macs=0.5") for m in (minilm_shared, copy.deepcopy(minilm_shared).bfloat16())]
    assert agreed(*plans) >= 0.95


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_student_of_another_teacher_gets_its_plan_in_half_precision_too(tiny, ragged, half):
    student, teacher, batches = tiny(seed=0), tiny(seed=1), ragged(4, 8)
    whole = score_units(student, teacher, batches).plan("macs=0.5", round_to=1)
    small = score_units(student.to(half), teacher.to(half), batches).plan("macs=0.5", round_to=1)
    assert agreed(whole, small) >= 0.95


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_derivatives_too_small_for_float16_are_not_lost(tiny, ragged, half):
    model, batches = tiny(), ragged(1, 4)

    def watch(output, batch, draw):
        return [([x], [1e-12 * torch.randn(x.shape, generator=draw)]) for x in states_of(output)[-1:]]

    (whole,) = derivatives(model, batches, Asked(find_sites(model)), watch, 1)
    (small,) = derivatives(model.to(half), batches, Asked(find_sites(model)), watch, 1)
    for name, size in whole.size.items():
        assert float((small.size[name] - size).norm() / size.norm()) < 0.05


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_refit_is_in_float64_and_written_in_the_type_of_the_weights(tiny, ragged, half):
    def repaired(model):
        smaller = copy.deepcopy(model)
        apply_plan(smaller, score_units(model, None, batches).plan("macs=0.7", round_to=1))
        return smaller, repair(smaller, model, batches)

    batches = ragged(8, 32)
    (_, whole), (smaller, small) = repaired(tiny()), repaired(tiny().to(half))
    assert {p.dtype for p in smaller.parameters()} == {half}
    assert any(record.accepted for record in whole)
    for a, b in zip(whole, small, strict=True):
        assert b.after == pytest.approx(a.after, rel=0.15, abs=1e-3)
