"""The pictures: written, small, and drawn from unusual data without a warning."""

import math

import numpy as np
import pytest

from hf_kdprune.publish import plots

LIMIT = 100 * 1024  # bytes, of one picture in a card


def plan(layers, heads, neurons, scored=True):
    """A plan that keeps about half, with one emptied attention."""
    random = np.random.default_rng(0)
    sites = []
    for layer in range(layers):
        for kind, total in (("attention", heads), ("ffn", neurons)):
            scores = random.lognormal(-8, 1.5, total)
            kept = [] if (kind, layer) == ("attention", 1) else np.flatnonzero(scores > math.exp(-8)).tolist()
            site = {"name": f"layer.{layer}.{kind}", "kind": kind, "layer": layer, "total": total, "kept": kept}
            sites.append(site | {"scores": scores.tolist() if scored else []})
    return {"version": 1, "budget": {}, "importance": "feature_loss", "sites": sites}


def report(**changes):
    """The parts of a report that are drawn."""
    size = {"teacher": {"params": 10, "macs": 20, "disk_bytes": 40}, "compact": {"params": 5, "macs": 9}}
    accuracy = {"teacher": {"accuracy": 0.92}, "pruned": {"accuracy": 0.9}, "compact": {"accuracy": 0.92}}
    base = {"metrics": accuracy, "size": size, "speed": {"ratio": {"1": 1.2, "32": 0.6}}, "loss": []}
    return base | {"dataset": {"eval_samples": 50}} | changes


@pytest.mark.parametrize(("layers", "heads", "neurons"), [(1, 2, 8), (6, 12, 1536), (32, 64, 2048)])
@pytest.mark.parametrize("scored", [True, False])
def test_plan_is_drawn_at_any_size(tmp_path, layers, heads, neurons, scored):
    path = tmp_path / "plan.png"
    assert plots.draw_plan(plan(layers, heads, neurons, scored), path)
    assert path.stat().st_size < LIMIT
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plan_with_one_kind_of_site_or_uneven_layers_is_drawn(tmp_path):
    data = plan(3, 4, 8)
    data["sites"] = [site for site in data["sites"] if site["kind"] == "attention"]
    data["sites"][0] |= {"total": 2, "kept": [1], "scores": [-0.5, -0.1]}
    assert plots.draw_plan(data, tmp_path / "plan.png")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"speed": {}},
        {"metrics": {"teacher": {}, "pruned": {}, "compact": {}}},
        {"metrics": {"teacher": {"accuracy": 1.0}, "pruned": {}, "compact": {"accuracy": 1.0}}},
        {"metrics": {"teacher": {"perplexity": 28.1}, "compact": {"perplexity": 31.0}}, "size": {}, "speed": {}},
    ],
)
def test_tradeoff_is_drawn_from_what_was_measured(tmp_path, changes):
    path = tmp_path / "tradeoff.png"
    assert plots.draw_tradeoff(report(**changes), path)
    assert path.stat().st_size < LIMIT


@pytest.mark.parametrize("points", [1, 10, 3000])
def test_loss_is_drawn_at_any_length(tmp_path, points):
    path = tmp_path / "loss.png"
    history = [{"step": i, "loss": 1 / i, "loss_task": 0.5 / i, "learning_rate": 1e-4} for i in range(1, points + 1)]
    history += [{"step": points, "loss": math.nan, "loss_task": 0.0}, {"step": points, "eval_loss": 1.0}]
    assert plots.draw_loss(report(loss=history), path)
    assert path.stat().st_size < LIMIT


@pytest.mark.parametrize("losses", [(3, 2, 0.5, 0), (1e-4, 5e-5, 1e-7, 0), (0.2, -1e-3, 0, 0), (0,)])
def test_curve_is_drawn_at_any_scale(tmp_path, losses):
    path = tmp_path / "curve.png"
    points = [{"share": (i + 1) / len(losses), "macs": i, "loss": loss} for i, loss in enumerate(losses)]
    assert plots.draw_curve(points, path, "predicted feature loss", 16)
    assert plots.draw_curve(points, path, "predicted feature loss", None)
    assert path.stat().st_size < LIMIT and path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_leaves_no_file(tmp_path):
    path = tmp_path / "none.png"
    assert not plots.draw_loss(report(), path)
    assert not plots.draw_curve([], path, "", None)
    assert not plots.draw_plan({"sites": [], "importance": ""}, path)
    assert not plots.draw_tradeoff(report(metrics={}, size={}, speed={}), path)
    assert not path.exists()
