"""Forward passes of many batches side by side, each halted where its output projections write, until it is told to go on.

So every site is seen by all batches before any batch goes past it, at the price of one pass of each: what a refit needs that
goes from the bottom of a model to its top. Each pass is a greenlet; all run in the caller's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..layers import inputs_of
from .sites import Part

Batch = dict[str, Tensor]


@dataclass
class Stop:
    """Where a pass halts: one output projection has written, or several whose outputs meet, and none has been read.

    Attributes:
        parts: Whose projections those are; several where attention and FFN run side by side.
        reads: What each projection reads, (batch, seq, width).
        wrote: What each writes, (batch, seq, hidden).
        stream: The residual stream behind them, (batch, seq, hidden), or with batch and seq joined; what they wrote where
            no norm reads the sum.
    """

    parts: tuple[Part, ...]
    reads: list[Tensor]
    wrote: list[Tensor]
    stream: Tensor

    def rewrite(self, wrote: list[Tensor]) -> None:
        """Go on as if the projections had written this: the stream changes in place, for all who hold it."""
        self.stream += sum(new - old for new, old in zip(wrote, self.wrote, strict=True)).view(self.stream.shape)


class Pass:
    """One forward pass of one batch."""

    def __init__(self, model: nn.Module, batch: Batch):
        """Nothing runs before the first `go`."""
        self.pending: dict[Part, tuple[Tensor, Tensor]] = {}
        self.greenlet = greenlet(lambda: (model(**inputs_of(batch)), None)[1])
        self.greenlet.halted = self

    def go(self) -> Stop | None:
        """Run on to the next stop; None at the end."""
        return self.greenlet.switch()

    def end(self) -> None:
        """Leave the pass where it is."""
        self.greenlet.throw(GreenletExit)

    def wrote(self, part: Part, read: Tensor, wrote: Tensor) -> None:
        """Halt behind an output projection, or note it where a norm reads the sum."""
        self.pending[part] = (read, wrote if part.after is None else wrote.clone())  # Falcon adds to it in place
        if part.after is None:
            self.halt([part], wrote)

    def summed(self, after: str, stream: Tensor) -> None:
        """Halt before a norm that reads what projections wrote."""
        if due := [part for part in self.pending if part.after == after]:
            self.halt(due, stream)

    def halt(self, parts: list[Part], stream: Tensor) -> None:
        """Hand the stop to who called `go`."""
        seen = [self.pending.pop(part) for part in parts]
        self.greenlet.parent.switch(Stop(tuple(parts), *map(list, zip(*seen, strict=True)), stream))


@contextmanager
def passes(model: nn.Module, batches: Sequence[Batch], parts: Sequence[Part]) -> Iterator[list[Pass]]:
    """One pass a batch, at its start; the model is as it was afterwards, wherever the passes stand."""

    with ExitStack() as stack:
        for part in parts:
            hook = model.get_submodule(part.consumer).register_forward_hook(
                lambda module, args, output, part=part: getcurrent().halted.wrote(part, args[0], output)
            )
            stack.callback(hook.remove)
        for after in {part.after for part in parts if part.after is not None}:
            hook = model.get_submodule(after).register_forward_pre_hook(
                lambda module, args, after=after: getcurrent().halted.summed(after, args[0])
            )
            stack.callback(hook.remove)
        running = [Pass(model, batch) for batch in batches]
        for each in running:
            stack.callback(each.end)
        yield running
