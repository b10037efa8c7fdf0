"""SIGTERM and whatever else ends a training: see tests/faults for the same with processes that really die."""

import logging
import os
import signal
import threading

import pytest
import torch
from small import logits, tiny_bert
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_kdprune import interrupts
from hf_kdprune.interrupts import TERMINATED, StopAtSigterm, advice, until_sigterm, without_jit
from hf_kdprune.publish.whole import last_whole, why_broken

HELPS = {"repair": False, "learning_rate": 1e-3}  # with these training brings back what pruning took, so that it is kept
STEPS = {"save_strategy": "steps", "save_steps": 50, "max_steps": 6, **HELPS}  # 11 steps an epoch


class Signalled(TrainerCallback):
    """Sends this process a SIGTERM, once, at an event of a step."""

    def __init__(self, event, step):
        setattr(self, event, self.at)
        self.step, self.judged = step, []

    def at(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)

    def on_log(self, args, state, control, logs, **_):
        self.judged += [state.global_step] if "eval_loss" in logs else []


@pytest.fixture(autouse=True)
def same_handler_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def stopped(trainer):
    with pytest.raises(SystemExit) as end, until_sigterm(trainer):
        trainer.train()
    assert end.value.code == TERMINATED == 143
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, StopAtSigterm)]


@pytest.mark.parametrize(
    ("event", "order"),
    [("on_step_begin", "random"), ("on_pre_optimizer_step", "group_by_length"), ("on_step_begin", "sequential")],
)
def test_the_step_ends_and_is_saved_and_the_rest_gives_the_same_model(make, tmp_path, caplog, event, order):
    settings = {**STEPS, "train_sampling_strategy": order}
    whole = make(output=tmp_path / "whole", model=tiny_bert(spread=0.2), **settings)
    whole.train()
    assert whole.recovery["kept"] == "after"  # else all runs would end alike
    with caplog.at_level(logging.WARNING):
        stopped(make(output=tmp_path / "cut", model=tiny_bert(spread=0.2), callbacks=[Signalled(event, 2)], **settings))
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3" and why_broken(checkpoint) is None
    assert (
        f"training ended at step 3 of 6 by SIGTERM; the last whole checkpoint is {checkpoint}: "
        "go on with train(resume_from_checkpoint=True)" in caplog.messages
    )
    resumed = make(output=tmp_path / "cut", model=tiny_bert(spread=0.2), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_a_run_that_died_after_its_last_checkpoint_trains_no_further(make, tmp_path):
    """transformers itself trains one step more where the last step is not the end of an epoch."""
    whole = make(model=tiny_bert(spread=0.2), **STEPS)
    whole.train()
    assert whole.recovery["kept"] == "after" and last_whole(tmp_path / "out").endswith("checkpoint-6")
    resumed = make(model=tiny_bert(spread=0.2), **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.parametrize(
    ("step", "save", "at", "judged"),
    [
        (4, "no", 5, []),  # an epoch that is left in its middle is not judged
        (10, "no", 11, [11]),  # one that ended is, before it is saved
        (10, "epoch", 11, [11]),
        (21, "no", 22, [11, 22]),  # the last step
    ],
)
def test_epochs_are_judged_as_without_a_signal(make, tmp_path, step, save, at, judged):
    callback = Signalled("on_step_begin", step)
    settings = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": save}
    trainer = make(callbacks=[callback], output=tmp_path / "out", **settings)
    stopped(trainer)
    assert callback.judged == judged
    assert last_whole(tmp_path / "out") == str(tmp_path / "out" / f"checkpoint-{at}")
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == judged


def test_a_signal_while_the_last_step_is_judged(make, tmp_path):
    trainer = make(callbacks=[Signalled("on_evaluate", 4)], max_steps=4, eval_strategy="steps", eval_steps=4)
    stopped(trainer)
    assert last_whole(tmp_path / "out").endswith("checkpoint-4")


def test_the_checkpoint_of_that_step_is_written_once(make, tmp_path, monkeypatch):
    trainer, saved = make(callbacks=[Signalled("on_step_begin", 2)], **{**STEPS, "save_steps": 3}), []
    save = trainer._save_checkpoint
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *a, **k: saved.append(trainer.state.global_step) or save(*a, **k))
    stopped(trainer)
    assert saved == [3]


def test_the_best_checkpoint_is_chosen_as_without_a_signal(make, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "num_train_epochs": 2, **HELPS}
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", **best}
    whole = make(output=tmp_path / "whole", model=tiny_bert(spread=0.2), **settings)
    whole.train()
    assert whole.recovery["kept"] == "after"
    stopped(make(output=tmp_path / "cut", model=tiny_bert(spread=0.2), callbacks=[Signalled("on_step_begin", 10)], **settings))
    resumed = make(output=tmp_path / "cut", model=tiny_bert(spread=0.2), **settings)
    resumed.train(resume_from_checkpoint=last_whole(tmp_path / "cut"))
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_the_second_signal_and_that_of_a_forked_child_go_to_the_old_handler(make, monkeypatch):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("old"))
    try:
        trainer = make(max_steps=1)
        with pytest.raises(KeyError), until_sigterm(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == ["old"]
            raise KeyError  # goes on as it is
        with until_sigterm(trainer):
            (stop,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, StopAtSigterm)]
            monkeypatch.setattr(stop, "process", 1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert got == ["old", "old"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_training_is_not_lost(make):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("old"))
    try:
        with until_sigterm(make(max_steps=1)):
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == []
        assert got == ["old"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_changes(make):
    trainer, seen = make(max_steps=1), []

    def train():
        with until_sigterm(trainer):
            trainer.train()
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before] and trainer.state.global_step == 1


def test_the_callback_of_transformers_is_replaced(make, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(callbacks=[Signalled("on_step_begin", 2)], enable_jit_checkpoint=True, **STEPS)
    without_jit(trainer)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
    stopped(trainer)
    assert last_whole(tmp_path / "out").endswith("checkpoint-3")


class Fault(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (FloatingPointError("the loss is nan"), "FloatingPointError: the loss is nan"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_fault_says_how_to_go_on(make, tmp_path, caplog, error, said):
    trainer = make(callbacks=[Fault(error)], **{**STEPS, "save_steps": 1})
    with pytest.raises(type(error)) as raised, advice(trainer):
        trainer.train()
    assert raised.value is error
    assert (
        f"training ended at step 3 of 6 by {said}; the last whole checkpoint is {tmp_path / 'out' / 'checkpoint-2'}: "
        "once the cause is gone, go on with train(resume_from_checkpoint=True)" in caplog.messages
    )


def test_a_fault_before_any_checkpoint_says_so(make, tmp_path, caplog):
    trainer = make(callbacks=[Fault(RuntimeError("a worker died"))], **STEPS)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(RuntimeError), advice(trainer):
        trainer.train()
    (said,) = {m for m in caplog.messages if "training ended" in m}
    assert "by RuntimeError: a worker died; " in said and "has no whole checkpoint" in said
    assert "checkpoint-1 is not whole: trainer_state.json, which is written last, is missing" in said
    assert "start anew, with save_strategy and save_steps" in said


def test_advice_does_not_hide_the_fault(make, monkeypatch, caplog):
    def unreadable(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hf_kdprune.interrupts.newest", unreadable)
    with pytest.raises(ZeroDivisionError), advice(make()):
        raise ZeroDivisionError
    assert "it cannot be read ([Errno 13] Permission denied)" in caplog.text


def test_advice_outlives_what_torch_says_of_a_dead_worker_meanwhile(make, tmp_path, monkeypatch, caplog):
    answers = iter([RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1."), (None, {})])

    def newest(_):
        if isinstance(answer := next(answers), RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr("hf_kdprune.interrupts.newest", newest)
    with pytest.raises(ConnectionResetError), advice(make()):
        raise ConnectionResetError(104, "Connection reset by peer")
    (said,) = caplog.messages
    assert "by ConnectionResetError: [Errno 104] Connection reset by peer, and RuntimeError: DataLoader worker (pid 7)" in said


@pytest.mark.parametrize(
    ("error", "workers", "said"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), 0, "a full disk"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 0, "a full disk"),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "a worker of the data loader may have died"),
        (ConnectionResetError(104, "Connection reset by peer"), 0, None),
        (ValueError("one\ntwo"), 0, None),
    ],
)
def test_what_does_not_say_what_happened_is_explained(make, error, workers, said):
    told = interrupts.told(error, make(dataloader_num_workers=workers).args)
    assert told.startswith(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    assert told.endswith(str(error).splitlines()[0]) if said is None else said in told
