"""Scores and a budget make a Plan: one list over all heads and neurons, lowest score per cost first (METHOD.md 5)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .budget import KINDS, UNIT, WHOLE, Budget, Limit
from .sites import Plan, Site, SitePlan, Sites
from .uniform import allowed_kinds, uniform


@dataclass(frozen=True)
class Bundle:
    """Units of one site that go together, so that FFN widths stay multiples of `round_to`.

    Attributes:
        site: The site.
        size: Number of units.
        score: Their joint score.
        cost: Their joint cost, in what the budget counts.
    """

    site: Site
    size: int
    score: float
    cost: int


@dataclass
class Scores:
    """What each unit is worth: the rise of the second loss if it goes.

    Attributes:
        sites: The sites.
        values: Site name -> (units,) scores; squared (curvature) scores add up and share one list.
        errors: Site name -> (units,) standard errors; zeros where the score is exact.
        importance: The name of the score.
        stock: The kinds of sites that the model's own class can have fewer of, in all layers alike.
    """

    sites: Sites
    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    importance: str
    stock: tuple[str, ...] = ("attention", "ffn")

    def plan(self, budget: str, round_to: int = 8, shapes: str = "free") -> Plan:
        """The plan that loses the least score under `budget`; runs no forward pass.

        Args:
            budget: "macs=0.5" and so on, see `Budget.parse`.
            round_to: FFN widths become multiples of it.
            shapes: "free", "uniform" (every layer alike) or "stock" (what the model's own class can build).

        Raises:
            ValueError: The text is no budget, it cannot be reached in these shapes, or every unit of a site has the same
                score.
        """
        parsed = Budget.parse(budget)
        parsed.check(self.sites)
        self.check()
        kept = {site.name: site.total for site in self.sites}
        for limit in parsed.limits:
            if shapes == "free":
                self.remove(limit, round_to, kept)
            else:
                kept |= uniform(self.sites, self.values, limit, round_to, allowed_kinds(shapes, limit, self.stock))
        reached = parsed.reached(self.sites, kept)
        share = next(iter(reached.values())) if len(reached) == 1 else reached
        facts = {"asked": parsed.asked, "reached": share, "seq_len": self.sites.seq_len}
        return Plan([self.site_plan(site, kept[site.name]) for site in self.sites], facts, self.importance)

    def check(self) -> None:
        """Raise if a site's scores are no order: all equal (a first-order score at student == teacher) or not finite.

        Source: METHOD.md 1.
        """
        for name, scores in self.values.items():
            if not bool(scores.isfinite().all()):
                raise ValueError(f"{name}: scores must be finite, got NaN or infinity: look at the calibration data")
            if len(scores) > 1 and bool((scores == scores[0]).all()):
                raise ValueError(
                    f"{name}: all {len(scores)} units have the same score {scores[0]:.3g}, which ranks nothing: "
                    f"importance={self.importance!r} does not see this site, choose another"
                )

    def order(self, site: Site) -> list[int]:
        """Units of a site, the least worth first; ties in the order of the weights."""
        return self.values[site.name].argsort(stable=True).tolist()

    def site_plan(self, site: Site, kept: int) -> SitePlan:
        """Keep the `kept` units with the highest scores."""
        indices = sorted(self.order(site)[site.total - kept :])
        scores = [float(f"{score:.6g}") for score in self.values[site.name].tolist()]  # more digits say nothing
        return SitePlan(site.name, site.kind, site.layer, site.total, indices, scores)

    def bundles(self, site: Site, limit: Limit, round_to: int) -> list[Bundle]:
        """The site's units, cheapest first, in steps that keep its width a multiple of `round_to`."""
        step = round_to if site.kind == "ffn" else 1
        scores = self.values[site.name][self.order(site)].tolist()
        first = site.total % step or step
        edges = [0, *range(first, site.total + 1, step)]
        cost = UNIT[limit.counts](site, self.sites)
        return [
            Bundle(site, b - a, sum(scores[a:b]), cost * (b - a))
            for a, b in zip(edges, edges[1:], strict=False)
            if b <= site.total - site.least
        ]

    def remove(self, limit: Limit, round_to: int, kept: dict[str, int]) -> None:
        """Lower `kept` until the limit holds, then give back what still fits, the most valuable first."""
        queue = [
            (bundle.score / bundle.cost, position, site.name, bundle)
            for site in self.sites
            if site.kind in KINDS[limit.counts]
            for position, bundle in enumerate(self.bundles(site, limit, round_to))
        ]
        queue.sort(key=lambda item: item[:3])
        excess = WHOLE[limit.counts](self.sites, kept) - limit.allowed(self.sites)
        gone: dict[str, list[Bundle]] = {}
        for _, _, name, bundle in queue:
            if excess <= 0:
                break
            gone.setdefault(name, []).append(bundle)
            excess -= bundle.cost
        if excess > 0:
            raise ValueError(
                f"the budget asks for {excess:,.0f} {limit.counts} less than is left when every site keeps the least that it "
                f"must with round_to={round_to}: choose a larger budget or a smaller round_to"
            )
        for name in sorted(gone, key=lambda n: gone[n][-1].score / gone[n][-1].cost, reverse=True):
            while gone[name] and gone[name][-1].cost <= -excess:
                excess += gone[name].pop().cost
        for name, bundles in gone.items():
            kept[name] -= sum(bundle.size for bundle in bundles)
