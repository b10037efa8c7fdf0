"""Does a model in half precision get the plan that it gets in float32? On how many units the two plans agree.

    python scripts/benchmarks/precision.py                      # MiniLM and SmolLM2-135M, 15 minutes on 2 cores
    python scripts/benchmarks/precision.py --models minilm --importance feature_loss:plain feature_loss+logits

A unit is agreed on that both plans keep or both remove. Beside the model in bfloat16 and float16 stand what bounds it from
above, weights that were rounded to bfloat16 and ranked in float32, and what says how much the ranking knows, float32 with
another seed of the probe. "itself" is a student that is its own teacher; "another" one of macs=0.75, refitted, whose teacher is
the model that it came from, and which keeps the same of what is left. The bar: 95 % of all units. Writes docs/precision.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from real_models import batches, load_smollm2
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_kdprune import apply_plan, repair, score_units
from hf_kdprune.demo.data import minilm
from hf_kdprune.prune.allocation import Scores
from hf_kdprune.prune.sites import Plan
from hf_kdprune.publish.report import environment

OUT = Path("docs") / "precision.json"
BUDGETS = ("macs=0.5", "macs=0.25")
SAMPLES = {"minilm": 128, "smollm2": 32}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Batch = dict[str, Tensor]


def load(name: str) -> tuple[PreTrainedModel, list[Batch]]:
    """A model in float32, and real questions."""
    torch.manual_seed(0)
    if name == "smollm2":
        model, tokenizer = load_smollm2()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=77)
        tokenizer = AutoTokenizer.from_pretrained(minilm())
    return model.float().eval(), batches(tokenizer, SAMPLES[name], 16)


def in_types(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """What is compared with the model: copies in other types; "rounded" is in float32 again."""
    copies = {name: copy.deepcopy(model).to(kind) for name, kind in HALVES.items()}
    return {**copies, "rounded": copy.deepcopy(model).bfloat16().float(), "another seed": model}


def compare(student: PreTrainedModel, teacher: PreTrainedModel | None, data: list[Batch], importance: str) -> list[dict]:
    """One student in all types, its teacher alike."""
    whole, rows = score_units(student, teacher, data, importance), []
    teachers = {} if teacher is None else in_types(teacher)
    for name, model in in_types(student).items():
        start = time.perf_counter()
        scores = score_units(model, teachers.get(name), data, importance, seed=int(name == "another seed"))
        seconds = round(time.perf_counter() - start, 1)
        for budget in BUDGETS:
            agreed = agreement(whole, scores, budget)
            rows.append({"importance": importance, "weights": name, "budget": budget, **agreed, "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def agreement(a: Scores, b: Scores, budget: str) -> dict[str, float]:
    """Share of the units on which two rankings agree: of all, of heads, of neurons."""
    first, second = a.plan(budget), b.plan(budget)
    kinds = {"units": ("attention", "ffn"), "heads": ("attention",), "neurons": ("ffn",)}
    return {name: round(1 - apart(first, second, mine) / total(first, mine), 4) for name, mine in kinds.items()}


def apart(a: Plan, b: Plan, kinds: Sequence[str]) -> int:
    """Units that one plan keeps and the other does not."""
    return sum(len(set(site.kept) ^ set(b[site.name].kept)) for site in a.sites if site.kind in kinds)


def total(plan: Plan, kinds: Sequence[str]) -> int:
    """Units of these kinds."""
    return sum(site.total for site in plan.sites if site.kind in kinds)


def run(name: str, importances: Sequence[str]) -> list[dict]:
    """One model, as its own teacher, and a smaller one beside it as another."""
    model, data = load(name)
    rows = [{"teacher": "itself", **row} for i in importances for row in compare(model, None, data, i)]
    if name == "minilm":
        student = copy.deepcopy(model)
        apply_plan(student, score_units(model, None, data).plan("macs=0.75"), data[0])
        repair(student, model, data)
        rows += [{"teacher": "another", **row} for i in importances for row in compare(student, model, data, i)]
    return [{"model": name, "samples": SAMPLES[name], **row} for row in rows]


def main() -> None:
    """Compare what was asked for, and write it into the record beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--importance", nargs="+", default=["feature_loss"])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    runs = [row for name in args.models for row in run(name, args.importance)]
    done = {(row["model"], row["importance"]) for row in runs}
    kept = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
    runs = [row for row in kept if (row["model"], row["importance"]) not in done] + runs
    facts = {"command": "python scripts/benchmarks/precision.py", "environment": environment()}
    OUT.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
