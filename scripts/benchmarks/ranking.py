"""Ours beside the peers, without any training: one fine-tuned model, several budgets, several samples of calibration data.

    pip install -e ".[benchmark]"
    python scripts/benchmarks/ranking.py sst2 cola ag_news     # hours on 2 cores: K-prune and Kwon take a minute a model
    python scripts/benchmarks/ranking.py smollm2 --budgets params=0.8 params=0.7 --methods ours magnitude flap minitron
    python scripts/benchmarks/ranking.py --table               # the tables and the picture again, from what was run

MiniLM-L6 classifiers are judged on all of the test set: accuracy or Matthews correlation, KL(teacher || student), plain feature
loss. SmolLM2-135M is judged by its perplexity on WikiText-2 test, calibrated on web text. Each run is a line of
docs/ranking.jsonl, the last of the same name counts; the table is docs/ranking.md, the picture
docs/ranking.png. Each method has its own compensation; random, magnitude and Taylor, which have none, are given our repair.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import transformers
from judging import Judge, Perplexity
from peers import PEERS
from ranking_table import write_tables
from teachers import TASKS, teacher, web_text
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune import apply_plan, repair, score_units
from hf_kdprune.demo.run import say
from hf_kdprune.layers import match_layers
from hf_kdprune.prune.schedule import Pruning
from hf_kdprune.prune.stages import plan_in_rounds
from hf_kdprune.publish.report import environment
from hf_kdprune.samples import by_length, split

Batches = list[dict[str, Tensor]]
Realise = Callable[[str], PreTrainedModel]
BUDGETS = ["macs=0.75", "macs=0.6", "macs=0.5", "macs=0.4", "macs=0.3", "macs=0.25"]
RUNS = Path("docs") / "ranking.jsonl"


def ranked(importance: str) -> Callable[[PreTrainedModel, Batches, int], Realise]:
    """This package with one of its scores: rank once, then surgery and repair for each budget."""

    def prepare(model: PreTrainedModel, batches: Batches, seed: int) -> Realise:
        scores = score_units(model, None, batches, importance, seed=seed)

        def realise(budget: str) -> PreTrainedModel:
            smaller = copy.deepcopy(model)
            apply_plan(smaller, scores.plan(budget), batches[0])
            repair(smaller, model, batches)
            return smaller

        return realise

    return prepare


def in_rounds(model: PreTrainedModel, batches: Batches, seed: int) -> Realise:
    """This package in four rounds of ranking, each of what the one before left; the surgery and repair are of one."""
    matches = match_layers(model, None, batches)

    def realise(budget: str) -> PreTrainedModel:
        plan = plan_in_rounds(model, None, batches, matches, Pruning(budget, seed=seed, rounds=4))
        smaller = copy.deepcopy(model)
        apply_plan(smaller, plan, batches[0])
        repair(smaller, model, batches)
        return smaller

    return realise


METHODS: dict[str, Callable[[PreTrainedModel, Batches, int], Realise]] = {
    "ours": ranked("feature_loss"),
    "ours, plain metric": ranked("feature_loss:plain"),
    "ours, with logits": ranked("feature_loss+logits"),
    "ours, in 4 rounds": in_rounds,
    "taylor": ranked("taylor"),
    "magnitude": ranked("magnitude"),
    "random": ranked("random"),
    **PEERS,
}


def main() -> None:
    """Run what was asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="sst2, cola, ag_news, banking77, ud_english_ewt_pos, smollm2")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples (%(default)s)")
    parser.add_argument("--limit", type=int, help="judge on the first so many test samples only")
    parser.add_argument("--table", action="store_true", help="write the tables again, run nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for task in [] if args.table else args.tasks:
        model, judge, sample = (language_model if task == "smollm2" else classifier)(task, args)
        record({"task": task, "method": "teacher", "seed": 0, "budget": "", **judge(model)})
        for seed in args.seeds:
            for method in args.methods:
                run(task, method, seed, args.budgets, model, judge, sample(seed))
    write_tables(RUNS)


def run(
    task: str, method: str, seed: int, budgets: list[str], model: PreTrainedModel, judge: Callable, batches: Batches
) -> None:
    """One method on one calibration sample: each budget is a line of the record."""
    start = time.perf_counter()
    realise = METHODS[method](model, batches, seed)
    prepared = time.perf_counter() - start
    for budget in budgets:
        start = time.perf_counter()
        smaller = realise(budget)
        seconds = {"score": round(prepared, 1), "realise": round(time.perf_counter() - start, 1)}
        record({"task": task, "method": method, "seed": seed, "budget": budget, **judge(smaller), "seconds": seconds})


def classifier(task: str, args: argparse.Namespace) -> tuple[PreTrainedModel, Judge, Callable[[int], Batches]]:
    """A teacher of `teachers.py`, its judge, and its calibration samples by seed."""
    model, tokenizer, train, test = teacher(task)
    collate = TASKS[task].collator(tokenizer)
    test = test.select(range(min(len(test), args.limit or len(test))))
    judge = Judge(model, [dict(batch) for batch in by_length(test, collate, 32)])
    return model, judge, lambda seed: [dict(b) for b in by_length(split(train, args.samples, seed)[0], collate, 32)]


def language_model(task: str, args: argparse.Namespace) -> tuple[PreTrainedModel, Perplexity, Callable[[int], Batches]]:
    """SmolLM2-135M, its perplexity, and web text by seed: rows of 256 tokens, 4 in a batch."""
    from real_models import load_smollm2

    model, tokenizer = load_smollm2()
    return model.eval(), Perplexity(tokenizer, args.limit or 24), lambda seed: web_text(tokenizer, args.samples // 16, seed)


def record(facts: dict, runs: Path = RUNS) -> None:
    """Append one run; of runs of the same name the last counts, so that processes may share the file."""
    with runs.open("a") as file:
        file.write(json.dumps({**facts, "environment": environment()}) + "\n")
    say(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}))


if __name__ == "__main__":
    main()
