"""A tiny classifier with its data, and a trainer of it, for tests of the trainer."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from hf_kdprune import KDPruneConfig, KDPruneTrainer

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]


def tiny_bert(layers=2, hidden=32, labels=("bad", "good"), vocab=100, seed=0, spread=0.02):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=spread,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    return BertForSequenceClassification(config)


def rows(count=96, labelled=True, seed=0):
    """Sentences whose label is whether the second token is in the upper half of the vocabulary."""
    draw = np.random.default_rng(seed)
    ids = [[2, *draw.integers(5, 100, draw.integers(3, 12)).tolist(), 3] for _ in range(count)]
    data = {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}
    if labelled:
        data["label"] = [int(i[1] > 52) for i in ids]
    return Dataset.from_dict(data)


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def logits(model, ids=((2, 10, 20, 3), (2, 60, 70, 3))):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor(ids, device=model.device)).logits.cpu()


def tokenizer():
    """Of the words w0 to w94."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.txt")
        file.write_text("\n".join(VOCAB))
        return BertTokenizerFast(str(file))


TRAINER = ("callbacks", "model_init", "data_collator")  # what a Trainer takes beside its settings


def trainer(output, model=None, teacher=None, train_dataset=None, metrics=accuracy, loss=None, **settings):
    """A trainer of the tiny classifier; `settings` are fields of KDPruneConfig, or of TRAINER."""
    given = {name: settings.pop(name) for name in TRAINER if name in settings}
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return KDPruneTrainer(
        tiny_bert() if model is None and "model_init" not in given else model,
        KDPruneConfig(output_dir=str(output), **{**defaults, **settings}),
        teacher=teacher,
        train_dataset=rows() if train_dataset is None else train_dataset,
        eval_dataset=rows(32, seed=1),
        processing_class=tokenizer(),
        compute_metrics=metrics,
        compute_loss_func=loss,
        **given,
    )
