"""Teachers of every kind in a KDPruneTrainer, and what trains beside the student: on disk, resumed, refused, broken."""

import copy
from pathlib import Path

import pytest
import torch
from small import rows, tiny_bert
from tasks import collate, rows_of, trainer_of
from transformers import TrainerCallback

from hf_kdprune.distill.teacher import with_labels_of

NO_FEATURES = {"features_weight": 0.0, "max_steps": 4, "save_strategy": "no", "logging_steps": 1}

CACHED = lambda folder: {"teacher_cache": str(folder / "cache")}  # noqa: E731


def log_of(trainer):
    return [entry["loss_logits"] for entry in trainer.state.log_history if "loss_logits" in entry]


def test_a_cached_teacher_teaches_what_the_live_one_does(make, tmp_path):  # noqa: F811
    logs, asked = {}, []
    for name, settings in (("live", {}), ("first", CACHED(tmp_path)), ("second", CACHED(tmp_path))):
        trainer = make(teacher=tiny_bert(seed=1, spread=0.2), output=tmp_path / name, **NO_FEATURES, **settings)
        if name == "second":
            trainer.teacher.register_forward_hook(lambda *_, trainer=trainer: asked.append(trainer.is_in_train))
        trainer.train()
        logs[name] = log_of(trainer)
    assert logs["first"] == pytest.approx(logs["live"], rel=1e-4) and len(logs["live"]) == 4
    assert logs["second"] == logs["first"]
    assert asked and not any(asked)  # it ranks and judges, and is not asked while the student trains


def test_a_cache_of_other_data_is_refused(make, tmp_path):  # noqa: F811
    make(teacher_cache=str(tmp_path / "cache"), **NO_FEATURES).train()
    other = make(teacher_cache=str(tmp_path / "cache"), train_dataset=rows(seed=5), **NO_FEATURES)
    with pytest.raises(ValueError, match="cache"):
        other.train()


def test_a_language_model_learns_from_the_likeliest_words(tmp_path):
    trainer = trainer_of("causal_lm", tmp_path, teacher_cache=str(tmp_path / "cache"), teacher_top_k=5, **NO_FEATURES)
    trainer.train()
    assert all(loss > 0 for loss in log_of(trainer))


def test_labels_in_another_order_are_matched_by_name(make):  # noqa: F811
    student, teacher = tiny_bert(), tiny_bert()
    with torch.no_grad():  # the same model with its labels the other way round
        for tensor in teacher.classifier.parameters():
            tensor.copy_(tensor.flip(0))
    teacher.config.id2label, teacher.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    with pytest.raises(ValueError, match="remap_labels=True"):
        make(model=student, teacher=teacher)
    batch = collate([{"input_ids": torch.tensor([2, 7, 9, 3])}])
    expected = teacher.eval()(**batch).logits
    student.eval()
    assert torch.equal(with_labels_of(student, teacher)(**batch).logits, student(**batch).logits)
    trainer = make(model=student, teacher=teacher, remap_labels=True, max_steps=1)
    trainer.train()
    assert torch.equal(teacher(**batch).logits, expected) and teacher.config.id2label[0] == "good"


def test_what_trains_beside_the_student_is_resumed_and_never_saved_in_it(make, tmp_path):  # noqa: F811
    settings = {"auxiliary_weight": 1.0, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1}
    whole, again = (make(output=tmp_path / name, teacher=tiny_bert(hidden=48, seed=1), **settings) for name in ("a", "b"))
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "kdprune_trained_only.safetensors").is_file()
    again.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b) and "kdprune" not in name
    other = make(output=tmp_path / "c", teacher=tiny_bert(hidden=48, seed=1), **{**settings, "auxiliary_weight": 0.0})
    with pytest.raises(ValueError, match="resume with the same auxiliary_weight"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_named_and_the_last_checkpoint_is_whole(make, tmp_path, who):  # noqa: F811
    teacher = tiny_bert(seed=1)
    trainer = make(teacher=teacher, max_steps=4, save_steps=2, save_strategy="steps", logging_steps=1)
    trainer.prune()
    broken = trainer.model if who == "student" else teacher

    def spoil(module, args, output):
        return output * float("nan") if trainer.state.global_step == 3 and trainer.model.training else output

    broken.bert.encoder.layer[1].output.dense.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=f"the {who}'s features of layer 2"):
        trainer.train()
    again = make(output=Path(trainer.args.output_dir), teacher=copy.deepcopy(tiny_bert(seed=1)), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_labels_may_come_from_the_collator(tmp_path):
    """As with DataCollatorForLanguageModeling: the data set has none."""
    trainer = trainer_of("causal_lm", tmp_path, max_steps=1)
    bare = [{"input_ids": row["input_ids"]} for row in rows_of("causal_lm")]
    made = lambda parts: collate([{**part, "labels": part["input_ids"]} for part in parts])  # noqa: E731
    other = type(trainer)(trainer.teacher, trainer.args, train_dataset=bare, data_collator=made)
    other.train()
    assert other.recovery is not None


def test_the_user_s_own_loss_and_smoothed_labels_are_the_task(make):  # noqa: F811
    def own(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    found = {}
    for name, settings in (("model's", {}), ("own", {"loss": own})):
        trainer = make(max_steps=1, logging_steps=1, gradient_accumulation_steps=2, **settings)
        trainer.train()
        found[name] = [e["loss_task"] for e in trainer.state.log_history if "loss_task" in e]
    assert found["own"] == pytest.approx(found["model's"], rel=1e-5)
    trainer = make(max_steps=1, logging_steps=1, gradient_accumulation_steps=2, label_smoothing_factor=0.3)
    trainer.train()
    (smoothed,) = [e["loss_task"] for e in trainer.state.log_history if "loss_task" in e]
    assert smoothed != pytest.approx(found["own"][0], rel=1e-5) and smoothed == pytest.approx(found["own"][0], rel=0.2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True, "use_cpu": True}, {"train_sampling_strategy": "group_by_length"}],
    ids=["less memory", "bf16", "lengths"],
)
def test_what_a_trainer_can_do_beside_stays(make, settings):  # noqa: F811
    student = tiny_bert()
    if not settings:
        newer = getattr(student, "activation_checkpointing_enable", None)  # its name in transformers of today
        (newer or student.gradient_checkpointing_enable)()
    trainer = make(model=student, max_steps=2, logging_steps=1, auxiliary_weight=1.0, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_a_student_with_adapters_learns(make, lora):  # noqa: F811
    student = lora(tiny_bert())
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    trainer = make(model=student, max_steps=2, logging_steps=1, learning_rate=1e-2)
    trainer.prune()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert trainer.recovery["kept"] == "before" or (moved and moved <= trained)
    assert all(entry["loss_features"] > 0 for entry in trainer.state.log_history if "loss_features" in entry)


def test_a_model_that_training_broke_is_taken_back(make, caplog):  # noqa: F811
    class Break(TrainerCallback):
        def on_train_end(self, args, state, control, model, **rest):
            with torch.no_grad():
                model.classifier.weight.fill_(float("nan"))

    trainer = make(max_steps=1, callbacks=[Break()])
    trainer.train()
    assert trainer.recovery["kept"] == "before" and "cannot be judged" in caplog.text
    assert bool(trainer.model.classifier.weight.isfinite().all())
