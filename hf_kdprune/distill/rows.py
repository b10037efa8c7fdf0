"""Which row of the training set a sample of a batch is, and whether its inputs are still those that they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..layers import inputs_of, masks_of

Batch = dict[str, Tensor]
ROW = "kdprune_row"  # the column of a data set, and the key of a batch, that holds the number of the row


class WithRows(Dataset):
    """A map-style data set of dicts whose samples also carry the number of their row."""

    def __init__(self, dataset: object):
        """Take anything with a length whose items are mappings."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Rows."""
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        """One sample; its values as they are."""
        return {**self.dataset[row], ROW: row % len(self)}

    def __getitems__(self, rows: list[int]) -> list[dict]:
        """Several samples, read or transformed at once where the data set can."""
        read = getattr(self.dataset, "__getitems__", None)
        samples = read(rows) if read else [self.dataset[row] for row in rows]
        return [{**sample, ROW: row % len(self)} for sample, row in zip(samples, rows, strict=True)]


class CollateWithRows:
    """A collator that hands the row numbers past another one, into batch[ROW], (batch,) int64.

    Samples without a row number, such as those of an evaluation set, are collated as they would be without it.
    """

    def __init__(self, collate: Callable[[list], dict]):
        """Wrap a collator, which never sees ROW; one that is wrapped already is not wrapped twice."""
        self.collate = collate.collate if isinstance(collate, CollateWithRows) else collate
        self.tokenizer = getattr(collate, "tokenizer", None)  # which Trainer saves beside a model

    def __call__(self, samples: list) -> dict:
        """Collate samples."""
        if not all(isinstance(sample, Mapping) and ROW in sample for sample in samples):
            return self.collate(samples)
        batch = self.collate([{k: v for k, v in sample.items() if k != ROW} for sample in samples])
        batch[ROW] = torch.tensor([int(sample[ROW]) for sample in samples])
        return batch


def with_rows(dataset: object) -> object:
    """The data set with the number of each row in it, as a column where that copies nothing; one that has it comes back.

    A column stays with its row through select, shuffle and split, and so do features, format and lengths of a
    datasets.Dataset. One that was selected from already, or makes its samples by a transform, is wrapped instead.
    """
    if isinstance(dataset, datasets.Dataset):
        if ROW in dataset.column_names:
            return dataset
        plain = dataset.format["type"] != "custom" and set(dataset.format["columns"]) == set(dataset.column_names)
        if plain and dataset._indices is None:  # else add_column would write the whole data set anew
            return dataset.add_column(ROW, torch.arange(len(dataset)).numpy())
        return WithRows(dataset)
    has = len(dataset) and isinstance(dataset[0], Mapping) and ROW in dataset[0]
    return dataset if has else WithRows(dataset)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers, one to one; products wrap around. Source: Steele et al. 2014, SplitMix64."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # torch shifts the sign in: x and ~x would be alike
    return x


def checksums(batch: Batch) -> Tensor:
    """64 bits of the inputs of each sample at its real positions, labels left out: (batch,) int64.

    They do not depend on padding that a mask tells of, on the other samples, or on the device. Each number, as bits, is
    multiplied by an odd weight that depends on its place and on the name of its input, and the products are added.

    Raises:
        ValueError: Inputs are not one a sample.
    """
    inputs = {k: v for k, v in sorted(inputs_of(batch).items()) if k != ROW and isinstance(v, Tensor) and v.dim()}
    if len({len(value) for value in inputs.values()}) != 1:
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        raise ValueError(f"inputs must have a row a sample, got {shapes}: check the data collator, and do not pack samples")
    masks, total = masks_of(batch), 0
    for name, value in inputs.items():
        bits = value.float().contiguous().view(torch.int32) if value.is_floating_point() else value
        bits = bits.to(torch.int64).reshape(*value.shape[:2], -1) if value.dim() > 1 else bits.to(torch.int64)[:, None, None]
        mask = masks.get("decoder" if name.startswith("decoder") else "main")
        padded = mask is not None and mask.shape == value.shape[:2] and not name.startswith("pixel")
        real = mask if padded else bits.new_ones(1, bits.shape[1], dtype=torch.bool)
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        place = (real.long().cumsum(1) - 1)[..., None] * bits.shape[2] + torch.arange(bits.shape[2], device=bits.device)
        weights = mix(mix(place + salt) + salt) | 1
        total = total + ((bits + 1) * weights * real[..., None]).flatten(1).sum(1)
    return total
