"""Searches over budgets, as pure functions of what tries one: the smallest that holds, and one tightened until it does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from .sites import Plan

logger = logging.getLogger(__name__)
RESOLUTION = 0.01  # of the share of MACs at which a walk ends
SLACK = 1.03  # a latency that is missed by less is held: timings repeat no better
ROUNDS = 3  # plans that are made for one latency


@dataclass(frozen=True)
class Step:
    """One budget that was tried.

    Attributes:
        share: What it asked for, of the model as given.
        value: What was measured; the less the better.
        plan: The plan that was measured.
    """

    share: float
    value: float
    plan: Plan


def smallest(attempt: Callable[[float], Step], whole: Step, allowed: float, lowest: float) -> Step:
    """The step of the smallest share whose value is at most `allowed`, to 0.01, by bisection.

    It takes for granted that a larger share gives no larger value; that the step which is returned holds was measured.

    Args:
        attempt: Makes and measures the model of a share.
        whole: The step of the model as given, which is known to hold.
        allowed: The most that the value may be.
        lowest: The least share that can be made.
    """
    fails, holds, best = math.ceil(lowest / RESOLUTION - 1e-9) - 1, round(1 / RESOLUTION), whole
    while holds - fails > 1:
        middle = (fails + holds) // 2
        step = attempt(middle * RESOLUTION)
        logger.info("share %.2f: %.4g measured, %.4g allowed", step.share, step.value, allowed)
        if step.value <= allowed:
            holds, best = middle, step
        else:
            fails = middle
    if best is whole:
        logger.warning(
            "nothing can be removed: the largest smaller model that was tried exceeds the %.4g allowed; the plan keeps "
            "every unit. Allow a larger loss, or give repair more calibration samples",
            allowed,
        )
    return best


def tightened(attempt: Callable[[float], Step], asked: float, lowest: float) -> Step:
    """The first step whose measured value is at most `asked`, within 3 %; each next one asks for less by what was missed.

    Args:
        attempt: Plans for a share and measures what it gives.
        asked: The share.
        lowest: The least share that can be planned for.
    """
    target, tried = asked, []
    for _ in range(ROUNDS):
        tried.append(attempt(target))
        if tried[-1].value <= asked * SLACK or target <= lowest:
            break
        target = max(lowest, target * asked / tried[-1].value)
    best = tried[-1] if tried[-1].value <= asked * SLACK else min(tried, key=lambda step: step.value)
    if best.value > asked * SLACK:
        logger.warning(
            "the latency budget is missed: %.3f of the model's time was asked for, %.3f was measured, in %d plans (targets "
            "%s): on this device the model does not get faster as measured layer by layer; ask for less, or take a macs budget",
            *(asked, best.value, len(tried), ", ".join(f"{step.share:.3f}" for step in tried)),
        )
    return best
