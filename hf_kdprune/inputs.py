"""Inputs for a model when nobody gave any: made up from its config, or real rows brought to one length."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .layers import FRAMES

Batch = dict[str, Tensor]
AUDIO_RATIO = 320  # samples of a frame, where the config does not say: 20 ms at 16 kHz


def made_up_inputs(model: PreTrainedModel, seq_len: int = 8, rows: int = 1) -> Batch:
    """Random inputs that `model` takes, on its device and floats in its dtype; the same at each call.

    Tokens, images, raw audio and spectrograms are known, of one tower or two, with decoder tokens where there is a
    decoder. The main input comes first.

    Args:
        model: Any transformers model, in PEFT or not.
        seq_len: Tokens of a row, or about as many frames of raw audio. Other inputs have the size that the config
            states, and text beside an image is no longer than its tower takes.
        rows: Rows of each input.

    Raises:
        ValueError: The model reads something else.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's forward takes anything
    config, main = base.config, base.main_input_name
    takes = inspect.signature(base.forward).parameters
    draw = torch.Generator().manual_seed(0)
    made: Batch = {}
    towers = has_two_towers(config, takes)
    for name in ("input_ids", "pixel_values") if towers else (main,):
        if name == "input_ids":
            length = min(seq_len, config.text_config.max_position_embeddings) if towers else seq_len
            made[name] = random_tokens(config, (rows, length), draw)
            if "attention_mask" in takes:
                made["attention_mask"] = torch.ones_like(made[name])
        elif size := float_size(config, name, seq_len):
            made[name] = torch.randn(rows, *size, generator=draw).to(base.dtype)
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = random_tokens(config, (rows, seq_len), draw)
    needed = {main, *(p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)}
    if missing := sorted(needed - made.keys()):
        raise ValueError(
            f"{type(base).__name__} reads {', '.join(map(repr, missing))}, and inputs cannot be made up for that: "
            "give batch=, one real batch of its inputs"
        )
    return {name: value.to(base.device) for name, value in made.items()}


def has_two_towers(config: PreTrainedConfig, takes: Mapping[str, object]) -> bool:
    """Whether a text and an image are read side by side (CLIP); a language model that sees does without the image."""
    return (
        {"input_ids", "pixel_values"} <= takes.keys()
        and hasattr(config, "vision_config")
        and not any(name.startswith("image_token") for name in vars(config))
    )


def random_tokens(config: PreTrainedConfig, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Token ids, (rows, seq), without special ones but for one end-of-sequence id at the end of each row.

    Padding would be masked, and an image token would ask for an image. Some models read their result at the end of
    the sequence, which they find by its id.
    """
    text = config.get_text_config()
    vocab = min(text.vocab_size, getattr(text, "decoder_vocab_size", None) or text.vocab_size)
    fields = {**vars(config), **vars(text)}
    special = {name: ids_of(value) for name, value in fields.items() if name.endswith(("token_id", "token_index"))}
    usable = torch.arange(min(5, vocab - 1), vocab)
    usable = usable[~torch.isin(usable, torch.tensor([i for ids in special.values() for i in ids], dtype=torch.long))]
    ids = usable[torch.randint(len(usable), shape, generator=draw)]
    end = [i for i in special.get("eos_token_id", ()) if i < vocab and i not in special.get("pad_token_id", ())]
    if end:
        ids[:, -1] = end[0]
    return ids


def ids_of(value: object) -> list[int]:
    """The token ids in a field of a config, which holds one, several or none."""
    return [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]


def float_size(config: PreTrainedConfig, name: str, seq_len: int) -> tuple[int, ...] | None:
    """The size of one row of the input `name`; None if that is unknown."""
    seen = getattr(config, "vision_config", config)
    if name == "pixel_values" and hasattr(seen, "image_size"):
        size = seen.image_size
        frames = (seen.num_frames,) if hasattr(seen, "num_frames") else ()  # of a video
        return (*frames, getattr(seen, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    if name == "input_values" and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return config.max_length, config.num_mel_bins  # a spectrogram, not raw audio
    if name == "input_values":
        return ((seq_len + 1) * getattr(config, "inputs_to_logits_ratio", AUDIO_RATIO),)  # the last frame reads past its end
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return config.num_mel_bins, 2 * config.max_source_positions  # of a convolution of stride 2
    return None


def completed(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch with what follows from it for `model`: the decoder's tokens from the labels, which frames of audio are real."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if (
        base.config.is_encoder_decoder
        and shift
        and labels is not None
        and labels.dim() == 2
        and "decoder_input_ids" not in batch
    ):
        batch = {**batch, "decoder_input_ids": shift(labels=labels)}
    if "input_values" in batch and mask is not None and hasattr(base, "_get_feature_vector_attention_mask"):
        frames = int(base._get_feat_extract_output_lengths(torch.tensor(batch["input_values"].shape[1])))
        batch = {**batch, FRAMES: base._get_feature_vector_attention_mask(frames, mask)}
    return batch


def at_length(batch: Batch, seq_len: int) -> Batch:
    """Rows of `batch` brought to exactly `seq_len` real tokens each: cut, or their own tokens said again.

    A batch without tokens comes back as it is, and so do images beside tokens.
    """
    if "input_ids" not in batch:
        return batch
    out: Batch = {}
    for name, value in batch.items():
        if value.dim() > 2 or value.is_floating_point():
            out[name] = value
        elif value.dim() == 2:
            real = batch.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
            if real is None or real.shape != value.shape:
                real = torch.ones_like(value)
            rows = [row[keep] for row, keep in zip(value, real.bool(), strict=True)]
            out[name] = torch.stack([row.repeat(-(-seq_len // len(row)))[:seq_len] for row in rows])
    return out
