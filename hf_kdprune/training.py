"""The run of a KDPruneTrainer: prune and train, in one stage or several, and keep the better of before and after.

Between two stages lies a training checkpoint. What follows it goes on from its files, whether the run was interrupted there or
not: that is why a resumed run gives the model of one that never stopped.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .distill import trained_only
from .distill.teacher import frozen_copy
from .layers import match_layers
from .metrics import judge_of, measured_on
from .prune.budget import Budget
from .prune.discovery import find_sites
from .prune.importance import mean_length
from .prune.optimizer_state import check_optimizer, cut_along, cuts_of, shapes_of
from .prune.schedule import Pruning, one_shot, realise, report_losses
from .prune.sites import Plan, Sites
from .prune.stages import Left, from_here, plan_further, stage_budgets, stage_steps
from .teaching import cached, live

Train = Callable[[str | None], object]


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
        """What was best in other shapes is no longer best."""
        self.trainer.lesson.since = state.global_step
        if self.trainer.course.optimizer is not None:
            forget_best(state)
        self.trainer.course.optimizer = None  # by now it is loaded

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Stop where a stage is due."""
        if state.global_step == self.trainer.course.next:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """The Trainer takes the end of a stage for that of an epoch, and would judge, save and tidy up again."""
        if state.global_step == self.trainer.course.next:
            control.should_save = control.should_evaluate = control.should_log = False
            forget_best(state)


def forget_best(state: object) -> None:
    """Let the state of a Trainer hold no best checkpoint."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None


def train_in_stages(trainer: Trainer, train: Train, checkpoint: str | None) -> object:
    """Make the stages that are due, train between them and after the last; returns what the last training returned.

    Args:
        trainer: A KDPruneTrainer that has pruned once, or is to begin, or was restored from `checkpoint`.
        train: Trains from a checkpoint, or from the start.
        checkpoint: What to go on from.
    """
    course, loaded = trainer.course, checkpoint is None
    if trainer.plan is None:
        advance(trainer)
    trainer.lesson.teach = cached(trainer) if trainer.args.teacher_cache else live(trainer)
    trained_only.attach(trainer.model, trainer.teacher, trainer.calibration, trainer.lesson, trainer.objective)
    while True:
        if checkpoint is not None and course.next == step_of(checkpoint):
            if not loaded:
                trainer._load_from_checkpoint(checkpoint)
            advance(trainer, checkpoint)
        judge_before(trainer)
        output = train(checkpoint)
        if course.finished:
            return output
        if trainer.state.global_step < course.next:  # somebody stopped it: what is left of the budget goes now
            course.done = len(course.steps) - 1
            advance(trainer)
            judge_before(trainer)
            return output
        checkpoint, loaded = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}", True


def step_of(checkpoint: str) -> int:
    """The training step at which a checkpoint was written."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]


def judge_before(trainer: Trainer) -> None:
    """Remember what the last stage left, and measure it, once."""
    course = trainer.course
    if course.finished and course.before is None:
        trainer._metrics["pruned"] = measured_on(trainer, trainer.model, "pruned", trainer.eval_dataset)
        course.held_out = trainer.held_out_loss()
        course.before = {
            name: tensor.to("cpu", copy=True)
            for name, tensor in trainer.model.state_dict().items()
            if not name.startswith(trained_only.PREFIXES)
        }


def advance(trainer: Trainer, checkpoint: str | None = None) -> None:
    """Make the next stage: rank what is left, plan, cut, refit.

    Args:
        trainer: Its model is smaller afterwards.
        checkpoint: That of the training before it, whose optimizer is cut along; None: nothing is trained from there.
    """
    course, data = trainer.course, trainer.calibration
    pruning = replace(trainer.args.pruning(), budget=course.budgets[course.done])
    if trainer.plan is None:
        cut(trainer, first_plan(trainer, pruning))
        return
    model = trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    left = Left(course.sites, trainer.plan)
    plan = plan_further(model, trainer.teacher, data, trainer.matches, pruning, left)
    sites = find_sites(model, data[0])
    here = from_here(plan, left.plan, sites)
    cuts, before = cuts_of(model, sites, here), shapes_of(new_optimizer(trainer), model)
    cut(trainer, here)
    model.kdprune_plan = trainer.plan = plan
    fresh = new_optimizer(trainer)
    if checkpoint is not None:
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        course.optimizer = cut_along(state, before, model, fresh, cuts)


def new_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer that the Trainer makes for the model as it is; it makes another one when it trains."""
    trainer.optimizer = trainer.lr_scheduler = None
    made, trainer.optimizer = trainer.create_optimizer(), None
    return made


def first_plan(trainer: Trainer, pruning: Pruning) -> Plan:
    """Rank the model as it was given, and plan; nothing is changed."""
    data = trainer.calibration
    trainer.matches = match_layers(trainer.model, trainer.teacher, data, trainer.args.layer_map)
    judge = judge_of(trainer, trainer._judging)
    plan = one_shot(trainer.model, trainer.teacher, data, trainer.matches, pruning, judge)
    measured = Budget.parse(pruning.budget).measured
    return broadcast_object_list([plan])[0] if measured else plan  # ranks may measure other figures


def cut(trainer: Trainer, plan: Plan) -> None:
    """Surgery and repair, on all ranks alike.

    Raises:
        RuntimeError: The smaller model would not equal the gated one, or two ranks made different plans.
    """
    digests = gather_object([hashlib.sha256(json.dumps(plan.kept).encode()).hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError("the ranks made different plans: give them the same data, device and seed")
    model, data = trainer.model, trainer.calibration
    original = frozen_copy(model)
    trainer.repairs = realise(model, original, data, plan, trainer.args.pruning())
    report_losses(trainer.repairs, original, trainer.teacher, data, plan, trainer.matches)
    trainer.teacher, trainer.plan, trainer.lesson.matches = trainer.teacher or original, plan, trainer.matches
    trainer.course.done += 1


@contextmanager
def with_optimizer(course: Course, checkpoint: str) -> Iterator[str]:
    """The checkpoint, or beside it for a while one in which the optimizer's state fits what a stage left of the model."""
    if course.optimizer is None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="kdprune-") as folder:
        torch.save(course.optimizer, Path(folder, OPTIMIZER_NAME))
        Path(folder, SCHEDULER_NAME).write_bytes(Path(checkpoint, SCHEDULER_NAME).read_bytes())
        yield folder


def keep_the_better(trainer: Trainer) -> None:
    """Judge what the training made of the last stage, and take it back if it is no better."""
    course, after = trainer.course, trainer.held_out_loss()
    better = after < course.held_out
    trainer.recovery = {
        "held_out_before": course.held_out,
        "held_out_after": after,
        "kept": "after" if better else "before",
    }
    if not better:
        trainer.model.load_state_dict(course.before)
    course.before = None
    trainer._metrics.pop("compact", None)
