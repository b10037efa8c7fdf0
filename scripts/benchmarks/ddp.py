"""What two processes cost on two cores: samples a second of training beside one process with two threads, at the same batch.

    python scripts/benchmarks/ddp.py            # MiniLM at half of its MACs on Banking77, 5 minutes on 2 idle cores

Two runs of KDPruneTrainer live at the same time and take turns, some steps each: one process with 2 threads and batches of 32,
and two processes (DDP over gloo) with 1 thread each and batches of 16. The ratio is the median over rounds of two processes
over one, with the lowest and the highest. CPU seconds are of all processes of a group together, the waiting of OpenMP's threads
for each other included. On cores that others use the two threads wait most of the time, so the figures mean something on idle
ones only: the load is recorded beside them. They are docs/ddp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import transformers
from torch.distributed import TCPStore
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.demo.data import minilm
from hf_kdprune.demo.run import Demo, common, freeze_embeddings, read, say
from hf_kdprune.publish.report import environment

OUT = Path("docs") / "ddp.json"
BATCH = 32
GROUPS = {"one process, 2 threads": (1, 2), "two processes, 1 thread each": (2, 1)}  # name -> processes, threads of each
PATIENCE = timedelta(minutes=20)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of a round, for each of the two (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"others use the machine (load {load:.1f}): two threads of one process suffer more from that than two processes")
    seconds, cpu = take_turns(args)
    rates = {name: [args.steps * BATCH / s for s in found] for name, found in seconds.items()}
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    found = {
        "command": f"python scripts/benchmarks/ddp.py --rounds {args.rounds} --steps {args.steps}",
        "samples a second": {name: spread(values) for name, values in rates.items()},
        "two processes over one": spread(ratios),
        "CPU seconds a step": {name: spread([s / args.steps for s in found]) for name, found in cpu.items()},
        "load average before": round(load, 2),
        "environment": environment(),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    say(json.dumps(found))


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [round(f(values), 3) for f in (statistics.median, min, max)]


def take_turns(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and CPU seconds, of each round of each group, the first left out."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        groups = {name: start(name, args, store.port, folder) for name in GROUPS}
        try:
            seconds: dict[str, list[float]] = {name: [] for name in GROUPS}
            cpu: dict[str, list[float]] = {name: [] for name in GROUPS}
            for turn in range(args.rounds + 1):
                for name in list(GROUPS)[:: 1 if turn % 2 else -1]:
                    store.set(f"go {name} {turn}", "")
                    taken = [store.get(f"done {name} {turn} {rank}").split() for rank in range(GROUPS[name][0])]
                    seconds[name].append(max(float(wall) for wall, _ in taken))
                    cpu[name].append(sum(float(used) for _, used in taken))
                say(f"round {turn}: {[round(s[-1], 2) for s in seconds.values()]} s")
            return tuple({name: found[1:] for name, found in part.items()} for part in (seconds, cpu))
        finally:
            for group in groups.values():
                group.terminate()
                group.wait()


def start(name: str, args: argparse.Namespace, port: int, folder: str) -> subprocess.Popen:
    """The processes of a group, which wait for their turn."""
    processes, threads = GROUPS[name]
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    asked = [f"--rounds={args.rounds}", f"--steps={args.steps}", f"--worker={port} {folder} {name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, *launch, __file__, *asked], env=environment, stdout=subprocess.DEVNULL)


def work(args: argparse.Namespace) -> None:
    """Train, in turns."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    port, folder, name = args.worker.split(" ", 2)
    processes, threads = GROUPS[name]
    torch.set_num_threads(threads)
    data, tokenizer, (train, _) = read(Demo())
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(data.labels))
    config = KDPruneConfig(
        f"{folder}/{processes}",
        calibration_samples=64,
        repair=False,
        max_steps=(args.rounds + 1) * args.steps,
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="random",  # by length, the order would depend on the size of a process's batch
        **{
            key: value
            for key, value in common().items()
            if key not in ("train_sampling_strategy", "per_device_train_batch_size")
        },
        per_device_train_batch_size=BATCH // processes,
    )
    turns = Turns(name, int(port), args.steps)
    KDPruneTrainer(freeze_embeddings(model), config, train_dataset=train, processing_class=tokenizer, callbacks=[turns]).train()


class Turns(TrainerCallback):
    """Waits before the first step of a round, and says after the last one how long they took."""

    def __init__(self, name: str, port: int, steps: int):
        """Take the name of the group, the port of the store, and the steps of a round."""
        self.name, self.steps, self.begun = name, steps, (0.0, 0.0)
        self.store = TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object) -> None:
        """Wait."""
        if state.global_step % self.steps == 0:
            self.store.wait([f"go {self.name} {state.global_step // self.steps}"])
            self.begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object) -> None:
        """Tell."""
        if state.global_step % self.steps == 0:
            taken = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
            self.store.set(
                f"done {self.name} {state.global_step // self.steps - 1} {args.process_index}", "{} {}".format(*taken)
            )


if __name__ == "__main__":
    main()
