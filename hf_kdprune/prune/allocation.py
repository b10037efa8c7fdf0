"""Scores and a budget make a Plan: one list over all heads and neurons, lowest score per cost first (METHOD.md 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .budget import KINDS, WHOLE, Budget, Limit, cost_of
from .latency_table import LatencyTable
from .rules import Bounds, Rules
from .sites import Plan, Site, SitePlan, Sites
from .uniform import counts, in_all, uniform

TRUST = 2.0
BY_TRIAL = (
    "is found by making smaller models and measuring them, which scores alone cannot: give a KDPruneTrainer "
    'KDPruneConfig(budget="loss=..."), or call plan_for_loss (hf_kdprune.prune.schedule)'
)


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
    cost: float


@dataclass
class Scores:
    """What each unit is worth: the rise of the second loss if it goes.

    Attributes:
        sites: The sites.
        values: Site name -> (units,) scores; squared (curvature) scores add up and share one list.
        errors: Site name -> (units,) standard errors; zeros where the score is exact.
        importance: The name of the score.
        stock: The kinds of sites that the model's own class can have fewer of, in all layers alike.
        weights: Fingerprint of the weights that were ranked; "": any.
        gone: Site name -> units that an earlier stage removed: no plan keeps them, whatever their scores.
    """

    sites: Sites
    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    importance: str
    stock: tuple[str, ...] = ("attention", "ffn")
    weights: str = ""
    gone: dict[str, frozenset[int]] = field(default_factory=dict)

    @property
    def latency(self) -> LatencyTable | None:
        """Measured times, which a budget of "latency=" needs: `scores.latency = time_sites(model, batch, scores.sites)`."""
        return self.sites.latency

    @latency.setter
    def latency(self, table: LatencyTable | None) -> None:
        """Take the measured times."""
        self.sites.latency = table

    def plan(
        self, budget: str, round_to: int = 8, shapes: str = "free", keep: Sequence[str] = (), least: float | None = None
    ) -> Plan:
        """The plan that loses the least score under `budget`; runs no forward pass.

        Args:
            budget: "macs=0.5" and so on, see `Budget.parse`.
            round_to: FFN widths become multiples of it.
            shapes: "free", "uniform" (every layer alike) or "stock" (what the model's own class can build).
            keep: What is never removed: sites ("bert.encoder.layer.0.attention"), layers ("bert.encoder.layer.0"), units
                ("bert.encoder.layer.3.attention:0,5" or ":0-3").
            least: Units that each site keeps: a share of them in (0, 1), or a number; None: see `trusted`.

        Raises:
            ValueError: The text is no budget, it cannot be reached in these shapes with what must stay, it needs
                measurements that were not made, or every unit of a site has the same score.
        """
        parsed, rules = Budget.parse(budget), Rules(round_to, shapes, keep, least)
        if parsed.counts == "loss":
            raise ValueError(f"a budget of 'loss=', got {budget!r}, {BY_TRIAL}")
        bounds = self.bounds(rules)
        kept = dict(bounds.ceilings)
        if parsed.counts == "latency":
            WHOLE["latency"](self.sites, None)  # raises where no times were measured
        check_reach(parsed, self.sites, rules, self.stock)
        self.check()
        for limit in parsed.limits:
            if shapes == "free":
                self.remove(limit, rules, self.trusted(limit, rules, bounds), kept)
            else:
                ordered = {s.name: self.values[s.name][self.order(s, bounds)] for s in self.sites}
                kept |= uniform(self.sites, ordered, limit, rules, bounds, self.stock)
        sites = [self.site_plan(site, kept[site.name], bounds) for site in self.sites]
        return Plan(sites, self.facts(parsed, kept), self.importance, weights=self.weights)

    def bounds(self, rules: Rules) -> Bounds:
        """What must stay of what is left."""
        bounds = rules.bounds(self.sites)
        return replace(bounds, ceilings={s.name: s.total - len(self.gone.get(s.name, ())) for s in self.sites})

    def facts(self, budget: Budget, kept: dict[str, int]) -> dict:
        """What a plan says of its budget; a latency is predicted until somebody measures it."""
        reached = budget.reached(self.sites, kept)
        share = next(iter(reached.values())) if len(reached) == 1 else reached
        facts = {"asked": budget.asked, "reached": share, "seq_len": self.sites.seq_len}
        if budget.counts == "latency":
            table = self.latency
            facts |= {"predicted": share, "batch": table.batch, "seq_len": table.seq_len, "device": table.device}
        return facts

    def check(self) -> None:
        """Raise if a site's scores are no order: all equal (a first-order score at student == teacher) or not finite.

        Source: METHOD.md 1.
        """
        for name, scores in self.values.items():
            if not bool(scores.isfinite().all()):
                raise ValueError(f"{name}: scores must be finite, got NaN or infinity: look at the calibration data")
            left = scores[[i for i in range(len(scores)) if i not in self.gone.get(name, ())]]
            if len(left) > 1 and bool((left == left[0]).all()):
                raise ValueError(
                    f"{name}: all {len(left)} units have the same score {left[0]:.3g}, which ranks nothing: "
                    f"importance={self.importance!r} does not see this site, choose another"
                )

    def order(self, site: Site, bounds: Bounds) -> list[int]:
        """Units of a site, the least worth first, ties in the order of the weights; those gone lead, those held are last."""
        held, gone = bounds.protected[site.name], self.gone.get(site.name, ())
        return sorted(self.values[site.name].argsort(stable=True).tolist(), key=lambda unit: (unit in held) - (unit in gone))

    def site_plan(self, site: Site, kept: int, bounds: Bounds) -> SitePlan:
        """Keep the `kept` units with the highest scores, those that must stay among them."""
        indices = sorted(self.order(site, bounds)[site.total - kept :])
        scores = [float(f"{score:.6g}") for score in self.values[site.name].tolist()]  # more digits say nothing
        return SitePlan(site.name, site.kind, site.layer, site.total, indices, scores)

    def lowest(self, counts: str, rules: Rules) -> float:
        """The least share of what `counts` names that can remain under `rules`."""
        return lowest(Limit(counts, 1), self.sites, rules, self.stock)

    def bundles(self, site: Site, limit: Limit, rules: Rules, bounds: Bounds) -> list[Bundle]:
        """The site's units that may go, cheapest first, in steps that keep its width a multiple of `round_to`."""
        step = rules.step(site)
        scores = self.values[site.name][self.order(site, bounds)].tolist()
        first, gone = site.total % step or step, site.total - bounds.ceilings[site.name]
        edges = [gone, *(e for e in range(first, site.total - bounds.floors[site.name] + 1, step) if e > gone)]
        costs = [cost_of(limit.counts, site, self.sites, site.total - edge) for edge in edges]
        pairs = zip(zip(edges, costs, strict=True), zip(edges[1:], costs[1:], strict=True), strict=False)
        return [Bundle(site, b - a, sum(scores[a:b]), dear - cheap) for (a, dear), (b, cheap) in pairs]

    def trusted(self, limit: Limit, rules: Rules, bounds: Bounds) -> Bounds:
        """Bounds within which the scores are believed: no site loses more than TRUST times the share that all lose.

        Scores are of second order around the whole model, and say little of a site that is nearly gone while others are whole.
        A language model at params=0.8 loses a fifth less in perplexity so (docs/variants.md). Where units are too coarse for
        that, the share grows until the budget can be reached; with a `least` of the user's nothing is added to it.
        """
        whole, lowest = WHOLE[limit.counts](self.sites, None), fewest(self.sites, limit, rules, self.stock)
        most = whole - WHOLE[limit.counts](self.sites, lowest)
        lost = TRUST * (whole - limit.allowed(self.sites)) / most if most > 0 and rules.least is None else 1.0
        while 0 < lost < 1:
            floors = {s.name: max(bounds.floors[s.name], rules.below(s, s.total * (1 - lost))) for s in self.sites}
            kept = {s.name: rules.narrowest(s, floors[s.name]) for s in self.sites if s.name in lowest}
            if WHOLE[limit.counts](self.sites, kept) <= limit.allowed(self.sites):
                return replace(bounds, floors={n: min(floor, bounds.ceilings[n]) for n, floor in floors.items()})
            lost *= 1.25
        return bounds

    def remove(self, limit: Limit, rules: Rules, bounds: Bounds, kept: dict[str, int]) -> None:
        """Lower `kept` until the limit holds, then give back what still fits, the most valuable first."""
        excess = WHOLE[limit.counts](self.sites, kept) - limit.allowed(self.sites)
        queue = [
            (price(step), position, site.name, step)
            for site in self.sites
            if site.kind in KINDS[limit.counts]
            for position, step in enumerate(steps(self.bundles(site, limit, rules, bounds)))
        ]
        queue.sort(key=lambda item: item[:3])
        gone: dict[str, list[Bundle]] = {}
        for _, _, name, step in queue:
            if excess <= 0:
                break
            gone.setdefault(name, []).extend(step)
            excess -= sum(bundle.cost for bundle in step)
        for name in sorted(gone, key=lambda n: price(gone[n][-1:]), reverse=True):
            while gone[name] and gone[name][-1].cost <= -excess:
                excess += gone[name].pop().cost
        for name, bundles in gone.items():
            kept[name] -= sum(bundle.size for bundle in bundles)


def check_reach(budget: Budget, sites: Sites, rules: Rules, stock: tuple[str, ...]) -> None:
    """Raise unless `budget` can be reached under `rules`.

    Raises:
        ValueError: It cannot, or the rules name what is not there.
    """
    floors: dict[str, int] = {}
    for limit in (limit for limit in budget.limits if limit.counts in WHOLE):
        floors |= fewest(sites, limit, rules, stock)
    rules.bounds(sites)
    budget.check(sites, floors, str(rules))


def fewest(sites: Sites, limit: Limit, rules: Rules, stock: tuple[str, ...]) -> dict[str, int]:
    """Site name -> units that are left when all that may go under `limit` is gone; sites that stay whole are not in it."""
    bounds = rules.bounds(sites)
    if rules.shapes != "free":
        return in_all(sites, {kind: choices[0] for kind, choices in counts(sites, limit, rules, bounds, stock).items()})
    mine = [site for site in sites if site.kind in KINDS[limit.counts]]
    return {site.name: rules.narrowest(site, bounds.floors[site.name]) for site in mine}


def lowest(limit: Limit, sites: Sites, rules: Rules, stock: tuple[str, ...]) -> float:
    """The least share that can remain of what `limit` counts."""
    return WHOLE[limit.counts](sites, fewest(sites, limit, rules, stock)) / WHOLE[limit.counts](sites, None)


def price(bundles: Sequence[Bundle]) -> float:
    """Score per cost; infinite where nothing is won by removing them."""
    cost = sum(bundle.cost for bundle in bundles)
    return sum(bundle.score for bundle in bundles) / cost if cost > 0 else float("inf")


def steps(bundles: Sequence[Bundle]) -> list[list[Bundle]]:
    """A site's bundles in steps whose price rises, so that one list over all sites takes them in their order.

    Where a measured time hardly falls at first and then does, several bundles make one step; what wins nothing makes none.
    """
    joined: list[list[Bundle]] = []
    for bundle in bundles:
        joined.append([bundle])
        while len(joined) > 1 and price(joined[-1]) < price(joined[-2]):
            last = joined.pop()
            joined[-1] += last
    return [step for step in joined if price(step) < float("inf")]
