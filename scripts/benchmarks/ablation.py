"""Does each part earn its place? Banking77, MiniLM-L6 at half its MACs, with one part at a time taken away.

    python scripts/benchmarks/ablation.py            # 15 runs, about 40 minutes on 2 cores

Writes docs/ablation.json (every run) and docs/ablation.md (the table: median and range over seeds). One teacher, several
seeds of calibration and recovery; the row "all of it" is what `kdprune demo` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch.nn import functional as F

from hf_kdprune import KDPruneTrainer
from hf_kdprune.demo.run import Demo, accuracy, config, fine_tuned, read, say, trainer_for
from hf_kdprune.publish.report import environment

VARIANTS: dict[str, dict] = {
    "all of it": {},
    "random ranking": {"importance": "random"},
    "no features term": {"features_weight": 0.0},
    "no logits term": {"logits_weight": 0.0},
    "no repair": {"repair": False},
}
COLUMNS = {
    "accuracy_before": "accuracy before recovery",
    "kl_before": "KL to teacher before",
    "accuracy": "accuracy after",
    "kl": "KL to teacher after",
}


def main() -> None:
    """Run every variant with every seed, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("docs"), help="of ablation.json and ablation.md")
    parser.add_argument("--work", default="kdprune-demo", help="where the teacher is, shared with kdprune demo")
    parser.add_argument("--quick", action="store_true", help="a subset and few steps")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    base = Demo(output=args.work, quick=args.quick)
    data, tokenizer, parts = read(base)
    teacher = fine_tuned(base, data, tokenizer, parts)
    runs = []
    for seed in args.seeds:
        for variant in args.variants:
            say(f"{variant}, seed {seed}")
            settings = config(Demo(output=args.work, quick=args.quick, seed=seed), **VARIANTS[variant])
            runs.append({"variant": variant, "seed": seed, **run(trainer_for(teacher, settings, parts, tokenizer), parts[1])})
            say(json.dumps(runs[-1]))
    write(args.output, runs, args.variants)


def run(trainer: KDPruneTrainer, test: Dataset) -> dict[str, float]:
    """Prune, judge, recover, judge again."""
    trainer.eval_dataset = None  # judged here, on logits too
    taught = trainer.predict(test)
    trainer.prune()
    before = judge(trainer, test, taught.predictions)
    trainer.train()
    after = judge(trainer, test, taught.predictions)
    return {
        "teacher": accuracy(taught)["accuracy"],
        **{f"{name}_before": value for name, value in before.items()},
        **after,
        "budget": trainer.plan.budget["reached"],
        "kept": trainer.recovery["kept"],
    }


def judge(trainer: KDPruneTrainer, test: Dataset, taught: np.ndarray) -> dict[str, float]:
    """Accuracy and mean KL(teacher || student) at temperature 1 on the test set."""
    output = trainer.predict(test)
    log_probs = [torch.from_numpy(logits).log_softmax(-1) for logits in (output.predictions, taught)]
    kl = F.kl_div(*log_probs, reduction="batchmean", log_target=True)
    return {**accuracy(output), "kl": float(kl)}


def write(folder: Path, runs: list[dict], variants: list[str]) -> None:
    """Every run as data, and the table."""
    folder.mkdir(exist_ok=True)
    command = "python scripts/benchmarks/ablation.py"
    facts = {"command": command, "environment": environment(), "runs": runs}
    (folder / "ablation.json").write_text(json.dumps(facts, indent=1) + "\n")
    seeds = sorted({r["seed"] for r in runs})
    lines = [
        f"Teacher: accuracy {runs[0]['teacher']:.4f}. Median over seeds {seeds} (lowest to highest); made by `{command}`.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for variant in variants:
        mine = [r for r in runs if r["variant"] == variant]
        cells = [spread([r[column] for r in mine]) for column in COLUMNS]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    (folder / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
