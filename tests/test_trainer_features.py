"""What users of a Trainer have beside training: it must go on working when the Trainer prunes and distils."""

import dataclasses
import sys

import pytest
import torch
from small import logits, rows, tiny_bert
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from hf_kdprune import find_sites

CHECKPOINTING = next(  # its name in this transformers
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


def alike(*trainers):
    """Train each from the same state of the generators, whatever was drawn before."""
    for trainer in trainers:
        set_seed(0)
        trainer.train()


def losses(trainer):
    return [[v for k, v in entry.items() if k.startswith("loss")] for entry in trainer.state.log_history if "loss" in entry]


def outputs(model, dataset):
    """Logits and features of each sample, without padding."""
    model.eval()
    with torch.no_grad():
        found = [model(torch.tensor([row["input_ids"]]), output_hidden_states=True) for row in dataset]
    return torch.cat([output.logits for output in found]), [output.hidden_states for output in found]


def test_predictions_are_those_of_the_smaller_model_and_ask_no_teacher(make):
    trainer = make(max_steps=2)
    trainer.train()
    asked, data = [], rows(20, seed=2)
    trainer.teacher.register_forward_hook(lambda *_: asked.append(1))
    output = trainer.predict(data)
    assert torch.allclose(torch.tensor(output.predictions), outputs(trainer.model, data)[0], atol=1e-5) and not asked
    assert output.label_ids.tolist() == data["label"]
    right = (output.predictions.argmax(-1) == output.label_ids).mean()
    assert output.metrics["test_accuracy"] == pytest.approx(right) and "test_loss" in output.metrics


def test_smoothed_labels_are_the_task(make):
    trainer = make(label_smoothing_factor=0.3)
    trainer.prune()
    trainer.model.eval()
    for batch in trainer.calibration[:3]:
        counts = trainer.lesson.count(trainer.model, [batch])
        with torch.no_grad():
            terms, output = trainer.lesson.terms(trainer.model, trainer.model, batch, trainer.loss_terms, counts)
        expected = F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.3)
        assert float(terms["task"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_collator_may_read_columns_that_no_model_knows(make):
    """With remove_unused_columns=False it gets them; the labels are made of one here."""
    seen = set()

    def collate(batch):
        seen.update(name for row in batch for name in row)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
        labels = torch.tensor([int(row["note"] == "good") for row in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    notes = lambda data: data.map(lambda row: {"note": ("bad", "good")[row["label"]]}).remove_columns("label")  # noqa: E731
    settings = {"data_collator": collate, "remove_unused_columns": False, "max_steps": 3, "logging_steps": 1}
    trainer = make(train_dataset=notes(rows()), metrics=None, **settings)
    usual = make(max_steps=3, logging_steps=1, metrics=None)  # an evaluation draws random numbers
    alike(trainer, usual)
    assert "note" in seen
    assert trainer.plan.kept == usual.plan.kept
    assert torch.tensor(losses(trainer)) == pytest.approx(torch.tensor(losses(usual)), rel=1e-4)
    assert trainer.evaluate(notes(rows(16, seed=3)))["eval_loss"] > 0


def test_less_memory_is_the_same_training(make):
    """Activations that are computed again, with auxiliary classifiers and maps between widths, which read them."""
    settings = {"max_steps": 3, "logging_steps": 1, "auxiliary_weight": 0.5, "learning_rate": 1e-3}
    plain, less = (make(teacher=tiny_bert(hidden=48, seed=1), **settings, **more) for more in ({}, {CHECKPOINTING: True}))
    alike(plain, less)
    layer = less.model.bert.encoder.layer[0]
    assert layer.gradient_checkpointing and len(losses(plain)) == 3
    assert torch.tensor(losses(less)) == pytest.approx(torch.tensor(losses(plain)), rel=1e-4)


def test_bfloat16_is_nearly_the_same_training(make):
    settings = {"max_steps": 3, "logging_steps": 1, "auxiliary_weight": 0.5, "use_cpu": True}
    plain, half = make(**settings), make(bf16=True, **settings)
    alike(plain, half)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.plan.kept == plain.plan.kept  # ranked in float32
    assert torch.tensor(losses(half)) == pytest.approx(torch.tensor(losses(plain)), rel=0.05, abs=1e-3)
    assert losses(half) != losses(plain)


def test_samples_of_like_length_train_together(make):
    batches = []

    class Lengths(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **_):
            batches.extend(batch["attention_mask"].sum(1) for batch in train_dataloader)

    spread = {}
    for name in ("random", "group_by_length"):
        batches.clear()
        trainer = make(train_dataset=rows(400), train_sampling_strategy=name, max_steps=2, callbacks=[Lengths()])
        trainer.train()
        spread[name] = float(torch.stack([b.float().std() for b in batches if len(b) > 1]).mean())
        assert len(trainer.state.log_history) >= 2
    assert spread["group_by_length"] < 0.5 * spread["random"]


class Diary(TrainerCallback):
    """What a callback of the user sees."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **_):
        self.seen.append(("begin", model.num_parameters()))

    def on_log(self, args, state, control, logs, **_):
        self.seen.append(("log", {name for name in logs if name.startswith("loss_")}))

    def on_evaluate(self, args, state, control, metrics, **_):
        self.seen.append(("evaluate", metrics))

    def on_save(self, args, state, control, **_):
        self.seen.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **_):
        self.seen.append(("end", state.global_step))


def test_callbacks_see_the_training_of_the_smaller_model(make):
    diary = Diary()
    times = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    trainer = make(max_steps=4, callbacks=[diary], evaluate_terms=True, **times)
    trainer.train()
    assert [name for name, _ in diary.seen] == ["begin", "log", "log", "evaluate", "save", "log", "end"] or [
        name for name, _ in diary.seen
    ] == ["begin", "log", "log", "log", "evaluate", "save", "log", "end"]  # evaluation logs too
    assert diary.seen[0][1] == trainer.model.num_parameters() < tiny_bert().num_parameters()
    assert diary.seen[1][1] == {"loss_task", "loss_logits", "loss_features"}
    metrics = next(seen for name, seen in diary.seen if name == "evaluate")
    assert {"eval_accuracy", "eval_loss", "eval_loss_task", "eval_loss_logits", "eval_loss_features"} <= metrics.keys()


@pytest.mark.parametrize("schedule", ["one_shot", "gradual"])
def test_a_training_that_gets_no_better_is_stopped_early(make, schedule):
    """In stages the budget holds all the same."""
    falling = iter(range(100, 0, -1))
    trainer = make(
        metrics=lambda _: {"falling": float(next(falling))},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 40},
        **{"metric_for_best_model": "falling", "load_best_model_at_end": True, "schedule": schedule},
    )
    trainer.train()
    assert 6 <= trainer.state.global_step < 30
    assert trainer.plan.budget["reached"] <= 0.5
    now = find_sites(trainer.model, trainer.calibration[0], trainer.plan.budget["seq_len"]).macs()
    assert now / trainer.course.sites.macs() == pytest.approx(trainer.plan.budget["reached"])


def test_terms_of_an_evaluation_are_those_of_the_models(make):
    data = rows(32, seed=1)
    trainer = make(teacher=tiny_bert(seed=1, spread=0.2), max_steps=2, evaluate_terms=True)
    assert not any(name.startswith("eval_loss_") for name in trainer.evaluate())  # nobody teaches yet
    trainer.train()
    metrics = trainer.evaluate(data)
    (mine, features), (taught, targets) = outputs(trainer.model, data), outputs(trainer.teacher, data)
    assert metrics["eval_loss_task"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert metrics["eval_loss_task"] == pytest.approx(float(F.cross_entropy(mine, torch.tensor(data["label"]))), rel=1e-4)
    divergence = F.kl_div((mine / 2).log_softmax(-1), (taught / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    assert metrics["eval_loss_logits"] == pytest.approx(4 * float(divergence), rel=1e-4)
    batches, total = [range(i, i + 8) for i in range(0, 32, 8)], 0.0
    for batch in batches:  # each layer's error over its variance, by position of a batch
        for match in trainer.lesson.matches:
            error = [F.mse_loss(features[i][match.student], targets[i][match.teacher], reduction="none") for i in batch]
            total += (
                float(torch.cat([e[0] for e in error]).mean()) / match.variance / len(trainer.lesson.matches) / len(batches)
            )
    assert metrics["eval_loss_features"] == pytest.approx(total, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_student_trains_alike(make, monkeypatch):
    """By the backend that only traces: the others take minutes on a CPU."""
    for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC"):  # which TrainingArguments sets for the whole process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "0")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    teacher = tiny_bert(hidden=48, seed=1)
    settings = {"max_steps": 4, "logging_steps": 1, "auxiliary_weight": 0.5, "evaluate_terms": True, "teacher": teacher}
    plain = make(**settings)
    alike(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = make(torch_compile=True, torch_compile_backend="eager", **settings)
    alike(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()
    assert type(compiled.model) is type(plain.model) and compiled.plan.kept == plain.plan.kept
    assert torch.tensor(losses(compiled)) == pytest.approx(torch.tensor(losses(plain)), rel=1e-4)
    assert compiled.recovery["held_out_after"] == pytest.approx(plain.recovery["held_out_after"], rel=1e-4)
    assert compiled.evaluate()["eval_loss_logits"] == pytest.approx(plain.evaluate()["eval_loss_logits"], rel=1e-3)


@pytest.mark.parametrize("hidden", [32, 48])
def test_a_teacher_in_bfloat16_teaches_a_student_in_float32(make, hidden):
    """What it says has its own precision; what is made of it has the student's."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        teacher = tiny_bert(hidden=hidden, layers=3, seed=1, spread=0.2).to(dtype)
        trainer = make(teacher=teacher, max_steps=2, logging_steps=1)
        trainer.train()
        assert {p.dtype for p in teacher.parameters()} == {dtype} and trainer.model.dtype == torch.float32
        assert all(match.variances.dtype == torch.float32 for match in trainer.lesson.matches)
        found[dtype] = losses(trainer)
    assert torch.tensor(found[torch.bfloat16]) == pytest.approx(torch.tensor(found[torch.float32]), rel=0.05)
    batch = trainer.calibration[0]
    terms, _ = trainer.lesson.terms(
        trainer.model, trainer.model, batch, trainer.loss_terms, trainer.lesson.count(trainer.model, [batch])
    )
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_teacher_teaches(make, tmp_path, monkeypatch, bits):
    """Of bitsandbytes, on the CPU. The student is in float32; the report knows what the teacher costs."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes: not by default, every process would load it")
    monkeypatch.setattr(sys.modules["hf_kdprune.measure"], "SECONDS", 0.05)
    plain = tiny_bert(hidden=64, layers=3, seed=1, spread=0.2)
    plain.save_pretrained(tmp_path / "teacher")
    quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["classifier"])
    teacher = type(plain).from_pretrained(tmp_path / "teacher", quantization_config=quantised, device_map="cpu")
    stored = teacher.bert.encoder.layer[0].output.dense.weight.dtype
    trainer = make(teacher=teacher, max_steps=2, logging_steps=1, use_cpu=True)
    trainer.train()
    assert trainer.teacher is teacher and not stored.is_floating_point
    assert teacher.bert.encoder.layer[0].output.dense.weight.dtype == stored and trainer.model.dtype == torch.float32
    restored = type(plain).from_pretrained(tmp_path / "teacher", quantization_config=quantised, device_map="cpu").dequantize()
    live = make(teacher=restored.float(), max_steps=2, logging_steps=1, use_cpu=True)
    live.train()
    assert torch.tensor(losses(trainer)) == pytest.approx(torch.tensor(losses(live)), rel=0.1)
    size = trainer.report(str(tmp_path / "compact"))["size"]
    assert size["teacher"]["params"] == plain.num_parameters()
    assert size["teacher"]["macs"] == find_sites(plain, trainer.calibration[0], trainer.plan.budget["seq_len"]).macs()
    assert logits(trainer.model).shape == (2, 2)
