"""Fine-tuned MiniLM-L6 classifiers on data sets of shared/data: what the benchmarks prune.

    python scripts/benchmarks/teachers.py sst2 cola ag_news      # about 20 minutes on 2 cores; kept in runs/teachers

The other benchmarks call `teacher`, which trains on the first call and reads what was kept afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_kdprune.demo.data import minilm, tokenize
from hf_kdprune.demo.run import accuracy, common, freeze_embeddings, say

DATA = Path(os.environ.get("KDPRUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))
KEPT = Path("runs") / "teachers"


@dataclass(frozen=True)
class Task:
    """A data set and how its teacher is trained.

    Attributes:
        text: The text column, or two for pairs.
        test: Name of the split that judges.
        labels: Number of classes.
        epochs: Of fine-tuning.
        rate: Learning rate.
    """

    text: tuple[str, ...]
    test: str
    labels: int
    epochs: float
    rate: float


TASKS = {
    "sst2": Task(("sentence",), "validation", 2, 1, 2e-4),
    "cola": Task(("sentence",), "validation", 2, 5, 1e-4),
    "ag_news": Task(("text",), "test", 4, 2, 2e-4),
    "banking77": Task(("text",), "test", 77, 4, 3e-4),
}


def read(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test data as token ids and `label`."""
    task = TASKS[name]
    files = {"train": str(DATA / name / "train.parquet"), "test": str(DATA / name / f"{task.test}.parquet")}
    data = datasets.load_dataset("parquet", data_files=files)
    parts = [tokenize(data[part].select_columns([*task.text, "label"]), tokenizer, list(task.text)) for part in files]
    return parts[0], parts[1]


def teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, datasets.Dataset, datasets.Dataset]:
    """The fine-tuned model of a task, its tokenizer, and the task's training and test data."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    train, test = read(name, tokenizer)
    folder = KEPT / name
    if not (folder / "config.json").is_file():
        fine_tune(TASKS[name], folder, tokenizer, train, test)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer, train, test


def web_text(tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, length: int = 256) -> list[dict[str, Tensor]]:
    """Batches of 4 rows of `length` tokens of web text (UD English EWT, documents joined), drawn by seed."""
    files = {"data_files": str(DATA / "ud_english_ewt_pos" / "train.parquet"), "split": "train"}
    ids = tokenizer(" ".join(datasets.load_dataset("parquet", **files)["text"]), return_tensors="pt")["input_ids"][0]
    parts = ids[: len(ids) // length * length].view(-1, length)
    chosen = parts[torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:rows]]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in chosen.split(4)]


def fine_tune(
    task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase, train: datasets.Dataset, test: datasets.Dataset
) -> None:
    """Train and keep a teacher."""
    say(f"fine-tuning {folder}: {task}")
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=task.labels)
    args = TrainingArguments(
        str(folder) + "-training",
        learning_rate=task.rate,
        num_train_epochs=task.epochs,
        **{**common(), "logging_steps": 200, "warmup_steps": 100},
    )
    parts = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "compute_metrics": accuracy}
    trainer = Trainer(freeze_embeddings(model), args, **parts)
    trainer.train()
    say(json.dumps(trainer.evaluate()))
    model.save_pretrained(folder)


def main() -> None:
    """Train those that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    transformers.logging.set_verbosity_error()
    for name in parser.parse_args().tasks:
        teacher(name)


if __name__ == "__main__":
    main()
