"""Which terms of the first loss earn their place: ground truth alone, with the teacher's output, its features, auxiliaries.

    python scripts/benchmarks/objectives.py --tasks cola ag_news --seeds 0 1 2        # 24 runs of 2 to 5 minutes on one core

MiniLM-L6 pruned to macs=0.35 and trained for 1,000 steps of 32 samples; the same pruned model for each loss of a seed. What
counts is the model at the end of the training, whether or not it is better than before. Judged on the first `--limit` samples
of the test set. Each run is a line of docs/objectives.jsonl, the last of the same name counts; the table is docs/objectives.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import datasets
import transformers
from judging import Judge
from recovery import spread
from teachers import TASKS, teacher
from transformers import PreTrainedModel, TrainerCallback

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.demo.run import common, freeze_embeddings, say
from hf_kdprune.publish.report import environment
from hf_kdprune.samples import by_length

RUNS = Path("docs") / "objectives.jsonl"
NAME = ("task", "loss", "seed", "steps")
LOSSES = {  # name -> weights of task, logits, features and auxiliary
    "task": (1.0, 0.0, 0.0, 0.0),
    "task + logits": (1.0, 1.0, 0.0, 0.0),
    "task + logits + features": (1.0, 1.0, 1.0, 0.0),
    "task + logits + features + auxiliary": (1.0, 1.0, 1.0, 0.3),
}


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cola", "ag_news"], choices=list(TASKS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--table", action="store_true", help="write the table again, run nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for task in [] if args.table else args.tasks:
        bench = Bench(task, args.limit)
        for seed in args.seeds:
            for loss in args.losses:
                bench.run(loss, seed, args.steps)
    write_table()


class AtEnd(TrainerCallback):
    """Judges what training ends with, before it is decided which model is kept."""

    def __init__(self, judge: Judge):
        """Take the judge."""
        self.judge, self.found = judge, {}

    def on_train_end(self, args: object, state: object, control: object, model: PreTrainedModel, **rest: object) -> None:
        """Judge."""
        self.found = self.judge(model)


class Bench:
    """A task: its teacher, what judges, and the plan of each seed, which is made once.

    Attributes:
        plans: Seed -> plan.
        pruned: Seed -> what the pruned model is worth before any training.
    """

    def __init__(self, task: str, limit: int):
        """Load all, and judge the teacher."""
        self.task, self.plans, self.pruned = task, {}, {}
        self.model, self.tokenizer, self.train, test = teacher(task)
        self.collate = TASKS[task].collator(self.tokenizer)
        test = test.select(range(min(limit, len(test))))
        self.judge = Judge(self.model, [dict(batch) for batch in by_length(test, self.collate, 32)])
        self.whole = self.judge(self.model)

    def run(self, loss: str, seed: int, steps: int) -> None:
        """Prune, judge, train with one loss, judge what it ends with."""
        weights = dict(zip(("task_weight", "logits_weight", "features_weight", "auxiliary_weight"), LOSSES[loss], strict=True))
        settings = {**common(), "logging_steps": 250, "warmup_steps": 100, "max_steps": steps, "disable_tqdm": True}
        args = KDPruneConfig(f"runs/objectives-{self.task}-{seed}", budget="macs=0.35", seed=seed, **weights, **settings)
        student = freeze_embeddings(copy.deepcopy(self.model))
        parts = {"train_dataset": self.train, "processing_class": self.tokenizer, "data_collator": self.collate}
        trainer = KDPruneTrainer(student, args, **parts)
        self.plans[seed] = trainer.prune(copy.deepcopy(self.plans.get(seed)))
        if seed not in self.pruned:
            self.pruned[seed] = self.judge(trainer.model)
        end = AtEnd(self.judge)
        trainer.add_callback(end)
        trainer.train()
        facts = {**dict(zip(NAME, (self.task, loss, seed, steps), strict=True)), "teacher": self.whole}
        facts |= {"pruned": self.pruned[seed], "trained": end.found}
        with RUNS.open("a") as file:
            file.write(json.dumps({**facts, **trainer.recovery, "environment": environment()}) + "\n")
        say(json.dumps(facts))


def write_table() -> None:
    """A row for each task and loss: medians over seeds (lowest to highest)."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    runs = list({tuple(run[key] for key in NAME): run for run in runs}.values())
    columns = ("accuracy", "matthews", "kl", "features")
    lines = [
        f"Median over seeds (lowest to highest) of each run in [{RUNS.name}]({RUNS.name}), by "
        "`python scripts/benchmarks/objectives.py`; MiniLM-L6 at macs=0.35.",
        "",
        "| task | loss | steps | seeds | accuracy | Matthews correlation | KL to the teacher | feature loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task in dict.fromkeys(run["task"] for run in runs):
        first = next(run for run in runs if run["task"] == task)
        lines.append(row(task, "the teacher", "-", "-", [[first["teacher"][c]] for c in columns]))
        mine = [run for run in runs if run["task"] == task]
        pruned = list({run["seed"]: run["pruned"] for run in mine}.values())
        lines.append(row(task, "pruned, not trained", "0", len(pruned), [[p[c] for p in pruned] for c in columns]))
        for loss in LOSSES:
            found = [run for run in mine if run["loss"] == loss]
            if found:
                steps = f"{found[0]['steps']:,}"
                lines.append(row(task, loss, steps, len(found), [[r["trained"][c] for r in found] for c in columns]))
    RUNS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def row(task: str, loss: str, steps: str, seeds: object, columns: list[list[float]]) -> str:
    """A line of the table."""
    return f"| {task} | {loss} | {steps} | {seeds} | {' | '.join(spread(values, '.3f') for values in columns)} |"


if __name__ == "__main__":
    main()
