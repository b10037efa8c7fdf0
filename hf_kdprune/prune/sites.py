"""The vocabulary of pruning: what can be removed (Unit, Site), from what (Sites), and what is kept (Plan)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .latency_table import LatencyTable

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
class Cut:
    """The entries of one tensor that go with the units of a site.

    Attributes:
        path: Path of the module that owns the tensor.
        tensor: Its name there: "weight", "bias", or a parameter's own name.
        dim: The dimension that loses entries.
        runs: (start, step, size): unit u owns the entries from start + u * step on, size of them, in each run. One run
            where query, key and value have layers of their own; three where they are packed in one layer.
    """

    path: str
    tensor: str
    dim: int
    runs: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        """Of the tensor, as in a state dict."""
        return f"{self.path}.{self.tensor}"

    @property
    def size(self) -> int:
        """Entries of one unit."""
        return sum(size for _, _, size in self.runs)

    def indices(self, units: Iterable[int]) -> list[int]:
        """The entries of `units`, ascending."""
        return sorted(start + u * step + i for u in units for start, step, size in self.runs for i in range(size))


@dataclass(frozen=True)
class Part:
    """One attention or FFN; most sites have one, those that must lose the same heads have several.

    Attributes:
        consumer: Path of the output projection: what it reads, (..., total * width), carries the gates.
        after: Path of the norm that reads the residual stream behind the consumer; None where there is none.
        core: Path of the module that computes the attention; None for an FFN.
        returns: Length of the tuple that `core` returns; 0 if it returns a tensor.
        cache: The layer of the key-value cache that `core` fills; None if it fills none.
    """

    consumer: str
    after: str | None = None
    core: str | None = None
    returns: int = 0
    cache: int | None = None

    @property
    def inner(self) -> str | None:
        """Name of the output projection within `core`; None if it lies outside."""
        inside = self.core is not None and self.consumer.startswith(self.core + ".")
        return self.consumer[len(self.core) + 1 :] if inside else None


@dataclass(frozen=True)
class Site:
    """The heads of one attention, or the neurons of one FFN; of several where they can only go together.

    Attributes:
        name: Path of the block and the kind: "bert.encoder.layer.0.attention".
        kind: "attention" or "ffn".
        layer: Position of the block in its stack.
        total: Number of units.
        width: Channels of one unit at the output projection: the head size, or 1 for a neuron.
        parts: Where the units are computed.
        cuts: What surgery takes out of the weights.
        hidden: Size of the residual stream that the consumer writes.
        unit_macs: MACs of one unit in one forward pass over one sample; attention products included.
        unit_params: Parameters of one unit.
        attributes: (module path, attribute, change a unit) for numbers of modules that count units or channels.
        least: Units that must stay: 1 where the block cannot do without (most can).
    """

    name: str
    kind: str
    layer: int
    total: int
    width: int
    parts: tuple[Part, ...]
    cuts: tuple[Cut, ...]
    hidden: int
    unit_macs: int
    unit_params: int
    attributes: tuple[tuple[str, str, int], ...] = ()
    least: int = 0

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of the weights."""
        return [Unit(self.name, i) for i in range(self.total)]

    @property
    def consumers(self) -> tuple[str, ...]:
        """Paths of the output projections."""
        return tuple(part.consumer for part in self.parts)

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the modules that lose rows: query, key, value; or up, gate."""
        paths = dict.fromkeys(c.path for c in self.cuts if c.tensor == "weight")
        return tuple(p for p in paths if not p.startswith(self.consumers))


class Sites(list[Site]):
    """The sites of a model in the order in which they run, and the cost of what is no site.

    Attributes:
        other_macs: MACs for each sample, outside the sites (a language model's head, a classifier).
        other_params: Parameters outside the sites; embeddings are here.
        seq_len: Tokens of a sample, at which MACs were counted; None where the input is no text.
        latency: Measured times, see `time_sites`; None until somebody measured.
    """

    def __init__(self, sites: Iterable[Site], *, other_macs: int, other_params: int, seq_len: int | None):
        """Take the sites and the fixed costs, see the class."""
        super().__init__(sites)
        self.other_macs, self.other_params, self.seq_len = other_macs, other_params, seq_len
        self.latency: LatencyTable | None = None

    def macs(self, kept: dict[str, int] | None = None) -> int:
        """MACs of one forward pass over one sample; `kept` gives units left by site (default: all)."""
        return self.other_macs + sum(s.unit_macs * (kept or {}).get(s.name, s.total) for s in self)

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
        budget: {"asked": "macs=0.5", "reached": share that remains, "seq_len": tokens at which MACs were counted}; of a
            latency also what was predicted, and batch and device of the measurement; of a loss also the loss.
        importance: The score that ranked the units.
        version: Of the format of plan.json.
        weights: Fingerprint of the weights for which it was made, before surgery; "": not said.
    """

    sites: list[SitePlan]
    budget: dict
    importance: str
    version: int = PLAN_VERSION
    weights: str = ""

    def __str__(self) -> str:
        """A table: what each site keeps, by layer."""
        shown = [(str(s.layer), s.kind, f"{len(s.kept)} of {s.total}", s.name, ranges(s.kept)) for s in self.sites]
        head = ("layer", "kind", "kept", "site", "units kept")
        widths = [max(len(row[i]) for row in (head, *shown)) for i in range(4)]
        lines = ["  ".join([*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[4]]) for row in (head, *shown)]
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.budget.items())
        return "\n".join([f"ranked by {self.importance}; budget: {facts}", *lines])

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
        sites = [SitePlan(**s) for s in data["sites"]]
        return cls(sites, data["budget"], data["importance"], data["version"], data.get("weights", ""))

    @classmethod
    def random(cls, sites: Sites, budget: str, seed: int = 0) -> Plan:
        """A plan under `budget` whose units were drawn by lot: the baseline of every ranking."""
        from .importance.baselines import random_scores  # scores make plans; importing them above would be a cycle

        return random_scores(sites, seed).plan(budget)


def ranges(indices: list[int], most: int = 8) -> str:
    """Ascending indices as "0-3, 7, 9-11", the middle left out where there are more than `most` runs."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], i]
        else:
            runs.append([i])
    texts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(texts if len(texts) <= most else [*texts[: most - 1], "...", texts[-1]]) or "none"
