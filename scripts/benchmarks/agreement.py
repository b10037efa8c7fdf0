"""Do scores order units as removal does? Spearman's correlation with exact ablation, on heads and groups of neurons.

    python scripts/benchmarks/agreement.py sst2 ag_news      # a few minutes on 2 cores

MiniLM-L6 classifiers of `teachers.py`. Exact: the second loss with one head, or one random group of neurons of a layer, gated
away, on the same samples. A group's estimate is the sum of its neurons' scores. Writes docs/agreement.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from teachers import TASKS, teacher
from torch import Tensor

from hf_kdprune import find_sites, score_units
from hf_kdprune.prune.importance import Asked
from hf_kdprune.prune.importance.ablation import loss
from hf_kdprune.prune.importance.feature_loss import under_covariance
from hf_kdprune.prune.trial import gates_at_zero
from hf_kdprune.publish.report import environment
from hf_kdprune.samples import by_length, split

GROUP = 192  # neurons


def main() -> None:
    """Compare on each model, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--probes", type=int, default=4, help="passes with other random numbers (%(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    found = {task: compare(task, args.samples, args.probes) for task in args.tasks}
    facts = {"command": f"python scripts/benchmarks/agreement.py {' '.join(args.tasks)}", "environment": environment()}
    Path("docs/agreement.json").write_text(json.dumps({**facts, "spearman": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


@torch.no_grad()
def compare(task: str, samples: int, probes: int) -> dict[str, float]:
    """Rank correlation on one model: of heads, of groups of neurons."""
    model, tokenizer, train, _ = teacher(task)
    data = split(train, samples, 0)[0]
    batches = [dict(batch) for batch in by_length(data, TASKS[task].collator(tokenizer), 32)]
    sites = find_sites(model, batches[0])
    features = replace(under_covariance(model, None, batches, Asked(sites)), teacher=model)
    with torch.enable_grad():
        tables = [score_units(model, None, batches, seed=seed).values for seed in range(probes)]
    taught = [features.taught(batch) for batch in batches]
    pairs: dict[str, list[tuple[float, float]]] = {"attention": [], "ffn": []}
    draw = torch.Generator().manual_seed(0)
    for site in sites:
        step = 1 if site.kind == "attention" else GROUP
        for group in torch.randperm(site.total, generator=draw).split(step):
            kept = {s.name: [u for u in range(s.total) if s is not site or u not in group.tolist()] for s in sites}
            with gates_at_zero(model, kept, sites):
                exact = float(loss(model, batches, features, taught).sum())
            pairs[site.kind].append((sum(float(t[site.name][group].sum()) for t in tables), exact))
    return {kind: spearman(*map(torch.tensor, zip(*found, strict=True))) for kind, found in pairs.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


if __name__ == "__main__":
    main()
