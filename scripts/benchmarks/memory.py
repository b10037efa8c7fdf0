"""Peak memory of ranking, surgery and repair beside that of a training step; and whether anything grows with the steps.

    python scripts/benchmarks/memory.py                  # MiniLM and SmolLM2-135M in fp32, 15 minutes on 2 cores
    python scripts/benchmarks/memory.py --soak           # 2,000 steps of a tiny KDPruneTrainer, 3 minutes

Each figure is of a process of its own: the most resident memory while the job runs, less what was resident when the model and
its data were loaded, in MiB. Linux only: the kernel's mark (VmHWM) is set back before the job, so that it does not count what
loading took. The bar: ranking takes no more than a training step. Writes docs/memory.json.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_kdprune import KDPruneConfig, KDPruneTrainer, apply_plan, repair, score_units
from hf_kdprune.demo.data import BANKING77, minilm
from hf_kdprune.demo.run import freeze_embeddings
from hf_kdprune.publish.report import environment

OUT = Path("docs") / "memory.json"
Batch = dict[str, Tensor]
Job = Callable[[PreTrainedModel, list[Batch]], Callable[[], object]]
SAMPLES = {"minilm": 1024, "smollm2": 12}  # that are ranked with; the peak is that of one batch
BUDGET = "macs=0.5"
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def load(name: str, folder: str) -> tuple[PreTrainedModel, list[Batch]]:
    """The model in memory of its own (not a mapped file), and batches with labels: 32 questions, or 4 x 256 tokens."""
    data = datasets.load_dataset(str(BANKING77), split="train").shuffle(seed=0)
    tokenizer, count = AutoTokenizer.from_pretrained(folder), SAMPLES[name]
    if name == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=77)
        rows = sorted(data.select(range(count)), key=lambda row: len(row["text"]))
        batches = [
            {
                **tokenizer([r["text"] for r in rows[i : i + 32]], padding=True, return_tensors="pt"),
                "labels": torch.tensor([r["label"] for r in rows[i : i + 32]]),
            }
            for i in range(0, count, 32)
        ]
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer(" ".join(data["text"]), return_tensors="pt")["input_ids"][0, : count * 256].view(-1, 4, 256)
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, batches


def training_step(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """Three AdamW steps on the longest batches, as the Trainer makes them by default (fused, gradients set to None)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def work() -> None:
        model.train()
        for batch in batches[-3:]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def pass_only(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """A forward pass without a gradient."""

    @torch.no_grad()
    def work() -> None:
        model.eval()
        for batch in batches[-3:]:
            model(**batch)

    return work


def ranking(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """All of ranking: discovery, the metric of the second loss, the probe."""
    return lambda: score_units(model, None, batches)


def ranking_with_logits(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """The same, of features and logits: two backward passes."""
    return lambda: score_units(model, None, batches, "feature_loss+logits")


def ranking_against(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """Ranking against another teacher, which is loaded before."""
    teacher = copy.deepcopy(model)
    return lambda: score_units(model, teacher, batches)


def surgery(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """Surgery and its check; the copy from before it is loaded before."""
    plan, original = score_units(model, None, batches[-2:]).plan(BUDGET), copy.deepcopy(model)
    return lambda: (apply_plan(model, plan, batches[0]), original)


def repairing(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """The refit, after surgery."""
    original = copy.deepcopy(model)
    apply_plan(model, score_units(model, None, batches[-2:]).plan(BUDGET), batches[0])
    return lambda: repair(model, original, batches)


def rows_of(batches: list[Batch]) -> list[dict[str, Tensor]]:
    """The samples of the last batches, brought to one length already."""
    return [{key: value[i] for key, value in b.items()} for b in batches[-1:] * 6 for i in range(len(b["input_ids"]))]


def stock_trainer(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """Three steps of transformers' Trainer."""
    folder = tempfile.mkdtemp()
    rows, size = rows_of(batches), len(batches[0]["input_ids"])
    args = TrainingArguments(folder, per_device_train_batch_size=size, max_steps=3, **QUIET)
    return lambda: Trainer(model, args, train_dataset=rows).train()


def kdprune_trainer(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    """The whole job on a student of which next to nothing is cut, three steps with three terms of the first loss.

    The teacher is the student as it was: what it costs is what this takes more than the stock Trainer.
    """
    folder = tempfile.mkdtemp()
    rows, size = rows_of(batches), len(batches[0]["input_ids"])
    settings = {"max_steps": 3, "budget": "macs=0.999", "calibration_samples": 2 * size}
    args = KDPruneConfig(folder, per_device_train_batch_size=size, **settings, **QUIET)

    def work() -> dict:
        trainer = KDPruneTrainer(model, args, train_dataset=rows)
        trainer.train()
        return {"teacher's own weights": own_mib(trainer.teacher, model)}

    return work


def own_mib(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """MiB of the teacher's weights that are not the student's too."""
    shared = {p.untyped_storage().data_ptr() for p in student.parameters()}
    mine = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in teacher.parameters()}
    return round(sum(size for place, size in mine.items() if place not in shared) / 2**20, 1)


def frozen(job: Job) -> Job:
    """The same job, embeddings frozen."""
    return lambda model, batches: job(freeze_embeddings(model), batches)


JOBS: dict[str, Job] = {
    "forward pass": pass_only,
    "training step": training_step,
    "training step, embeddings frozen": frozen(training_step),
    "ranking": ranking,
    "ranking with logits": ranking_with_logits,
    "ranking against another teacher": ranking_against,
    "surgery": surgery,
    "repair": repairing,
    "Trainer": stock_trainer,
    "KDPruneTrainer": kdprune_trainer,
    "KDPruneTrainer, embeddings frozen": frozen(kdprune_trainer),
}


def settle() -> None:
    """Give back what is free, and set the kernel's mark of the peak back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str = "VmRSS") -> float:
    """MiB that the kernel counts now ("VmRSS") or at the peak ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def one(name: str, job: str, folder: str) -> dict:
    """Run one job in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = load(name, folder)
    work = JOBS[job](model, batches)
    settle()
    loaded, start = resident("VmRSS"), time.perf_counter()
    found = work()
    peak, seconds = resident("VmHWM"), time.perf_counter() - start
    settle()
    return {
        "model": name,
        "job": job,
        "above loaded": round(peak - loaded, 1),
        "left behind": round(resident("VmRSS") - loaded, 1),
        "loaded": round(loaded, 1),
        "weights": round(sum(p.numel() * p.itemsize for p in model.parameters()) / 2**20, 1),
        "seconds": round(seconds, 1),
        **(found if isinstance(found, dict) else {}),
    }


def measure(name: str, jobs: list[str]) -> list[dict]:
    """Each job in a process of its own."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        if name == "smollm2":
            from real_models import load_smollm2

            model, tokenizer = load_smollm2()
            del model.config.quantization_config  # of the GGUF file
            for part in (model, tokenizer):
                part.save_pretrained(folder)
        for job in jobs:
            command = [sys.executable, __file__, "--one", name, job, minilm() if name == "minilm" else folder]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"{name}, {job}:\n{child.stderr[-3000:]}")
            runs.append(json.loads(child.stdout.splitlines()[-1]))
            print(json.dumps(runs[-1]), flush=True)
    return runs


def main() -> None:
    """Measure what was asked for, and write it into the record beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--soak", action="store_true", help="the steps only")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak (%(default)s)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    facts = json.loads(OUT.read_text()) if OUT.exists() else {}
    if args.soak:
        from soak import soak

        facts["soak"] = soak(args.steps)
    else:
        mine = [run for name in args.models for run in measure(name, args.jobs)]
        done = {(run["model"], run["job"]) for run in mine}
        facts["runs"] = [r for r in facts.get("runs", []) if (r["model"], r["job"]) not in done] + mine
    OUT.write_text(json.dumps({**facts, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
