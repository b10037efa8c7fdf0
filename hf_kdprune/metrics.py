"""The user's own metrics, measured through the Trainer: for the report, and to judge a budget of "loss=1%"."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path

from transformers import PreTrainedModel, Trainer

from .inputs import at_length
from .prune.budget import Budget
from .prune.judge import Judge, feature_judge, metric_judge
from .publish.checkpoint import load_line, merged
from .publish.report import SETTINGS, Report, costs, dataset_facts, model_facts

NO_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def measured_on(trainer: Trainer, model: PreTrainedModel, name: str, dataset: object) -> dict[str, float]:
    """The metrics of `model` on `dataset`; {} where there is no data set or no metric.

    Args:
        trainer: Whose compute_metrics, collator and settings are used.
        model: The model, which stands in for the trainer's.
        name: Prefix of the metrics meanwhile.
        dataset: One, or several by name.
    """
    if dataset is None or trainer.compute_metrics is None:
        return {}
    sets = dataset if isinstance(dataset, dict) else {"": dataset}
    mine, found = (trainer.model, trainer.model_wrapped), {}
    trainer.model = trainer.model_wrapped = model
    try:
        for part, rows in sets.items():
            metrics = trainer.predict(rows, metric_key_prefix=name).metrics
            metrics = {k.removeprefix(f"{name}_"): float(v) for k, v in metrics.items()}
            found |= {f"{part}_{k}".strip("_"): v for k, v in metrics.items() if k not in NO_METRICS}
    finally:
        trainer.model, trainer.model_wrapped = mine
    return found


def check_metric(trainer: Trainer) -> None:
    """Raise if the budget bounds a metric and the trainer has none."""
    budget = Budget.parse(trainer.args.budget)
    if budget.limits[0].unit == "%" and trainer.compute_metrics is None:
        raise ValueError(
            f"budget {budget.asked!r} bounds a metric, and compute_metrics is None: give compute_metrics=, or bound the "
            'feature loss, which needs none: "loss=0.1"'
        )


def judge_of(trainer: Trainer, dataset: Sized | None) -> Judge | None:
    """What measures the loss of a smaller model under a budget of "loss="; None where there is no data set for it.

    Args:
        trainer: A KDPruneTrainer whose layers are matched.
        dataset: Samples that neither train, nor rank, nor repair.
    """
    if dataset is None:
        return None
    if Budget.parse(trainer.args.budget).limits[0].unit == "%":
        return judge_by_metric(trainer, dataset)
    return feature_judge(trainer.model, trainer.teacher, trainer.batches_of(dataset), trainer.lesson.matches)


def judge_by_metric(trainer: Trainer, dataset: Sized) -> Judge:
    """Judges a smaller model by the share of the metric that it lost on `dataset`.

    Raises:
        ValueError: It is not said which of several metrics counts.
    """
    before = measured_on(trainer, trainer.model, "judge", dataset)
    wanted = trainer.args.metric_for_best_model
    name = next(iter(before)) if wanted is None and len(before) == 1 else str(wanted).removeprefix("eval_")
    if name not in before:
        raise ValueError(
            f"budget {trainer.args.budget!r} needs one metric: metric_for_best_model must be one of {sorted(before)}, which "
            f"compute_metrics gives, got {wanted!r}"
        )
    greater = trainer.args.greater_is_better is not False
    return metric_judge(lambda m: measured_on(trainer, m, "judge", dataset)[name], name, before[name], greater)


def report_of(trainer: Trainer, output_dir: str) -> dict:
    """Measure teacher and compact model side by side: the data of report.json; {} on ranks that do not save."""
    for name, model in (("teacher", trainer.teacher), ("compact", trainer.model)):
        if name not in trainer._metrics:
            trainer._metrics[name] = measured_on(trainer, model, name, trainer.eval_dataset)
    trainer._metrics.setdefault("pruned", trainer._metrics["compact"])
    if not trainer.args.should_save:
        return {}
    teacher, compact = merged(trainer.teacher), merged(trainer.model)
    rows = len(trainer.train_dataset) + trainer._held_out_rows
    evaluated = len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Sized) else 0
    return Report(
        name=Path(output_dir).resolve().name,
        model={**model_facts(compact, teacher), **trainer.about.get("model", {})},
        dataset={**dataset_facts(rows, evaluated), **trainer.about.get("dataset", {})},
        metrics={name: trainer._metrics[name] for name in ("teacher", "pruned", "compact")},
        **costs(teacher, compact, at_length(trainer.calibration[0], trainer.plan.budget["seq_len"])),
        budget=trainer.plan.budget,
        seeds={"seed": trainer.args.seed, "data_seed": trainer.args.pruning().seed},
        loss=[entry for entry in trainer.state.log_history if "loss" in entry],
        recovery=trainer.recovery,
        repair=[vars(r) for r in trainer.repairs],
        settings={name: getattr(trainer.args, name) for name in SETTINGS},
        load=load_line(compact, output_dir),
        **{k: v for k, v in trainer.about.items() if k in ("example", "command")},
    ).to_json()
