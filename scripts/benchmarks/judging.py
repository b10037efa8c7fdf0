"""What the benchmarks judge a smaller model by, beside its teacher, on all of a test set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import torch
from teachers import DATA
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_kdprune.layers import at_real, hidden_states, inputs_of

Batch = dict[str, Tensor]
FEATURES = 1024  # samples on which features are compared: all of most test sets


class Judge:
    """Accuracy or Matthews correlation, KL to the teacher, and the plain feature loss.

    Attributes:
        batches: The test set.
        logits: The teacher's of what is labelled, for each batch.
        states: The teacher's features of the first batches: a list of layers for each, (tokens, hidden).
        variance: Of the teacher's features, by layer.
    """

    @torch.no_grad()
    def __init__(self, teacher: PreTrainedModel, batches: Sequence[Batch]):
        """Run the teacher once."""
        self.batches = batches
        self.logits = [labelled(teacher(**inputs_of(batch)).logits, batch) for batch in batches]
        some = batches[:: max(1, round(len(batches) * len(batches[0]["input_ids"]) / FEATURES))]
        self.states = [(batch, [at_real(s, batch) for s in hidden_states(teacher, batch)[1:]]) for batch in some]
        layers = [torch.cat(layer) for layer in zip(*(states for _, states in self.states), strict=True)]
        self.variance = [float(layer.var(0).mean()) for layer in layers]

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Judge one model."""
        model.eval()
        logits = [labelled(model(**inputs_of(batch)).logits, batch) for batch in self.batches]
        mine, taught = torch.cat(logits), torch.cat(self.logits)
        labels = torch.cat([labelled(batch["labels"], batch) for batch in self.batches])
        kl = F.kl_div(mine.log_softmax(-1), taught.log_softmax(-1), reduction="batchmean", log_target=True)
        return {
            "accuracy": float((mine.argmax(-1) == labels).float().mean()),
            "matthews": matthews(mine.argmax(-1), labels),
            "kl": float(kl),
            "features": self.feature_loss(model),
        }

    def feature_loss(self, model: PreTrainedModel) -> float:
        """Mean over layers and real positions of the squared error of the features, over d times their variance."""
        total, tokens = 0.0, 0
        for batch, taught in self.states:
            mine = [at_real(s, batch) for s in hidden_states(model, batch)[1:]]
            tokens += len(mine[0])
            errors = [float((a - b).square().mean(1).sum()) for a, b in zip(mine, taught, strict=True)]
            total += sum(error / variance for error, variance in zip(errors, self.variance, strict=True))
        return total / tokens / len(self.variance)


def labelled(values: Tensor, batch: Batch) -> Tensor:
    """Of the rows, or of their words, those that have a label: (items, ...)."""
    return values[batch["labels"] != -100]


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of predicted and true classes, of any number of classes (Gorodkin 2004)."""
    count = int(max(predicted.max(), labels.max())) + 1
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    rows, columns, total = table.sum(1), table.sum(0), table.sum()
    spread = (total**2 - rows.square().sum()) * (total**2 - columns.square().sum())
    return float((table.diagonal().sum() * total - rows @ columns) / spread.sqrt()) if spread else 0.0


class Perplexity:
    """Perplexity on WikiText-2 test, in rows of 512 tokens, and its ratio to the teacher's.

    Attributes:
        rows: (rows, 512) token ids.
        dense: The teacher's perplexity, measured on the first call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int):
        """Take the first rows of the text, joined."""
        lines = datasets.load_dataset("parquet", data_files=str(DATA / "wikitext2" / "test.parquet"), split="train")["text"]
        ids = tokenizer("".join(lines), return_tensors="pt")["input_ids"][0]
        self.rows = ids[: rows * 512].view(-1, 512)
        self.dense: float | None = None

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Judge one model."""
        model.eval()
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in self.rows]
        perplexity = math.exp(sum(losses) / len(losses))
        self.dense = self.dense or perplexity
        return {"perplexity": perplexity, "ratio": perplexity / self.dense}


def matthews_of(predicted: EvalPrediction) -> float:
    """Matthews correlation of what a Trainer predicted, where there is a label."""
    batch = {"labels": torch.from_numpy(predicted.label_ids)}
    return matthews(labelled(torch.from_numpy(predicted.predictions).argmax(-1), batch), labelled(batch["labels"], batch))
