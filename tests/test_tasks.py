"""Every task: the first loss is the same in one batch, in micro-batches and on two ranks, and the job runs to its end."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tasks import TASKS, collate, gradient, rows_of, trainer_of

CLASSIFIERS = ("single_label", "multi_label", "regression", "token_classification", "images")
TERMS = {
    "task": {"task": 1.0},
    "logits": {"logits": 1.0},
    "features": {"features": 1.0},
    "auxiliary": {"auxiliary": 1.0},
}


def agree(a, b):
    assert a.shape == b.shape and float(a.abs().max()) > 0
    assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_give_the_gradient_of_the_batch(task, tmp_path):
    trainer = trainer_of(task, tmp_path, auxiliary_weight=float(task in CLASSIFIERS))
    rows, whole = rows_of(task)[:8], trainer.loss_terms
    for term, weights in TERMS.items():
        if term == "auxiliary" and task not in CLASSIFIERS:
            continue
        for loss in ("mse", "cosine", "relations", "cka") if term == "features" else ("mse",):
            trainer.loss_terms = replace(whole, weights=weights, feature_loss=loss)
            one, two, four = (gradient(trainer, [size] * (8 // size), rows) for size in (8, 4, 2))
            agree(one, two)
            agree(one, four)


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    file = Path(__file__).with_name("tasks.py")
    done = subprocess.run([*launch, str(file), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for task, found in torch.load(tmp_path / "gradients.pt").items():
        auxiliary = float(task in ("single_label", "token_classification"))
        agree(gradient(trainer_of(task, tmp_path / task, auxiliary_weight=auxiliary), [8], rows_of(task)[:8]), found)


@pytest.mark.parametrize("task", TASKS)
def test_the_job_runs_to_its_end(task, tmp_path):
    trainer = trainer_of(task, tmp_path, max_steps=2, per_device_train_batch_size=2, logging_steps=1, evaluate_terms=True)
    trainer.train()
    assert {"loss_task", "loss_logits", "loss_features"} <= trainer.state.log_history[0].keys()
    metrics = trainer.evaluate(rows_of(task, 5))
    assert all(metrics[f"eval_loss_{term}"] >= 0 for term in ("task", "logits", "features"))


def test_the_model_s_own_loss_is_the_task_term(tmp_path):
    for task in TASKS:
        trainer = trainer_of(task, tmp_path / task)
        rows = rows_of(task)[:4]
        batch = collate(rows[:1] if task == "answers" else rows)  # transformers' own lets padding be chosen
        trainer.model.train()
        with torch.no_grad():
            terms, output = trainer.lesson.terms(
                trainer.model, trainer.model, batch, trainer.loss_terms, trainer.lesson.count(trainer.model, [batch])
            )
            expected = trainer.model(**batch).loss
        assert float(terms["task"]) == pytest.approx(float(expected), rel=1e-5), task
