"""Does anything grow with the steps of a KDPruneTrainer? Run by `memory.py --soak`.

A tiny BERT, all four terms of the first loss, and everything on that a run may have on: logs, evaluation with terms, two kept
checkpoints. Each 50 steps, behind a warm-up, what is resident, the live tensors and the live Python objects.
"""

from __future__ import annotations

import ctypes
import gc
import math
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_kdprune import KDPruneConfig, KDPruneTrainer

EVERY, WARM_UP = 50, 500  # steps
SETTINGS = {
    "per_device_train_batch_size": 8,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "evaluate_terms": True,
    "save_steps": 100,
    "save_total_limit": 2,
    "auxiliary_weight": 1.0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Watch(TrainerCallback):
    """Samples the process while it trains."""

    def __init__(self, trace: bool = False):
        """No samples; `trace`: remember where memory was taken after the warm-up (slow)."""
        self.samples: list[dict[str, float]] = []
        self.trace, self.before = trace, None

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Take a sample."""
        if state.global_step < WARM_UP or state.global_step % EVERY:
            return
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free and not given back is no leak
        objects = gc.get_objects()
        self.samples.append(
            {
                "step": state.global_step,
                "resident": int(Path("/proc/self/statm").read_text().split()[1]) * 4,  # KiB
                "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
                "objects": len(objects),
            }
        )
        if self.trace and self.before is None:
            tracemalloc.start(8)
            self.before = tracemalloc.take_snapshot()


def soak(steps: int, trace: bool = False) -> dict:
    """Train, and say by how much what grew, a step.

    Args:
        steps: Of training, more than the warm-up.
        trace: Print where Python took the memory that it holds at the end.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start, watch = time.perf_counter(), Watch(trace)
    with tempfile.TemporaryDirectory() as folder:
        trainer = KDPruneTrainer(
            model(),
            KDPruneConfig(folder, max_steps=steps, **SETTINGS),
            train_dataset=rows(512),
            eval_dataset=rows(64),
            callbacks=[watch],
        )
        trainer.train()
    if trace:
        for line in tracemalloc.take_snapshot().compare_to(watch.before, "traceback")[:12]:
            print(line, *line.traceback.format(), sep="\n  ")
    at = [sample["step"] for sample in watch.samples]
    found = {}
    for name, unit in (("resident", "KiB"), ("tensors", "tensors"), ("objects", "objects")):
        values = [sample[name] for sample in watch.samples]
        slope, error = fit(at, values)
        found[name] = {"unit": unit, "first": values[0], "last": values[-1], "per step": slope, "standard error": error}
    return {"steps": steps, "samples": len(at), "seconds": round(time.perf_counter() - start), **found}


def model() -> BertForSequenceClassification:
    """A BERT of two layers."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertForSequenceClassification(BertConfig(vocab_size=500, max_position_embeddings=64, num_labels=3, **sizes))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens, 16 a row, with the label that the first one says."""
    ids = torch.randint(5, 500, (count, 16))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return round(slope, 4), round(math.sqrt(rest / (n - 2) / spread), 4)
