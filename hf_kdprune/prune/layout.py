"""Which rows of which layers belong to which unit, read off from the derivatives of what an output projection reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .trace import Trace, moved

Rows = frozenset[tuple[str, int]]  # (layer, row)
Runs = tuple[tuple[int, int, int], ...]
PROBES = 8  # neurons that tell the layout of an FFN


@dataclass(frozen=True)
class Layout:
    """The units in front of one output projection.

    Attributes:
        consumer: Path of the linear layer that reads them.
        kind: "attention" or "ffn".
        total: Number of units.
        width: Channels of one unit in what the consumer reads.
        sources: Linear layers that feed the consumer directly.
        runs: Linear layer -> the rows of each unit, see `Cut`; a source whose rows all units share is not in here.
        tables: Parameter -> (dimension, entries of each unit): a bias that each head has of its own.
    """

    consumer: str
    kind: str
    total: int
    width: int
    sources: tuple[str, ...]
    runs: dict[str, Runs]
    tables: dict[str, tuple[int, Runs]]


def find_layout(trace: Trace, consumer: str, block: str, tables: dict[str, Tensor]) -> Layout | None:
    """The units that `consumer` reads; None if it reads no units.

    Args:
        trace: With a graph.
        consumer: Path of a linear layer.
        block: Path of its block, which holds all that feeds units.
        tables: Parameters that may hold something for each head.
    """
    read = trace.reads[consumer]
    if not read.requires_grad or not read.shape[-1]:
        return None
    leaves = {name: trace.writes[name] for name in trace.linears if name != consumer and trace.writes[name].numel()}
    sources = {name: leaves[name] for name in moved(read, None, leaves)}
    if not sources or not all(name.startswith(block + ".") for name in sources):
        return None  # the residual stream
    live = read.detach().abs().flatten(0, -2).amax(0).nonzero().flatten().tolist()  # a ReLU leaves some channels dead
    if len(live) < min(2, read.shape[-1]):
        return None

    def rows(channels: list[int]) -> Rows:
        found = moved(read, channels, sources)
        entries = {name: g.abs().flatten(0, -2).amax(0).nonzero().flatten().tolist() for name, g in found.items()}
        return frozenset((name, row) for name, kept in entries.items() for row in kept)

    width, shared = unit_width(rows, live, read.shape[-1])
    total = read.shape[-1] // width if width else 0
    if not width or read.shape[-1] % width:
        return None
    if width == 1 and not shared:
        owned = {c: rows([c]) for c in live[:: max(1, len(live) // PROBES)] + live[-1:]}
        runs = fit_layers(owned, sources)
        covered = runs and all(sum(r[2] for r in runs[n]) * total == sources[n].shape[-1] for n in runs)
        return Layout(consumer, "ffn", total, 1, tuple(sources), runs, {}) if covered else None
    owned = {u: rows(list(range(u * width, (u + 1) * width))) for u in range(total)}
    if total > 1:
        common = frozenset.intersection(*owned.values())  # the one key and value of all queries
        owned = {u: own - common for u, own in owned.items()}
    runs = fit_layers(owned, sources)
    if not runs:
        return None
    return Layout(consumer, "attention", total, width, tuple(sources), runs, fit_tables(read, width, total, tables))


def unit_width(rows: Callable[[list[int]], Rows], live: list[int], channels: int) -> tuple[int, Rows]:
    """How many channels the first unit has (0: these are no units), and the rows that first and last channel share."""
    if channels == 1:
        return 1, frozenset()
    first, last = rows(live[:1]), rows(live[-1:])
    shared = first & last
    own = first - shared
    if not own:
        return 0, shared  # a norm mixes all channels

    def same(channel: int) -> bool:
        return len(rows([channel]) & own) >= 2

    if not same(live[1]):
        return (channels if shared else 1), shared  # the channels of a single head share all but their value
    low, high = live[1], live[-1]  # the first is in the unit, the second is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(middle) else (low, middle)
    return high, shared


def fit_layers(owned: dict[int, Rows], sources: Iterable[str]) -> dict[str, Runs]:
    """Layer -> runs that explain the rows of every unit seen; {} where there are none."""
    used = {name for rows in owned.values() for name, _ in rows}
    names = [name for name in sources if name in used]
    runs = {name: fit_runs({u: [r for n, r in rows if n == name] for u, rows in owned.items()}) for name in names}
    return runs if all(runs.values()) else {}


def fit_runs(owned: dict[int, list[int]]) -> Runs:
    """(start, step, size) of the runs of entries that each unit owns; () if the units do not follow one another evenly."""
    units = sorted(owned)
    blocks = {u: consecutive(sorted(owned[u])) for u in units}
    a, b = units[0], units[-1]
    if any([size for _, size in blocks[u]] != [size for _, size in blocks[a]] for u in units):
        return ()
    runs = []
    for i, (start, size) in enumerate(blocks[a]):
        step = (blocks[b][i][0] - start) // (b - a) if b > a else size
        runs.append((start - a * step, step, size))
        if any(blocks[u][i][0] != start + (u - a) * step for u in units) or step < size:
            return ()
    return tuple(runs)


def consecutive(entries: list[int]) -> list[tuple[int, int]]:
    """(start, length) of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for entry in entries:
        if found and entry == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((entry, 1))
    return found


def fit_tables(read: Tensor, width: int, total: int, tables: dict[str, Tensor]) -> dict[str, tuple[int, Runs]]:
    """Parameter -> (dimension, runs) for those that hold entries for each unit."""
    used = {name: tables[name] for name in moved(read, None, tables)} if tables else {}
    by_unit = [moved(read, range(u * width, (u + 1) * width), used) for u in range(total)] if used else []
    found = {}
    for name, table in used.items():
        for dim, size in enumerate(table.shape):
            if size % total or total == 1 or not all(name in seen for seen in by_unit):
                continue
            owned = {u: entries_along(seen[name], dim) for u, seen in enumerate(by_unit)}
            apart = sum(len(own) for own in owned.values()) == len({e for own in owned.values() for e in own})
            if apart and (runs := fit_runs(owned)):
                found[name] = (dim, runs)
    return found


def entries_along(gradient: Tensor, dim: int) -> list[int]:
    """Positions along `dim` at which the gradient is not zero."""
    others = [d for d in range(gradient.dim()) if d != dim]
    seen = gradient.abs().amax(others) if others else gradient.abs()
    return torch.nonzero(seen).flatten().tolist()
