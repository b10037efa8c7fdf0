"""The gradual schedule: rank, prune and train in stages."""

import copy
import json
import shutil

import pytest
import torch
from small import logits, rows, tiny_bert, trainer
from transformers import TrainerCallback

from hf_kdprune import Plan, apply_plan, find_sites, load_pretrained
from hf_kdprune.layers import match_layers
from hf_kdprune.prune.optimizer_state import cut_along, cuts_of, shapes_of
from hf_kdprune.prune.schedule import Pruning
from hf_kdprune.prune.stages import Left, from_here, plan_further, rounds_of, stage_budgets, stage_steps
from hf_kdprune.prune.trial import gates_at_zero

GRADUAL = {"schedule": "gradual", "budget": "macs=0.4", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def gradual(make):
    """A trainer in four stages, before steps 0, 3, 7 and 10 of 20."""

    def build(**settings):
        return make(**{"model": tiny_bert(spread=0.2), **GRADUAL, "max_steps": 20, **settings})

    return build


def test_budgets_fall_along_a_cubic_curve(tiny):
    sites = find_sites(tiny("bert"))
    assert stage_budgets("macs=0.5", 1, sites) == ["macs=0.5"]
    assert stage_budgets("macs=0.2", 2, sites) == ["macs=0.300000", "macs=0.2"]
    absolute = stage_budgets(f"params={sites.params() * 0.6 / 1000}K", 2, sites)
    assert float(absolute[0].removeprefix("params=")) == pytest.approx(0.65, abs=1e-4)
    assert stage_budgets("heads=0.5,ffn=0.25", 2, sites)[0] == "heads=0.562500,ffn=0.343750"


def test_stages_lie_in_the_first_half():
    assert stage_steps(1, 1) == [0]
    assert stage_steps(4, 1000) == [0, 167, 333, 500]
    assert stage_steps(4, 6) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="need 6 steps or more, got 5"):
        stage_steps(4, 5)


def test_the_model_shrinks_from_stage_to_stage(gradual):
    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            sizes.append((state.global_step, model.num_parameters()))

    trainer = gradual(callbacks=[Watch()])
    trainer.train()
    by_stage = [{size for step, size in sizes if a < step <= b} for a, b in ((0, 3), (3, 7), (7, 10), (10, 20))]
    assert [len(found) for found in by_stage] == [1, 1, 1, 1]
    shrinking = [found.pop() for found in by_stage]
    assert shrinking == sorted(shrinking, reverse=True) and len(set(shrinking)) == 4
    assert trainer.plan.budget["asked"] == "macs=0.4" and 0.3 < trainer.plan.budget["reached"] <= 0.4
    assert trainer.recovery["held_out_before"] > 0


def test_its_plan_alone_makes_the_shapes_and_the_model_reloads(gradual, tmp_path):
    trainer = gradual(max_steps=8)
    trainer.train()
    replayed = tiny_bert(spread=0.2)
    apply_plan(replayed, trainer.plan)
    shapes = {name: tensor.shape for name, tensor in trainer.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in replayed.state_dict().items()} == shapes
    assert replayed.config.kdprune == trainer.model.config.kdprune
    trainer.save_model(str(tmp_path / "compact"))
    assert torch.equal(logits(load_pretrained(tmp_path / "compact")), logits(trainer.model))
    assert Plan.load(tmp_path / "compact" / "plan.json").kept == trainer.plan.kept


@pytest.mark.parametrize("settings", [{}, {"auxiliary_weight": 0.3, "teacher": tiny_bert(hidden=48, seed=1)}])
def test_resuming_anywhere_gives_the_model_of_the_uninterrupted_run(gradual, tmp_path, settings):
    whole = gradual(output=tmp_path / "whole", **settings)
    whole.train()
    for step in (3, 6, 10, 18):  # a stage is due, amid two stages, the last stage is due, recovery
        output = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        resumed = gradual(output=output, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.plan.kept == whole.plan.kept and resumed.recovery == whole.recovery
        state = whole.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.model.state_dict().items())


def test_stages_between_the_epochs_judge_and_save_as_epochs_do(gradual, tmp_path):
    """11 steps an epoch: stages before steps 0, 4, 7 and 11, of which the last one is the end of an epoch."""
    settings = {"max_steps": 22, "save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = gradual(output=tmp_path / "whole", **settings)
    whole.train()
    judged = [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert whole.course.steps == [0, 4, 7, 11] and judged == [11, 22]
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "resumed" / "checkpoint-7")
    resumed = gradual(output=tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_the_best_model_is_one_of_the_final_shape(gradual):
    """The metric is best at the first evaluation, which sees the shape of the first stage."""
    falling = iter(range(100, 0, -1))
    trainer = gradual(
        metrics=lambda _: {"falling": float(next(falling))},
        **{"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1},
        metric_for_best_model="falling",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")  # the first after the last stage
    assert 0.3 < trainer.plan.budget["reached"] <= 0.4
    reached = find_sites(trainer.model, trainer.calibration[0], trainer.plan.budget["seq_len"]).macs()
    assert reached / trainer.course.sites.macs() == pytest.approx(trainer.plan.budget["reached"])


def test_somebody_stops_it_early_and_the_budget_holds_all_the_same(gradual):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5

    trainer = gradual(callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.plan.budget["reached"] <= 0.4
    assert trainer.recovery["kept"] == "before"


@pytest.mark.parametrize(
    "settings",
    [
        {"shapes": "uniform", "budget": "heads=0.5,ffn=0.5"},
        {"shapes": "stock", "budget": "params=0.7"},
        {"keep": ["bert.encoder.layer.0.attention:3", "bert.encoder.layer.1.ffn"], "budget": "params=0.8"},
        {"budget": "macs=0.03", "round_to": 1},
        {"repair": False, "importance": "taylor"},
    ],
)
def test_rules_hold_in_stages_as_at_once(gradual, settings):
    trainer = gradual(max_steps=8, save_strategy="no", **settings)
    trainer.train()
    kept = trainer.plan.kept
    if "keep" in settings:
        assert 3 in kept["bert.encoder.layer.0.attention"] and len(kept["bert.encoder.layer.1.ffn"]) == 64
    if "shapes" in settings:
        assert len({len(units) for name, units in kept.items() if name.endswith("ffn")}) == 1
    reached = trainer.plan.budget["reached"]
    limits = [float(part.partition("=")[2]) for part in trainer.plan.budget["asked"].split(",")]
    assert all(r <= limit for r, limit in zip(reached.values() if len(limits) > 1 else [reached], limits, strict=True))


def test_checkpoints_that_only_stages_need_do_not_stay(gradual, tmp_path):
    trainer = gradual(save_strategy="no", max_steps=8, output=tmp_path / "out")
    trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_optimizer_is_cut_along(tiny, ragged):
    """Training cut weights with a cut state is training the whole ones with their gates at 0."""
    masked, batches = tiny("bert").train(), ragged(6, 4)
    for module in masked.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sites = find_sites(masked)
    plan = Plan.random(sites, "macs=0.5", seed=1)
    masks = {site.name: plan[site.name].kept for site in sites}
    optimizer = torch.optim.AdamW(masked.parameters(), lr=1e-3)
    train(masked, optimizer, batches[:3])
    smaller = copy.deepcopy(masked)
    before, cuts = shapes_of(optimizer, masked), cuts_of(smaller, sites, plan)
    apply_plan(smaller, plan)
    fresh = torch.optim.AdamW(smaller.parameters(), lr=1e-3)
    fresh.load_state_dict(cut_along(copy.deepcopy(optimizer.state_dict()), before, smaller, fresh, cuts))
    train(smaller, fresh, batches[3:])
    with gates_at_zero(masked, masks, sites):
        train(masked, optimizer, batches[3:])
    apply_plan(masked, plan)
    for (name, a), b in zip(masked.named_parameters(), smaller.parameters(), strict=True):
        if name.endswith("key.bias"):  # the softmax does not see it, so that its gradient is rounding
            continue
        assert torch.allclose(a, b, atol=1e-6), name


def train(model, optimizer, batches):
    for batch in batches:
        model(**batch, labels=torch.arange(len(batch["input_ids"])) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_further_plan_keeps_some_of_what_is_left(tiny, ragged):
    model, batches = tiny("bert"), ragged(4, 8)
    teacher, sites = copy.deepcopy(model), find_sites(model, batches[0], 10)
    first = Plan.random(sites, "macs=0.6")
    apply_plan(model, first, batches[0])
    matches = match_layers(teacher, None, batches, "auto")
    plan = plan_further(model, batches, matches, Pruning("macs=0.4"), Left(sites, first))
    assert all(set(plan.kept[name]) <= set(kept) for name, kept in first.kept.items())
    assert 0.3 < plan.budget["reached"] <= 0.4
    here = from_here(plan, first, find_sites(model, batches[0]))
    apply_plan(model, here, batches[0])
    assert find_sites(model, batches[0], 10).macs() / sites.macs() == pytest.approx(plan.budget["reached"])


@pytest.mark.parametrize(
    ("budget", "rounds", "expected"),
    [("macs=0.5", None, 1), ("macs=0.1", None, 4), ("macs=0.5", 2, 2), ("ffn=0.1", None, 4), ("loss=0.1", 3, 1)],
)
def test_nearly_everything_goes_in_rounds(tiny, budget, rounds, expected):
    sites = find_sites(tiny("bert"))
    assert rounds_of(Pruning(budget, round_to=1, rounds=rounds), sites, ("ffn",)) == expected


def test_rounds_rank_what_is_left_and_change_nothing(make):
    plans = {}
    for rounds in (1, 3):
        model = tiny_bert(spread=0.2)
        before = copy.deepcopy(model.state_dict())
        trainer = make(model=model, budget="macs=0.3", round_to=1, pruning_rounds=rounds)
        plan = plans[rounds] = trainer.propose()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert 0.2 < plan.budget["reached"] <= 0.3 and plan.budget["asked"] == "macs=0.3"
        assert trainer.prune(plan) is plan
    assert plans[1].kept != plans[3].kept


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ({"pruning_rounds": 0}, "pruning_rounds must be None or at least 1, got 0"),
        ({"budget": "latency=0.5"}, "counted, not measured.*got 'latency=0.5'"),
        ({"budget": "loss=0.1"}, "counted, not measured"),
        ({"save_only_model": True}, "save_only_model must be False"),
        ({"optim": "adafactor"}, "Adafactor keeps .*exp_avg_sq_row"),
        ({"pruning_stages": 0}, "pruning_stages must be at least 1, got 0"),
        ({"max_steps": 5}, "need 6 steps or more, got 5"),
    ],
)
def test_what_cannot_go_in_stages_is_refused_before_any_work(gradual, case, match):
    with pytest.raises(ValueError, match=match):
        gradual(**case)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ({"budget": "macs=0.5"}, "budget was macs=0.4, and now is macs=0.5"),
        ({"seed": 1}, "seed was 42, and now is 1"),
        ({"pruning_stages": 3}, r"made was \[0, 3, 7, 10\], and now is \[0, 5, 10\]"),
        ({"importance": "taylor"}, "importance was feature_loss, and now is taylor"),
        ({"per_device_train_batch_size": 4}, "processes was 8, and now is 4"),
        ({"train_dataset": rows(90)}, "training samples was 87, and now is 81"),
        ({"model": tiny_bert(spread=0.2, seed=3)}, "resumes from the student with which it began"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(gradual, finished, case, match):
    with pytest.raises(ValueError, match=match):
        gradual(**case).train(resume_from_checkpoint=str(finished / "checkpoint-6"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose checkpoints are only read."""
    output = tmp_path_factory.mktemp("finished")
    trainer(output, model=tiny_bert(spread=0.2), **GRADUAL, max_steps=20).train()
    return output


def changed(finished, tmp_path, **state):
    """A copy of a checkpoint in which the state says something else."""
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "checkpoint-6", folder)
    file = folder / "kdprune_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **state}))
    return str(folder)


def test_a_checkpoint_of_a_newer_version_is_refused(gradual, finished, tmp_path):
    with pytest.raises(ValueError, match="has version 2; this hf_kdprune reads up to 1: upgrade it"):
        gradual().train(resume_from_checkpoint=changed(finished, tmp_path, version=2))


def test_a_saved_model_is_no_checkpoint_to_resume_from(gradual, finished, tmp_path):
    folder = changed(finished, tmp_path)
    (tmp_path / "checkpoint-6" / "kdprune_state.json").unlink()
    with pytest.raises(ValueError, match="kdprune_state.json is missing"):
        gradual().train(resume_from_checkpoint=folder)


def test_another_number_of_processes_may_go_on_with_the_same_samples_a_step(gradual, finished, tmp_path, caplog):
    folder = changed(finished, tmp_path, ranks=2)
    for rank in range(2):
        shutil.copy(finished / "checkpoint-6" / "rng_state.pth", tmp_path / "checkpoint-6" / f"rng_state_{rank}.pth")
    trainer = gradual()
    trainer.train(resume_from_checkpoint=folder)
    assert "written by 2 processes" in caplog.text and trainer.state.global_step == 20
