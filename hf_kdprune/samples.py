"""Which training samples train, which judge the training, and which rank and repair."""

from __future__ import annotations

from collections.abc import Callable, Sized

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .config import KDPruneConfig
from .distill.rows import with_rows
from .layers import LABELS
from .prune.budget import Budget

HELD_OUT = 512  # training samples, at most a tenth, that judge whether recovery made the model better
JUDGING = 2048  # the same, that judge how small the model may be under a budget of "loss="


class GroupedByLength(LengthGroupedSampler):
    """As transformers', but the order depends on the seed and the epoch only, so that a resumed run sees what it would have."""

    def __init__(self, drawn: LengthGroupedSampler, seed: int):
        """Take what Trainer made, which draws from the generator of all."""
        super().__init__(drawn.batch_size, lengths=drawn.lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says so before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


def seeded(sampler: object, args: KDPruneConfig) -> object:
    """What the Trainer draws training samples by, such that a resumed run goes on in the same order."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return GroupedByLength(sampler, seed) if isinstance(sampler, LengthGroupedSampler) else sampler


def held_out_size(dataset: Sized, most: int = HELD_OUT) -> int:
    """How many samples are held out of a data set."""
    return min(most, max(1, len(dataset) // 10))


def check_dataset(dataset: object) -> None:
    """Raise unless `dataset` can be drawn from.

    Raises:
        ValueError: No length, or too few samples.
    """
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)) or not isinstance(dataset, Sized):
        raise ValueError(
            f"train_dataset must have a length, got {type(dataset).__name__}: calibration and held-out samples are drawn "
            "from it; take a part of the stream into a datasets.Dataset"
        )
    if len(dataset) < 4:
        raise ValueError(f"train_dataset must hold at least 4 samples, got {len(dataset)}: give the training split")


def check_labels(batch: dict, args: KDPruneConfig) -> None:
    """Raise unless a collated batch has the labels that the first loss needs.

    Raises:
        ValueError: It has none.
    """
    if (args.task_weight or args.auxiliary_weight) and not set(batch) & {*LABELS, *(args.label_names or ())}:
        raise ValueError(
            f"task_weight {args.task_weight} and auxiliary_weight {args.auxiliary_weight} need labels; a batch of "
            f"train_dataset has {sorted(batch)}: name the label column 'labels', give a data_collator that makes labels, or "
            "set both weights to 0 to learn from the teacher"
        )


def divided(dataset: object, args: KDPruneConfig) -> tuple[object, object, object | None]:
    """What trains, ranks and repairs; what judges the training; what judges a budget of "loss=" (None for others).

    Raises:
        ValueError: It cannot be drawn from.
    """
    check_dataset(dataset)
    if args.teacher_cache:
        dataset = with_rows(dataset)
    held_out, dataset = split(dataset, held_out_size(dataset), args.seed)
    if Budget.parse(args.budget).counts != "loss":
        return dataset, held_out, None
    judging, dataset = split(dataset, held_out_size(dataset, JUDGING), args.seed)
    return dataset, held_out, judging


def split(dataset: object, count: int, seed: int) -> tuple[object, object]:
    """`count` random samples of a data set, and the others."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = sorted(order[:count]), sorted(order[count:])
    return tuple(dataset.select(p) if hasattr(dataset, "select") else Subset(dataset, p) for p in parts)


def by_length(dataset: object, collate: Callable[[list], dict], size: int) -> DataLoader:
    """Batches of `size`, samples of like length together where lengths are known."""
    if hasattr(dataset, "column_names") and "input_ids" in dataset.column_names:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        dataset = dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return DataLoader(dataset, batch_size=size, collate_fn=collate)
