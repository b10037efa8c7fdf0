"""How often a training that is killed at any moment ends with the weights of one that was not: always, or a bug.

    python scripts/benchmarks/kills.py --kills 20                          # schedule="gradual" in 4 stages
    python scripts/benchmarks/kills.py --kills 20 --schedule one_shot

Two layers of MiniLM-L6 as a classifier of SST-2, 22 steps, a checkpoint every 3, of which two are kept. A run is killed by
SIGKILL at a moment drawn evenly over the work of the uninterrupted run (seconds of CPU time; imports are done before), and
started again, from its last whole checkpoint if it has one; one in three is killed again, and so on. At its end the weights,
and those of its last checkpoint with the optimizer's state, must be the same to the bit. The result is docs/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import random
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import psutil
import torch
import transformers
from teachers import teacher
from torch import Tensor

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.demo.run import accuracy, common, say
from hf_kdprune.publish.report import environment
from hf_kdprune.publish.whole import last_whole, newest

RESULT = Path("docs") / "kills.json"
AGAIN = 1 / 3  # of the runs that were killed are killed once more


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--schedule", choices=("gradual", "one_shot"), default="gradual")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", default="runs/kills", help="where the runs write (%(default)s)")
    transformers.logging.set_verbosity_error()
    measure(parser.parse_args())


def child(output: Path, schedule: str) -> None:
    """Train, or go on training, and leave what came of it beside the output directory."""
    with output.with_suffix(".log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        output.with_suffix(".json").write_text(json.dumps(train(str(output), schedule)))


def train(output: str, schedule: str) -> dict:
    """What a run comes to."""
    model, tokenizer, data, _ = teacher("sst2")
    model.bert.encoder.layer, model.config.num_hidden_layers = model.bert.encoder.layer[:2], 2
    stages = {"pruning_stages": 4} if schedule == "gradual" else {}
    settings = {"budget": "macs=0.5", "schedule": schedule, "calibration_samples": 64, "max_steps": 22, **stages}
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "disable_tqdm": True}
    config = KDPruneConfig(output, **{**common(), **settings, **saving, "per_device_train_batch_size": 8, "warmup_steps": 2})
    parts = {"train_dataset": data.select(range(400)), "processing_class": tokenizer, "compute_metrics": accuracy}
    trainer = KDPruneTrainer(model, config, **parts)
    checkpoint = newest(output)[0]
    trainer.train(resume_from_checkpoint=checkpoint)
    last = Path(last_whole(output))
    moments = torch.load(last / "optimizer.pt")["state"]
    return {
        "kept": trainer.recovery["kept"],
        "last": last.name,
        "weights": digest(trainer.model.state_dict()),
        "trained": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": digest({f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}),
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """One number for all bits of all tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def measure(args: argparse.Namespace) -> None:
    """One run that nobody kills, then runs that are killed until there were enough kills."""
    folder, draw = Path(args.folder) / args.schedule, random.Random(args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected, seconds = run(folder / "whole", args.schedule)
    say(f"the uninterrupted run takes {seconds:.0f} s: {expected}")
    runs = []
    while (done := sum(len(r["kills"]) for r in runs)) < args.kills:
        output = folder / f"run-{len(runs)}"
        found = killed(output, args, draw, seconds, expected)
        shutil.rmtree(output)
        runs += [found] if found["kills"] else []  # one may have ended before its moment
        say(f"{done + len(found['kills'])} of {args.kills} kills: {json.dumps(found)}")
    kills = [kill for r in runs for kill in r["kills"]]
    facts = {
        "kills": len(kills),
        "kills_with_equal_end": sum(len(r["kills"]) for r in runs if r["equal"]),
        "runs": len(runs),
        "runs_with_equal_end": sum(r["equal"] for r in runs),
        "resumed": sum(kill["resumed_from"] is not None for kill in kills),
        "half_written_checkpoints": sum(len(kill["not_whole"]) for kill in kills),
        "cpu_seconds_uninterrupted": round(seconds, 2),
        "expected": expected,
        "each": runs,
        "command": f"python scripts/benchmarks/kills.py --kills {args.kills} --schedule {args.schedule} --seed {args.seed}",
        "environment": environment(),
    }
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    RESULT.write_text(json.dumps({**known, args.schedule: facts}, indent=1) + "\n")
    say(f"{facts['kills_with_equal_end']} of {facts['kills']} kills left nothing behind: {RESULT}")
    sys.exit(facts["kills_with_equal_end"] < facts["kills"])


def killed(output: Path, args: argparse.Namespace, draw: random.Random, seconds: float, expected: dict) -> dict:
    """A run that is killed and started again until it is done."""
    kills = []
    while True:
        again = not kills or draw.random() < AGAIN
        found, worked = run(output, args.schedule, draw.uniform(0, seconds) if again else math.inf)
        if found is not None:
            return {"kills": kills, "equal": found == expected, **({} if found == expected else {"found": found})}
        checkpoint, broken = newest(output)
        kills.append(
            {
                "after_seconds": round(worked, 2),
                "resumed_from": checkpoint and Path(checkpoint).name,
                "not_whole": {Path(name).name: why for name, why in broken.items()},
            }
        )


def run(output: Path, schedule: str, kill_after: float = math.inf) -> tuple[dict | None, float]:
    """What a child finds, None if it was killed before its end, and its seconds of CPU time."""
    process, worked = multiprocessing.get_context("fork").Process(target=child, args=(output, schedule)), 0.0
    process.start()
    while process.exitcode is None and worked < kill_after:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            worked = sum(psutil.Process(process.pid).cpu_times()[:2])
        process.join(0.01)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, worked
    if process.exitcode:
        raise RuntimeError(f"the run in {output} failed by itself:\n{output.with_suffix('.log').read_text()[-3000:]}")
    return json.loads(output.with_suffix(".json").read_text()), worked


if __name__ == "__main__":
    main()
