"""How a KDPruneTrainer begins: what judges and what ranks is drawn, and all is checked; with `model_init` more than once."""

from __future__ import annotations

import logging

import torch
from transformers import Trainer, enable_full_determinism, set_seed

from .course import check_schedule
from .distill.first_loss import FirstLoss, check_lesson
from .prune.budget import Budget
from .prune.repair import SiteRepair
from .prune.schedule import check_budget
from .prune.sites import Plan
from .samples import check_labels, split
from .sharding import check_sharding
from .teaching import live

logger = logging.getLogger(__name__)


def begin(trainer: Trainer) -> None:
    """Draw the samples that judge and rank, and check all against model and teacher; of a run before nothing is left.

    Raises:
        ValueError: They do not go together.
    """
    args, trainer.loss_terms, trainer.teacher = trainer.args, trainer.args.objective(), trainer.given_teacher
    trainer.plan: Plan | None = None
    trainer.repairs: list[SiteRepair] = []
    trainer.recovery: dict | None = None
    trainer._metrics: dict[str, dict] = {}
    if Budget.parse(args.budget).counts == "loss" and trainer._judging is None:
        raise ValueError(
            f"a budget of loss= needs samples that judge it, which are set apart when a KDPruneTrainer is made; got "
            f"{args.budget!r} later: make another one with that budget"
        )
    check_sharding(trainer)
    check_precision(trainer)
    trainer._held_out, trainer._held_out_rows = trainer.batches_of(trainer.set_apart), len(trainer.set_apart)
    count = min(args.calibration_samples, len(trainer.train_dataset))
    trainer.calibration = trainer.batches_of(split(trainer.train_dataset, count, args.pruning().seed)[0])
    check_labels(trainer.calibration[0], args)
    check_budget(trainer.model, trainer.calibration, args.pruning())
    head = check_lesson(trainer.model, trainer.teacher, trainer.calibration[0], trainer.loss_terms, args.layer_map)
    trainer.lesson = FirstLoss(head, trainer._task, trainer.compute_loss_func is not None, live(trainer))
    check_schedule(trainer)


def check_precision(trainer: Trainer) -> None:
    """Say so where float16 is asked for and will not be had.

    Raises:
        ValueError: Its gradients cannot be scaled.
    """
    args, kinds = trainer.args, {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    if args.fp16 and torch.float16 in kinds:
        raise ValueError(
            "fp16=True computes in float16 and needs weights in float32, got some in float16: load the model with "
            "dtype=torch.float32, or train it in bfloat16 (bf16=True)"
        )
    if args.fp16 and args.device.type == "cpu":
        logger.warning(
            "fp16=True needs a GPU; on this CPU accelerate trains in float32: set bf16=True for mixed precision here, or leave "
            "fp16 out"
        )


def anew(trainer: Trainer, trial: object) -> None:
    """Begin with another student, from `model_init`, unless the present one was never trained and no trial has its own.

    Args:
        trainer: A KDPruneTrainer that was made with `model_init`.
        trial: Of a hyperparameter search, whose settings are taken; None: a training by itself.
    """
    used, trainer.used = trainer.used, True
    if trial is None and not used:
        return
    trainer._hp_search_setup(trial)
    (enable_full_determinism if trainer.args.full_determinism else set_seed)(trainer.args.seed)
    trainer.model = trainer.model_wrapped = Trainer.call_model_init(trainer, trial)
    trainer.optimizer = trainer.lr_scheduler = None
    if trainer.place_model_on_device:
        trainer._move_model_to_device(trainer.model, trainer.args.device)
    begin(trainer)
