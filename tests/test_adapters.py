"""Students with adapters (PEFT) through KDPruneTrainer, from the first change to the saved model."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from small import logits, tiny_bert
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_kdprune import find_sites, load_pretrained
from hf_kdprune.adapters import FILE, load

SETTINGS = {"learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "budget": "macs=0.4"}


@pytest.fixture
def adapted(make, lora):
    """A trainer whose student has adapters; two of them are the same."""

    def build(**settings):
        return make(model=lora(tiny_bert(spread=0.2)), **{**SETTINGS, **settings})

    return build


def same(one, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


class Movement(TrainerCallback):
    """What training changed, looked at before it is judged, and perhaps taken back."""

    def on_train_begin(self, args, state, control, model, **_):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_end(self, args, state, control, model, **_):
        self.moved = {name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])}


def test_only_adapters_train_and_the_teacher_is_the_student_before_the_change(adapted):
    watch = Movement()
    trainer = adapted(callbacks=[watch])
    expected, before = logits(trainer.model), trainer.model.num_parameters()
    trainer.train()
    assert watch.moved and all("lora_" in name for name in watch.moved)
    assert torch.equal(logits(trainer.teacher), expected)
    assert trainer.model.num_parameters() < before and 0.3 < trainer.plan.budget["reached"] <= 0.4


def test_the_saved_model_has_its_adapters_merged(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["hf_kdprune.measure"], "SECONDS", 0.05)  # the name in the package is the function
    trainer = adapted()
    trainer.train()
    trainer.save_model(str(tmp_path / "compact"))
    for model in (
        load_pretrained(tmp_path / "compact"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact", trust_remote_code=True),
    ):
        assert not any("lora" in name for name in model.state_dict())
        assert torch.allclose(logits(model), logits(trainer.model), atol=1e-5)
    assert any("lora_" in name for name, _ in trainer.model.named_parameters())  # the one in memory still has them
    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    assert report["model"]["architecture"] == "BertForSequenceClassification"
    assert report["size"]["teacher"]["params"] == tiny_bert().num_parameters()
    assert report["size"]["compact"]["params"] == load_pretrained(tmp_path / "compact").num_parameters()


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "gradual", "pruning_stages": 2, "max_steps": 8}], ids=["at once", "stages"]
)
def test_resuming_gives_the_model_of_the_uninterrupted_run(adapted, tmp_path, settings):
    whole = adapted(output=tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 4):
        output = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        resumed = adapted(output=output, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.plan.kept == whole.plan.kept and resumed.recovery == whole.recovery
        assert same(resumed.model, whole.model)


def test_a_training_checkpoint_is_an_ordinary_model_and_holds_base_and_adapters_apart(adapted, tmp_path):
    trainer = adapted(max_steps=2, auxiliary_weight=1.0, output=tmp_path)
    seen = {}

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model, **_):
            seen.update({name: t.clone() for name, t in model.state_dict().items()}, output=logits(model))

    trainer.add_callback(Look())
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert torch.allclose(logits(load_pretrained(folder)), seen.pop("output"), atol=1e-5)
    held = load_file(folder / FILE)
    assert not any("auxiliary" in name for name in held) and any("auxiliary" in name for name in seen)
    assert all(torch.equal(tensor, seen[name]) for name, tensor in held.items()) and any("lora_B" in name for name in held)


def test_the_best_of_the_checkpoints_is_taken_back(adapted, monkeypatch):
    falling = iter(range(100, 0, -1))
    trainer = adapted(
        metrics=lambda _: {"falling": float(next(falling))},
        **{"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
        metric_for_best_model="falling",
    )
    best, judged = {}, iter([2.0, 1.0])
    monkeypatch.setattr(trainer, "held_out_loss", lambda: next(judged))  # so that nothing is taken back to before training

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 2:
                best.update({name: t.clone() for name, t in model.state_dict().items()})

    trainer.add_callback(Look())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and trainer.recovery["kept"] == "after"
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_checkpoint_of_other_adapters_is_refused(adapted, make, lora, tmp_path):
    trainer = adapted(max_steps=2, output=tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    held = load_file(folder / FILE)
    with pytest.raises(ValueError, match="differs in .* wrap the student by the same PEFT config"):
        load(lora(tiny_bert()), folder)  # as before surgery
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="is not there, and has not"):
        load(trainer.model, folder)
    assert held and not load(tiny_bert(), folder)  # one without adapters has another way


def test_sites_are_those_of_the_model_under_the_adapters(lora):
    plain, wrapped = find_sites(tiny_bert()), find_sites(lora(tiny_bert()))
    assert [(s.kind, s.total) for s in plain] == [(s.kind, s.total) for s in wrapped]
