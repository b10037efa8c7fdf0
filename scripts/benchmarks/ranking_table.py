"""The table and the picture of `ranking.py`, from its record."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

HEADS = {  # metric -> heading and format; the first that a task has stands first
    "accuracy": ("accuracy", ".4f"),
    "matthews": ("Matthews correlation", ".3f"),
    "kl": ("KL to the teacher", ".3f"),
    "features": ("feature loss", ".3f"),
    "perplexity": ("perplexity", ".1f"),
}
SHOWN = {"cola": ("matthews", "kl", "features"), "smollm2": ("perplexity",)}
USUAL = ("accuracy", "kl", "features")
BEST_IS_LOW = ("kl", "features", "perplexity")
Runs = list[dict]


def write_tables(record: Path) -> None:
    """Write ranking.md and ranking.png beside the record."""
    runs = [json.loads(line) for line in record.read_text().splitlines()]
    runs = list({tuple(run[key] for key in ("task", "method", "seed", "budget")): run for run in runs}.values())
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    command = f"python scripts/benchmarks/{record.stem}.py"
    spread = "lowest to highest; one seed where no range stands"
    lines = [f"Median over the seeds ({spread}) of each run in [{record.name}]({record.name}), by `{command}`.", ""]
    for task in tasks:
        lines += table(task, [run for run in runs if run["task"] == task])
    record.with_suffix(".md").write_text("\n".join(lines))
    draw(runs, record.with_suffix(".png"))


def table(task: str, runs: Runs) -> list[str]:
    """A table a metric: methods by budgets; the best of a column is bold."""
    whole = next(run for run in runs if run["method"] == "teacher")
    runs = [run for run in runs if run["method"] != "teacher"]
    budgets = sorted({run["budget"] for run in runs}, key=lambda b: -float(b.split("=")[1]))
    methods = list(dict.fromkeys(run["method"] for run in runs))
    lines = []
    for metric in SHOWN.get(task, USUAL):
        head, form = HEADS[metric]
        lines += [f"**{task}, {head}** (teacher {whole[metric]:{form}})", ""]
        lines += ["| | " + " | ".join(budgets) + " |", "|---|" + "---:|" * len(budgets)]
        cells = {m: [values(runs, m, b, metric) for b in budgets] for m in methods}
        best = [best_of([c[i] for c in cells.values()], metric) for i in range(len(budgets))]
        for method in methods:
            shown = [cell(v, form, v and statistics.median(v) == best[i]) for i, v in enumerate(cells[method])]
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
        lines.append("")
    return lines


def values(runs: Runs, method: str, budget: str, metric: str) -> list[float]:
    """What the seeds gave."""
    return [run[metric] for run in runs if run["method"] == method and run["budget"] == budget]


def best_of(column: list[list[float]], metric: str) -> float | None:
    """The best median of a column; None where there is nothing to compare."""
    medians = [statistics.median(v) for v in column if v]
    if len(medians) < 2:
        return None
    return min(medians) if metric in BEST_IS_LOW else max(medians)


def cell(found: list[float], form: str, best: bool) -> str:
    """Median (lowest to highest), in bold where it is the best."""
    if not found:
        return "-"
    median = f"{statistics.median(found):{form}}"
    spread = f" ({min(found):{form}} to {max(found):{form}})" if len(found) > 1 else ""
    return (f"**{median}**" if best else median) + spread


def draw(runs: Runs, path: Path) -> None:
    """KL to the teacher against the budget, a panel a classification task; medians, ranges as bands."""
    tasks = list(dict.fromkeys(run["task"] for run in runs if "kl" in run and run["method"] != "teacher"))
    if not tasks:
        return
    figure = Figure(figsize=(5.2 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    colours = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(run["method"] for run in runs if run["method"] != "teacher"))}
    for axes, task in zip(panels, tasks, strict=True):
        mine = [run for run in runs if run["task"] == task and run["method"] != "teacher"]
        for method in dict.fromkeys(run["method"] for run in mine):
            budgets = sorted({run["budget"] for run in mine if run["method"] == method})
            found = [values(mine, method, b, "kl") for b in budgets]
            shares = [float(b.split("=")[1]) for b in budgets]
            ours = method.startswith("ours")
            look = {"lw": 2.4 if ours else 1.2, "ms": 4, "label": method, "color": colours[method]}
            axes.plot(shares, [statistics.median(v) for v in found], "o-", **look)
            axes.fill_between(shares, [min(v) for v in found], [max(v) for v in found], color=colours[method], alpha=0.12)
        axes.set(title=task, xlabel="MACs that remain (share)", ylabel="KL to the teacher, no training", yscale="log")
        axes.grid(color="#D0D0D0", linewidth=0.6)
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
