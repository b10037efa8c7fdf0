"""Fine-tuned MiniLM-L6 classifiers on data sets of shared/data: what the benchmarks prune.

    python scripts/benchmarks/teachers.py sst2 cola ag_news      # about 20 minutes on 2 cores; kept in runs/teachers

The other benchmarks call `teacher`, which trains on the first call and reads what was kept afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_kdprune.demo.data import MAX_TOKENS, minilm, tokenize
from hf_kdprune.demo.run import common, freeze_embeddings, say

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
        of_words: The column of each word's label, where words are classified and not texts.
    """

    text: tuple[str, ...]
    test: str
    labels: int
    epochs: float
    rate: float
    of_words: str | None = None

    @property
    def auto(self) -> type:
        """The class that loads its teacher."""
        return AutoModelForTokenClassification if self.of_words else AutoModelForSequenceClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list], dict]:
        """What pads a batch."""
        return (DataCollatorForTokenClassification if self.of_words else DataCollatorWithPadding)(tokenizer)


TASKS = {
    "sst2": Task(("sentence",), "validation", 2, 1, 2e-4),
    "cola": Task(("sentence",), "validation", 2, 5, 1e-4),
    "ag_news": Task(("text",), "test", 4, 2, 2e-4),
    "banking77": Task(("text",), "test", 77, 4, 3e-4),
    "ud_english_ewt_pos": Task(("tokens",), "test", 17, 3, 3e-4, of_words="upos"),
}


def read(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test data as token ids and `label`, or `labels` of the first token of each word."""
    task = TASKS[name]
    files = {"train": str(DATA / name / "train.parquet"), "test": str(DATA / name / f"{task.test}.parquet")}
    data = datasets.load_dataset("parquet", data_files=files)
    if task.of_words:
        data = data.map(words(tokenizer, task), batched=True, remove_columns=data["train"].column_names)
        return data["train"], data["test"]
    parts = [tokenize(data[part].select_columns([*task.text, "label"]), tokenizer, list(task.text)) for part in files]
    return parts[0], parts[1]


def words(tokenizer: PreTrainedTokenizerBase, task: Task) -> Callable[[dict], dict]:
    """What makes token ids of words, and puts each word's label on its first token."""

    def encode(rows: dict) -> dict:
        found = tokenizer(rows[task.text[0]], is_split_into_words=True, truncation=True, max_length=MAX_TOKENS)
        of_token = [found.word_ids(i) for i in range(len(found["input_ids"]))]
        firsts = [[w if w is not None and w not in ids[:i] else None for i, w in enumerate(ids)] for ids in of_token]
        kept = zip(firsts, rows[task.of_words], strict=True)
        return {**found, "labels": [[-100 if w is None else labels[w] for w in ids] for ids, labels in kept]}

    return encode


def teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, datasets.Dataset, datasets.Dataset]:
    """The fine-tuned model of a task, its tokenizer, and the task's training and test data."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    train, test = read(name, tokenizer)
    folder = KEPT / name
    if not (folder / "config.json").is_file():
        fine_tune(TASKS[name], folder, tokenizer, train, test)
    return TASKS[name].auto.from_pretrained(folder).eval(), tokenizer, train, test


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
    model = task.auto.from_pretrained(minilm(), num_labels=task.labels)
    args = TrainingArguments(
        str(folder) + "-training",
        learning_rate=task.rate,
        num_train_epochs=task.epochs,
        **{**common(), "logging_steps": 200, "warmup_steps": 100},
    )
    parts = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "compute_metrics": right}
    trainer = Trainer(freeze_embeddings(model), args, data_collator=task.collator(tokenizer), **parts)
    trainer.train()
    say(json.dumps(trainer.evaluate()))
    model.save_pretrained(folder)


def right(predicted: EvalPrediction) -> dict[str, float]:
    """Share of what is labelled whose highest logit is the label's."""
    labelled = predicted.label_ids != -100
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids)[labelled].mean())}


def main() -> None:
    """Train those that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    transformers.logging.set_verbosity_error()
    for name in parser.parse_args().tasks:
        teacher(name)


if __name__ == "__main__":
    main()
