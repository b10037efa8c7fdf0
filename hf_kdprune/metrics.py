"""The user's own metrics, measured through the Trainer: for the report, and to judge a budget of "loss=1%"."""

from __future__ import annotations

from collections.abc import Sized

from transformers import PreTrainedModel, Trainer

from .prune.budget import Budget
from .prune.judge import Judge, feature_judge, metric_judge

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


def check_metric(budget: Budget, trainer: Trainer) -> None:
    """Raise if `budget` bounds a metric and the trainer has none."""
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
    return feature_judge(trainer.model, trainer.teacher, trainer.batches_of(dataset), trainer.matches)


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
