"""What a training step with the first loss costs: beside one teacher pass and one plain student step, and from the cache.

    python scripts/benchmarks/distillation_step.py              # MiniLM at half of its MACs on SST-2, 3 minutes on 2 cores

Four kinds of step take turns on the same batches, without an optimizer: the floor (a forward pass of the teacher, and a forward
and backward pass of the student with its own loss), the step of KDPruneTrainer with task, logits and features terms and a live
teacher, its step with task and logits terms from the cache, and the stock Trainer's step. Medians over rounds; ratios are
medians of the ratios of a round. The figures are docs/distillation_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from teachers import TASKS, teacher
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.demo.run import freeze_embeddings, say
from hf_kdprune.publish.report import environment
from hf_kdprune.teaching import cached, live

OUT = Path("docs") / "distillation_step.json"
COMMON = {"per_device_train_batch_size": 32, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
Batch = dict[str, Tensor]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2", choices=list(TASKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(args.task, folder, args.batches)
        for step in steps.values():
            step()  # what is done once is not measured
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append((time.perf_counter() - start) / args.batches)
    pairs = (("live over floor", "live teacher", "floor"), ("cached over stock", "cached teacher", "stock Trainer"))
    ratios = {label: [a / b for a, b in zip(seconds[x], seconds[y], strict=True)] for label, x, y in pairs}
    found = {
        "task": args.task,
        "milliseconds": {name: round(1000 * statistics.median(s), 2) for name, s in seconds.items()},
        "ratios": {k: [round(f(v), 3) for f in (statistics.median, min, max)] for k, v in ratios.items()},
        "environment": environment(),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    say(json.dumps(found))


def floor(student: PreTrainedModel, whole: PreTrainedModel, batches: list[Batch]) -> None:
    """One pass of the teacher, and one step of the student with its own loss."""
    student.train()
    for batch in batches:
        with torch.no_grad():
            whole(**{k: v for k, v in batch.items() if k != "labels"})
        student(**batch).loss.backward()
        student.zero_grad()


def steps_of(task: str, folder: str, count: int) -> dict[str, Callable[[], None]]:
    """By name, what runs `count` steps of a kind on the same batches."""
    model, tokenizer, train, _ = teacher(task)
    train = train.select(range(2048))
    config = KDPruneConfig(f"{folder}/out", teacher_cache=f"{folder}/cache", features_weight=0.0, **COMMON)
    parts = {"train_dataset": train, "processing_class": tokenizer, "data_collator": TASKS[task].collator(tokenizer)}
    trainer = KDPruneTrainer(freeze_embeddings(model), config, **parts)
    trainer.prune()
    student, whole = trainer.model, trainer.teacher
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(count), strict=False)]
    plain = [{k: v for k, v in batch.items() if k != "kdprune_row"} for batch in batches]
    stock = Trainer(student, TrainingArguments(f"{folder}/stock", **COMMON), **parts)
    from_disk, objective = cached(trainer), trainer.loss_terms

    def ours(features: float, given: list[Batch]) -> None:
        trainer.lesson.teach = live(trainer) if features else from_disk
        weights = {**objective.weights, "features": features}
        trainer.loss_terms = type(objective)(weights, objective.temperature)
        for batch in given:
            _, counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
            trainer.training_step(student, dict(batch), counts)
            student.zero_grad()

    def stocks() -> None:
        for batch in plain:
            stock.training_step(student, dict(batch), (batch["labels"] != -100).sum())
            student.zero_grad()

    stock.current_gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = 1
    return {
        "floor": lambda: floor(student, whole, plain),
        "live teacher": lambda: ours(1.0, plain),
        "cached teacher": lambda: ours(0.0, batches),
        "stock Trainer": stocks,
    }


if __name__ == "__main__":
    main()
