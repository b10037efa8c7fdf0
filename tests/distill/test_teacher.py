"""The student as its own teacher: what the two have in common in memory, and that the teacher never changes."""

import copy

import pytest
import torch
from small import logits, tiny_bert
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_kdprune import Plan, apply_plan, find_sites
from hf_kdprune.distill.teacher import frozen_copy, separate
from hf_kdprune.prune.surgery import changes

SETTINGS = {"budget": "macs=0.4", "learning_rate": 1e-2, "max_steps": 3}


def frozen_embeddings(**settings):
    model = tiny_bert(**settings)
    model.bert.embeddings.requires_grad_(False)
    return model


def in_common(one, other):
    """Names of the parameters that lie at the same place in memory, and that are of some size."""
    theirs = dict(other.named_parameters(remove_duplicate=False))
    mine = one.named_parameters(remove_duplicate=False)
    return {name for name, p in mine if name in theirs and p.numel() and p.data_ptr() == theirs[name].data_ptr()}


def pruned_and_trained(make, model, **settings):
    expected = logits(model)
    trainer = make(model=model, **{**SETTINGS, **settings})
    trainer.train()
    assert torch.equal(logits(trainer.teacher), expected)
    assert not torch.equal(logits(trainer.model), expected)
    return trainer


def test_what_is_frozen_and_stays_is_in_common(make):
    trainer = pruned_and_trained(make, frozen_embeddings())
    expected = {name for name, _ in trainer.model.named_parameters() if name.startswith("bert.embeddings")}
    assert in_common(trainer.teacher, trainer.model) == expected and len(expected) == 5
    assert not any(p.requires_grad for p in trainer.teacher.parameters())


def test_what_trains_is_not(make):
    trainer = pruned_and_trained(make, tiny_bert())
    assert not in_common(trainer.teacher, trainer.model)


def test_what_repair_refits_is_not_though_it_is_frozen(make):
    student = tiny_bert().requires_grad_(False)
    student.classifier.requires_grad_(True)
    trainer = pruned_and_trained(make, student)
    shared = in_common(trainer.teacher, trainer.model)
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in shared and "bert.pooler.dense.weight" in shared
    assert not {name for name in shared if "query" in name or "intermediate" in name or name.endswith("output.dense.bias")}


def test_the_base_under_adapters_is_in_common(make, lora):
    student = lora(tiny_bert())
    trainer = pruned_and_trained(make, student)
    shared, names = in_common(trainer.teacher, trainer.model), [name for name, _ in student.named_parameters()]
    assert {name for name in names if "embeddings" in name or "LayerNorm" in name} <= shared
    assert not {name for name in shared if "lora_" in name or "query" in name or "base_layer" in name}
    expected = logits(trainer.teacher)
    trainer.model.merge_and_unload()  # writes into what its adapters lie upon
    assert torch.equal(logits(trainer.teacher), expected)


def test_surgery_leaves_the_old_weights_to_the_teacher():
    """No copy of what is about to be replaced, trained or not."""
    student = tiny_bert()
    sites, before = find_sites(student), {name: p.data_ptr() for name, p in student.named_parameters()}
    expected = logits(student)
    teacher = frozen_copy(student, *changes(student, sites))
    apply_plan(student, Plan.random(sites, "macs=0.5"))
    old = {name for name, p in teacher.named_parameters() if p.data_ptr() == before[name]}
    assert old == {cut.name for site in sites for cut in site.cuts}
    assert not in_common(teacher, student) and torch.equal(logits(teacher), expected)


def test_half_precision_keeps_what_is_in_common():
    student = frozen_embeddings().to(torch.bfloat16)
    sites, expected = find_sites(student), logits(student)
    teacher = frozen_copy(student, *changes(student, sites))
    apply_plan(student, Plan.random(sites, "macs=0.5"))
    assert "bert.embeddings.word_embeddings.weight" in in_common(teacher, student)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16} and torch.equal(logits(teacher), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_tied_weights_stay_tied(tiny, frozen):
    model = tiny("gpt2", auto=AutoModelForCausalLM)
    model.transformer.wte.requires_grad_(not frozen)
    teacher = frozen_copy(model)
    assert teacher.lm_head.weight is teacher.transformer.wte.weight is not model.transformer.wte.weight
    assert (teacher.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()) is frozen
    assert teacher.get_input_embeddings().weight.shape == (200, 32)


def test_moving_or_casting_one_moves_no_other():
    student = frozen_embeddings()
    teacher, expected = frozen_copy(student), logits(student)
    student.half()
    assert torch.equal(logits(teacher), expected) and not in_common(teacher, student)


def test_buffers_that_are_saved_are_copied_and_constants_are_not():
    student = tiny_bert()
    student.norm = torch.nn.BatchNorm1d(4)
    teacher = frozen_copy(student)
    student.norm.train()(torch.randn(8, 4))
    assert int(teacher.norm.num_batches_tracked) == 0 and not bool(teacher.norm.running_mean.any())
    mine, theirs = (m.bert.embeddings.position_ids for m in (student, teacher))
    assert mine.data_ptr() == theirs.data_ptr()


def test_who_unfreezes_before_training_trains_the_student_alone(make):
    student = frozen_embeddings()
    expected = logits(student)
    trainer = make(model=student, **SETTINGS)
    trainer.prune()
    assert in_common(trainer.teacher, trainer.model)
    student.requires_grad_(True)
    place = student.bert.embeddings.word_embeddings.weight
    before, seen = place.detach().clone(), []

    class Watch(TrainerCallback):  # before recovery is judged, and perhaps taken back
        def on_train_end(self, args, state, control, model, **_):
            seen.append(not torch.equal(place, before) and torch.equal(logits(trainer.teacher), expected))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [True] and torch.equal(logits(trainer.teacher), expected)
    assert not in_common(trainer.teacher, trainer.model)


def test_another_teacher_stays_as_it_is():
    student, teacher = tiny_bert(), tiny_bert(seed=1)
    places = [p.data_ptr() for p in teacher.parameters()]
    separate(teacher, student)
    assert [p.data_ptr() for p in teacher.parameters()] == places


def test_a_run_that_is_resumed_shares_as_one_that_was_not(make, tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(model=frozen_embeddings(), output=tmp_path / "whole", **settings)
    whole.train()
    student = frozen_embeddings()
    expected = logits(student)
    resumed = make(model=student, output=tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert in_common(resumed.teacher, resumed.model) == in_common(whole.teacher, whole.model)
    assert torch.equal(logits(resumed.teacher), expected) and torch.equal(logits(resumed.model), logits(whole.model))


def test_hooks_go_along():
    student, seen = frozen_embeddings(), []
    student.classifier.register_forward_hook(lambda *_: seen.append(1))
    logits(frozen_copy(student))
    assert seen == [1] and logits(copy.deepcopy(student)).shape == (2, 2)
