"""Two jobs that tests/test_distributed.py runs in two processes, by `torch.distributed.run processes.py FOLDER`.

Each process leaves what it found in FOLDER/JOB-RANK.pt.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from families import build
from small import tiny_bert, trainer
from torch import Tensor
from transformers import TrainerCallback

from hf_kdprune import KDPruneTrainer, score_units
from hf_kdprune.layers import match_layers
from hf_kdprune.prune.importance import IMPORTANCE
from hf_kdprune.ranks import Ranks

COUNTS = (5, 1)  # batches: unequal shares, and a process without any


def batches_of(count: int) -> list[dict[str, Tensor]]:
    """Random tokens of different length, with labels."""
    draw, out = torch.Generator().manual_seed(0), []
    for _ in range(count):
        lengths = torch.tensor([[9], *torch.randint(3, 10, (3, 1), generator=draw).tolist()])
        mask = (torch.arange(9) < lengths).long()
        ids = torch.randint(5, 200, (4, 9), generator=draw) * mask
        out.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (4,), generator=draw)})
    return out


def scores(ranks: Ranks) -> dict[str, dict]:
    """Every score on each number of batches, without and with another teacher, which is wider."""
    model, found = build("bert", intermediate_size=16), {}
    for teacher in (None, build("bert", seed=1, hidden_size=48)):
        for count in COUNTS:
            batches = batches_of(count)
            matches = match_layers(model, teacher, batches, "auto", ranks)
            layers = {f"variances {m.student} {m.teacher}": m.variances for m in matches}
            layers |= {f"projection {m.student}": m.projection for m in matches if m.projection is not None}
            found[f"layers {count} {teacher is None}"] = {"values": layers}
            for importance in IMPORTANCE:
                if teacher is None or importance.startswith(("feature_loss", "ablation")):
                    made = score_units(model, teacher, batches, importance, seed=3, ranks=ranks)
                    plan = made.plan("macs=0.5", round_to=1)
                    found[f"{importance} {count} {teacher is None}"] = {
                        "values": made.values,
                        "errors": made.errors,
                        "kept": plan.kept,
                    }
    return found


def broken(ranks: Ranks) -> list[str]:
    """What is said where the features of a batch that only the second process runs are no numbers."""
    model, batches = build("bert"), batches_of(4)
    matches = match_layers(model, None, batches[:1])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7] = float("nan")
    for i, batch in enumerate(batches):
        batch["input_ids"] = torch.where(batch["input_ids"] == 7, 8, batch["input_ids"])
        batch["input_ids"][0, 0] = 7 if i == 1 else 8
    said = []
    for ask in (
        lambda: match_layers(model, None, batches, ranks=ranks),
        lambda: score_units(model, None, batches, matches=matches, ranks=ranks),
        lambda: score_units(model, None, batches, "activation", ranks=ranks).plan("macs=0.5"),
    ):
        try:
            ask()
        except ValueError as error:
            said.append(str(error))
    return said


def trained(folder: Path, **settings: object) -> KDPruneTrainer:
    """A run with 8 samples a step, without chance."""
    made = trainer_of(folder, **settings)
    made.train()
    return made


def trainer_of(folder: Path, **settings: object) -> KDPruneTrainer:
    """Its trainer."""
    defaults = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "learning_rate": 1e-3, "use_cpu": True}
    shares = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // PartialState(cpu=True).num_processes}
    return trainer(folder, without_dropout(), budget="macs=0.6", **{**defaults, **shares, **settings})


def resumed(folder: Path, **settings: object) -> KDPruneTrainer:
    """The same run, which died after step 5 and went on from the checkpoint of step 4."""
    made = trainer_of(folder, callbacks=[Dies()], **settings)
    with contextlib.suppress(InterruptedError):
        made.train()
    made = trainer_of(folder, **settings)
    made.train(resume_from_checkpoint=True)
    return made


class Dies(TrainerCallback):
    """Ends a training by an error."""

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 5:
            raise InterruptedError


def without_dropout() -> torch.nn.Module:
    """A classifier that trains without chance."""
    model = tiny_bert(spread=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def facts(made: KDPruneTrainer) -> dict:
    """What a run came to."""
    return {
        "kept": made.plan.kept,
        "weights": dict(made.model.state_dict()),
        "losses": {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry},
        "recovery": made.recovery,
        "evaluated": made.evaluate(),
    }


def replicated(folder: Path) -> dict:
    """Ranking, and a run whose processes write into folders of their own, which show what they write."""
    ranks = Ranks.of(Accelerator(cpu=True))
    found = {"scores": scores(ranks), "broken": broken(ranks)}
    made = trained(folder / f"out-{ranks.index}", evaluate_terms=True)
    made.save_model()
    return {**found, "run": facts(made), "resumed": facts(resumed(folder / "resumed", evaluate_terms=True))}


def sharded(folder: Path) -> dict:
    """The same under FSDP2, with all that a run may have: classifiers of its own, evaluations, the best of its checkpoints."""
    let_cpus_shard()
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
    made = trained(folder / "run", evaluate_terms=True, **fsdp)
    kind = type(made.model).__name__
    more = {"auxiliary_weight": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = trained(folder / "best", load_best_model_at_end=True, **more, **fsdp)
    found = {"run": facts(made), "kind": kind, "resumed": facts(resumed(folder / "resumed", evaluate_terms=True, **fsdp))}
    made.save_model()
    return {**found, "best": best.state.best_global_step}


def let_cpus_shard() -> None:
    """Accelerate shards on accelerators only; FSDP2 itself can on CPUs, over gloo. Let it take them for GPUs."""
    init = PartialState.__init__

    def as_gpus(self: PartialState, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpus


def main(folder: Path) -> None:
    """Do both jobs and leave what they found."""
    importlib.import_module("hf_kdprune.measure").SECONDS = 0.02  # the name in the package is the function
    for job in (replicated, sharded):
        torch.save(job(folder / job.__name__), folder / f"{job.__name__}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
