"""How a run goes: when each stage is made and what it leaves, and the callback that stops the training for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .prune.budget import Budget
from .prune.discovery import find_sites
from .prune.importance import mean_length
from .prune.optimizer_state import check_optimizer
from .prune.sites import Sites
from .prune.stages import stage_budgets, stage_steps


@dataclass
class Course:
    """How a run goes, and how far it is.

    Attributes:
        steps: The training step before which each stage is made; the first is 0.
        budgets: What each leaves.
        sites: Of the model as it was given.
        done: Stages that were made.
        before: What the last stage left, before it was trained: weights on the CPU.
        held_out: The first loss of that on held-out samples.
        optimizer: The optimizer's state of a stage that was just made and has no checkpoint yet.
    """

    steps: list[int]
    budgets: list[str]
    sites: Sites
    done: int = 0
    before: dict[str, Tensor] | None = None
    held_out: float | None = None
    optimizer: dict | None = None

    @property
    def finished(self) -> bool:
        """Whether the last stage was made."""
        return self.done == len(self.steps)

    @property
    def next(self) -> int | None:
        """The step before which the next stage is due; None after the last one."""
        return None if self.finished else self.steps[self.done]


def course_of(trainer: Trainer) -> Course:
    """The course of a run that has not begun.

    Raises:
        ValueError: The stages do not fit into the training steps.
    """
    args = trainer.args
    if args.schedule == "one_shot":
        return at_once(trainer)
    sites, steps = sites_of(trainer), trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    return Course(stage_steps(args.pruning_stages, steps), stage_budgets(args.budget, args.pruning_stages, sites), sites)


def check_schedule(trainer: Trainer) -> None:
    """Raise unless the schedule goes together with the budget, the steps, the optimizer and the devices.

    Raises:
        ValueError: It does not.
    """
    args = trainer.args
    if args.schedule == "one_shot":
        return
    wanted = 'or schedule="one_shot"'
    if Budget.parse(args.budget).measured:
        raise ValueError(
            f'schedule="gradual" needs a budget that is counted, not measured, so that every stage has its share; got '
            f"{args.budget!r}: take macs=, params=, heads= or ffn=, {wanted}"
        )
    if args.save_only_model:
        raise ValueError(
            f'schedule="gradual" goes on from checkpoints with an optimizer; save_only_model must be False, {wanted}'
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(f'schedule="gradual" cuts the optimizer\'s state, which FSDP and DeepSpeed shard: take DDP, {wanted}')
    weight = torch.nn.Parameter(torch.ones(8, 4, device=args.device))
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    ready = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not {"params", "model"} & set(options)
    if trainer.optimizer is not None or not ready:
        raise ValueError(
            f'schedule="gradual" makes a new optimizer at each stage: choose it by optim=, got one ready made, {wanted}'
        )
    check_optimizer(kind([weight], **options), weight)
    course_of(trainer)


def at_once(trainer: Trainer) -> Course:
    """The course of a run whose one stage is made by itself."""
    return Course([0], [trainer.args.budget], sites_of(trainer))


def sites_of(trainer: Trainer) -> Sites:
    """The sites of the model as it was given, at the mean length of the calibration samples."""
    return find_sites(trainer.model, trainer.calibration[0], mean_length(trainer.calibration))


class StageEnd(TrainerCallback):
    """Ends the training before each stage with a checkpoint, and keeps what is counted apart from stage to stage."""

    def __init__(self, trainer: Trainer):
        """Take the trainer."""
        self.trainer = trainer

    def on_train_begin(self, args: object, state: object, control: object, **rest: object) -> None:
        """Count anew, as the Trainer does; what was best in other shapes is no longer best."""
        self.trainer.lesson.since, self.trainer.lesson.sums = state.global_step, {}
        if self.trainer.course.optimizer is not None:
            forget_best(state)
        self.trainer.course.optimizer = None  # by now it is loaded

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Stop where a stage is due; at the end of an epoch the checkpoint waits for what is judged there."""
        if state.global_step == self.trainer.course.next:
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)

    def on_epoch_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """The Trainer takes each stop for the end of an epoch, and would judge and save again."""
        if state.global_step == self.trainer.course.next:
            control.should_save = ends_epoch(state)
            control.should_evaluate &= ends_epoch(state)
            control.should_log &= ends_epoch(state)

    def on_save(self, args: object, state: object, control: object, **rest: object) -> None:
        """With a best checkpoint of this stage the Trainer would load it, and delete others."""
        if state.global_step == self.trainer.course.next:
            forget_best(state)


def ends_epoch(state: object) -> bool:
    """Whether the last step of an epoch was done."""
    return float(state.epoch).is_integer()


def forget_best(state: object) -> None:
    """Let the state of a Trainer hold no best checkpoint."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
