"""KDPruneTrainer: the HF Trainer with the three wings wired in. Rank, plan, surgery, repair, recovery, save."""

from __future__ import annotations

import functools
from pathlib import Path

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from . import adapters, training
from .beginning import anew, begin
from .config import KDPruneConfig
from .course import StageEnd, at_once, course_of
from .distill import trained_only
from .distill.rows import ROW, CollateWithRows
from .distill.teacher import check_teacher, placed, with_labels_of
from .inputs import completed
from .interrupts import advice
from .metrics import check_metric, report_of
from .prune.discovery import find_sites
from .prune.schedule import restate
from .prune.sites import Plan
from .publish import hub
from .publish.checkpoint import check_writable, save_pretrained
from .resume import checkpoint_of, restore, whole_or_gone, write_checkpoint
from .samples import by_length, divided, seeded
from .sharding import as_it_is
from .teaching import match

Batch = dict[str, Tensor]


class KDPruneTrainer(Trainer):
    """Makes a fine-tuned model smaller and faster without making it worse.

    Attributes:
        teacher: What the student learns from; without one given, the student as it was before the first change.
        plan: What was kept; None before `prune` or `train`.
        repairs: What the closed-form refit did, a record a site.
        recovery: Loss on held-out training data before and after training, and which was kept.
        about: Facts for the card that the trainer cannot know: {"dataset": {...}, "model": {...}, "command": ...}.
    """

    loss_is_scaled_for_ga = True  # each term is divided by the number of its items in the whole step

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: KDPruneConfig | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        train_dataset: Dataset | datasets.Dataset,
        **trainer: object,
    ):
        """Check everything that can be refused before any work is done.

        Args:
            model: The fine-tuned student; it is changed in place. None: `model_init` makes one for each training.
            args: The settings; they must be given.
            teacher: Another model with the same labels and tokenizer; None: the student as it is now.
            train_dataset: Trains, ranks and repairs; a part is held out to judge recovery.
            **trainer: Everything else that Trainer takes.

        Raises:
            ValueError: Model, teacher, data and budget do not go together; the message states rule, value, next step.
            OSError: The output directory cannot be written.
        """
        if not isinstance(args, KDPruneConfig):
            raise ValueError(f"args must be a KDPruneConfig, got {type(args).__name__}: it takes the same fields")
        check_writable(args.output_dir)
        train_dataset, self.set_apart, self._judging = divided(train_dataset, args)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **trainer)
        find_sites(self.model)
        if teacher is not None:
            check_teacher(self.model, teacher, args.remap_labels, self.processing_class)
            teacher = placed(with_labels_of(self.model, teacher), args.device)
        check_metric(self)
        self.model_accepts_loss_kwargs = False  # so that the Trainer hands no global count to a mean
        self.given_teacher, self.used, self.about, self._trial = teacher, False, {}, None
        if args.teacher_cache:
            self.data_collator = CollateWithRows(self.data_collator)
        self.add_callback(StageEnd(self))
        begin(self)

    def batches_of(self, dataset: object) -> list[Batch]:
        """All of a small data set, collated as for training, the same on every rank."""
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="calibration")
        loader = by_length(dataset, self.collate, self.args.per_device_train_batch_size)
        return [{k: v for k, v in self._prepare_inputs(batch).items() if k != ROW} for batch in loader]

    def collate(self, rows: list) -> Batch:
        """Collate as for training, and complete what follows from it."""
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        return completed(self.model, dict(collate(rows)))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        """As Trainer's, with the same order after an interruption."""
        return seeded(super()._get_train_sampler(train_dataset), self.args)

    def _set_signature_columns_if_needed(self) -> None:
        """As Trainer's, and the row number that finds a sample in the teacher's cache."""
        super()._set_signature_columns_if_needed()
        if self.args.teacher_cache and ROW not in self._signature_columns:
            self._signature_columns += [ROW]

    def propose(self) -> Plan:
        """Rank and plan as `prune` does, and change nothing: a plan to print, draw, edit, save, and give to `prune`.

        Raises:
            ValueError: The model was pruned already, or the budget cannot be reached.
        """
        if self.plan is not None:
            raise ValueError("the model was pruned already: save it, load it, and give it to a new KDPruneTrainer")
        return training.first_plan(self, self.args.pruning())

    def prune(self, plan: Plan | None = None) -> Plan:
        """Rank, plan, surgery, repair, for the whole budget at once; no training. The model is smaller afterwards.

        Args:
            plan: One that was made for this model, to be replayed; None: rank the units and make one.

        Raises:
            ValueError: It was done already, or the plan is for another model.
            RuntimeError: The smaller model would not equal the gated one, or two ranks made different plans.
        """
        if plan is None or self.plan is not None:
            plan = self.propose()
        else:
            restate(plan, self.model, self.calibration[0])
            match(self)
        self.course = at_once(self)
        training.cut(self, plan)
        return plan

    def train(self, resume_from_checkpoint: str | bool | None = None, **trainer: object) -> object:
        """Prune if that was not done, at once or in stages, and train with the first loss; recovery that does harm is undone.

        Args:
            resume_from_checkpoint: A training checkpoint, or True for the last whole one in the output directory.
            **trainer: What Trainer.train takes.

        Raises:
            ValueError: The stages do not fit into the steps, or the checkpoint is of another run.
            FloatingPointError: The first loss is NaN or infinite.
            SystemExit: Code 143: a SIGTERM came; a checkpoint was saved.
        """
        if self.model_init is not None:
            anew(self, trainer.get("trial"))
        checkpoint = checkpoint_of(self, resume_from_checkpoint)
        if self.plan is None:
            self.course = course_of(self)
        if checkpoint:
            restore(self, checkpoint)
        with advice(self):
            output = training.train_in_stages(self, functools.partial(super().train, **trainer), checkpoint)
        training.keep_the_better(self)
        self.objective = None  # a hyperparameter search judges the model that is kept, not that of the last evaluation
        return output

    def call_model_init(self, trial: object = None) -> PreTrainedModel:
        """As Trainer's; in training, which has it called again, the student that was pruned."""
        return self.model if vars(self).get("is_in_train") else super().call_model_init(trial)

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor | tuple[Tensor, object]:
        """The first loss while training; the model's own loss in evaluation, which asks no teacher unless told to."""
        if not model.training:
            if self.lesson.evaluated is not None:
                self.lesson.evaluate(model, self.accelerator.unwrap_model(model), inputs, self.loss_terms.judge())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = num_items_in_batch if isinstance(num_items_in_batch, dict) else self.lesson.count(self.model, [inputs])
        plain = self.accelerator.unwrap_model(model)
        terms, outputs = self.lesson.terms(model, plain, inputs, self.loss_terms, counts)
        self.lesson.log(terms)
        loss = self.loss_terms.total(terms) * self.accelerator.num_processes  # of whose gradients the mean is taken
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: object, num_batches: int, device: torch.device) -> tuple[list, dict | None]:
        """The micro-batches of a step, and how many items each term has in all of them on all ranks."""
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed after the last step: Trainer would make one more
            return [], None
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        return batches, self.lesson.count(self.model, batches, self.accelerator) if batches else None

    def _task(self, model: PreTrainedModel, inputs: Batch, counts: dict) -> tuple[Tensor, object]:
        """The model's own loss, smoothed if asked, or the user's, over the count of the whole step."""
        user = self.compute_loss_func is not None
        loss, outputs = super().compute_loss(model, inputs, True, torch.tensor(counts["task"]) if user else None)
        shared = user and self.args.average_tokens_across_devices  # then Trainer has multiplied by the ranks already
        return loss / self.accelerator.num_processes if shared else loss, outputs

    def held_out_loss(self) -> float:
        """The first loss, less auxiliary classifiers, on training data that recovery does not see."""
        self.model.eval()
        return self.lesson.whole(self.model, self._held_out, self.loss_terms.judge())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term of the first loss since the last log: loss_task, loss_logits, and so on."""
        if "loss" in logs:
            logs |= self.lesson.logged(self.state.global_step, self.accelerator)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> object:
        """As Trainer's; with evaluate_terms the metrics hold each term: eval_loss_task, and so on."""
        asked = self.args.evaluate_terms and self.plan and metric_key_prefix.startswith("eval")  # before, nobody teaches
        self.lesson.evaluated = [] if asked else None
        with as_it_is(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(
            {f"{metric_key_prefix}_loss_{name}": v for name, v in self.lesson.means(self.accelerator).items()}
        )
        return output

    def report(self, output_dir: str) -> dict:
        """Measure teacher and compact model side by side: the data of report.json; {} on ranks that do not save."""
        return report_of(self, output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the smaller model with its plan, report, card and pictures, reload it, and print the line that loads it.

        Raises:
            RuntimeError: The checkpoint does not reload with the same outputs; nothing was put under its name.
        """
        output_dir = str(output_dir or self.args.output_dir)
        if _internal_call or self.plan is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save_final(output_dir)
        if self.args.push_to_hub:
            self._push(output_dir)

    def _save_final(self, output_dir: str) -> None:
        """Measure on all ranks, save on one."""
        report = self.report(output_dir)
        if self.args.should_save:
            print(save_pretrained(self.model, output_dir, self.processing_class, report=report))
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a training checkpoint, from one process; of a model that is sharded, `state_dict` has the weights."""
        if self.args.should_save:
            write_checkpoint(self, Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """As Trainer's, and what trains with the student; after a stage the model in memory is ahead of its checkpoint."""
        if self.course.optimizer is None:
            if not adapters.load(self.model, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            if not self.is_fsdp_enabled:  # there it lies among the weights
                trained_only.load(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; after a stage the optimizer's state is cut along."""
        with training.with_optimizer(self.course, checkpoint) as folder:
            super()._load_optimizer_and_scheduler(folder)

    def _load_best_model(self) -> None:
        """As Trainer's, of those that have the final shape."""
        if self.course.finished and not adapters.load(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's; trainer_state.json, which comes next, says that the files of all ranks are there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: PreTrainedModel, trial: object) -> None:
        """As Trainer's, and never a mixture of two, nor half of one."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        with whole_or_gone(folder, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **repo: object) -> object:
        """Save to the output directory, then upload it as `hub_model_id` (default: the directory's name), and wait for that.

        `repo` may hold token, revision and private; their defaults are hub_token, hub_revision and hub_private_repo.
        """
        if not blocking:
            raise ValueError("push_to_hub of this version waits for the upload: blocking must be True, got False")
        self._save_final(self.args.output_dir)
        return self._push(self.args.output_dir, commit_message=commit_message, **repo)

    def _push(self, path: str, **repo: object) -> object:
        """Upload from the main process."""
        args = self.args
        repo = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo} | repo
        name = args.hub_model_id or Path(path).resolve().name
        return hub.push(path, name, **repo) if self.is_world_process_zero() else None
