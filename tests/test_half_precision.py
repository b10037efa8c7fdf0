"""Training in mixed and in half precision: it does what was asked in every stage, and leaves the model in its own type."""

import copy
import logging

import pytest
import torch
from small import logits, tiny_bert
from transformers import TrainerCallback

from hf_kdprune import load_pretrained, save_pretrained

HALVES = [torch.bfloat16, torch.float16]


class InWhich(TrainerCallback):
    """Notes of each pass of the student whether it trains, and whether it computes in bfloat16."""

    def __init__(self):
        self.passes = set()

    def watch(self, module, args, output):
        self.passes.add((self.model.training, output.dtype))

    def on_train_begin(self, args, state, control, model=None, **rest):
        self.model, self.passes = model, set()
        self.hook = model.bert.encoder.layer[-1].output.dense.register_forward_hook(self.watch)

    def on_train_end(self, *args, **rest):
        self.hook.remove()
        assert {kind for training, kind in self.passes if training} == {torch.bfloat16}


@pytest.mark.parametrize("schedule", ["one_shot", "gradual"])
def test_bf16_trains_every_stage_in_mixed_precision_and_leaves_a_model_in_float32(make, schedule, tmp_path):
    watch = InWhich()
    trainer = make(bf16=True, use_cpu=True, schedule=schedule, pruning_stages=2, callbacks=[watch], evaluate_terms=True)
    trainer.train()
    assert watch.passes
    assert {p.dtype for p in [*trainer.model.parameters(), *trainer.teacher.parameters()]} == {torch.float32}
    before = trainer.recovery["held_out_after" if trainer.recovery["kept"] == "after" else "held_out_before"]
    assert trainer.held_out_loss() == pytest.approx(before, rel=1e-6)  # judged as it is saved, not in bfloat16
    save_pretrained(trainer.model, tmp_path / "compact", verify=False)
    assert torch.equal(logits(load_pretrained(tmp_path / "compact")), logits(trainer.model))


def test_bf16_trains_again_in_mixed_precision(make):
    watch = InWhich()
    trainer = make(bf16=True, use_cpu=True, callbacks=[watch])
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert watch.passes


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_model_in_half_precision_stays_in_it(make, half, tmp_path):
    trainer = make(
        model=tiny_bert(spread=0.2).to(half),
        use_cpu=True,
        auxiliary_weight=1.0,
        evaluate_terms=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.train()
    assert any(record.accepted for record in trainer.repairs)
    save_pretrained(trainer.model, tmp_path / "compact", verify=False)
    again = load_pretrained(tmp_path / "compact")
    assert {p.dtype for m in (trainer.model, trainer.teacher, again) for p in m.parameters()} == {half}
    assert torch.equal(logits(again), logits(trainer.model))


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_leaves_the_weights_whole(make, flag):
    trainer = make(use_cpu=True, **{flag: True})
    trainer.prune()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.evaluate()
    assert all(torch.equal(now, before[name]) for name, now in trainer.model.state_dict().items())
    assert all(now.dtype == before[name].dtype for name, now in trainer.model.state_dict().items())


def test_fp16_on_a_cpu_says_that_it_does_nothing(make, caplog):
    with caplog.at_level(logging.WARNING):
        make(fp16=True, use_cpu=True)
    assert "fp16=True" in caplog.text and "float32" in caplog.text


def test_fp16_refuses_weights_whose_gradients_it_cannot_scale(make):
    with pytest.raises(ValueError, match="needs weights in float32"):
        make(model=tiny_bert().half(), fp16=True, use_cpu=True)
