"""Variants of the second loss that were tried for the ranking: which layers count, in which directions, over what, and
whether a site may lose much more than the others.

    python scripts/benchmarks/variants.py sst2 --budgets macs=0.4 macs=0.25 macs=0.15     # 10 minutes on 2 cores
    python scripts/benchmarks/variants.py smollm2 --budgets params=0.8 --samples 384      # perplexity, no repair

Each is ranked, cut, repaired (SmolLM2: cut only) and judged as in `ranking.py`. Each run is a line of docs/variants.jsonl, the
last of the same name counts; the table is docs/variants.md. The default was chosen on SST-2 and SmolLM2.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import datasets
import torch
import transformers
from ranking import classifier, language_model, record
from ranking_table import write_tables
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune import apply_plan, find_sites, repair
from hf_kdprune.layers import LayerMatch, at_real, count_real, enough, hidden_states, match_layers
from hf_kdprune.prune.allocation import Scores
from hf_kdprune.prune.importance import Asked, mean_length
from hf_kdprune.prune.importance.feature_loss import Features, covariances
from hf_kdprune.prune.importance.probe import derivatives
from hf_kdprune.ranks import Ranks

RUNS = Path("docs") / "variants.jsonl"
VARIANTS = {  # name -> (share of the last layer, power of the covariance, over the root mean square of each position, least)
    "half in the last layer (default)": (0.5, 0.5, True, None),
    "half in the last layer, a site may lose all": (0.5, 0.5, True, 0),
    "all layers alike": (None, 0.5, True, None),
    "all layers alike, positions as they are": (None, 0.5, False, None),
    "last layer only": (1.0, 0.5, True, None),
    "last layer only, half power": (1.0, 0.25, True, None),
    "last layer only, every direction alike": (1.0, 0.0, True, None),
    "half in the last layer, half power": (0.5, 0.25, True, None),
    "all layers alike, every direction alike": (None, 0.0, True, None),
}


def main() -> None:
    """Run every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--budgets", nargs="+", default=["macs=0.4", "macs=0.25"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for task in args.tasks:
        model, judge, sample = (language_model if task == "smollm2" else classifier)(task, args)
        record({"task": task, "method": "teacher", "seed": 0, "budget": "", **judge(model)}, RUNS)
        for seed in args.seeds:
            batches = sample(seed)
            for name in args.variants:
                scores = scored(model, batches, name, seed)
                for budget in args.budgets:
                    smaller = copy.deepcopy(model)
                    apply_plan(smaller, scores.plan(budget, least=VARIANTS[name][-1]), batches[0])
                    if task != "smollm2":
                        repair(smaller, model, batches)
                    record({"task": task, "method": name, "seed": seed, "budget": budget, **judge(smaller)}, RUNS)
    write_tables(RUNS)


def scored(model: PreTrainedModel, batches: list[dict[str, Tensor]], name: str, seed: int) -> Scores:
    """Rank under one variant."""
    last, power, by_position, _ = VARIANTS[name]
    sites = find_sites(model, batches[0], mean_length(batches))
    matches = [m for m in match_layers(model, None, batches) if m.student > 0]
    others = len(matches) - 1
    weights = [1 / len(matches)] * len(matches) if last is None else [(1 - last) / others] * others + [last]
    some, alone = enough(batches, matches[0].width), Ranks.alone()
    sigmas = covariances(model, some, matches, alone) if by_position else as_they_are(model, some, matches)
    roots = [(w / count_real(batches)) ** 0.5 * root(sigma, power) for w, sigma in zip(weights, sigmas, strict=True)]
    features = Features(matches, roots, by_position, None)
    asked = Asked(sites, matches, seed)
    values, errors = features.scores(derivatives(model, batches, asked, features.watch, features.kinds))
    return Scores(sites, values, errors, name)


@torch.no_grad()
def as_they_are(model: PreTrainedModel, batches: list[dict[str, Tensor]], matches: list[LayerMatch]) -> list[Tensor]:
    """Covariances of features that are taken over nothing, (hidden, hidden) in float64."""
    layers = zip(*([at_real(x, batch) for x in hidden_states(model, batch)] for batch in batches), strict=True)
    features = [torch.cat(layer).double() for layer in layers]
    return [features[match.teacher].T.cov(correction=0) for match in matches]


def root(sigma: Tensor, power: float) -> Tensor:
    """Sigma^power / tr(Sigma)^(power + 1/2): the covariance metric at 1/2, the plain one at 0, of no scale in between."""
    values, vectors = torch.linalg.eigh(sigma.double())
    values = values.clamp(min=0)
    scaled = values**power / values.sum() ** (power + 0.5)
    return ((vectors * scaled) @ vectors.T).float()


if __name__ == "__main__":
    main()
