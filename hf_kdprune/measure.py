"""What a model costs: parameters, MACs, latency, throughput, peak memory, bytes on disk."""

from __future__ import annotations

import functools
import statistics
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .inputs import at_length
from .layers import evaluating, inputs_of
from .prune.discovery import trace_sites
from .timing import rows_of, time_rounds

Batch = dict[str, Tensor]
BATCH_SIZES = (1, 32)
SECONDS = 3.0  # how long each batch size is timed, for each model
ROUNDS = 15  # and at least this often


@dataclass
class Measurement:
    """The cost of one model on this machine.

    Attributes:
        params: Number of parameters, all of them.
        macs: Multiply-accumulates of one forward pass over one sample of `seq_len` tokens.
        seq_len: Tokens of a sample, for `macs` and for the timings.
        latency_ms: Batch size -> median milliseconds of a forward pass.
        samples_per_second: At the largest batch size.
        peak_memory_bytes: Weights and the most activations alive at once, at the largest batch size.
    """

    params: int
    macs: int
    seq_len: int
    latency_ms: dict[str, float] = field(default_factory=dict)
    samples_per_second: float = 0.0
    peak_memory_bytes: int = 0


def measure(model: PreTrainedModel, batch: Batch, batch_sizes: Sequence[int] = BATCH_SIZES) -> Measurement:
    """Measure one model on inputs shaped like `batch`.

    Args:
        model: The model, on the device on which it is to be measured.
        batch: Inputs, each (batch, seq); `seq` is the length at which everything is measured.
        batch_sizes: For the timings.
    """
    return compare([model], batch, batch_sizes)[0][0]


def compare(
    models: Sequence[PreTrainedModel], batch: Batch, batch_sizes: Sequence[int] = BATCH_SIZES, progress: bool = False
) -> tuple[list[Measurement], dict[str, float]]:
    """Measure models side by side: their timings are interleaved, since a shared machine drifts.

    Returns:
        A Measurement for each model, and batch size -> median over rounds of (last model's time / first model's time).
    """
    inputs = inputs_of(batch)
    seq_len = next(iter(inputs.values())).shape[1]
    results = [Measurement(m.num_parameters(), macs_of(m, inputs, seq_len), seq_len) for m in models]
    modes = [m.training for m in models]
    ratios: dict[str, float] = {}
    for model in models:
        model.eval()
    for size in batch_sizes:
        rows = rows_of(inputs, size)
        rounds = time_rounds(models, rows, SECONDS, ROUNDS, progress)
        for result, times in zip(results, zip(*rounds, strict=True), strict=True):
            result.latency_ms[str(size)] = statistics.median(times)
            result.samples_per_second = size / result.latency_ms[str(size)] * 1000
        ratios[str(size)] = statistics.median(times[-1] / times[0] for times in rounds)
    for model, result, mode in zip(models, results, modes, strict=True):
        result.peak_memory_bytes = peak_memory(model, rows)
        model.train(mode)
    return results, ratios


def macs_of(model: PreTrainedModel, batch: Batch, seq_len: int) -> int:
    """MACs of one forward pass over one sample of `seq_len` tokens.

    They are counted by formula. A quantised model, which has no sites, is run: each quantised layer counts as the linear layer
    that it stands for, and torch counts the rest.
    """
    if not getattr(model, "is_quantized", False):
        return trace_sites(model, batch, seq_len).macs()
    one = at_length({name: value[:1] for name, value in batch.items()}, seq_len)
    others = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counted(model) as linear, others:
        model(**one)
    return sum(linear) + others.get_total_flops() // 2


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Within the context, quantised layers give zeros, and the MACs of each call are put into the list."""
    macs: list[int] = []

    def zeros(module: nn.Module, read: Tensor) -> Tensor:
        macs.append(read.numel() // read.shape[-1] * module.in_features * module.out_features)
        return read.new_zeros(*read.shape[:-1], module.out_features)

    layers = [m for m in model.modules() if hasattr(m, "in_features") and not is_plain(m)]
    before = [vars(module).get("forward") for module in layers]
    for module in layers:
        module.forward = functools.partial(zeros, module)
    try:
        yield macs
    finally:
        for module, forward in zip(layers, before, strict=True):
            del module.forward
            if forward is not None:  # as accelerate's, of a model that is spread over devices
                module.forward = forward


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as numbers, one for each input and output."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point() and weight.numel() == module.in_features * module.out_features


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live while it is on; `peak` is the most at any time."""

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and note the storages that it made."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and id(storage) not in given and storage not in self.known:
                self.known.add(storage)
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, size)
        return out

    def free(self, size: int) -> None:
        """A storage is gone."""
        self.live -= size


@torch.no_grad()
def peak_memory(model: PreTrainedModel, rows: Batch) -> int:
    """Bytes of weights and the most bytes of activations alive at once in one forward pass of `rows`."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        model(**rows)
        return torch.cuda.max_memory_allocated()
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    with LiveBytes() as counter:
        model(**rows)
    return sum(weights.values()) + counter.peak


def disk_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weight files that saving `model` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
