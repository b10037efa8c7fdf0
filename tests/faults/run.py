"""A training that a fault ends, in a process of its own: see test_faults.py.

`run.py ORDER` carries out one order, a JSON object: {"out": directory, "fault": one of FAULTS, "settings": fields of
KDPruneConfig, "resume": bool}. `run.py` alone imports everything once, then forks a child for each line with an order on stdin;
it answers "pid" and the child's process id, and when the child has ended "exit" and its code. A child prints into "log".
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import huggingface_hub.file_download
import torch
import transformers
from small import logits, tiny_bert, trainer
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from hf_kdprune import KDPruneTrainer, load_pretrained

FINAL, READY, GO = "final.pt", "ready", "go"  # files beside the output directory
STEP = 3  # of 11, before which most faults come; a checkpoint is written every 2
LIMIT = 100_000  # bytes: more than the weights have, less than the optimizer


def rank() -> str:
    """Of this process, where there are several."""
    return os.environ.get("RANK", "")


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, act: Callable[[], object], step: int = STEP):
        self.act, self.step = act, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


def wait(made: KDPruneTrainer, out: Path) -> None:
    """Halt in mid-step until the test has sent its signal."""

    def halt():
        (out.parent / f"{READY}{rank()}").write_text(str(os.getpid()))
        for _ in range(3000):
            if (out.parent / GO).exists():
                return
            time.sleep(0.01)
        raise TimeoutError(GO)

    made.add_callback(At(halt))


def full(made: KDPruneTrainer, out: Path) -> None:
    """No file may grow further, which is what a full disk looks like where no disk of a given size can be mounted."""
    made.add_callback(At(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))))


def gone(made: KDPruneTrainer, out: Path) -> None:
    """The output directory is removed."""
    made.add_callback(At(lambda: shutil.rmtree(out)))


def replaced(made: KDPruneTrainer, out: Path) -> None:
    """The output directory is moved away, and something else has its name."""
    made.add_callback(At(lambda: (out.rename(out.with_name("moved")), out.write_text("in the way"))))


def unwritable(made: KDPruneTrainer, out: Path) -> None:
    """The output directory becomes one of another user, and read-only."""

    def lock():
        for entry in (out, *out.rglob("*")):
            entry.chmod(0o555)
        if os.geteuid() == 0:  # who may write everywhere
            os.seteuid(65534)

    made.add_callback(At(lock))


def killed_in_save(made: KDPruneTrainer, out: Path) -> None:
    """The process dies when half of the optimizer's state is written."""
    save = torch.save

    def half(state: object, file: object) -> None:
        save(state, file)
        if "checkpoint-4" in str(file) and str(file).endswith("optimizer.pt"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def worker_dies(made: KDPruneTrainer, out: Path) -> None:
    """The worker of the data loader is gone in the middle of its sixth batch."""
    collate, batches = made.data_collator, []

    def die(rows: list) -> dict:
        batches.append(1)
        if get_worker_info() is not None and len(batches) == 6:
            os._exit(1)
        return collate(rows)

    made.data_collator = die


FAULTS = {
    "none": lambda made, out: None,
    **{f.__name__: f for f in (wait, full, gone, replaced, unwritable, killed_in_save, worker_dies)},
}


def train(order: dict) -> None:
    """Train with the fault, and write down the weights if the end is reached."""
    out = Path(order["out"])
    defaults = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "repair": False, "use_cpu": True}
    made = trainer(out, tiny_bert(spread=0.2), **{**defaults, **order["settings"]})
    FAULTS[order["fault"]](made, out)
    made.train(resume_from_checkpoint=order["resume"])
    torch.save({"weights": made.model.state_dict(), "kept": made.recovery["kept"]}, out.parent / f"{FINAL}{rank()}")


def download(order: dict) -> None:
    """Ask for a teacher until it is there; say what came of each attempt, and what lies on disk after it."""
    huggingface_hub.file_download.DOWNLOAD_CHUNK_SIZE = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
    time.sleep = lambda seconds: None  # the client waits between its own attempts
    for local in (False, True, False, True):
        try:
            print(json.dumps(logits(load_pretrained(order["teacher"], local_files_only=local)).tolist()))
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))


def next_order() -> dict:
    """In a child that was forked for it: the order."""
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            os.setsid()  # so that the test can signal the whole group
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            return order
        print("pid", child, flush=True)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    order = json.loads(sys.argv[1]) if len(sys.argv) > 1 else next_order()
    download(order) if "teacher" in order else train(order)
