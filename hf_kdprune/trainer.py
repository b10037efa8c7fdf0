"""KDPruneTrainer: the HF Trainer with the three wings wired in. Rank, plan, surgery, repair, recovery, save."""

from __future__ import annotations

import shutil
from collections.abc import Sized
from pathlib import Path

import datasets
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from .config import KDPruneConfig
from .distill import auxiliary
from .distill.objective import Objective
from .distill.teacher import ask, check_teacher, frozen_copy
from .inputs import at_length
from .layers import LayerMatch, depth_of, inputs_of, layer_pairs, match_layers, real_positions
from .metrics import check_metric, judge_of, measured_on
from .prune.budget import Budget
from .prune.discovery import find_sites
from .prune.repair import SiteRepair
from .prune.schedule import check_budget, one_shot, realise, report_losses, restate
from .prune.sites import Plan
from .publish import hub
from .publish.checkpoint import check_writable, last_checkpoint, load_line, save_pretrained
from .publish.report import SETTINGS, Report, costs, dataset_facts, model_facts
from .samples import JUDGING, by_length, check_dataset, held_out_size, split

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

    loss_is_scaled_for_ga = False  # compute_loss returns the mean of its batch

    def __init__(
        self,
        model: PreTrainedModel,
        args: KDPruneConfig,
        *,
        teacher: PreTrainedModel | None = None,
        train_dataset: Dataset | datasets.Dataset,
        **trainer: object,
    ):
        """Check everything that can be refused before any work is done.

        Args:
            model: The fine-tuned student; it is changed in place.
            args: The settings.
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
        find_sites(model)
        if teacher is not None:
            check_teacher(model, teacher)
        check_dataset(train_dataset, args)
        held_out, train_dataset = split(train_dataset, held_out_size(train_dataset), args.seed)
        budget, self._judging = Budget.parse(args.budget), None
        if budget.counts == "loss":
            self._judging, train_dataset = split(train_dataset, held_out_size(train_dataset, JUDGING), args.seed)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **trainer)
        check_metric(budget, self)
        self.model_accepts_loss_kwargs = False  # so that the Trainer hands no global count to a mean
        self.teacher = None if teacher is None else teacher.to(args.device).eval()
        self.objective = args.objective()
        self.plan: Plan | None = None
        self.matches: list[LayerMatch] = []
        self.repairs: list[SiteRepair] = []
        self.recovery: dict | None = None
        self.about: dict = {}
        self._metrics: dict[str, dict] = {}
        self._terms: dict[str, list[Tensor]] = {}
        self._held_out = self.batches_of(held_out)
        count = min(args.calibration_samples, len(train_dataset))
        self.calibration = self.batches_of(split(train_dataset, count, args.pruning().seed)[0])
        check_budget(model, self.calibration, args.pruning())
        layer_pairs(args.layer_map, *(depth_of(m, self.calibration[0]) for m in (model, self.teacher or model)))

    def batches_of(self, dataset: object) -> list[Batch]:
        """All of a small data set, collated as for training, the same on every rank."""
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="calibration")
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        loader = by_length(dataset, collate, self.args.per_device_train_batch_size)
        return [dict(self._prepare_inputs(batch)) for batch in loader]

    def propose(self) -> Plan:
        """Rank and plan as `prune` does, and change nothing: a plan to print, draw, edit, save, and give to `prune`.

        Raises:
            ValueError: The model was pruned already, or the budget cannot be reached.
        """
        if self.plan is not None:
            raise ValueError("the model was pruned already: save it, load it, and give it to a new KDPruneTrainer")
        data, budget = self.calibration, Budget.parse(self.args.budget)
        self.matches = match_layers(self.model, self.teacher, data, self.args.layer_map)
        plan = one_shot(self.model, self.teacher, data, self.matches, self.args.pruning(), judge_of(self, self._judging))
        return broadcast_object_list([plan])[0] if budget.measured else plan  # ranks may measure other figures

    def prune(self, plan: Plan | None = None) -> Plan:
        """Rank, plan, surgery, repair; no training. The model is smaller afterwards.

        Args:
            plan: One that was made for this model, to be replayed; None: rank the units and make one.

        Raises:
            ValueError: It was done already, or the plan is for another model.
            RuntimeError: The smaller model would not equal the gated one, or two ranks made different plans.
        """
        data = self.calibration
        if plan is None or self.plan is not None:
            plan = self.propose()
        else:
            restate(plan, self.model, data[0])
            self.matches = match_layers(self.model, self.teacher, data, self.args.layer_map)
        if any(kept != plan.kept for kept in gather_object([plan.kept])):
            raise RuntimeError("the ranks made different plans: give them the same data, device and seed")
        original = frozen_copy(self.model)
        self.repairs = realise(self.model, original, data, plan, self.args.pruning())
        report_losses(self.repairs, original, self.teacher, data, plan, self.matches)
        self.teacher, self.plan = self.teacher or original, plan
        return plan

    def train(self, resume_from_checkpoint: str | bool | None = None, **trainer: object) -> object:
        """Prune if that was not done, then train with the first loss; the better of before and after is kept.

        Args:
            resume_from_checkpoint: A training checkpoint, or True for the last one in the output directory.
            **trainer: What Trainer.train takes.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if self.plan is None:
            self.prune(Plan.load(Path(resume_from_checkpoint) / "plan.json") if resume_from_checkpoint else None)
        self._metrics["pruned"] = measured_on(self, self.model, "pruned", self.eval_dataset)
        before = self.held_out_loss()
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
        if self.objective.uses("auxiliary"):
            auxiliary.attach(self.model)
        try:
            output = super().train(resume_from_checkpoint, **trainer)
        finally:
            auxiliary.detach(self.model)
        after = self.held_out_loss()
        if not (better := after < before):
            self.model.load_state_dict(weights)
        self.recovery = {"held_out_before": before, "held_out_after": after, "kept": "after" if better else "before"}
        self._metrics.pop("compact", None)
        return output

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor | tuple[Tensor, object]:
        """The first loss while training; the model's own loss in evaluation, which asks no teacher."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms, outputs = self.loss_terms(model, inputs, self.objective)
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())
        return (self.objective.total(terms), outputs) if return_outputs else self.objective.total(terms)

    def loss_terms(self, model: PreTrainedModel, inputs: Batch, objective: Objective) -> tuple[dict[str, Tensor], object]:
        """The terms of `objective` that have a weight, each a scalar, and the student's output."""
        terms: dict[str, Tensor] = {}
        asked = {**inputs, "output_hidden_states": objective.uses("features") or objective.uses("auxiliary")}
        if objective.uses("task"):
            terms["task"], outputs = super().compute_loss(model, asked, return_outputs=True)
        else:
            outputs = model(**inputs_of(asked))
        mask = real_positions(inputs)
        if objective.needs_teacher:
            taught = ask(self.teacher, inputs, objective.uses("features"))
            terms |= objective.taught_terms(outputs, taught, self.matches, mask)
        if objective.uses("auxiliary"):
            classifiers = getattr(self.accelerator.unwrap_model(model), auxiliary.NAME)
            logits = classifiers(outputs.hidden_states[1:], mask)
            terms["auxiliary"] = auxiliary.auxiliary_loss(logits, inputs["labels"])
        return terms, outputs

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The first loss, less auxiliary classifiers, on training data that recovery does not see."""
        self.model.eval()
        judge = self.objective.judge()
        rows = [len(real_positions(batch)) for batch in self._held_out]
        losses = [float(judge.total(self.loss_terms(self.model, batch, judge)[0])) for batch in self._held_out]
        return sum(n * loss for n, loss in zip(rows, losses, strict=True)) / sum(rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term of the first loss since the last log: loss_task, loss_logits, and so on."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[f"loss_{name}"] = float(self.accelerator.reduce(torch.stack(values).mean(), "mean"))
            self._terms = {}
        super().log(logs, start_time)

    def report(self, output_dir: str) -> dict:
        """Measure teacher and compact model side by side: the data of report.json; {} on ranks that do not save."""
        for name, model in (("teacher", self.teacher), ("compact", self.model)):
            if name not in self._metrics:
                self._metrics[name] = measured_on(self, model, name, self.eval_dataset)
        self._metrics.setdefault("pruned", self._metrics["compact"])
        if not self.args.should_save:
            return {}
        rows = len(self.train_dataset) + sum(len(real_positions(b)) for b in self._held_out)
        evaluated = len(self.eval_dataset) if isinstance(self.eval_dataset, Sized) else 0
        return Report(
            name=Path(output_dir).resolve().name,
            model={**model_facts(self.model, self.teacher), **self.about.get("model", {})},
            dataset={**dataset_facts(rows, evaluated), **self.about.get("dataset", {})},
            metrics={name: self._metrics[name] for name in ("teacher", "pruned", "compact")},
            **costs(self.teacher, self.model, at_length(self.calibration[0], self.plan.budget["seq_len"])),
            budget=self.plan.budget,
            seeds={"seed": self.args.seed, "data_seed": self.args.pruning().seed},
            loss=[entry for entry in self.state.log_history if "loss" in entry],
            recovery=self.recovery,
            repair=[vars(r) for r in self.repairs],
            settings={name: getattr(self.args, name) for name in SETTINGS},
            load=load_line(self.model, output_dir),
            **{k: v for k, v in self.about.items() if k in ("example", "command")},
        ).to_json()

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
        """Write a training checkpoint: the model without card or check, which a final save has."""
        folder = Path(output_dir or self.args.output_dir)
        save_pretrained(self.model, folder, self.processing_class, verify=False, state_dict=state_dict)
        torch.save(self.args, folder / "training_args.bin")

    def _save_checkpoint(self, model: PreTrainedModel, trial: object) -> None:
        """As Trainer's, but what was interrupted half-way is taken away again."""
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save and not (folder / "trainer_state.json").is_file():  # it is written last
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **repo: object) -> object:
        """Save to the output directory, then upload it as `hub_model_id` (default: the directory's name).

        Args:
            commit_message: Of the commit.
            blocking: Must be True: this version waits for the upload, and raises ValueError otherwise.
            **repo: token, revision, private; default: `hub_token`, `hub_revision`, `hub_private_repo`.
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
