"""What training with the first loss brings back after pruning, and which learning rate does it best.

    python scripts/benchmarks/recovery.py --task sst2 --budgets macs=0.35 macs=0.25 macs=0.125 --seeds 0 1 2
    python scripts/benchmarks/recovery.py --task sst2 --budgets macs=0.25 macs=0.125 --rates 5e-5 1e-4 2e-4 4e-4   # the sweep
    python scripts/benchmarks/recovery.py --budgets macs=0.5 macs=0.25 --stages 1 4 --seeds 0 1 2   # at once against in stages

1,000 steps of 32 samples, MiniLM-L6, about 4 minutes a run on one core. The metric is measured on all of the test set; which
rate is best is read from the first loss on training data that were held out, so that no choice is made on the test set. Each
run is a line of docs/recovery.jsonl, the last of the same name counts; the table is docs/recovery.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import datasets
import transformers
from judging import matthews_of
from teachers import TASKS, right, teacher
from transformers import EvalPrediction

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.demo.run import common, freeze_embeddings, say
from hf_kdprune.publish.report import environment

RUNS = Path("docs") / "recovery.jsonl"
COLUMNS = (
    *("task", "budget", "stages", "learning rate", "steps", "seeds", "teacher", "pruned", "recovered"),
    *("under the teacher, points", "held-out first loss", "seconds"),
)
NAME = ("task", "budget", "stages", "rate", "steps", "seed")


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2", choices=list(TASKS))
    parser.add_argument("--budgets", nargs="+", default=["macs=0.35", "macs=0.25", "macs=0.125"])
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates (default: that of KDPruneConfig)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1], help="1: one_shot; more: gradual, in so many stages")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="write the table again, run nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rates = args.rates or [KDPruneConfig("runs").learning_rate]
    for seed in [] if args.table else args.seeds:
        for budget in args.budgets:
            for rate, stages in itertools.product(rates, args.stages):
                run(dict(zip(NAME, (args.task, budget, stages, rate, args.steps, seed), strict=True)))
    write_table()


def run(name: dict) -> None:
    """Judge, prune and train, at once or in stages, judge."""
    model, tokenizer, train, test = teacher(name["task"])
    args = KDPruneConfig(
        "runs/recovery-" + "-".join(map(str, name.values())),
        budget=name["budget"],
        schedule="one_shot" if name["stages"] == 1 else "gradual",
        pruning_stages=name["stages"],
        learning_rate=name["rate"],
        max_steps=name["steps"],
        seed=name["seed"],
        disable_tqdm=True,
        **{**common(), "logging_steps": 250, "warmup_steps": 100},
    )
    options = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "compute_metrics": judge}
    collate = TASKS[name["task"]].collator(tokenizer)
    trainer = KDPruneTrainer(freeze_embeddings(model), args, data_collator=collate, **options)
    judged = {"teacher": judge(trainer.predict(test))}
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    judged |= {"pruned": trainer._metrics["pruned"], "recovered": judge(trainer.predict(test))}
    facts = {**name, **judged, **trainer.recovery, "seconds": round(seconds), "environment": environment()}
    with RUNS.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    say(json.dumps(facts))


def judge(predicted: EvalPrediction) -> dict[str, float]:
    """Accuracy and Matthews correlation."""
    return {**right(predicted), "matthews": matthews_of(predicted)}


def write_table() -> None:
    """Medians over seeds, a row for each task, budget and rate."""
    runs = [{"stages": 1, **json.loads(line)} for line in RUNS.read_text().splitlines()]
    runs = list({tuple(run[key] for key in NAME): run for run in runs}.values())
    lines = [
        f"Median over seeds (lowest to highest) of each run in [{RUNS.name}]({RUNS.name}), by "
        "`python scripts/benchmarks/recovery.py`; MiniLM-L6, accuracy on the whole test set.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
    ]
    keys = {tuple(run[name] for name in NAME[:-1]) for run in runs}
    for key in sorted(keys, key=lambda key: (key[0], -float(key[1].split("=")[1]), *key[2:])):
        mine = [r for r in runs if tuple(r[k] for k in NAME[:-1]) == key]
        taught = mine[0]["teacher"]["accuracy"]
        under = [100 * (taught - r["recovered"]["accuracy"]) for r in mine]
        columns = [[r[stage]["accuracy"] for r in mine] for stage in ("pruned", "recovered")]
        held_out = statistics.median(min(r["held_out_before"], r["held_out_after"]) for r in mine)
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {key[3]:g} | {key[4]:,} | {len(mine)} | {taught:.4f} "
            f"| {spread(columns[0], '.4f')} | {spread(columns[1], '.4f')} | {spread(under, '.2f')} | {held_out:.4f} "
            f"| {statistics.median(r['seconds'] for r in mine):.0f} |"
        )
    RUNS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def spread(values: list[float], form: str) -> str:
    """Median (lowest to highest)."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{ends}"


if __name__ == "__main__":
    main()
