"""Which calibration batches each process runs, and sums over the processes, so that many rank as one would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")


def unchanged(tensor: Tensor) -> Tensor:
    """What the sum over one process is."""
    return tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that share the calibration batches. Each holds all of them and runs every `count`-th.

    Attributes:
        index: Which process this is, from 0.
        count: How many there are.
        total: Sums a tensor over all of them; all must call it, in the same order and with the same shapes.
    """

    index: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = unchanged

    @classmethod
    def alone(cls) -> Ranks:
        """One process, which runs everything."""
        return cls()

    @classmethod
    def of(cls, accelerator: Accelerator) -> Ranks:
        """The processes of an accelerator."""
        if accelerator.num_processes == 1:
            return cls()

        def total(tensor: Tensor) -> Tensor:
            return accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)  # NCCL sums on its device only

        return cls(accelerator.process_index, accelerator.num_processes, total)

    def share(self, batches: Sequence[T]) -> list[tuple[int, T]]:
        """What this process runs, each with its number among all; nothing where there are fewer batches than processes."""
        return list(enumerate(batches))[self.index :: self.count]


def draw_for(seed: int, number: int) -> torch.Generator:
    """Random numbers for one batch: the same whichever process runs it, and whatever it ran before."""
    (mixed,) = np.random.SeedSequence((seed, number)).generate_state(1)  # torch wants seeds whose bits are mixed
    return torch.Generator().manual_seed(int(mixed))
