"""What ranking costs: its time over one forward and backward pass of training on the same calibration samples.

    python scripts/benchmarks/ranking_cost.py        # a minute or two on 2 cores

MiniLM-L6 and Banking77. The two are timed in turn, the ratio is the median of the pairs. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_kdprune import score_units
from hf_kdprune.demo.data import minilm
from hf_kdprune.demo.run import Demo, freeze_embeddings, read
from hf_kdprune.publish.report import environment
from hf_kdprune.samples import by_length, split


def main() -> None:
    """Time both, several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    data, tokenizer, (train, _) = read(Demo())
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(data.labels))
    freeze_embeddings(model)  # as the demo trains: the cheaper of the two ways to train
    collate = DataCollatorWithPadding(tokenizer)
    loader: DataLoader = by_length(split(train, args.samples, 0)[0], collate, 32)
    batches = [dict(batch) for batch in loader]
    pairs = [(timed(rank, model, batches), timed(train_pass, model, batches)) for _ in range(args.rounds + 1)][1:]
    print(
        json.dumps(
            {
                "ratio": statistics.median(a / b for a, b in pairs),
                "ratios": [round(a / b, 3) for a, b in pairs],
                "rank_seconds": statistics.median(a for a, _ in pairs),
                "forward_backward_seconds": statistics.median(b for _, b in pairs),
                "samples": args.samples,
                "environment": environment(),
            }
        )
    )


def timed(work, model, batches) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work(model, batches)
    return time.perf_counter() - start


def rank(model, batches) -> None:
    """All of ranking: discovery, the metric of the second loss, the probe."""
    score_units(model, None, batches)


def train_pass(model, batches) -> None:
    """One forward and backward pass in training mode, without an optimizer step."""
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()


if __name__ == "__main__":
    main()
