"""The pictures of the model card: what each layer kept, what it cost, how training went; and of `kdprune inspect`.

Every function draws one PNG from plain data and says whether it drew it. `Figure` objects only, never pyplot: nothing
global is touched, so a notebook's or a training run's own figures and styles stay as they are.
"""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe-Ito: colour-blind safe
INK, PALE, GRID = "#333333", "#E6E6E6", "#D0D0D0"


def draw_plan(plan: dict, path: Path | str) -> bool:
    """Draw the heads that each layer kept, coloured by score, and the share of its neurons.

    Args:
        plan: Contents of `plan.json`.
        path: The PNG to write.

    Returns:
        False, and no file, if the plan has no site.
    """
    panels = [("attention", _heads), ("ffn", _neurons)]
    panels = [(draw, [site for site in plan["sites"] if site["kind"] == kind]) for kind, draw in panels]
    panels = [(draw, sites) for draw, sites in panels if sites]
    if not panels:
        return False
    rows = max(len(sites) for _, sites in panels)
    row, size = (0.34, 9) if rows <= 12 else (0.2, 7)  # inches, points
    figure = Figure(figsize=(5 * len(panels), row * rows + 1.5), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=[row * rows, 0.13])
    for column, (draw, sites) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        _frame(axes)
        draw(axes, figure.add_subplot(grid[1, column]), sites, plan["importance"])
        _rows(axes, sites, size)
    return _save(figure, path)


def draw_tradeoff(report: dict, path: Path | str) -> bool:
    """Draw quality (teacher, pruned, compact) beside cost (compact as a share of the teacher).

    Args:
        report: Contents of `report.json`. The first metric is the one drawn.
        path: The PNG to write.

    Returns:
        False, and no file, if neither quality nor cost was measured.
    """
    quality, cost = _stages(report), _costs(report)
    if not quality and not cost:
        return False
    figure = Figure(figsize=(9, 0.38 * max(3, len(cost)) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title, drawn in ((left, "Quality", quality), (right, "Cost of the compact model", cost)):
        _frame(axes)
        _title(axes, title)
        if not drawn:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=INK)
            axes.set(xticks=[], yticks=[])
    if quality:
        _draw_stages(left, report, quality)
    if cost:
        _draw_costs(right, cost)
    return _save(figure, path)


def draw_loss(report: dict, path: Path | str) -> bool:
    """Draw the loss and its terms over the training steps.

    Args:
        report: Contents of `report.json`.
        path: The PNG to write.

    Returns:
        False, and no file, if no step was logged.
    """
    curves = _terms(report["loss"])
    if not curves:
        return False
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    _frame(axes)
    colours = itertools.cycle([BLUE, ORANGE, GREEN, PINK])
    for term, points in curves.items():
        _curve(axes, points, INK if term == "total" else next(colours), term)
    values = np.concatenate([points[:, 1] for points in curves.values()])
    if 0 < 30 * values.min() < values.max():  # a small term would be a flat line at the bottom
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1e4 * values.min() else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0, values.min()))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=9, labelcolor=INK)
    return _save(figure, path)


def draw_curve(points: list[dict], path: Path | str, label: str, tokens: int | None) -> bool:
    """Draw what is lost, by the scores of what goes, against the MACs that remain.

    Args:
        points: {"share": of the MACs, "loss": predicted} each, in the order of the shares.
        path: The PNG to write.
        label: What "loss" is.
        tokens: Of a sample, at which MACs were counted.

    Returns:
        False, and no file, if there is no point.
    """
    if not points:
        return False
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    _frame(axes)
    _curve(axes, np.array([(100 * p["share"], p["loss"]) for p in points]), BLUE, "predicted")
    axes.set(xlim=(0, 100), ylim=(min(0, *(p["loss"] for p in points)), None))
    axes.set_xlabel(f"MACs kept (%{f', at {tokens} tokens' if tokens else ''})", color=INK, fontsize=9)
    axes.set_ylabel(f"{label}, before repair", color=INK, fontsize=9)
    axes.grid(color=GRID, linewidth=0.6)
    return _save(figure, path)


def _heads(axes: Axes, bar: Axes, sites: list[dict], importance: str) -> None:
    width = max(site["total"] for site in sites)
    scores, removed = np.full((len(sites), width), np.nan), []
    for row, site in enumerate(sites):
        scores[row, site["kept"]] = _scores(site)[site["kept"]]
        removed += [Rectangle((unit, row), 1, 1) for unit in sorted(set(range(site["total"])) - set(site["kept"]))]
    positive = scores[scores > 0]
    low, high = np.quantile(positive, [0.02, 0.98]) if positive.size else (1.0, 1.0)
    norm = LogNorm(low, max(high, 1.01 * low), clip=True)
    scores = np.ma.masked_invalid(np.where(scores <= 0, low, scores))  # a second-order score may fall below zero
    edges = {"edgecolors": "white", "linewidth": 0.9 if width <= 16 else 0.4}
    colours = "viridis_r" if positive.size else ListedColormap([BLUE])
    mesh = axes.pcolormesh(scores, norm=norm, cmap=colours, **edges)
    axes.add_collection(PatchCollection(removed, facecolor=PALE, **edges))
    step = math.ceil(width / 16)
    axes.set_xticks(np.arange(0, width, step) + 0.5, np.arange(0, width, step))
    axes.set(xlim=(0, width), ylim=(len(sites), 0))
    axes.set_xlabel("head", color=INK, fontsize=9)
    _title(axes, "Attention heads kept (grey: removed)")
    if not positive.size:
        return bar.axis("off")
    ticks = np.geomspace(norm.vmin, norm.vmax, 3)
    axes.figure.colorbar(mesh, cax=bar, orientation="horizontal", extend="both")
    bar.set_xticks(ticks, [f"{tick:.1e}" for tick in ticks])
    bar.set_xticks([], minor=True)
    bar.tick_params(labelsize=8, colors=INK)
    bar.set_xlabel(f"score of a kept head ({importance}, log scale)", color=INK, fontsize=9)


def _neurons(axes: Axes, legend: Axes, sites: list[dict], importance: str) -> None:
    rows = np.arange(len(sites)) + 0.5
    axes.barh(rows, 100, height=0.7, color=PALE)
    shares = [100 * len(site["kept"]) / site["total"] for site in sites]
    bars = axes.barh(rows, shares, height=0.7, color=BLUE)
    sums = [(_scores(site)[site["kept"]].clip(0).sum(), _scores(site).clip(0).sum()) for site in sites]
    of_score = [100 * kept / total if total else math.nan for kept, total in sums]
    (marks,) = axes.plot(of_score, rows, "D", color=ORANGE, markersize=5, markeredgecolor="white", clip_on=False)
    axes.set(xlim=(0, 100), ylim=(len(sites), 0))
    axes.set_xlabel("kept in the layer (%)", color=INK, fontsize=9)
    _title(axes, "FFN neurons kept")
    texts = ["of its neurons", f"of their score ({importance})"]
    handles = [bars, marks] if any(total for _, total in sums) else [bars]
    legend.legend(handles, texts[: len(handles)], ncols=2, loc="center", frameon=False, fontsize=9, labelcolor=INK)
    legend.axis("off")


def _rows(axes: Axes, sites: list[dict], size: float) -> None:
    layers = [site["layer"] for site in sites]
    unique = len(set(layers)) == len(layers)  # not so in an encoder-decoder, which numbers its layers twice
    axes.set_yticks(np.arange(len(sites)) + 0.5, layers if unique else range(len(sites)), fontsize=size)
    axes.set_ylabel("layer" if unique else "site, in the model's order", color=INK, fontsize=9)
    axes.tick_params(length=0, axis="y")
    for row, site in enumerate(sites):
        text = f"{len(site['kept'])} / {site['total']}"
        axes.annotate(text, (1, row + 0.5), (7, 0), axes.get_yaxis_transform(), "offset points",
                      va="center", fontsize=size, color=INK, annotation_clip=False)  # fmt: skip


def _scores(site: dict) -> np.ndarray:
    return np.asarray(site.get("scores") or np.zeros(site["total"]), float)  # none known: all alike


def _metric(report: dict) -> str | None:
    stages = [report["metrics"].get(stage, {}) for stage in ("compact", "pruned", "teacher")]
    return next((name for metrics in stages for name in metrics), None)


def _stages(report: dict) -> list[tuple[str, float, str]]:
    texts = {"teacher": ("teacher", INK), "pruned": ("pruned, before\nrecovery", ORANGE), "compact": ("compact", BLUE)}
    name, metrics = _metric(report), report["metrics"]
    found = [(text, metrics.get(s, {}).get(name, math.nan), colour) for s, (text, colour) in texts.items()]
    return [stage for stage in found if math.isfinite(stage[1])]


def _draw_stages(axes: Axes, report: dict, stages: list[tuple[str, float, str]]) -> None:
    samples, name = report["dataset"]["eval_samples"], _metric(report)
    label = f"{name} on {samples:,} samples" if samples else name
    values = [value for _, value, _ in stages]
    errors = [0.0] * len(stages)
    if name == "accuracy" and samples:  # a mean of zeros and ones: its standard error is known
        errors = [math.sqrt(max(value * (1 - value), 0) / samples) for value in values]
        label += " (bars: 1 standard error)"
    for row, ((_, value, colour), error) in enumerate(zip(stages, errors, strict=True)):
        axes.errorbar(value, row, xerr=error or None, fmt="o", markersize=9, color=colour, capsize=4)
        axes.annotate(f"{value:.4g}", (value, row), (0, 9), textcoords="offset points", ha="center", color=colour)
    spread = max(max(values) - min(values), 2 * max(errors), 1e-3 * abs(values[0]), 1e-6)
    axes.set(xlim=(min(values) - spread, max(values) + spread), ylim=(len(stages) - 0.5, -0.7))
    axes.set_yticks(range(len(stages)), [text for text, _, _ in stages])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.6)


def _costs(report: dict) -> list[tuple[str, float]]:
    """Compact as a share of the teacher (%), for each cost that both were measured for."""
    costs = []
    names = {"params": "parameters", "macs": "MACs", "disk_bytes": "disk", "peak_memory_bytes": "peak memory"}
    before = report["size"].get("teacher", {}) | report["speed"].get("teacher", {})
    after = report["size"].get("compact", {}) | report["speed"].get("compact", {})
    for key, name in names.items():
        if before.get(key) and after.get(key) is not None:
            costs.append((name, 100 * after[key] / before[key]))
    ratios = report["speed"].get("ratio", {})
    return costs + [(f"latency, batch {size}", 100 * ratios[size]) for size in sorted(ratios, key=int)]


def _draw_costs(axes: Axes, costs: list[tuple[str, float]]) -> None:
    rows, shares = range(len(costs)), [share for _, share in costs]
    axes.barh(rows, 100, height=0.62, color=PALE)
    axes.barh(rows, shares, height=0.62, color=BLUE)
    axes.axvline(100, color=INK, linewidth=1, linestyle="--")
    for row, share in enumerate(shares):
        axes.annotate(f"{share:.0f} %", (share, row), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set(xlim=(0, 1.18 * max(100, *shares)), ylim=(len(costs) - 0.4, -0.6))
    axes.set_yticks(rows, [name for name, _ in costs])
    axes.set_xlabel("% of the teacher's (less is better)", color=INK, fontsize=9)


def _terms(history: list[dict]) -> dict[str, np.ndarray]:
    """The total and its terms, each an array (points, 2) of step and value; what is not finite is left out."""
    terms = {"total": "loss"}
    terms |= {key.removeprefix("loss_"): key for entry in history for key in entry if key.startswith("loss_")}
    points = {name: [(entry["step"], entry[key]) for entry in history if key in entry] for name, key in terms.items()}
    arrays = {name: np.array(pairs, float).reshape(-1, 2) for name, pairs in points.items()}
    arrays = {name: array[np.isfinite(array[:, 1])] for name, array in arrays.items()}
    return {name: array for name, array in arrays.items() if len(array)}


def _curve(axes: Axes, points: np.ndarray, colour: str, label: str) -> None:
    width = len(points) // 25
    if width > 1:  # many noisy points: their running mean is what a reader follows
        axes.plot(*points.T, color=colour, linewidth=0.7, alpha=0.25)
        points = np.stack([np.convolve(column, np.ones(width) / width, "valid") for column in points.T], axis=1)
    marker = "o" if len(points) < 15 else None
    axes.plot(*points.T, color=colour, linewidth=2, marker=marker, markersize=4, label=label)


def _frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", color=INK, fontweight="bold")


def _save(figure: Figure, path: Path | str) -> bool:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, facecolor="white")
    image = Image.open(drawn).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # a third of the bytes
    image.save(path, "PNG", optimize=True)
    return True
