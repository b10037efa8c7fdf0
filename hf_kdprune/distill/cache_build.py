"""Makes the folder that `cache.py` reads: a pass of the teacher over a whole training set, and what it was made of."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from glob import escape
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..inputs import completed
from ..layers import evaluating, masked_by, masks_of
from .divergence import log_probs
from .rows import ROW, CollateWithRows, WithRows, checksums
from .teacher import ask

Batch = dict[str, Tensor]
VERSION = 1
DATA, IDENTITY = "teacher.arrow", "teacher.json"
SUM = "checksum"  # the column of what `checksums` gave for the inputs of a row
SPAN = ("start_logits", "end_logits")
SAMPLED = 64  # rows of the training set that are collated anew when a cache is opened
CHUNK = 256  # positions whose likeliest classes are looked for at once: 150 MiB where there are 150,000 classes
PART = 4096  # numbers of each tensor of the teacher that make its fingerprint
AGAIN = "give another folder, or delete this one to have it computed again"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What of the teacher's logits is kept.

    Attributes:
        temperature: T; it says something only beside top_k: whole logits serve any temperature.
        top_k: The likeliest classes of each position of a language model; None: all logits, as they are.
    """

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the settings make no cache; forget a temperature that says nothing."""
        if not self.temperature > 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"a teacher cache needs temperature > 0, and top_k >= 1 or None; got {self}")
        if self.top_k is None:
            object.__setattr__(self, "temperature", 1.0)


@dataclass
class Identity:
    """What a cache was made of, and how it is laid out: the JSON in its folder.

    Attributes:
        teacher: `teacher_fingerprint`.
        temperature: Of `Kept`.
        top_k: Of `Kept`.
        version: Of this layout.
        rows: Of the training set.
        bytes: Of the Arrow file.
        classes: Of the teacher's logits.
        padded_by: The name in `layers.masks_of` of what says which positions are real; "": all; None: one row a sample.
        widths: Column -> numbers of each position, or of each sample.
    """

    teacher: str
    temperature: float
    top_k: int | None
    version: int = VERSION
    rows: int = 0
    bytes: int = 0
    classes: int = 0
    padded_by: str | None = None
    widths: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it."""
        (folder / IDENTITY).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Read it; raise ValueError where there is none, or of another version."""
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if IDENTITY not in names:
            raise ValueError(f"a teacher cache needs a folder of its own; {folder} holds {names[:5]}: give an empty one")
        try:
            read = json.loads((folder / IDENTITY).read_text())
            if read.get("version") == VERSION:
                return cls(**read)
            raise TypeError(f"version {read.get('version')!r}, and this version of hf_kdprune reads {VERSION}")
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"a teacher cache must be readable; {folder / IDENTITY} is not ({error}): {AGAIN}") from error


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 over class name, labels, and a strided sample of every parameter and buffer (rotary frequencies too)."""
    labels = {str(k): str(v) for k, v in (getattr(teacher.config, "id2label", None) or {}).items()}
    digest = hashlib.sha256(json.dumps([type(teacher).__name__, labels], sort_keys=True).encode())
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        part = tensor.detach().flatten()[:: -(-tensor.numel() // PART) | 1]  # odd: not always the same column
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update((part.float() if part.is_floating_point() else part.long()).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def batches(dataset: object, collate: CollateWithRows, parts: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """These samples, collated; the random state of the training is left as it is."""
    for batch in DataLoader(dataset, batch_sampler=parts, collate_fn=collate, generator=torch.Generator()):
        yield dict(batch)


def sample_sums(teacher: PreTrainedModel, dataset: object, collate: CollateWithRows, size: int) -> dict[int, int]:
    """Row -> checksum of its inputs now, for a strided sample of the rows, collated `size` at a time."""
    rows = range(0, len(dataset), max(1, -(-len(dataset) // SAMPLED)))
    found = {}
    for batch in batches(dataset, collate, [list(rows[i : i + size]) for i in range(0, len(rows), size)]):
        found |= zip(batch.pop(ROW).tolist(), checksums(completed(teacher, batch)).tolist(), strict=True)
    return found


def check_repeatable(teacher: PreTrainedModel, dataset: object, collate: CollateWithRows, size: int) -> None:
    """Raise ValueError where the inputs of a row are not the same each time, alone or beside others."""
    if not len(dataset):
        raise ValueError("a teacher cache needs a training set; it holds no samples: give the training split")
    alone, beside = (sample_sums(teacher, dataset, collate, n) for n in (1, size))
    if wrong := [row for row in alone if alone[row] != beside[row]]:
        raise ValueError(
            f"a teacher can be cached where a row gives the same inputs each time; {len(wrong)} of {len(alone)} rows that were "
            f"looked at, row {wrong[0]} first, do not: turn off random masking and augmentation, pad with an attention_mask "
            "or to one length, or train without a cache"
        )


def lengthwise(dataset: object, size: int) -> list[list[int]]:
    """Batches of `size` samples of like length, where lengths are known; the longest first, to run out of memory at once."""
    table, order = dataset.dataset if isinstance(dataset, WithRows) else dataset, list(range(len(dataset)))
    if "input_ids" in (getattr(table, "column_names", None) or ()):
        lengths = [len(ids) for ids in table["input_ids"]]
        order.sort(key=lengths.__getitem__, reverse=True)
    return [order[i : i + size] for i in range(0, len(order), size)]


def build(
    folder: Path, teacher: PreTrainedModel, dataset: object, collate: CollateWithRows, size: int, identity: Identity
) -> None:
    """Compute a cache beside `folder` and give it its name when it is whole.

    Raises:
        ValueError: The teacher or the data set cannot be cached.
        OSError: It cannot be written.
    """
    check_repeatable(teacher, dataset, collate, size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{escape(folder.name)}.*.building"):
        log.warning("%s is of a run that still computes its teacher cache, or was killed: then delete it", left)
    work = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.building")
    work.mkdir()
    try:
        with evaluating(teacher), torch.no_grad():
            found = records(teacher, dataset, collate, size, identity)
            first = next(found)
            with pyarrow.OSFile(str(work / DATA), "wb") as sink, pyarrow.ipc.new_stream(sink, first.schema) as writer:
                for record in chain([first], found):
                    writer.write_batch(record)
        identity.bytes = (work / DATA).stat().st_size
        identity.save(work)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        try:
            work.rename(folder)
        except OSError:
            if not (folder / IDENTITY).is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def records(
    teacher: PreTrainedModel, dataset: object, collate: CollateWithRows, size: int, identity: Identity
) -> Iterator[pyarrow.RecordBatch]:
    """What the teacher says, a record a row; fills in the layout in `identity`."""
    parts = lengthwise(dataset, size)
    bar = tqdm(
        batches(dataset, collate, parts), desc="teacher cache", unit="batch", total=len(parts), disable=None, leave=False
    )
    for i, batch in enumerate(bar):
        rows = batch.pop(ROW)
        batch = {k: v.to(teacher.device) if isinstance(v, Tensor) else v for k, v in completed(teacher, batch).items()}
        sums = checksums(batch).cpu()
        if len(sums) != len(rows):
            raise ValueError(f"a batch must hold a sample a row; got {len(sums)} and {len(rows)}: do not pack samples")
        columns, held, padded_by, classes = said(ask(teacher, batch, features=False), batch, rows, identity)
        widths = {name: value.shape[-1] for name, value in columns.items()}
        if i == 0:
            identity.widths, identity.padded_by, identity.classes = widths, padded_by, classes
        if (identity.widths, identity.padded_by, identity.classes) != (widths, padded_by, classes):
            raise ValueError(
                f"a teacher's logits must be laid out alike in all batches; got {widths} of {classes} classes padded by "
                f"{padded_by!r} after {identity.widths} of {identity.classes} padded by {identity.padded_by!r}, at row "
                f"{int(rows[0])}: train without a cache"
            )
        ends = np.concatenate([[0], held.cpu().numpy().cumsum()])
        arrays = {ROW: pyarrow.array(rows.numpy()), SUM: pyarrow.array(sums.numpy())}
        for name, value in columns.items():
            offsets = pyarrow.array(ends * value.shape[-1], pyarrow.int64())
            arrays[name] = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(value.cpu().numpy().ravel()))
        yield pyarrow.RecordBatch.from_pydict(arrays)


def said(output: object, batch: Batch, rows: Tensor, identity: Identity) -> tuple[dict[str, Tensor], Tensor, str | None, int]:
    """What is kept of a teacher's output.

    Returns:
        Columns, each (real positions or samples of the batch, width); how many of these each sample has, (batch,); the name
        of the mask that tells which positions are real, see `Identity`; the number of classes.

    Raises:
        ValueError: There are no logits that could be cached, or some are NaN or infinite.
    """
    names = SPAN if getattr(output, SPAN[0], None) is not None else ("logits",)
    found = {name: getattr(output, name, None) for name in names}
    if not all(isinstance(x, Tensor) and x.dim() in ((2,) if names is SPAN else (2, 3)) for x in found.values()):
        raise ValueError(
            "a teacher can be cached that gives logits of (batch, classes) or (batch, seq, classes), or start and end logits "
            f"of (batch, seq); got {type(output).__name__} with {sorted(output)}: train without a cache"
        )
    found = {name: (x[..., None] if names is SPAN else x).float() for name, x in found.items()}
    like, key = found[names[0]], None
    real = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    if like.dim() == 3:
        key, real = positions(batch, like, real)
    broken = torch.stack([~x.isfinite().all(-1) for x in found.values()]).any(0) & real
    if bool(broken.any()):
        row = int(rows[broken.view(len(rows), -1).any(1).cpu()][0])
        raise ValueError(
            f"a teacher's logits must be finite; of row {row} it gives NaN or infinity: check the model and the row"
        )
    held, classes = real.view(len(rows), -1).sum(1), like.shape[-1]
    columns = {name: x[real] for name, x in found.items()}
    if (k := identity.top_k) is not None:
        if like.dim() != 3 or names is SPAN or k > classes:
            raise ValueError(
                f"top_k keeps the likeliest classes of each position of a language model; got top_k {k}, and logits "
                f"{list(found[names[0]].shape)}: set a smaller top_k, or None to keep all"
            )
        parts = columns["logits"].split(CHUNK)
        tops = [log_probs(part, identity.temperature, torch.float32).topk(k) for part in parts]
        columns = {"log_probs": torch.cat([t.values for t in tops]), "indices": torch.cat([t.indices for t in tops]).int()}
    return columns, held, key, classes


def positions(batch: Batch, logits: Tensor, every: Tensor) -> tuple[str, Tensor]:
    """The name of the mask that tells where logits (batch, seq, classes) are padded, "" if nothing is, and that mask.

    Raises:
        ValueError: There is padding, and it is not known where it is in the logits.
    """
    masks = masks_of(batch)
    if key := masked_by(batch, logits, "decoder" if "decoder_input_ids" in batch else ""):
        return key, masks[key].view(every.shape)
    if any(not bool(mask.all()) for mask in masks.values()):
        raise ValueError(
            f"it must be known which of the teacher's {logits.shape[1]} positions are padding; there are masks of "
            f"{ {name: mask.shape[1] for name, mask in masks.items()} }: give decoder_attention_mask or labels where there is "
            "a decoder, else inputs of one length"
        )
    return "", every
