"""What teaches in a KDPruneTrainer: which layers, and where the teacher's output comes from, itself or the disk."""

from __future__ import annotations

import datasets
import torch
from torch import Tensor
from transformers import Trainer

from .distill.cache import Kept, cached_teacher
from .distill.first_loss import Teacher
from .distill.teacher import ask
from .layers import match_layers
from .ranks import Ranks

Batch = dict[str, Tensor]


def match(trainer: Trainer) -> None:
    """Say which layer of the student learns from which of the teacher, measured by all ranks on the calibration samples."""
    teacher, data, ranks = trainer.teacher, trainer.calibration, Ranks.of(trainer.accelerator)
    trainer.lesson.matches = match_layers(trainer.model, teacher, data, trainer.args.layer_map, ranks)


def live(trainer: Trainer) -> Teacher:
    """The teacher that the trainer has by then is asked."""
    return lambda batch, rows, features: ask(trainer.teacher, batch, features)


def cached(trainer: Trainer) -> Teacher:
    """Training samples are looked up in `teacher_cache`, which is made if the folder is empty; for others the teacher is asked.

    Raises:
        ValueError: The folder holds the cache of another teacher, data set or setting, or none that is whole.
    """
    args, data, asked = trainer.args, trainer.train_dataset, live(trainer)
    if isinstance(data, datasets.Dataset):
        data = trainer._remove_unused_columns(data, description="teacher cache")
    # Loading data draws random numbers: a run that makes the cache must train as one that finds it.
    with args.main_process_first(local=False, desc="teacher cache"), torch.random.fork_rng(devices=[]):
        kept, size = Kept(args.temperature, args.teacher_top_k), args.per_device_train_batch_size
        cache = cached_teacher(args.teacher_cache, trainer.teacher, data, trainer.collate, size, kept)

    def teach(batch: Batch, rows: Tensor | None, features: bool) -> object:
        return asked(batch, rows, features) if rows is None else cache.look_up(rows, batch)

    return teach
