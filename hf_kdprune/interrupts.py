"""What happens when a training is told to end, or ends by a fault: a checkpoint where one can be, and how to go on."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from .publish.whole import newest

logger = logging.getLogger(__name__)
TERMINATED = 128 + signal.SIGTERM  # 143: what a shell says of a process that SIGTERM ended
WORKER_STAYS = 30  # seconds for which a worker of a data loader outlives a SIGTERM


@contextmanager
def until_sigterm(trainer: Trainer) -> Iterator[None]:
    """Train in this block so that a SIGTERM ends it with a checkpoint after the step that runs; a second one ends it at once.

    Only the main thread of a process gets signals; in another one nothing changes. Of several ranks all stop at the same step,
    whichever of them got the signal.

    Raises:
        SystemExit: Code 143, once the block has ended: a SIGTERM came.
    """
    if not in_main_thread():
        yield
        return
    without_jit(trainer)
    stop = StopAtSigterm(trainer)
    trainer.add_callback(stop)
    old = signal.signal(signal.SIGTERM, stop.on_signal)
    stop.old = signal.SIG_DFL if old is None else old  # None: a handler that Python did not set
    try:
        yield
        if stop.agreed:
            trainer.accelerator.wait_for_everyone()  # a launcher kills the others as soon as one has left
    finally:
        signal.signal(signal.SIGTERM, stop.old)
        trainer.remove_callback(stop)
    if stop.agreed:
        if trainer.is_world_process_zero():
            say_how_to_go_on(trainer, "SIGTERM", logging.WARNING)
        raise SystemExit(TERMINATED)
    if stop.asked:  # after the last moment at which the ranks ask each other
        os.kill(os.getpid(), signal.SIGTERM)


def without_jit(trainer: Trainer) -> None:
    """Take transformers' own callback for SIGTERM away, which `enable_jit_checkpoint` sets.

    It ends with exit code 0, as if the training were done, so that nobody starts the job again; it waits 3 s, asks no other
    rank, and may save in mid-step, which no run that was not interrupted would do. From the trainer's construction on it keeps
    the signal to itself, in ranking too.
    """
    theirs = trainer.pop_callback(JITCheckpointCallback) if in_main_thread() else None
    if theirs is not None:
        theirs.on_train_end(trainer.args, trainer.state, trainer.control)  # sets the old handler again


def in_main_thread() -> bool:
    """Whether this thread may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


class StopAtSigterm(TrainerCallback):
    """Ends the training once a rank got a SIGTERM.

    Attributes:
        asked: Whether this process got one.
        agreed: Whether all ranks know that one did.
        saved: The step of the last checkpoint of this training.
        old: The handler before.
    """

    def __init__(self, trainer: Trainer):
        """Take the trainer."""
        self.trainer, self.process = trainer, os.getpid()
        self.asked = self.agreed = False
        self.saved: int | None = None
        self.old: Callable | int = signal.SIG_DFL

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember it; the second one, or one to a forked child of this process, does what it did before."""
        if self.asked or os.getpid() != self.process:
            signal.signal(signal.SIGTERM, self.old)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.asked = True

    def stopping(self) -> bool:
        """Whether any rank got one; all ranks ask at the same moments."""
        if self.asked:
            self.trainer.accelerator.set_trigger()
        self.agreed = self.agreed or self.trainer.accelerator.check_trigger()
        return self.agreed

    def on_train_begin(self, args: object, state: object, control: object, **rest: object) -> None:
        """Let the workers of the data loader outlive a SIGTERM that goes to the whole process group, as torchrun's does."""
        loader = getattr(rest["train_dataloader"], "base_dataloader", rest["train_dataloader"])  # accelerate wraps it
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.worker_init_fn = functools.partial(outlive, loader.worker_init_fn)

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Save and stop; at the end of an epoch only when that was judged."""
        if self.stopping() and not at_end(state):
            control.should_save = control.should_training_stop = True

    def on_save(self, args: object, state: object, control: object, **rest: object) -> None:
        """Remember the step."""
        self.saved = state.global_step

    def on_epoch_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Save and stop; where the epoch was left before its end, do not judge what an uninterrupted run would not."""
        if self.stopping():
            control.should_training_stop = True
            if not at_end(state):
                control.should_log = control.should_evaluate = False
            control.should_save = control.should_evaluate or self.saved != state.global_step

    def on_train_end(self, args: object, state: object, control: object, **rest: object) -> None:
        """Save what no checkpoint has, if the signal came while the last step was judged."""
        if self.stopping() and self.saved != state.global_step and not args.load_best_model_at_end:
            self.trainer._save_checkpoint(self.trainer.model, self.trainer._trial)


def at_end(state: object) -> bool:
    """Whether the step that ended is the last of its epoch or of the training."""
    return state.epoch == int(state.epoch) or state.global_step >= state.max_steps


def outlive(start: Callable[[int], None] | None, worker: int) -> None:
    """In a worker of a data loader: go on for a while after a SIGTERM, so that the step can end, then leave quietly."""
    if start is not None:
        start(worker)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_STAYS))


@contextmanager
def advice(trainer: Trainer) -> Iterator[None]:
    """Whatever ends the training in this block, say which checkpoint is whole and how to go on; the exception goes on."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if trainer._trial is None:  # one of a hyperparameter search is not gone on with
            what = told(error, trainer.args)
            try:
                say_how_to_go_on(trainer, what, logging.ERROR)
            except RuntimeError as late:  # torch's handler of SIGCHLD raises wherever it is: a worker of the data loader died
                say_how_to_go_on(trainer, f"{what}, and {told(late, trainer.args)}", logging.ERROR)
        raise


def told(error: BaseException, args: TrainingArguments) -> str:
    """What an exception says, and what it means where it does not say that."""
    said = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    if "inline_container" in said or "PytorchStreamWriter" in said:
        return f"{said} (torch says so where a file could not be written; a full disk, or the limit of a file's size)"
    if isinstance(error, (ConnectionError, EOFError)) and args.dataloader_num_workers:
        return f"{said} (a worker of the data loader may have died)"
    return said


def say_how_to_go_on(trainer: Trainer, what: str, level: int) -> None:
    """Log one line: what ended the training, at which step, what there is to go on from, and how."""
    output, state = trainer._get_output_dir(trainer._trial), trainer.state
    try:
        found, broken = newest(output)
    except OSError as error:
        found, broken = None, {output: f"it cannot be read ({error})"}
    passed = f" ({'; '.join(f'{name} is not whole: {why}' for name, why in broken.items())})" if broken else ""
    if found is None:
        go_on = f"{output} has no whole checkpoint{passed}: start anew, with save_strategy and save_steps to lose less"
    else:
        cause = "once the cause is gone, " if level == logging.ERROR else ""
        go_on = f"the last whole checkpoint is {found}{passed}: {cause}go on with train(resume_from_checkpoint=True)"
    logger.log(level, "training ended at step %d of %d by %s; %s", state.global_step, state.max_steps, what, go_on)
