"""Pruning at once, before training; `stages` has what pruning in several stages adds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from ..layers import LayerMatch
from ..ranks import Ranks
from .allocation import Scores, check_reach
from .budget import UNITS, Budget
from .discovery import find_sites
from .importance import mean_length, score_units
from .importance.realised import site_losses
from .judge import Judge
from .latency import share_of_latency, time_sites
from .repair import SiteRepair, repair
from .rules import Rules
from .sites import Plan
from .stock import stock_kinds
from .surgery import apply_plan, check_plan
from .walk import Step, smallest, tightened

SCHEDULES = ("one_shot", "gradual")


@dataclass(frozen=True)
class Pruning:
    """What to do, as the user set it.

    Attributes:
        budget: "macs=0.5" and so on.
        importance: The score.
        repair: Whether to refit.
        round_to: FFN widths become multiples of it.
        shapes: "free", "uniform" or "stock".
        seed: Of the probe.
        keep: What is never removed, see `rules.KEEP_RULE`.
        least: Units that each site keeps, as a share or a number; None: see `Scores.trusted`.
        latency_batch: Samples of the passes that a latency budget times.
        ranks: The processes that rank together.
        rounds: In how many rounds the units are ranked, see `stages.plan_in_rounds`; None: as the budget asks for.
    """

    budget: str
    importance: str = "feature_loss"
    repair: bool = True
    round_to: int = 8
    shapes: str = "free"
    seed: int = 0
    keep: Sequence[str] = ()
    least: float | None = None
    latency_batch: int = 32
    ranks: Ranks = field(default_factory=Ranks.alone)
    rounds: int | None = None

    def rules(self) -> Rules:
        """What a plan must respect beside the budget."""
        return Rules(self.round_to, self.shapes, self.keep, self.least)


def check_budget(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], pruning: Pruning) -> None:
    """Raise unless the budget can be reached on `model`, as far as that is known before anything was measured.

    Raises:
        ValueError: It cannot, or the keep-list names what is not there.
    """
    sites = find_sites(model, batches[0], mean_length(batches))
    check_reach(Budget.parse(pruning.budget), sites, pruning.rules(), stock_kinds(model, sites))


def one_shot(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    matches: list[LayerMatch],
    pruning: Pruning,
    judge: Judge | None = None,
) -> Plan:
    """Rank every unit once and plan for the whole budget; nothing is changed.

    Args:
        model: The student.
        teacher: Another model as teacher; None: the student itself.
        batches: Calibration inputs.
        matches: Which student layer learns from which teacher layer.
        pruning: The settings.
        judge: What a budget of "loss=" needs.
    """
    asked = {"matches": matches, "seed": pruning.seed, "ranks": pruning.ranks}
    scores = score_units(model, teacher, batches, pruning.importance, **asked)
    return make_plan(model, scores, batches, pruning, judge)


def make_plan(
    model: PreTrainedModel,
    scores: Scores,
    batches: Sequence[dict[str, Tensor]],
    pruning: Pruning,
    judge: Judge | None = None,
) -> Plan:
    """Plan for the whole budget from scores that are there, measuring what the budget needs; arguments as of `one_shot`."""
    counts = Budget.parse(pruning.budget).counts
    if counts == "latency":
        return plan_for_latency(model, scores, batches[0], pruning)
    if counts == "loss":
        return plan_for_loss(model, scores, batches, pruning, judge)
    return scores.plan(pruning.budget, **asdict(pruning.rules()))


def plan_for_latency(model: PreTrainedModel, scores: Scores, batch: dict[str, Tensor], pruning: Pruning) -> Plan:
    """Time the sites, plan, time what the plan leaves, and plan again for less where that is too slow.

    Args:
        model: The model that was ranked; it is read, not changed.
        scores: Its scores; the times are left in them.
        batch: Inputs; brought to the mean length of the calibration samples.
        pruning: The settings.

    Raises:
        ValueError: The latency cannot be reached.
    """
    rules, size = pruning.rules(), pruning.latency_batch
    scores.latency = table = time_sites(model, batch, scores.sites, size)
    scores.plan(pruning.budget, **asdict(rules))  # refuses what cannot be reached
    (limit,) = Budget.parse(pruning.budget).limits

    def attempt(share: float) -> Step:
        plan = scores.plan(f"latency={share:.9f}", **asdict(rules))
        return Step(share, share_of_latency(model, batch, scores.sites, plan, size), plan)

    lowest = scores.lowest("latency", rules) * (1 + 1e-6)
    step = tightened(attempt, limit.allowed(scores.sites) / table.whole, lowest)
    step.plan.budget |= {"asked": pruning.budget, "reached": step.value}
    return step.plan


def plan_for_loss(
    model: PreTrainedModel,
    scores: Scores,
    batches: Sequence[dict[str, Tensor]],
    pruning: Pruning,
    judge: Judge,
) -> Plan:
    """The plan of the fewest MACs whose model, cut and repaired, loses no more than the budget says.

    Args:
        model: The model that was ranked; it is read, not changed.
        scores: Its scores; one scoring serves the whole walk.
        batches: Calibration inputs, for repair.
        pruning: The settings.
        judge: Measures what was lost, on other data.

    Raises:
        ValueError: The model as given loses more already, against another teacher.
    """
    (limit,) = Budget.parse(pruning.budget).limits
    rules = pruning.rules()
    if judge.before > limit.value:
        raise ValueError(
            f"budget {pruning.budget!r} allows a loss of {limit.value:g}; the model as given has {judge.before:.4g} against "
            "its teacher before anything is removed: allow more than that, or leave teacher out"
        )

    def attempt(share: float) -> Step:
        plan, smaller = scores.plan(f"macs={share:.4f}", **asdict(rules)), copy.deepcopy(model)
        realise(smaller, model, batches, plan, pruning)
        return Step(share, judge.loss(smaller), plan)

    whole = Step(1.0, judge.before, scores.plan("macs=1", **asdict(rules)))
    step = smallest(attempt, whole, limit.value, scores.lowest("macs", rules))
    step.plan.budget |= {"asked": pruning.budget, "loss": step.value, **judge.facts}
    return step.plan


def restate(plan: Plan, model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Let a plan that somebody gave, and may have edited, say what it reaches; a latency is left as it was measured."""
    counts = str(plan.budget.get("asked")).partition("=")[0]
    if counts in UNITS and counts != "latency":
        asked = Budget.parse("macs=1" if counts == "loss" else plan.budget["asked"])
        sites = find_sites(model, batch, plan.budget.get("seq_len"))
        check_plan(sites, plan)
        reached = asked.reached(sites, {name: len(kept) for name, kept in plan.kept.items()})
        plan.budget["reached"] = next(iter(reached.values())) if len(reached) == 1 else reached


def realise(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    plan: Plan,
    pruning: Pruning,
) -> list[SiteRepair]:
    """Surgery and repair: `model` is smaller afterwards.

    Args:
        model: The student.
        original: A copy of the student as it is now, towards which repair refits.
        batches: Calibration inputs.
        plan: What stays.
        pruning: The settings.
    """
    apply_plan(model, plan, batches[0])
    return repair(model, original, batches) if pruning.repair else []


def report_losses(
    repairs: Sequence[SiteRepair],
    original: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    plan: Plan,
    matches: list[LayerMatch],
) -> None:
    """Write into the records what each site was predicted to cost, and what it costs.

    Args:
        repairs: The records of `realise`; those of one part of several are left.
        original: The student before surgery.
        teacher: Another teacher; None: the student.
        batches: Those that ranked the units.
        plan: What was cut.
        matches: Which student layer learns from which teacher layer.
    """
    losses = site_losses(original, teacher, batches, plan, matches)
    for record in repairs:
        record.predicted, record.realised = losses.get(record.site, (None, None))
