"""report.json: every figure that the card shows, with what is needed to have it again."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..measure import compare, disk_bytes
from ..timing import cpu_name

REPORT_VERSION = 1
# The fields of KDPruneConfig that a card shows.
SETTINGS = (
    *("task_weight", "logits_weight", "features_weight", "auxiliary_weight", "temperature", "logits_loss"),
    *(
        "feature_loss",
        "layer_map",
        "importance",
        "repair",
        "schedule",
        "shapes",
        "round_to",
        "keep",
        "least",
        "calibration_samples",
    ),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type"),
)
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "hf_kdprune")


@dataclass
class Report:
    """What one run did and measured; field by field as in report.json.

    Attributes:
        name: Of the model: the last part of its directory or id.
        model: student, teacher, architecture, model_type, task, license, base_model.
        dataset: name, train_samples, eval_samples, license, source.
        metrics: teacher, pruned (before recovery), compact: name -> value each; {} where nothing was measured.
        size: teacher, compact: params, macs, disk_bytes each.
        speed: teacher, compact: latency_ms by batch, samples_per_second, peak_memory_bytes; ratio by batch.
        budget: asked, reached, seq_len; of a latency also predicted, batch, device; of a loss also loss, metric, before.
        seeds: seed, data_seed.
        loss: The log history of recovery, the terms of the first loss one by one.
        recovery: held_out_before, held_out_after, kept; None where there was none.
        repair: A record for each site.
        settings: The fields of KDPruneConfig that matter.
        example: One text with the label that the reloaded model gives it.
        load: The line that loads the model.
        command: The command that makes it again.
        environment: Versions and machine.
        version: Of the format.
    """

    name: str
    model: dict
    dataset: dict
    metrics: dict
    size: dict
    speed: dict
    budget: dict
    seeds: dict
    loss: list = field(default_factory=list)
    recovery: dict | None = None
    repair: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    example: dict | None = None
    load: str = ""
    command: str = field(default_factory=lambda: command_line())
    environment: dict = field(default_factory=lambda: environment())
    version: int = REPORT_VERSION

    def to_json(self) -> dict:
        """As plain data."""
        return asdict(self)


def costs(teacher: PreTrainedModel, compact: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, dict]:
    """Measure both models on inputs shaped like `batch`, interleaved: the sections "size" and "speed"."""
    measured, ratio = compare([teacher, compact], batch, progress=True)
    size, speed = {}, {"ratio": ratio}
    for name, model, m in zip(("teacher", "compact"), (teacher, compact), measured, strict=True):
        size[name] = {"params": m.params, "macs": m.macs, "disk_bytes": disk_bytes(model)}
        speed[name] = {
            "latency_ms": m.latency_ms,
            "samples_per_second": m.samples_per_second,
            "peak_memory_bytes": m.peak_memory_bytes,
        }
    return {"size": size, "speed": speed}


def dataset_facts(train: int, evaluated: int) -> dict:
    """The section "dataset", as far as the trainer knows."""
    return {"name": None, "train_samples": train, "eval_samples": evaluated, "license": None, "source": None}


def model_facts(student: PreTrainedModel, teacher: PreTrainedModel) -> dict:
    """The section "model", as far as the models themselves know."""
    names = student.config.name_or_path, teacher.config.name_or_path
    return {
        "student": names[0],
        "teacher": names[1] if names[1] != names[0] else None,
        "architecture": type(student).__name__,
        "model_type": student.config.model_type,
        "task": "text-classification",
        "license": None,
        "base_model": None,
    }


def command_line() -> str:
    """The command that this process was started with, as one would type it."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join([program if program.startswith("kdprune") else f"python {sys.argv[0]}".strip(), *sys.argv[1:]])


def environment() -> dict:
    """Versions of what computes, and the machine."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
