"""KDPruneTrainer on a tiny model: what a user of a Trainer would miss if it broke."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from small import logits, rows, tiny_bert
from transformers import TrainerCallback

from hf_kdprune import Plan, find_sites, load_pretrained
from hf_kdprune.prune import latency
from hf_kdprune.prune.importance import mean_length
from hf_kdprune.prune.judge import feature_error


def test_train_makes_the_model_smaller_and_logs_each_term(make):
    trainer = make(auxiliary_weight=0.5, budget="macs=0.5")
    before = trainer.model.num_parameters()
    trainer.train()
    assert trainer.model.num_parameters() < before
    assert 0.4 < trainer.plan.budget["reached"] <= 0.5
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    for entry in logged:
        terms = {k: v for k, v in entry.items() if k.startswith("loss_")}
        assert set(terms) == {"loss_task", "loss_logits", "loss_features", "loss_auxiliary"}
        weights = {"loss_task": 1, "loss_logits": 1, "loss_features": 1, "loss_auxiliary": 0.5}
        assert sum(weights[k] * v for k, v in terms.items()) == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.parametrize("term", ["task", "logits", "features", "auxiliary"])
def test_each_term_alone(make, term):
    weights = {f"{t}_weight": float(t == term) for t in ("task", "logits", "features", "auxiliary")}
    trainer = make(max_steps=2, **weights)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert {k for k in entry if k.startswith("loss_")} == {f"loss_{term}"}


def test_terms_reach_tensorboard(make, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make(report_to="tensorboard", max_steps=4).train()
    events = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    events.Reload()
    assert {"train/loss_task", "train/loss_logits", "train/loss_features"} <= set(events.Tags()["scalars"])


def test_prune_alone_keeps_the_teacher_as_it_was(make):
    model = tiny_bert()
    expected = logits(model)
    trainer = make(model=model, budget="macs=0.4")
    plan = trainer.prune()
    assert isinstance(plan, Plan) and trainer.plan is plan
    assert torch.equal(logits(trainer.teacher), expected)
    assert trainer.repairs and all(r.after < r.before for r in trainer.repairs if r.accepted)
    with pytest.raises(ValueError, match="already"):
        trainer.prune()


def test_a_proposal_changes_nothing_and_is_what_prune_does(make):
    model = tiny_bert().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = make(model=model, budget="macs=0.5", keep=["bert.encoder.layer.0.attention:3"], least=1)
    plan = trainer.propose()
    assert trainer.model is model and model.training and trainer.plan is None and not trainer.repairs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert 3 in plan.sites[0].kept and all(site.kept for site in plan.sites) and plan.budget["reached"] <= 0.5
    assert make(model=tiny_bert(), budget="macs=0.5", keep=["bert.encoder.layer.0.attention:3"], least=1).prune() == plan
    assert trainer.prune(plan) is plan and trainer.plan is plan
    with pytest.raises(ValueError, match="already"):
        trainer.propose()


def test_a_proposal_is_edited_saved_and_replayed(make, tmp_path):
    plan = make(budget="macs=0.5").propose()
    plan.sites[0].kept, plan.sites[3].kept = [0, 2, 3], list(range(24))
    plan.save(tmp_path / "plan.json")
    trainer = make(budget="macs=0.5")
    trainer.prune(Plan.load(tmp_path / "plan.json"))
    assert trainer.plan.kept == plan.kept
    assert trainer.model.config.kdprune["sites"][plan.sites[0].name]["units"] == 3
    macs = [find_sites(m, trainer.calibration[0], plan.budget["seq_len"]).macs() for m in (trainer.model, trainer.teacher)]
    assert trainer.plan.budget["reached"] == pytest.approx(macs[0] / macs[1])


def test_a_plan_for_other_weights_is_refused_before_surgery(make):
    plan, other = make().propose(), make(model=tiny_bert(seed=1))
    before = other.model.num_parameters()
    with pytest.raises(ValueError, match="made for other weights"):
        other.prune(plan)
    assert other.model.num_parameters() == before


def test_a_budget_in_time(make, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    trainer = make(model=tiny_bert(layers=3), budget="latency=0.9", latency_batch=4, max_steps=1)
    trainer.train()
    budget = trainer.plan.budget
    assert budget["asked"] == "latency=0.9" and budget["batch"] == 4 and budget["device"] and budget["reached"] > 0
    assert budget["predicted"] <= 0.9 and budget["seq_len"] == mean_length(trainer.calibration)


def test_a_budget_in_feature_loss(make):
    trainer = make(model=tiny_bert(spread=0.2), budget="loss=0.2", train_dataset=rows(200))
    plan = trainer.prune()
    assert plan.budget["loss"] <= 0.2 and 0.1 < plan.budget["reached"] < 1 and plan.budget["asked"] == "loss=0.2"
    judge = trainer.batches_of(trainer._judging)
    assert feature_error(trainer.model, trainer.teacher, judge, trainer.lesson.matches) == pytest.approx(plan.budget["loss"])


@pytest.mark.parametrize(
    ("metrics", "settings", "match"),
    [
        (lambda p: {"f1": 1.0, "accuracy": 1.0}, {}, r"must be one of \['accuracy', 'f1'\].*got None"),
        (lambda p: {"f1": 1.0}, {"metric_for_best_model": "bleu"}, r"must be one of \['f1'\].*got 'bleu'"),
        (lambda p: {"f1": 0.0}, {}, "f1 of the model as given is 0.0: choose another metric_for_best_model"),
    ],
)
def test_which_metric_may_fall_must_be_clear(make, metrics, settings, match):
    with pytest.raises(ValueError, match=match):
        make(budget="loss=1%", metrics=metrics, **settings).propose()


@pytest.mark.parametrize("greater", [True, False])
def test_a_budget_in_a_metric(make, greater):
    """A metric by hand: how near the logits are to what they were, so that it falls with the size."""
    model = tiny_bert(spread=0.2)
    whole = []

    def near(predicted):
        whole.append(predicted.predictions)
        apart = float(np.abs(predicted.predictions - whole[0]).mean() / np.abs(whole[0]).std())
        return {"near": 1 - apart, "far": 1 + apart, "other": 0.0}

    settings = (
        {"metric_for_best_model": "near"} if greater else {"metric_for_best_model": "eval_far", "greater_is_better": False}
    )
    trainer = make(model=model, budget="loss=10%", metrics=near, train_dataset=rows(200), **settings)
    plan = trainer.propose()
    assert model.num_parameters() == tiny_bert().num_parameters()
    assert 0 < plan.budget["loss"] <= 0.1 and 0.1 < plan.budget["reached"] < 1 and plan.budget["before"] == 1
    assert plan.budget["metric"] == ("near" if greater else "far")
    assert len(whole) <= 9 and all(len(p) == 18 for p in whole)  # a tenth of what recovery's judges left


def test_what_judges_a_loss_is_seen_by_nothing_else(make):
    trainer = make(budget="loss=0.2", train_dataset=rows(200))
    judging = {tuple(ids) for ids in trainer._judging["input_ids"]}
    held = {tuple(ids[ids > 0].tolist()) for batch in trainer._held_out for ids in batch["input_ids"]}
    trained = {tuple(ids) for ids in trainer.train_dataset["input_ids"]}
    calibrated = {tuple(ids[ids > 0].tolist()) for batch in trainer.calibration for ids in batch["input_ids"]}
    assert len(judging) == 18 and not judging & (held | trained | calibrated)
    assert make(train_dataset=rows(200))._judging is None


@pytest.mark.parametrize(("layers", "hidden"), [(3, 32), (2, 48), (4, 16)])
def test_another_teacher_of_other_depth_or_width(make, layers, hidden):
    teacher = tiny_bert(layers=layers, hidden=hidden, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = make(teacher=teacher, max_steps=3)
    trainer.train()
    assert trainer.teacher is teacher
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert np.isfinite(entry["loss_features"]) and np.isfinite(entry["loss_logits"])


def test_evaluation_asks_no_teacher(make):
    trainer = make(max_steps=1)
    trainer.train()
    asked = []
    trainer.teacher.register_forward_hook(lambda *_: asked.append(1))
    metrics = trainer.evaluate()
    assert not asked and "eval_accuracy" in metrics


def test_recovery_that_does_harm_is_taken_back(make):
    trainer = make(learning_rate=50.0, max_steps=5, max_grad_norm=1e9)
    trainer.prune()
    expected = logits(trainer.model)
    trainer.train()
    assert trainer.recovery["kept"] == "before"
    assert not trainer.recovery["held_out_after"] < trainer.recovery["held_out_before"]
    assert torch.equal(logits(trainer.model), expected)


def test_held_out_samples_are_not_trained_on(make):
    data = rows(100)
    trainer = make(train_dataset=data, max_steps=1)
    held = {tuple(ids[ids > 0].tolist()) for batch in trainer._held_out for ids in batch["input_ids"]}
    trained = {tuple(ids) for ids in trainer.train_dataset["input_ids"]}
    calibrated = {tuple(ids[ids > 0].tolist()) for batch in trainer.calibration for ids in batch["input_ids"]}
    assert len(trainer.train_dataset) == 90 and not held & trained and calibrated <= trained


def test_without_labels_the_teacher_is_enough(make):
    trainer = make(train_dataset=rows(labelled=False), task_weight=0.0, max_steps=2)
    trainer.train()
    assert trainer.recovery is not None


def test_same_seed_same_model(make, tmp_path):
    runs = []
    for name in ("a", "b"):
        trainer = make(output=tmp_path / name, max_steps=3)
        trainer.train()
        runs.append(trainer)
    assert runs[0].plan.kept == runs[1].plan.kept
    assert torch.equal(logits(runs[0].model), logits(runs[1].model))


def test_saved_model_reloads_with_card_and_report(make, tmp_path, capsys):
    trainer = make(max_steps=4, auxiliary_weight=1.0)
    trainer.train()
    path = tmp_path / "compact"
    trainer.save_model(str(path))
    assert f'from_pretrained("{path}", trust_remote_code=True)' in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "plan.json", "report.json", "README.md", "modeling_kdprune.py"} <= {
        f.name for f in path.iterdir()
    }
    assert list(path.glob("*.png")) and not [f for f in path.iterdir() if f.name.startswith(".")]
    report = json.loads((path / "report.json").read_text())
    assert report["version"] == 1
    assert set(report["metrics"]) == {"teacher", "pruned", "compact"}
    for name in ("teacher", "compact"):
        assert set(report["size"][name]) == {"params", "macs", "disk_bytes"}
        assert set(report["speed"][name]) == {"latency_ms", "samples_per_second", "peak_memory_bytes"}
    assert report["size"]["compact"]["params"] == trainer.model.num_parameters()
    reached = report["size"]["compact"]["macs"] / report["size"]["teacher"]["macs"]
    assert reached == pytest.approx(report["budget"]["reached"])
    assert report["metrics"]["compact"]["accuracy"] == trainer.evaluate()["eval_accuracy"]
    assert {"seeds", "loss", "environment", "load", "command"} <= set(report)
    assert not any("auxiliary" in name for name in load_pretrained(path).state_dict())
    assert torch.allclose(logits(load_pretrained(path)), logits(trainer.model), atol=1e-6)


class StopAt(TrainerCallback):
    """Ends the process' run as a crash would, after a checkpoint was written."""

    def on_save(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_resume_gives_the_model_of_the_uninterrupted_run(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-3}
    whole = make(output=tmp_path / "whole", **settings)
    whole.train()
    killed = make(output=tmp_path / "killed", callbacks=[StopAt()], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(output=tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plan.kept == whole.plan.kept
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_an_interrupted_checkpoint_is_taken_away(make, tmp_path, monkeypatch):
    trainer = make(save_strategy="steps", save_steps=2, max_steps=4)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_load_best_model_at_end(make):
    trainer = make(
        max_steps=4,
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert (Path(trainer.state.best_model_checkpoint) / "plan.json").is_file()


BAD_BUDGETS = ["macs=2", "mac=0.5", "macs=0", "macs=", "half", "latency=2"]


@pytest.mark.parametrize("budget", BAD_BUDGETS)
def test_no_budget_is_refused(make, budget):
    with pytest.raises(ValueError, match="budget is") as error:
        make(budget=budget)
    assert repr(budget) in str(error.value)


def test_unreachable_budget_is_refused_before_work(make):
    model = tiny_bert()
    with pytest.raises(ValueError, match=r"when every head and neuron is gone: choose a share between"):
        make(model=model, budget="params=0.001")
    assert model.num_parameters() == tiny_bert().num_parameters()


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ({"teacher": tiny_bert(labels=("a", "b"))}, "same labels"),
        ({"teacher": tiny_bert(labels=("good", "bad"))}, "same labels"),
        ({"teacher": tiny_bert(labels=("bad", "so", "good"))}, "same labels"),
        ({"teacher": tiny_bert(vocab=99)}, "same tokens"),
        ({"teacher_cache": "here"}, "features_weight=1"),
        ({"teacher_top_k": 3}, "teacher_top_k"),
        ({"train_dataset": rows(labelled=False)}, "need labels"),
        ({"train_dataset": rows(0)}, "at least 4 samples, got 0"),
        ({"train_dataset": rows().to_iterable_dataset()}, "must have a length"),
        ({"model": build("squeezebert")}, "no prunable site"),
        ({"importance": "magic"}, "importance must be one of"),
        ({"logits_loss": "l1"}, "logits_loss must be one of"),
        ({"feature_loss": "l1"}, "feature_loss must be one of"),
        ({"layer_map": [[9, 1]]}, "layer_map must be"),
        ({"layer_map": "first"}, "layer_map must be"),
        ({"task_weight": -1.0}, "must be >= 0"),
        ({"task_weight": 0.0, "logits_weight": 0.0, "features_weight": 0.0}, "not all 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"schedule": "greedy"}, "schedule must be one of"),
        ({"shapes": "square"}, "shapes must be one of"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"keep": ["bert.encoder.layer.9"]}, "near are bert.encoder.layer"),
        ({"keep": ["bert.encoder.layer"]}, "all is gone that keep=.* lets go"),
        ({"least": 1.5}, "least is what each site keeps"),
        ({"least": 0.9}, "all is gone that least=0.9, round_to=8 lets go"),
        ({"latency_batch": 0}, "latency_batch must be at least 1"),
        ({"budget": "loss=1%", "metrics": None}, "compute_metrics is None"),
    ],
)
def test_bad_input_is_refused_before_any_work(make, case, match):
    with pytest.raises(ValueError, match=match):
        make(**case)


def test_output_directory_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="output directory must be writable"):
        make(output=tmp_path / "file" / "out")


def test_import_is_quiet():
    """Importing the package prints nothing and starts nothing."""
    child = subprocess.run([sys.executable, "-c", "import hf_kdprune"], capture_output=True, text=True)
    assert child.returncode == 0 and not child.stdout
