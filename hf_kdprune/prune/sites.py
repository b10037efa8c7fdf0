"""The vocabulary of pruning: what can be removed (Unit, Site), from what (Sites), and what is kept (Plan)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

PLAN_VERSION = 1


@dataclass(frozen=True)
class Unit:
    """One thing that is removed whole: an attention head or an FFN neuron.

    Attributes:
        site: Name of the site that holds it.
        index: Its position in the site, counted before anything was removed.
    """

    site: str
    index: int


@dataclass(frozen=True)
class Site:
    """The heads of one attention, or the neurons of one FFN.

    Attributes:
        name: Path of the block and the kind: "bert.encoder.layer.0.attention".
        kind: "attention" or "ffn".
        layer: Position of the block in its stack.
        total: Number of units.
        width: Channels of one unit at the output projection: the head size, or 1 for a neuron.
        producers: Paths of the linear layers that lose rows (query, key, value; or up, gate).
        consumer: Path of the output projection, which loses columns.
        hidden: Size of the residual stream that producers read and the consumer writes.
        biases: How many of the producers have a bias.
        after: Path of the norm that reads the residual stream behind the consumer; None where there is none.
        core: Path of the module that computes the attention; None for an FFN.
        returns: Length of the tuple that `core` returns; 0 if it returns a tensor.
        attributes: (module path, attribute, channels a unit) for integers of `core` that count heads.
        table: Rows of position tables that the producers read besides the tokens, and that are multiplied with the
            queries or keys (DeBERTa); 0 in most models.
    """

    name: str
    kind: str
    layer: int
    total: int
    width: int
    producers: tuple[str, ...]
    consumer: str
    hidden: int
    biases: int
    after: str | None = None
    core: str | None = None
    returns: int = 0
    attributes: tuple[tuple[str, str, int], ...] = ()
    table: int = 0

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of the weights."""
        return [Unit(self.name, i) for i in range(self.total)]

    def unit_macs(self, seq_len: int) -> int:
        """MACs of one unit over one sample of `seq_len` tokens; attention products included.

        Source: METHOD.md 5: a head costs S*4*d*d_h + 2*S^2*d_h, a neuron 2*S*d (3*S*d where it is gated).
        """
        linear = seq_len * (len(self.producers) + 1) * self.hidden * self.width
        linear += self.table * (self.hidden + seq_len) * self.width
        return linear + (2 * seq_len**2 * self.width if self.kind == "attention" else 0)

    @property
    def unit_params(self) -> int:
        """Parameters of one unit."""
        return self.width * ((len(self.producers) + 1) * self.hidden + self.biases)


class Sites(list[Site]):
    """The sites of a model in the order in which they run, and the cost of what is no site.

    Attributes:
        token_macs: MACs for each token, outside the sites (a language model's head, say).
        sample_macs: MACs for each sample, outside the sites (a pooler, a classifier).
        other_params: Parameters outside the sites; embeddings are here.
        seq_len: Tokens of a sample, at which MACs are counted unless told otherwise.
    """

    def __init__(self, sites: Iterable[Site], *, token_macs: int, sample_macs: int, other_params: int, seq_len: int):
        """Take the sites and the fixed costs, see the class."""
        super().__init__(sites)
        self.token_macs, self.sample_macs, self.other_params = token_macs, sample_macs, other_params
        self.seq_len = seq_len

    def macs(self, seq_len: int | None = None, kept: dict[str, int] | None = None) -> int:
        """MACs of one forward pass over one sample; `kept` gives units left by site (default: all)."""
        seq_len = seq_len or self.seq_len
        units = sum(site.unit_macs(seq_len) * (kept or {}).get(site.name, site.total) for site in self)
        return units + self.token_macs * seq_len + self.sample_macs

    def params(self, kept: dict[str, int] | None = None) -> int:
        """Parameters of the model; `kept` gives units left by site (default: all)."""
        return self.other_params + sum(s.unit_params * (kept or {}).get(s.name, s.total) for s in self)


@dataclass
class SitePlan:
    """What one site keeps.

    Attributes:
        name: The site.
        kind: "attention" or "ffn".
        layer: Position of its block.
        total: Units before.
        kept: Indices of the units that stay, ascending.
        scores: The score of each unit, kept or not; empty where nothing was scored.
    """

    name: str
    kind: str
    layer: int
    total: int
    kept: list[int]
    scores: list[float] = field(default_factory=list)

    @property
    def removed(self) -> list[int]:
        """Indices of the units that go."""
        kept = set(self.kept)
        return [i for i in range(self.total) if i not in kept]


@dataclass
class Plan:
    """Which units each site keeps: data that can be read, edited, saved and replayed.

    Attributes:
        sites: One SitePlan a site.
        budget: {"asked": "macs=0.5", "reached": share that remains, "seq_len": tokens at which MACs were counted}.
        importance: The score that ranked the units.
        version: Of the format of plan.json.
    """

    sites: list[SitePlan]
    budget: dict
    importance: str
    version: int = PLAN_VERSION

    def __getitem__(self, name: str) -> SitePlan:
        """The plan of one site, by name."""
        return next(site for site in self.sites if site.name == name)

    @property
    def kept(self) -> dict[str, list[int]]:
        """Site name -> indices of the units that stay."""
        return {site.name: site.kept for site in self.sites}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: The file is of a newer version than this package reads.
        """
        data = json.loads(Path(path).read_text())
        if data.get("version", 0) > PLAN_VERSION:
            raise ValueError(
                f"{path} has plan version {data['version']}; this hf_kdprune reads up to {PLAN_VERSION}: upgrade it"
            )
        return cls([SitePlan(**s) for s in data["sites"]], data["budget"], data["importance"], data["version"])

    @classmethod
    def random(cls, sites: Sites, budget: str, seed: int = 0) -> Plan:
        """A plan under `budget` whose units were drawn by lot: the baseline of every ranking."""
        from .importance.baselines import random_scores  # scores make plans; importing them above would be a cycle

        return random_scores(sites, seed).plan(budget)
