"""How long a forward pass takes: models side by side, round by round, since a shared machine drifts."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
WARM = 3  # rounds that are not counted


def rows_of(batch: Batch, size: int) -> Batch:
    """`size` rows of `batch`, its own said again where it has fewer."""
    return {k: v[torch.arange(size, device=v.device) % len(v)] for k, v in batch.items()}


@torch.inference_mode()
def time_rounds(
    models: Sequence[PreTrainedModel], rows: Batch, seconds: float, least: int, progress: bool = False
) -> list[tuple[float, ...]]:
    """Milliseconds of one forward pass of each model in turn, round after round; the first three rounds warm up.

    Args:
        models: In eval mode.
        rows: Inputs.
        seconds: How long, for each model.
        least: Rounds that are counted at least.
        progress: Whether a bar shows how far it is.
    """
    rounds: list[tuple[float, ...]] = []
    size = len(next(iter(rows.values())))
    bar = tqdm(total=seconds * len(models), desc=f"timing, batch {size}", unit="s", disable=not progress)
    spent, warm = 0.0, 0
    while spent < seconds * len(models) or len(rounds) < least:
        times = tuple(time_once(model, rows) for model in models)
        warm += 1
        if warm > WARM:
            rounds.append(times)
        spent += sum(times) / 1000
        bar.update(round(min(spent, bar.total), 1) - bar.n)
    bar.close()
    return rounds


def time_once(model: PreTrainedModel, rows: Batch) -> float:
    """Milliseconds of one forward pass."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**rows)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def device_name(device: torch.device) -> str:
    """The name of what computes: the GPU's, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The name of the processor, as Linux states it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
