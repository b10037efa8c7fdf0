"""Hidden states of teacher and student, and which student layer learns from which teacher layer.

Both losses read this file, so it stands above the rooms that hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer_map import layer_pairs, similarity
from .moments import joint_moments, moments_of, projected, unprojected
from .ranks import Ranks

Batch = dict[str, Tensor]
TOKENS_PER_COLUMN = 5  # that make a covariance or a least-squares fit (METHOD.md 3)
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
FRAMES = "kdprune_frames"  # in a batch of raw audio: (batch, frames), True where a frame is no padding
ALIKE_POSITIONS = 2048  # that tell which layers are alike
IGNORED = -100  # the label of a position that does not count


@dataclass(frozen=True)
class LayerMatch:
    """One student layer, the teacher layer it learns from, and what the teacher's features look like there.

    Attributes:
        student: Index into the student's hidden states; 0 is the embeddings.
        teacher: Index into the teacher's.
        variances: (hidden,) of the teacher's features over real positions, in the student's space.
        projection: (teacher hidden + 1, student hidden) from teacher features to the student's space, the last row a
            bias; None where the widths are equal.
    """

    student: int
    teacher: int
    variances: Tensor
    projection: Tensor | None = None

    @property
    def variance(self) -> float:
        """Mean variance of a dimension."""
        return float(self.variances.mean())

    @property
    def width(self) -> int:
        """Hidden size of the student there."""
        return len(self.variances)


def inputs_of(batch: Batch) -> Batch:
    """The batch less its labels."""
    return {k: v for k, v in known(batch).items() if k not in LABELS}


def known(batch: Batch) -> Batch:
    """The batch less what this package put there, which models do not know."""
    return {k: v for k, v in batch.items() if k != FRAMES}


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Features of every layer, embeddings first: each (batch, seq, hidden). Labels are not looked at."""
    return states_of(model(**inputs_of(batch), output_hidden_states=True))


def states_of(output: object) -> tuple[Tensor, ...]:
    """The hidden states in a model's output; of an encoder and a decoder, or of two towers, one after the other."""
    found = stacks_of(output)
    if not found:
        raise ValueError(f"features are hidden states, and {type(output).__name__} has none: rank by 'magnitude' instead")
    return tuple(state for states in found.values() for state in states)


def stacks_of(output: object) -> dict[str, tuple[Tensor, ...]]:
    """The hidden states in a model's output by stack: "main", or "encoder" and "decoder", or "text" and "vision"."""
    if getattr(output, "hidden_states", None) is not None:
        return {"main": tuple(output.hidden_states)}
    found = {stack: getattr(output, f"{stack}_hidden_states", None) for stack in ("encoder", "decoder")}
    towers = {tower: getattr(output, f"{tower}_model_output", None) for tower in ("text", "vision")}
    found |= {tower: getattr(inside, "hidden_states", None) for tower, inside in towers.items()}
    return {stack: tuple(states) for stack, states in found.items() if states is not None}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def real_positions(batch: Batch) -> Tensor:
    """(batch, seq), True where a position is no padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    first = next(iter(inputs_of(batch).values()))
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def positions_of(batch: Batch, features: Tensor, stack: str = "") -> Tensor:
    """True where `features` (batch, seq, hidden), or with batch and seq joined, stand at no padding: (batch, seq).

    They stand at the tokens of the batch, at those of its decoder, at frames of audio, or, as in images, at nothing that is
    ever padded.

    Args:
        batch: The inputs.
        features: Whose positions are asked for.
        stack: Of `stacks_of`, where it is known; "": found by the number of positions.

    Raises:
        ValueError: There is padding, at positions that are not those of the features (raw audio).
    """
    name, masks = masked_by(batch, features, stack), masks_of(batch)
    if name:
        return masks[name].view(features.shape[:-1]) if features.dim() == 3 else masks[name]
    text = "input_ids" in batch  # beside which there may be images, and encoder states of another length
    if not text and any(not bool(mask.all()) for mask in masks.values()):
        raise ValueError(
            f"features of {features.shape[1]} positions must be those of the inputs; attention_mask has "
            f"{next(iter(masks.values())).shape[1]}, and it is not known which are padding: give inputs of equal length, "
            "without padding"
        )
    return torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)


def masked_by(batch: Batch, features: Tensor, stack: str = "") -> str:
    """The name in `masks_of` of what says where `features` are padded; "" where nothing does. Arguments as above."""
    for name, mask in masks_of(batch).items() if stack != "vision" else ():
        if (not stack or (name == "decoder") == (stack == "decoder")) and mask.numel() == features.shape[:-1].numel():
            return name
    return ""


def masks_of(batch: Batch) -> dict[str, Tensor]:
    """What the batch says of padding: True at real tokens, at real frames of audio, and at real tokens of the decoder.

    A decoder whose mask is not given reads the labels shifted by one, so that its padding is where they are -100, or, where
    it is given no tokens either, what the encoder reads.
    """
    named = {"main": batch.get("attention_mask"), "frames": batch.get(FRAMES), "decoder": batch.get("decoder_attention_mask")}
    if named["decoder"] is None and "decoder_input_ids" not in batch:
        named["decoder"] = named["main"]
    elif named["decoder"] is None and batch.get("labels") is not None:
        named["decoder"] = batch["labels"] != IGNORED
    return {name: mask.bool() for name, mask in named.items() if mask is not None and mask.dim() >= 2}


def at_real(features: Tensor, batch: Batch) -> Tensor:
    """Features at real positions: (positions, hidden)."""
    return features.flatten(0, -2)[positions_of(batch, features).flatten()]


def root_mean_square(features: Tensor) -> Tensor:
    """Of each position, (..., 1) in float32; no derivative."""
    return features.detach().float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def count_real(batches: Sequence[Batch]) -> int:
    """Positions of a set of batches that are no padding."""
    return sum(int(real_positions(batch).sum()) for batch in batches)


def enough(batches: Sequence[Batch], width: int) -> Sequence[Batch]:
    """Every so many of the batches, so that they hold about TOKENS_PER_COLUMN real tokens for each of `width`."""
    return batches[:: max(1, min(len(batches), count_real(batches) // (TOKENS_PER_COLUMN * width)))]


@torch.no_grad()
def match_layers(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    layer_map: str | list = "auto",
    ranks: Ranks | None = None,
) -> list[LayerMatch]:
    """Pair the layers and measure the teacher's features, on as many of the batches as that needs.

    Where the widths differ, the teacher's features are brought into the student's space by the linear map that fits
    the student's present features best (ridge least squares): what a linear map cannot explain is not asked for.

    Args:
        model: The student.
        teacher: The teacher; None: the student itself.
        batches: Inputs, all of them on every process.
        layer_map: See `layer_pairs`. For "auto" each process finds which layers are alike, on the same few positions.
        ranks: The processes that share the batches; None: this one runs them all.

    Raises:
        ValueError: The layer map does not fit, or a feature is NaN or infinite.
    """
    source, ranks = model if teacher is None else teacher, ranks or Ranks.alone()
    with evaluating(model, source):
        learnt, taught = (hidden_states(m, batches[0]) for m in (model, source))
        similar = alike(model, source, batches) if layer_map == "auto" and len(learnt) != len(taught) else None
        pairs = layer_pairs(layer_map, len(learnt) - 1, len(taught) - 1, similar)
        widths = [(learnt[s].shape[-1], taught[t].shape[-1]) for s, t in pairs]
        some = [batch for _, batch in ranks.share(enough(batches, max(t for _, t in widths)))]
        apart = source is not model and any(s != t for s, t in widths)
        sums = sums_over(source, model if apart else None, some, pairs, widths)
    described, matches = projected if apart else unprojected, []
    for (s, t), (_, width), mine in zip(pairs, widths, sums, strict=True):
        total = ranks.total(mine)
        check_finite(total, t)  # of the sum, so that all processes stop
        matches.append(LayerMatch(s, t, *described(total, width)))
    return matches


@torch.no_grad()
def alike(model: PreTrainedModel, source: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """How alike the blocks of two models are, (blocks of the one, of the other), on some real positions.

    Each position is taken over its root mean square, so that the first token of a language model is not all that counts.
    """
    few, seen = [], 0
    for batch in batches:
        few, seen = [*few, batch], seen + count_real([batch])
        if seen >= ALIKE_POSITIONS:
            break
    features = []
    for m in (model, source):
        parts = [[at_real(x / root_mean_square(x), batch).float() for x in hidden_states(m, batch)[1:]] for batch in few]
        features.append([torch.cat(layer).cpu() for layer in zip(*parts, strict=True)])
    return similarity(*features)


def check_finite(features: Tensor, layer: int) -> None:
    """Raise ValueError where features of the teacher are NaN or infinite."""
    if not bool(features.isfinite().all()):
        raise ValueError(f"teacher features must be finite; layer {layer} gave NaN or infinity: check the model")


def sums_over(
    source: PreTrainedModel,
    model: PreTrainedModel | None,
    batches: Sequence[Batch],
    pairs: list[tuple[int, int]],
    widths: list[tuple[int, int]],
) -> list[Tensor]:
    """Moments, over real positions, of the teacher's features of each pair; with `model`, jointly with the student's."""
    sizes = [(2, t + 1) if model is None else (s + t + 1, s + t + 1) for s, t in widths]
    sums = [torch.zeros(*size, dtype=torch.float64) for size in sizes]
    for batch in batches:
        taught = hidden_states(source, batch)
        learnt = None if model is None else hidden_states(model, batch)
        for mine, (s, t) in zip(sums, pairs, strict=True):
            x = at_real(taught[t], batch).double()
            mine += (moments_of(x) if learnt is None else joint_moments(x, at_real(learnt[s], batch).double())).cpu()
    return sums


@torch.no_grad()
def target_features(teacher: PreTrainedModel, batch: Batch, matches: Sequence[LayerMatch]) -> list[Tensor]:
    """The teacher's features of the mapped layers in the student's space: each (batch, seq, student hidden)."""
    return project_features(hidden_states(teacher, batch), matches)


def project_features(states: Sequence[Tensor], matches: Sequence[LayerMatch]) -> list[Tensor]:
    """Hidden states of the teacher, brought into the student's space where the widths differ."""
    out = []
    for match in matches:
        state = states[match.teacher]
        if match.projection is not None:
            projection = match.projection.to(state)
            state = state @ projection[:-1] + projection[-1]
        out.append(state)
    return out
