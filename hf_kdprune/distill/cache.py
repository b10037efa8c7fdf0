"""The teacher's logits for a whole training set: computed once, kept on disk, memory-mapped, used by the next run too.

A folder holds one Arrow stream, a record a row of the training set, and a small JSON that says of what it was made. What
is kept of a row is what the teacher says at its real positions, so that a batch may be composed and padded in another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import masks_of
from .cache_build import AGAIN, DATA, SPAN, SUM, Identity, Kept, build, sample_sums, teacher_fingerprint
from .logits import TopK
from .rows import ROW, CollateWithRows, checksums, with_rows

Batch = dict[str, Tensor]
REASONS = (
    "the data set, tokenizer or collator changed, or it draws at random (masking, augmentation), or pads without an "
    "attention_mask"
)


class TeacherCache:
    """The teacher's logits of every row of a training set, on disk.

    Attributes:
        folder: Where.
        identity: Of what it was made.
    """

    def __init__(self, folder: str | Path):
        """Memory-map a whole cache.

        Raises:
            ValueError: The folder holds none, or one that is truncated or damaged.
        """
        self.folder = Path(folder)
        self.identity, file = Identity.load(self.folder), self.folder / DATA
        size, whole = file.stat().st_size if file.is_file() else 0, (self.identity.rows, self.identity.bytes)
        try:
            if size != whole[1]:
                raise OSError(f"{size} bytes of {whole[1]}")
            self.data = datasets.Dataset.from_file(str(file)).with_format("arrow")
            rows, sums = (self.data.data.column(name).to_numpy() for name in (ROW, SUM))
            if len(rows) != whole[0] or set(self.data.column_names) - {ROW, SUM} != set(self.identity.widths):
                raise OSError(f"{len(rows)} rows of {whole[0]}, columns {self.data.column_names}")
        except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"a teacher cache must be whole; {file} is damaged ({error}): {AGAIN}") from error
        self.order = np.argsort(rows)
        self.rows, self.sums = rows[self.order], sums[self.order]

    def look_up(self, rows: Tensor, batch: Batch) -> SimpleNamespace:
        """What the teacher says of a batch.

        Args:
            rows: (batch,), the rows of the training set that these samples are.
            batch: Their inputs, completed for the model (`inputs.completed`).

        Returns:
            `logits`, (batch, classes) or (batch, seq, classes) or a `TopK` of (batch, seq, k); or `start_logits` and
            `end_logits`, (batch, seq). Float32, on the device of the batch. Padding holds zeros, or where there are only the
            k likeliest classes, the same uniform distribution; as start or end of an answer, the lowest finite number.

        Raises:
            ValueError: A row is not in the cache, or its inputs are not those that the teacher saw.
        """
        asked = rows.flatten().cpu().numpy()
        at, known = self.find(asked)
        if (strangers := asked[~known]).size:
            raise ValueError(f"{self.folder} holds rows of the training set; row {strangers[0]} is none: {AGAIN}")
        self.check(asked, at, batch)
        table = self.data[self.order[at]]
        found = {name: self.at_real(name, table.column(name), batch) for name in self.identity.widths}
        if self.identity.top_k is None:
            return SimpleNamespace(**found)
        return SimpleNamespace(logits=TopK(found["log_probs"], found["indices"]))

    def find(self, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `rows` these rows are, (rows,), and whether they are there at all."""
        at = np.searchsorted(self.rows, asked).clip(max=len(self.rows) - 1)
        return at, self.rows[at] == asked

    def check(self, asked: np.ndarray, at: np.ndarray, batch: Batch) -> None:
        """Raise ValueError unless the batch holds the inputs that the teacher saw of these rows."""
        mine = checksums(batch).cpu().numpy()
        if len(mine) != len(asked):
            raise ValueError(f"a batch must hold a sample a row; got {len(mine)} and {len(asked)}: do not pack samples")
        if (wrong := asked[mine != self.sums[at]]).size:
            raise ValueError(
                f"each row must give the inputs that the teacher saw; {len(wrong)} of the {len(asked)} of a batch do not, row "
                f"{wrong[0]} of the training set first: {REASONS}. Make it repeatable, or {AGAIN}, or train without a cache"
            )

    def at_real(self, name: str, column: pyarrow.ChunkedArray, batch: Batch) -> Tensor:
        """One column of the samples of a batch, put at their real positions: (batch[, seq], width), or (batch, seq)."""
        key, width = self.identity.padded_by, self.identity.widths[name]
        like = next(value for value in batch.values() if isinstance(value, Tensor))
        numbers = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        values = torch.from_numpy(numbers).to(like.device).view(-1, width)
        if key is None:
            return values
        held = torch.from_numpy(np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks]) // width)
        ones = torch.ones(len(held), int(held[0]), dtype=torch.bool, device=like.device)
        real = masks_of(batch).get(key) if key else ones
        if real is None or not torch.equal(real.sum(1).cpu(), held):
            found = None if real is None else real.sum(1).tolist()
            raise ValueError(
                f"each row must have the positions that the teacher saw, {held.tolist()}, got {found} by the mask {key!r}: "
                "give the batch completed for the model, with its labels"
            )
        out = values.new_zeros(*real.shape, width)
        if name == "log_probs":
            out.fill_(-math.log(self.identity.classes))
        elif name == "indices":
            out += torch.arange(width, device=out.device, dtype=out.dtype)
        elif name in SPAN:
            out.fill_(torch.finfo(out.dtype).min)
        out[real] = values
        return out[..., 0] if name in SPAN else out.long() if name == "indices" else out


def cached_teacher(
    folder: str | Path,
    teacher: PreTrainedModel,
    dataset: object,
    collate: Callable[[list], dict],
    batch_size: int = 32,
    kept: Kept = Kept(),
) -> TeacherCache:
    """Open the cache in a folder, or compute it where the folder is empty or absent.

    Args:
        folder: A folder for this cache alone. What is in it is never changed or deleted.
        teacher: The teacher, on the device on which it is to run.
        dataset: Map-style, of dicts; the numbers of its rows are those of ROW, where samples have it (`rows.with_rows`).
        collate: The data collator that training uses, wrapped in `CollateWithRows` or not.
        batch_size: Samples of one pass.
        kept: What of the logits is kept.

    Raises:
        ValueError: The folder holds something else, a damaged cache, or one of another teacher, data set or setting; or this
            teacher and data set cannot be cached.
        OSError: It cannot be written.
    """
    folder, dataset, collate = Path(folder), with_rows(dataset), CollateWithRows(collate)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"a teacher cache needs a folder of its own; {folder} is a file: give a folder")
    wanted = Identity(teacher_fingerprint(teacher), kept.temperature, kept.top_k, rows=len(dataset))
    if not folder.is_dir() or not any(folder.iterdir()):
        build(folder, teacher, dataset, collate, batch_size, wanted)
    cache = TeacherCache(folder)
    for name in ("teacher", "top_k", "temperature", "rows"):
        ours, theirs = getattr(wanted, name), getattr(cache.identity, name)
        if ours != theirs:
            raise ValueError(f"a teacher cache serves what it was made of; {folder} has {name} {theirs}, now {ours}: {AGAIN}")
    now = sample_sums(teacher, dataset, collate, batch_size)
    at, known = cache.find(np.array(list(now)))
    same = known & (cache.sums[at] == list(now.values()))
    if wrong := [row for row, fits in zip(now, same, strict=True) if not fits]:
        raise ValueError(
            f"a teacher cache serves the data set that it was made of; in {folder} {len(wrong)} of {len(now)} rows that were "
            f"looked at, row {wrong[0]} first, gave other inputs than now: {REASONS}. Undo that, or {AGAIN}"
        )
    return cache
