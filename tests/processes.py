"""Jobs that tests/test_distributed.py runs in two processes, by `torch.distributed.run processes.py FOLDER JOB...`.

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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from families import build
from small import tiny_bert, trainer
from torch import Tensor
from transformers import TrainerCallback

from hf_kdprune import KDPruneTrainer, score_units
from hf_kdprune.layers import match_layers
from hf_kdprune.prune.importance import IMPORTANCE
from hf_kdprune.publish import checkpoint
from hf_kdprune.ranks import Ranks

GRADUAL = {"schedule": "gradual", "pruning_stages": 3, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
ROOT = Path(__file__).parents[1]
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
    defaults = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "learning_rate": 1e-3}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shares = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // processes}
    defaults["use_cpu"] = "ACCELERATE_TORCH_DEVICE" not in os.environ
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
    found |= {"run": facts(made), "resumed": facts(resumed(folder / "resumed", evaluate_terms=True))}
    return {**found, "gradual": facts(trained(folder / "gradual", **GRADUAL))}


def sharded(folder: Path) -> dict:
    """The same under FSDP2, with all that a run may have: classifiers of its own, evaluations, the best of its checkpoints."""
    launched_with("fsdp2")
    more = {"auxiliary_weight": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = trained(folder / "best", load_best_model_at_end=True, **more)
    return {**saved(folder), "best": best.state.best_global_step}


def saved(folder: Path) -> dict:
    """A run that is saved, and one that died and went on."""
    made = trained(folder / "run", evaluate_terms=True)
    made.save_model()
    kind = type(made.model).__name__
    return {"run": facts(made), "kind": kind, "resumed": facts(resumed(folder / "resumed", evaluate_terms=True))}


def zero2(folder: Path) -> dict:
    """The same under DeepSpeed, which partitions what the optimizer has."""
    launched_with("zero2")
    return saved(folder)


def zero3(folder: Path) -> dict:
    """The same under DeepSpeed, which partitions parameters too."""
    launched_with("zero3")
    return saved(folder)


def launched_with(name: str) -> None:
    """Be a process that `accelerate launch` started with scripts/accelerate/NAME.yaml.

    Accelerate shards on accelerators only; FSDP2 and DeepSpeed can on CPUs, over gloo. It is made to take them for GPUs.
    """
    os.environ |= environment_of(ROOT / "scripts" / "accelerate" / f"{name}.yaml") | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


def environment_of(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` sets for each process."""
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "script.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
    else:
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def main(folder: Path, *jobs: str) -> None:
    """Do these jobs and leave what they found."""
    importlib.import_module("hf_kdprune.measure").SECONDS = 0.02  # the name in the package is the function
    checkpoint.verify_checkpoint = lambda *saved: None  # in a fresh process, which takes long; the test loads what was saved
    for job in jobs:
        torch.save(globals()[job](folder / job), folder / f"{job}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
