"""What a training checkpoint knows beside what transformers writes, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from . import adapters
from .distill import trained_only
from .distill.teacher import frozen_copy
from .prune.discovery import find_sites
from .prune.fingerprint import fingerprint
from .prune.repair import SiteRepair
from .prune.sites import Plan
from .prune.surgery import apply_plan, changes
from .publish.checkpoint import save_pretrained
from .publish.whole import BEFORE, PLAN, STATE, last_whole, sweep, why_broken
from .teaching import match

logger = logging.getLogger(__name__)
STATE_VERSION = 1
# What made the plan so far, and what will make the rest of it.
ALWAYS = ("budget", "schedule", "seed", "data_seed")
WHILE_PRUNING = ("importance", "repair", "shapes", "round_to", "keep", "least", "calibration_samples", "pruning_rounds")


def write_checkpoint(trainer: Trainer, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """Write the model, without the card and the check that a final save has, and what else resuming needs of this package.

    Args:
        trainer: A KDPruneTrainer.
        folder: Of the checkpoint.
        state_dict: The weights, where the model is sharded; None: they are the model's.
    """
    model = trainer.model if trainer.bare is None else trainer.bare
    save_pretrained(model, folder, trainer.processing_class, verify=False, state_dict=state_dict)
    trained_only.save(model.state_dict() if state_dict is None else state_dict, folder)
    adapters.save(model, folder)
    save_state(trainer, folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Write what of a run is in no other file of its checkpoint: how far it is, and what recovery will be compared with."""
    course, args = trainer.course, trainer.args
    state = {
        "version": STATE_VERSION,
        "step": trainer.state.global_step,
        "steps": course.steps,
        "done": course.done,
        "held_out": course.held_out,
        "ranks": args.world_size,
        "samples_per_step": samples_per_step(trainer),
        "train_samples": len(trainer.train_dataset),
        "settings": {name: getattr(args, name) for name in (*ALWAYS, *WHILE_PRUNING)},
        "repairs": [asdict(record) for record in trainer.repairs],
        "pruned": trainer._metrics.get("pruned", {}),
    }
    (folder / STATE).write_text(json.dumps(state) + "\n")
    if course.before is not None and not args.save_only_model:
        save_file({name: tensor.contiguous().clone() for name, tensor in course.before.items()}, folder / BEFORE)


@contextmanager
def whole_or_gone(folder: Path, mine: bool) -> Iterator[None]:
    """What lies in the way of a checkpoint goes before it is written, and what was interrupted half-way goes after.

    Args:
        folder: Of the checkpoint.
        mine: Whether this process writes it.
    """
    if mine:
        if not folder.parent.is_dir():
            logger.warning("%s is gone, and made anew: earlier checkpoints are lost", folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        if mine and not (folder / TRAINER_STATE_NAME).is_file():  # it is written last
            shutil.rmtree(folder, ignore_errors=True)
        raise


def samples_per_step(trainer: Trainer) -> int:
    """Samples of one optimizer step on all ranks."""
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def checkpoint_of(trainer: Trainer, asked: str | bool | None) -> str | None:
    """The checkpoint to go on from; None to start anew.

    Args:
        trainer: Whose output directory is looked at.
        asked: A folder, or True for the last whole one.

    Raises:
        ValueError: There is none, or that one is not whole.
    """
    if trainer.args.should_save:
        sweep(trainer.args.output_dir)
    if asked is True:
        return last_whole(trainer.args.output_dir)
    if asked and (why := why_broken(asked)):
        raise ValueError(f"resuming needs a whole training checkpoint; of {asked}, {why}: name another, or say True")
    return asked or None


def restore(trainer: Trainer, checkpoint: str) -> None:
    """Bring the student into the shapes of a checkpoint, and the run to where it was; weights and optimizer load later.

    Args:
        trainer: A KDPruneTrainer whose model is the student as it was given, or is pruned by the same plan.
        checkpoint: A whole training checkpoint.

    Raises:
        ValueError: It is of another run than this one; the message says in what.
    """
    folder, course = Path(checkpoint), trainer.course
    state = read_state(folder)
    check_state(trainer, state, folder)
    plan = Plan.load(folder / PLAN)
    if trainer.plan is None:
        replay(trainer, plan, folder)
    elif trainer.plan.kept != plan.kept:
        raise ValueError(
            f"the student must be as it was given, or pruned by the plan of the checkpoint; it was pruned by another plan than "
            f"{folder / 'plan.json'}: load it again, and let train() prune it"
        )
    trainer.repairs = [SiteRepair(**record) for record in state["repairs"]]
    trainer._metrics["pruned"] = state["pruned"]
    course.done, course.held_out = state["done"], state["held_out"]
    if course.finished:
        course.before = load_file(folder / BEFORE)


def replay(trainer: Trainer, plan: Plan, folder: Path) -> None:
    """Surgery by the plan of a checkpoint, on the student as it was given."""
    model, data = trainer.model, trainer.calibration
    sites = find_sites(model, data[0])
    if plan.weights and plan.weights != (mine := fingerprint(model, sites)):
        raise ValueError(
            f"a training resumes from the student with which it began; {folder} began with the weights {plan.weights[:12]}..., "
            f"and the model has {mine[:12]}...: give KDPruneTrainer the model that the interrupted run was given"
        )
    original = frozen_copy(model, *changes(model, sites))
    match(trainer)
    apply_plan(model, plan, data[0])
    trainer.teacher, trainer.plan = trainer.teacher or original, plan


def read_state(folder: Path) -> dict:
    """The state that `save_state` wrote.

    Raises:
        ValueError: There is none, or it is of a newer version.
    """
    if not (folder / STATE).is_file():
        raise ValueError(
            f"{folder} has no {STATE}, which every training checkpoint of this package has: give one that KDPruneTrainer wrote "
            "while it trained, not a saved model"
        )
    state = json.loads((folder / STATE).read_text())
    if state["version"] > STATE_VERSION:
        raise ValueError(
            f"{folder / STATE} has version {state['version']}; this hf_kdprune reads up to {STATE_VERSION}: upgrade it, or "
            "start anew in another output_dir"
        )
    return state


def check_state(trainer: Trainer, state: dict, folder: Path) -> None:
    """Raise unless this run is the one of the checkpoint; warn where it will end as well, but not the same to the bit.

    Raises:
        ValueError: Budget, schedule, seeds, data or samples of a step differ.
    """
    args, course = trainer.args, trainer.course
    mine = {"train_samples": len(trainer.train_dataset), "samples_per_step": samples_per_step(trainer), "steps": course.steps}
    theirs = {name: state[name] for name in mine}
    for name in ALWAYS + (() if state["done"] == len(state["steps"]) else WHILE_PRUNING):
        mine[name], theirs[name] = getattr(args, name), state["settings"][name]
    if apart := [name for name in mine if mine[name] != theirs[name]]:
        said = "; ".join(f"{MEANING.get(name, name)} was {theirs[name]}, and now is {mine[name]}" for name in apart)
        raise ValueError(
            f"a training resumes with what its plan and its order of samples depend on; of {folder}, {said}: set it as it was, "
            "or start anew in another output_dir"
        )
    if state["ranks"] != args.world_size:
        logger.warning(
            f"{folder} was written by {state['ranks']} processes, and now there are {args.world_size}: each step has the same "
            "samples as before, and dropout falls otherwise, so the model will be as good and not the same to the bit"
        )


MEANING = {
    "train_samples": "the number of training samples",
    "samples_per_step": "per_device_train_batch_size x gradient_accumulation_steps x processes",
    "steps": "the step before which each stage is made",
}
