"""The first loss on a batch: the student's output, the teacher's, and the terms that they make.

Terms are sums over items, over the number of items in the whole optimizer step, so that batch 8, 4 x 2 micro-batches and 2
ranks give the same gradients. The stock Trainer averages the means of micro-batches, which is not the mean of the batch where
rows are ragged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..inputs import completed
from ..layer_map import layer_pairs
from ..layers import LayerMatch, evaluating, inputs_of, known, positions_of, stacks_of, states_of
from . import auxiliary, projection
from .head import ONE, Head, check_head, counts_of, head_of, span_loss, total_of
from .objective import Counts, Objective
from .rows import ROW
from .teacher import ask

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]
Task = Callable[[nn.Module, Batch, Counts], tuple[Tensor, object]]  # the loss of a batch, and the model's output
Teacher = Callable[[Batch, Tensor | None, bool], object]


@dataclass
class FirstLoss:
    """What teaches the student, and what of it is yet to be logged.

    Attributes:
        head: What the student has as a head.
        task: The model's own loss, a mean over its batch, or the user's.
        scaled: Whether `task` divides by the count that it is given (a user's compute_loss_func).
        teach: Batch, rows of the training set, whether features are wanted -> the teacher's output.
        matches: The mapped layers.
        sums: Term -> its sum over the micro-batches since the last log.
        since: Optimizer steps that were done at the last log.
        evaluated: Samples and terms of each batch of an evaluation that asks for them; None: it does not.
    """

    head: Head
    task: Task
    scaled: bool = False
    teach: Teacher | None = None
    matches: Sequence[LayerMatch] = ()
    sums: dict[str, Tensor] = field(default_factory=dict)
    since: int = 0
    evaluated: list[tuple[int, dict[str, float]]] | None = None

    def count(self, model: PreTrainedModel, batches: Sequence[Batch], accelerator: Accelerator | None = None) -> Counts:
        """Items of these batches by unit; with an accelerator, those of all ranks."""
        mine = total_of([counts_of(self.head, completed(model, batch)) for batch in batches])
        if accelerator is None or accelerator.num_processes == 1:
            return mine
        whole = accelerator.reduce(torch.tensor(list(mine.values()), device=accelerator.device), "sum").tolist()
        return dict(zip(mine, whole, strict=True)) | {ONE: 1}

    def terms(
        self, model: nn.Module, plain: PreTrainedModel, batch: Batch, objective: Objective, counts: Counts
    ) -> tuple[dict[str, Tensor], object]:
        """This batch's part of each term that has a weight, and the student's output.

        Args:
            model: The student, as it is wrapped for training.
            plain: The student itself.
            batch: The inputs and labels.
            objective: Which terms.
            counts: Items of the whole step, see `count`.

        Raises:
            FloatingPointError: A term is NaN or infinite; it says what is, in which model and layer.
        """
        batch = completed(plain, batch)
        rows, batch = batch.get(ROW), {k: v for k, v in batch.items() if k != ROW}
        asked = {**known(batch), "output_hidden_states": objective.needs_features}
        terms, taught = {}, None
        if objective.uses("task"):
            terms["task"], output = self.task_term(model, asked, batch, counts)
        else:
            output = model(**inputs_of(asked))
        if objective.needs_teacher:
            taught = self.teach(batch, rows, objective.uses("features"))
        if objective.uses("logits"):
            terms["logits"] = objective.logits_term(self.head, output, taught, batch, counts)
        if objective.uses("features"):
            mapped = self.mapped(output, plain)
            terms["features"] = objective.features_term(output, taught, self.matches, batch, counts, mapped)
        if objective.uses("auxiliary"):
            total = auxiliary.auxiliary_loss(self.head, output[auxiliary.NAME], batch)
            terms["auxiliary"] = total / max(counts["task"], 1)
        if not bool(torch.stack([t.detach() for t in terms.values()]).isfinite().all()):
            raise FloatingPointError(what_broke(terms, output, taught))
        return terms, output

    def mapped(self, output: dict, plain: PreTrainedModel) -> dict[int, tuple[Tensor, float]]:
        """By number of the mapped layer, the student's features in the teacher's space, and the teacher's variance there."""
        states = output.get(projection.NAME) or {}  # not there in evaluation, where the maps of the matches serve
        return {i: (state, getattr(plain, projection.NAME).variances[i]) for i, state in states.items()}

    def task_term(self, model: nn.Module, asked: Batch, batch: Batch, counts: Counts) -> tuple[Tensor, object]:
        """The model's own loss, or the user's, by item."""
        if self.head.kind == "span" and not self.scaled:  # start and end may count differently, so the mean of both will not do
            output = model(**inputs_of(asked))
            return span_loss(output, batch, counts), output
        loss, output = self.task(model, asked, counts)
        if self.scaled or self.head.summed:
            return loss, output
        mine = counts_of(self.head, batch)["task"]
        if not mine:  # the mean over nothing is NaN
            return output.logits.sum() * 0, output
        return loss * (mine / counts["task"]), output

    def log(self, terms: dict[str, Tensor]) -> None:
        """Remember the terms of a micro-batch."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def logged(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each term over the optimizer steps since the last call: loss_task, loss_logits, and so on."""
        steps, self.since, sums, self.sums = max(step - self.since, 1), step, self.sums, {}
        return {f"loss_{name}": float(accelerator.reduce(value, "sum")) / steps for name, value in sums.items()}

    @torch.no_grad()
    def whole(self, model: PreTrainedModel, batches: Sequence[Batch], objective: Objective) -> float:
        """`objective` on all of these batches, without a gradient; NaN, with a warning, where it is not finite."""
        counts = self.count(model, batches)
        try:
            return sum(float(objective.total(self.terms(model, model, batch, objective, counts)[0])) for batch in batches)
        except FloatingPointError as error:
            logger.warning(f"the model cannot be judged, so it is no better than another: {error}")
            return math.nan

    @torch.no_grad()
    def evaluate(self, model: nn.Module, plain: PreTrainedModel, batch: Batch, objective: Objective) -> None:
        """Remember the terms of a batch of an evaluation."""
        terms, _ = self.terms(model, plain, batch, objective, self.count(plain, [batch]))
        self.evaluated.append((len(next(iter(batch.values()))), {name: float(value) for name, value in terms.items()}))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean over the samples of all ranks of each term of an evaluation; {} where it was not asked for."""
        found, self.evaluated = self.evaluated or [], None
        if not found:
            return {}
        sums = torch.tensor([[n, *(n * value for value in terms.values())] for n, terms in found]).sum(0)
        total, *parts = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return {name: part / total for name, part in zip(found[0][1], parts, strict=True)}


def check_lesson(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, objective: Objective, layer_map: str | list
) -> Head:
    """What the student has as a head, from a pass of one sample through both models.

    Raises:
        ValueError: Head, layers and settings do not go together.
    """
    one = {k: v[:1] for k, v in batch.items()}
    with evaluating(model), torch.no_grad():
        output = model(**inputs_of(one), output_hidden_states=True)
        taught = output if teacher is None else ask(teacher, one, features=True)
    layer_pairs(layer_map, *(len(states_of(found)) - 1 for found in (output, taught)))
    head = head_of(model, output, batch.get("labels"))
    if objective.uses("logits"):
        check_head(head, model)
    if objective.uses("auxiliary"):
        auxiliary.check_auxiliary(head, model)
    return head


def blocks(output: object, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The features of each block, embeddings left out, and their real positions."""
    found = [(stack, state) for stack, states in stacks_of(output).items() for state in states[1:]]
    return [state for _, state in found], [positions_of(batch, state, stack) for stack, state in found]


def what_broke(terms: dict[str, Tensor], output: object, taught: object) -> str:
    """Which numbers are NaN or infinite: the first layer of each model, or its logits, or else only the term."""
    broken = []
    for who, given in (("student", output), ("teacher", taught)):
        named = [(f"features of layer {i}", s) for i, s in enumerate(s for states in stacks_of(given).values() for s in states)]
        named += [(name, getattr(given, name, None)) for name in ("logits", "start_logits", "end_logits")]
        wrong = [name for name, x in named if isinstance(x, Tensor) and not bool(x.isfinite().all())]
        broken += [f"the {who}'s {name}" for name in wrong[:1]]
    losses = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
    return (
        f"the first loss must be finite, got {losses}; NaN or infinite: {' and '.join(broken) or 'none of the outputs'}. The "
        "last checkpoint is whole: lower the learning rate, train in bf16 or float32, or look at the batch, and resume from it"
    )
