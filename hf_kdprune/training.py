"""The run of a KDPruneTrainer: prune and train, in one stage or several, and keep the better of before and after.

Between two stages lies a training checkpoint. What follows it goes on from its files, whether the run was interrupted there or
not: that is why a resumed run gives the model of one that never stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy

from .course import Course
from .distill import trained_only
from .distill.teacher import frozen_copy, separate
from .interrupts import until_sigterm
from .layers import LayerMatch, match_layers
from .metrics import judge_of, measured_on
from .prune.budget import Budget
from .prune.discovery import find_sites
from .prune.optimizer_state import cut_along, cuts_of, shapes_of
from .prune.schedule import Pruning, realise, report_losses
from .prune.sites import Plan
from .prune.stages import Left, from_here, plan_further, plan_in_rounds
from .prune.surgery import changes
from .ranks import Ranks
from .sharding import unprepare, whole_afterwards
from .teaching import cached, live, match

Train = Callable[[str | None], object]


def train_in_stages(trainer: Trainer, train: Train, checkpoint: str | None) -> object:
    """Make the stages that are due, train between them and after the last; returns what the last training returned.

    Args:
        trainer: A KDPruneTrainer that has pruned once, or is to begin, or was restored from `checkpoint`.
        train: Trains from a checkpoint, or from the start.
        checkpoint: What to go on from.
    """
    if trainer.plan is None:
        advance(trainer)
    trainer.lesson.teach = cached(trainer) if trainer.args.teacher_cache else live(trainer)
    with whole_afterwards(trainer):
        trained_only.attach(trainer.model, trainer.teacher, trainer.calibration, trainer.lesson, trainer.loss_terms)
        try:
            return train_on(trainer, train, checkpoint)
        finally:
            trained_only.detach(trainer.model)


def train_on(trainer: Trainer, train: Train, checkpoint: str | None) -> object:
    """The same, from the first stage on."""
    course, loaded = trainer.course, checkpoint is None
    while True:
        if checkpoint is not None and course.next == step_of(checkpoint):
            if not loaded:
                trainer._load_from_checkpoint(checkpoint)
            advance(trainer, checkpoint)
        judge_before(trainer)
        separate(trainer.teacher, trainer.model)
        with until_sigterm(trainer):
            output = train(checkpoint)
        unprepare(trainer)
        if course.finished:
            return output
        if trainer.state.global_step < course.next:  # somebody stopped it: what is left of the budget goes now
            course.done = len(course.steps) - 1
            advance(trainer)
            judge_before(trainer)
            return output
        checkpoint, loaded = f"{run_dir(trainer)}/checkpoint-{trainer.state.global_step}", True


def run_dir(trainer: Trainer) -> str:
    """Where the checkpoints of this training are: each trial of a hyperparameter search has a folder of its own."""
    return trainer._get_output_dir(trainer._trial)


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
    pruning = replace(trainer.args.pruning(), budget=course.budgets[course.done], ranks=Ranks.of(trainer.accelerator))
    if trainer.plan is None:
        cut(trainer, first_plan(trainer, pruning))
        return
    model = trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    left = Left(course.sites, trainer.plan)
    itself = match_layers(model, None, data, [[m.student, m.student] for m in trainer.lesson.matches], pruning.ranks)
    plan = plan_further(model, data, itself, pruning, left)
    sites = find_sites(model, data[0])
    here = from_here(plan, left.plan, sites)
    cuts, before = cuts_of(model, sites, here), shapes_of(new_optimizer(trainer), model)
    cut(trainer, here, itself)
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
    match(trainer)
    pruning, judge = replace(pruning, ranks=Ranks.of(trainer.accelerator)), judge_of(trainer, trainer._judging)
    plan = plan_in_rounds(trainer.model, trainer.teacher, trainer.calibration, trainer.lesson.matches, pruning, judge)
    measured = Budget.parse(pruning.budget).measured
    return broadcast_object_list([plan])[0] if measured else plan  # ranks may measure other figures


def cut(trainer: Trainer, plan: Plan, itself: list[LayerMatch] | None = None) -> None:
    """Surgery and repair, on all ranks alike.

    Args:
        trainer: Its model is smaller afterwards.
        plan: What stays of it.
        itself: Of a later stage, the layers by which the student was ranked against itself.

    Raises:
        RuntimeError: The smaller model would not equal the gated one, or two ranks made different plans.
    """
    digests = gather_object([hashlib.sha256(json.dumps(plan.kept).encode()).hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError("the ranks made different plans: give them the same data, device and seed")
    model, data = trainer.model, trainer.calibration
    original = frozen_copy(model, *changes(model, trainer.course.sites))
    trainer.repairs = realise(model, original, data, plan, trainer.args.pruning())
    against = (trainer.teacher, data, plan, trainer.lesson.matches) if itself is None else (None, data, plan, itself)
    report_losses(trainer.repairs, original, *against)
    trainer.teacher, trainer.plan = trainer.teacher or original, plan
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
    if trainer.args.save_strategy == SaveStrategy.NO and trainer.args.should_save:
        for step in course.steps[1:]:  # only the stages needed them
            shutil.rmtree(Path(run_dir(trainer), f"checkpoint-{step}"), ignore_errors=True)
