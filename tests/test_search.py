"""Hyperparameter search, and `model_init`: each training begins with a student of its own, which is pruned anew."""

import pytest
import torch
from small import logits, rows, tiny_bert

from hf_kdprune import KDPruneConfig, KDPruneTrainer, find_sites

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def searching(make, tmp_path):
    """A trainer that makes its student itself, and keeps each one of them."""

    def build(**settings):
        students = []

        def student(trial):
            students.append(tiny_bert(spread=0.2))
            return students[-1]

        trainer = make(model_init=student, **{"max_steps": 2, "eval_strategy": "no", **settings})
        trainer.students = students
        return trainer

    return build


class Watch:
    """What a trainer is like at the end of each training."""

    def __init__(self, trainer):
        self.trainer, self.seen, self.end = trainer, [], type(trainer).train
        trainer.train = self.train

    def train(self, **asked):
        output = self.end(self.trainer, **asked)
        t = self.trainer
        logged = [entry["loss_logits"] for entry in t.state.log_history if "loss_logits" in entry]
        macs = find_sites(t.model, t.calibration[0], t.plan.budget["seq_len"]).macs()
        self.seen.append((t.model, t.teacher, t.plan, t.loss_terms, macs / t.course.sites.macs(), logged))
        return output


def test_a_search_prunes_a_new_student_for_each_trial_with_its_settings(searching):
    def space(trial):
        return {
            "budget": trial.suggest_categorical("budget", ["macs=0.5", "macs=0.8"]),
            "temperature": trial.suggest_float("temperature", 1.0, 4.0),
            "logits_weight": trial.suggest_float("logits_weight", 0.5, 2.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        }

    trainer = searching()
    watch = Watch(trainer)
    sampler = optuna.samplers.GridSampler({"budget": ["macs=0.5", "macs=0.8"], "temperature": [1.0, 3.0]} | FIXED, seed=0)
    best = trainer.hyperparameter_search(space, compute_objective=lambda m: m["eval_loss"], n_trials=4, sampler=sampler)
    assert best.hyperparameters.keys() == {"budget", "temperature", "logits_weight", "learning_rate"}
    asked = {(plan.budget["asked"], terms.temperature) for _, _, plan, terms, _, _ in watch.seen}
    assert asked == {(budget, t) for budget in ("macs=0.5", "macs=0.8") for t in (1.0, 3.0)}
    for model, teacher, plan, terms, macs, logged in watch.seen:
        share = float(plan.budget["asked"].partition("=")[2])
        assert share - 0.2 < macs <= share and macs == pytest.approx(plan.budget["reached"])
        assert terms.weights["logits"] == 1.5 and logged
        assert torch.equal(logits(teacher), logits(tiny_bert(spread=0.2))) and not torch.equal(logits(model), logits(teacher))
    assert len({id(model) for model, *_ in watch.seen}) == 4 == len(trainer.students) - 1  # and the one that was checked


FIXED = {"logits_weight": [1.5], "learning_rate": [1e-3]}


def test_checkpoints_of_trials_lie_apart_and_stages_find_theirs(searching, tmp_path):
    trainer = searching(schedule="gradual", pruning_stages=2, max_steps=4, save_strategy="steps", save_steps=2, output=tmp_path)
    watch = Watch(trainer)
    space = lambda trial: {"temperature": trial.suggest_float("temperature", 1.0, 4.0)}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=2, compute_objective=lambda m: m["eval_loss"])
    assert all(macs <= 0.5 for *_, macs, _ in watch.seen)
    assert {p.parent.name for p in tmp_path.rglob("checkpoint-4")} == {"run-0", "run-1"}
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_search_judges_the_model_that_is_kept(searching, monkeypatch):
    """Recovery that does harm is taken back after the last evaluation."""
    trainer = searching(learning_rate=50.0, max_grad_norm=1e9, eval_strategy="steps", eval_steps=1)
    judged = []

    def objective(metrics):
        judged.append((trainer.is_in_train, metrics["eval_loss"]))
        return metrics["eval_loss"]

    space = lambda trial: {"temperature": trial.suggest_float("temperature", 1.0, 4.0)}  # noqa: E731
    best = trainer.hyperparameter_search(space, n_trials=1, compute_objective=objective)
    assert [training for training, _ in judged] == [True, True, False]
    assert best.objective == judged[-1][1] < judged[-2][1]


def test_a_trial_that_is_given_up_leaves_nothing_to_the_next(searching, caplog):
    class GiveUp(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 0

    trainer = searching(eval_strategy="steps", eval_steps=1)
    watch = Watch(trainer)
    space = lambda trial: {"temperature": trial.suggest_float("temperature", 1.0, 4.0)}  # noqa: E731
    best = trainer.hyperparameter_search(space, n_trials=2, pruner=GiveUp(), compute_objective=lambda m: m["eval_loss"])
    assert best.run_id == "1" and len(watch.seen) == 1 and "training ended" not in caplog.text
    assert torch.equal(logits(watch.seen[0][1]), logits(tiny_bert(spread=0.2)))


def test_the_best_settings_train_afterwards(searching, tmp_path):
    trainer = searching()
    space = lambda trial: {"budget": trial.suggest_categorical("budget", ["macs=0.6"])}  # noqa: E731
    best = trainer.hyperparameter_search(space, n_trials=1, compute_objective=lambda m: m["eval_loss"])
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.plan.budget["asked"] == "macs=0.6" and trainer.recovery is not None


def test_model_init_alone(searching):
    """The first training takes the student that was checked, or pruned by hand; each later one a new student."""
    trainer = searching()
    plan = trainer.prune()
    first = trainer.model
    trainer.train()
    assert trainer.model is first and trainer.plan is plan and len(trainer.students) == 1
    trainer.train()
    assert trainer.model is not first and trainer.plan.kept == plan.kept and len(trainer.students) == 2
    assert torch.equal(logits(trainer.teacher), logits(tiny_bert(spread=0.2)))


def test_another_teacher_stays_from_trial_to_trial(searching):
    teacher = tiny_bert(layers=3, seed=1)
    trainer = searching(teacher=teacher)
    watch = Watch(trainer)
    space = lambda trial: {"features_weight": trial.suggest_float("features_weight", 0.5, 2.0)}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=2, compute_objective=lambda m: m["eval_loss"])
    assert [taught is teacher for _, taught, *_ in watch.seen] == [True, True]


def test_a_budget_that_needs_other_samples_is_refused(searching):
    trainer = searching()
    space = lambda trial: {"budget": trial.suggest_categorical("budget", ["loss=0.2"])}  # noqa: E731
    with pytest.raises(ValueError, match="needs samples that judge it.*got 'loss=0.2' later"):
        trainer.hyperparameter_search(space, n_trials=1)


@pytest.mark.parametrize(
    ("case", "error", "match"),
    [
        ({}, RuntimeError, "either a `model` or `model_init`"),
        ({"model": tiny_bert(), "model_init": tiny_bert}, ValueError, "but not both"),
        ({"model": tiny_bert(), "args": None}, ValueError, "must be a KDPruneConfig, got NoneType"),
    ],
)
def test_one_student_and_settings_must_be_given(tmp_path, case, error, match):
    args = KDPruneConfig(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(error, match=match):
        KDPruneTrainer(**{"args": args, "train_dataset": rows(), **case})
