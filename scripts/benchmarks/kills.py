"""How often a training that is killed at any moment ends with the weights of one that was not: always, or a bug.

    python scripts/benchmarks/kills.py --kills 20                          # schedule="gradual" in 4 stages
    python scripts/benchmarks/kills.py --kills 20 --schedule one_shot

Two layers of MiniLM-L6 as a classifier of SST-2, 22 steps, a checkpoint every 3, of which two are kept. A run is killed by
SIGKILL at a moment drawn evenly over the duration of the uninterrupted run, from the end of the imports on, and started again,
from its last whole checkpoint if it has one; one in three is killed again, and so on. At its end the weights, and those of its
last checkpoint with the optimizer's state, must be the same to the bit. The result is docs/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
BEGUN = "begun"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--schedule", choices=("gradual", "one_shot"), default="gradual")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", default="runs/kills", help="where the runs write (%(default)s)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in a child: the output directory
    args = parser.parse_args()
    if args.run:
        train(args.run, args.schedule)
    else:
        measure(args)


def train(output: str, schedule: str) -> None:
    """In a child: train, or go on training, and say what came of it."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(BEGUN, flush=True)
    model, tokenizer, data, _ = teacher("sst2")
    model.bert.encoder.layer, model.config.num_hidden_layers = model.bert.encoder.layer[:2], 2
    stages = {"pruning_stages": 4} if schedule == "gradual" else {}
    settings = {"budget": "macs=0.5", "schedule": schedule, "calibration_samples": 128, "max_steps": 22, **stages}
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "disable_tqdm": True}
    config = KDPruneConfig(output, **{**common(), **settings, **saving, "per_device_train_batch_size": 16, "warmup_steps": 2})
    parts = {"train_dataset": data.select(range(2000)), "processing_class": tokenizer, "compute_metrics": accuracy}
    trainer = KDPruneTrainer(model, config, **parts)
    checkpoint = newest(output)[0]
    trainer.train(resume_from_checkpoint=checkpoint)
    last = Path(last_whole(output))
    moments = torch.load(last / "optimizer.pt")["state"]
    found = {
        "kept": trainer.recovery["kept"],
        "last": last.name,
        "weights": digest(trainer.model.state_dict()),
        "trained": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": digest({f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}),
    }
    print(json.dumps(found), flush=True)


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
    expected, seconds = run(folder / "whole", args.schedule)
    say(f"the uninterrupted run takes {seconds:.0f} s: {expected}")
    runs = []
    while (done := sum(len(r["kills"]) for r in runs)) < args.kills:
        runs.append(killed(folder / f"run-{len(runs)}", args, draw, seconds, expected))
        say(f"{done + len(runs[-1]['kills'])} of {args.kills} kills: {json.dumps(runs[-1])}")
        shutil.rmtree(folder / f"run-{len(runs) - 1}")
    kills = [kill for r in runs for kill in r["kills"]]
    facts = {
        "kills": len(kills),
        "kills_with_equal_end": sum(len(r["kills"]) for r in runs if r["equal"]),
        "runs": len(runs),
        "runs_with_equal_end": sum(r["equal"] for r in runs),
        "resumed": sum(kill["resumed_from"] is not None for kill in kills),
        "half_written_checkpoints": sum(len(kill["not_whole"]) for kill in kills),
        "seconds_uninterrupted": round(seconds, 1),
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
        found, lasted = run(output, args.schedule, draw.uniform(0, seconds) if again else None)
        if found is not None:
            return {"kills": kills, "equal": found == expected, **({} if found == expected else {"found": found})}
        checkpoint, broken = newest(output)
        kills.append(
            {
                "after_seconds": round(lasted, 1),
                "resumed_from": checkpoint and Path(checkpoint).name,
                "not_whole": {Path(name).name: why for name, why in broken.items()},
            }
        )


def run(output: Path, schedule: str, kill_after: float | None = None) -> tuple[dict | None, float]:
    """What a child finds, None if it was killed before its end, and the seconds from its imports on."""
    command = [sys.executable, __file__, "--schedule", schedule, "--run", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while (line := child.stdout.readline()) and line.strip() != BEGUN:
            continue
        started = time.monotonic()
        try:
            said, errors = child.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return None, time.monotonic() - started
    if child.returncode:
        raise RuntimeError(f"the run in {output} failed by itself:\n{errors[-3000:]}")
    return json.loads(said.splitlines()[-1]), time.monotonic() - started


if __name__ == "__main__":
    main()
