"""The model card: README.md made from `report.json` and `plan.json`. Every figure is the run's own, none is typed in.

The layout is in `card.md.jinja`; here is what the template needs computed. `table` is also what the terminal prints.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from . import plots

VERSION = 1  # of report.json and plan.json
NOT_MEASURED = "not measured"
KINDS = ("attention", "ffn")  # in the order of the card's columns
CAPTIONS = {
    "tradeoff.png": "Quality of the teacher, the pruned and the compact model, and what the compact model costs",
    "plan.png": "Attention heads and FFN neurons kept in each layer",
    "loss.png": "The training loss and its terms over the steps",
}
HUB_DATASET = r"(?:https://(?:huggingface\.co|hf\.co)/datasets/)?([\w.-]+/[\w.-]+)"


def write_card(directory: Path | str) -> None:
    """Write README.md and its pictures beside `report.json` and `plan.json`.

    Args:
        directory: A saved checkpoint. `plan.json` may be missing: nothing was removed.

    Raises:
        ValueError: `report.json` is missing, or one of the two is not JSON or of another version.
    """
    directory = Path(directory)
    report = _read(directory / "report.json")
    plan = _read(directory / "plan.json") if (directory / "plan.json").is_file() else None
    drawn = {
        "tradeoff.png": plots.draw_tradeoff(report, directory / "tradeoff.png"),
        "plan.png": plan is not None and plots.draw_plan(plan, directory / "plan.png"),
        "loss.png": plots.draw_loss(report, directory / "loss.png"),
    }
    card = render_card(report, [name for name, done in drawn.items() if done], plan)
    (directory / "README.md").write_text(card, encoding="utf-8")


def render_card(report: dict, pictures: list[str], plan: dict | None = None) -> str:
    """The card as text.

    Args:
        report: Contents of `report.json`.
        pictures: File names, relative to the card, in the order in which they are shown.
        plan: Contents of `plan.json`; None where there is none.

    Returns:
        Markdown with YAML front matter.

    Raises:
        ValueError: The report's load line is not one call that names the checkpoint.
    """
    # an undefined name is an error: a card with a silent hole would look finished
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "figure": _figure, "literal": _literal}
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    root, source = _load(report["load"])
    card = template.render(
        report=report,
        front_matter=_front_matter(report).to_yaml(),
        headline=_headline(report),
        root=root,
        source=source,
        rows=table(report),
        pictures=[(name, CAPTIONS.get(name, Path(name).stem)) for name in pictures],
        kept=_kept(plan["sites"]) if plan else [],
        standard_error=_standard_error(report),
        NOT_MEASURED=NOT_MEASURED,
    )
    return card + "\n"


def table(report: dict) -> list[tuple[str, str, str, str]]:
    """The two models side by side, for the card and for the terminal.

    Args:
        report: Contents of `report.json`.

    Returns:
        Rows (what, teacher, compact, change) in M, MiB, ms and samples/s. The change is the difference for a metric
        ("+0.0010") and compact / teacher for everything else ("0.53×"). A row "..., before recovery" has the pruned
        model in place of the compact one.
    """
    size, speed, tokens = report["size"], report["speed"], report["budget"].get("seq_len")
    rows = _metric_rows(report["metrics"])
    rows.append(_row("parameters", size, "params", _count))
    rows.append(_row(f"MACs at {tokens} tokens" if tokens else "MACs", size, "macs", _count))
    rows.append(_row("disk", size, "disk_bytes", _mebibytes))
    latencies = {model: speed.get(model, {}).get("latency_ms", {}) for model in ("teacher", "compact")}
    for batch in sorted(latencies["teacher"] | latencies["compact"], key=int):
        texts = _texts(latencies, batch, "{:,.2f} ms".format)
        rows.append((f"latency, batch {batch}", *texts, _times(speed.get("ratio", {}).get(batch))))
    if not any(latencies.values()):
        rows.append(("latency", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED))
    rows.append(_row("throughput", speed, "samples_per_second", "{:,.1f} samples/s".format))
    rows.append(_row("peak memory", speed, "peak_memory_bytes", _mebibytes))
    return rows


def _metric_rows(metrics: dict) -> list[tuple[str, str, str, str]]:
    teacher, pruned, compact = (metrics.get(stage, {}) for stage in ("teacher", "pruned", "compact"))
    rows = []
    for name in teacher | pruned | compact:
        stages = {name: compact} | ({f"{name}, before recovery": pruned} if name in pruned else {})
        for what, stage in stages.items():
            before, after = teacher.get(name), stage.get(name)
            change = NOT_MEASURED if None in (before, after) else f"{after - before:+.4f}"
            rows.append((what, _figure(before), _figure(after), change))
    return rows or [("quality", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)]


def _row(what: str, models: dict, key: str, form: Callable[[float], str]) -> tuple[str, str, str, str]:
    return what, *_texts(models, key, form), _times(_ratio(models, key))


def _texts(models: dict, key: str, form: Callable[[float], str]) -> tuple[str, str]:
    values = [models.get(model, {}).get(key) for model in ("teacher", "compact")]
    return tuple(NOT_MEASURED if value is None else form(value) for value in values)


def _ratio(models: dict, key: str) -> float | None:
    before, after = (models.get(model, {}).get(key) for model in ("teacher", "compact"))
    return after / before if before and after is not None else None


def _times(ratio: float | None) -> str:
    return NOT_MEASURED if ratio is None else f"{ratio:.2f}×"


def _figure(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return NOT_MEASURED if value is None else f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _count(value: float) -> str:
    return f"{value / 1e9:,.4g} G" if value >= 1e9 else f"{value / 1e6:.4g} M"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.2f} MiB"


def _cell(value: object) -> str:
    """One table cell: a line break or a bar would end it."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # of a string, also Python


def _headline(report: dict) -> str:
    """The figures of the first sentence: cost as shares of the teacher, then the first metric."""
    size, timed = report["size"], report["speed"].get("ratio", {})
    shares = {"parameters": _ratio(size, "params"), "MACs": _ratio(size, "macs")}
    batch = max(timed, key=int, default=None)
    shares |= {f"latency at batch {batch}": timed[batch]} if batch else {"latency": None}
    costs = [f"{name} {NOT_MEASURED}" if s is None else f"{s:.0%} of the {name}" for name, s in shares.items()]
    compact, teacher = (report["metrics"].get(stage, {}) for stage in ("compact", "teacher"))
    quality = [f"{name} {_figure(compact[name])} (teacher: {_figure(teacher.get(name))})" for name in list(compact)[:1]]
    return f"{', '.join(costs)}; {quality[0] if quality else f'quality {NOT_MEASURED}'}"


def _standard_error(report: dict) -> float | None:
    """Of an accuracy, a mean of zeros and ones; of another metric it does not follow from the value."""
    accuracy, samples = report["metrics"].get("compact", {}).get("accuracy"), report["dataset"]["eval_samples"]
    return math.sqrt(accuracy * (1 - accuracy) / samples) if accuracy is not None and samples else None


def _load(line: str) -> tuple[str, str]:
    """The name that the load line needs imported, and the checkpoint that it names."""
    try:
        call = ast.parse(line, mode="eval").body
        root, source = call.func, ast.literal_eval(call.args[0])
    except (SyntaxError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            "The load line of report.json must be one Python call whose first argument is the checkpoint, as in "
            f"'AutoModel.from_pretrained(\"user/name\")', got {line!r}. Write report.json again by saving the model."
        ) from error
    while isinstance(root, ast.Attribute):
        root = root.value
    return root.id, source


def _front_matter(report: dict) -> ModelCardData:
    model, dataset, metrics = report["model"], report["dataset"], report["metrics"].get("compact", {})
    # only an owner/name is certain to be this data set on the Hub; a bare name may be somebody else's
    ids = [re.fullmatch(HUB_DATASET, dataset[key] or "") for key in ("source", "name")]
    hub_id = next((found[1] for found in ids if found), None)
    shared = {"task_type": model["task"], "dataset_type": hub_id or dataset["name"], "dataset_name": dataset["name"]}
    results = [EvalResult(metric_type=name, metric_value=value, **shared) for name, value in metrics.items()]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=model["task"],
        license=model["license"],
        base_model=model["base_model"],
        datasets=[hub_id] if hub_id else None,
        metrics=list(metrics) or None,
        tags=["hf_kdprune", "pruning", "distillation", "model-compression", model["model_type"]],
        model_name=report["name"] if results else None,
        eval_results=results or None,
    )


def _kept(sites: list[dict]) -> list[tuple[str, str, str]]:
    """Rows (layer, heads kept, neurons kept), the last one the sums."""
    places = [(site["kind"], site["layer"]) for site in sites]
    by_layer = len(set(places)) == len(places)  # not so in an encoder-decoder, which numbers its layers twice
    counts = {}
    for site in sites:
        for place in (str(site["layer"]) if by_layer else f"`{site['name']}`", "all"):
            count = counts.setdefault(place, {}).setdefault(site["kind"], [0, 0])
            count[0] += len(site["kept"])
            count[1] += site["total"]
    counts["all"] = counts.pop("all", {})  # to the end
    texts = {place: ["{:,} / {:,}".format(*row.get(kind, (0, 0))) for kind in KINDS] for place, row in counts.items()}
    return [(place, *pair) for place, pair in texts.items()]


def _read(path: Path) -> dict:
    step = "Save the model again with this version of hf_kdprune (`trainer.save_model`), then write the card."
    if not path.is_file():
        raise ValueError(f"A card is made from {path.name}, and {path} does not exist. {step}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} must be JSON, and {path} is not: {error}. {step}") from error
    if content.get("version") != VERSION:
        raise ValueError(f"{path.name} must be of version {VERSION}, got {content.get('version')!r} in {path}. {step}")
    return content
