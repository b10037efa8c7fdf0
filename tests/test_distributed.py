"""Two processes rank, plan and train as one does."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import processes
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hf_kdprune import load_pretrained
from hf_kdprune.ranks import Ranks, draw_for
from hf_kdprune.sharding import check_sharding


def launched(folder, *jobs, **environment):
    """Run jobs of `processes` in two processes; returns a function of a job: what each process found, and the job's folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = subprocess.run(
        [*command, processes.__file__, str(folder), *jobs],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return lambda job: ([torch.load(folder / f"{job}-{rank}.pt") for rank in (0, 1)], folder / job)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """What came of the jobs that need no other package."""
    return launched(tmp_path_factory.mktemp("processes"), "replicated", "sharded")


@pytest.fixture(scope="module")
def alone():
    """Scores of one process."""
    return processes.scores(Ranks.alone())


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    """The run of one process, with the same samples in each step."""
    return processes.facts(processes.trained(tmp_path_factory.mktemp("alone"), evaluate_terms=True))


@pytest.mark.parametrize("count", processes.COUNTS)
def test_two_processes_rank_as_one(launch, alone, count):
    (first, second), _ = launch("replicated")
    names = [name for name in alone if f" {count} " in name]
    assert len(names) == 2 + len(processes.IMPORTANCE) + 4
    for name in names:
        mine, other = first["scores"][name], second["scores"][name]
        assert alone[name].get("kept") == mine.get("kept") == other.get("kept"), name
        for part in alone[name].keys() - {"kept"}:
            largest = max([float(values.abs().max()) for values in alone[name][part].values()])
            for key, expected in alone[name][part].items():
                assert torch.equal(mine[part][key], other[part][key]), (name, key)
                # What is a difference of large sums, as a standard error is, keeps fewer digits.
                torch.testing.assert_close(mine[part][key], expected, rtol=1e-6, atol=1e-6 * largest)


def test_what_is_broken_in_one_share_stops_both(launch):
    (first, second), _ = launch("replicated")
    assert first["broken"] == second["broken"]
    assert len(first["broken"]) == 3
    assert "layer 1 gave NaN" in first["broken"][0] and "scores must be finite" in first["broken"][2]


@pytest.mark.parametrize("job", ["replicated", "sharded"])
def test_two_processes_train_as_one(launch, run_alone, job):
    found, _ = launch(job)
    check_runs(found, run_alone)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_processes_train_as_one_under_deepspeed(tmp_path, run_alone):
    found = launched(tmp_path, "zero2", "zero3", DS_ACCELERATOR="cpu")
    for job in ("zero2", "zero3"):
        both, folder = found(job)
        check_runs(both, run_alone)
        check_whole(both[0], folder)


def check_runs(both, alone):
    """The runs of two processes are that of one, without a break and with one."""
    first, second = both
    for found in (first["run"], first["resumed"]):
        assert found["kept"] == alone["kept"]
        assert found["recovery"]["kept"] == alone["recovery"]["kept"] == "after"
        for name in ("held_out_before", "held_out_after"):
            assert found["recovery"][name] == pytest.approx(alone["recovery"][name], rel=1e-4)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        for name in ("loss", "accuracy", "loss_task", "loss_logits", "loss_features"):
            assert found["evaluated"][f"eval_{name}"] == pytest.approx(alone["evaluated"][f"eval_{name}"], rel=1e-3)
        trained = {name: w for name, w in alone["weights"].items() if "key.bias" not in name}  # on which no loss depends
        for name, weight in trained.items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)
    for name, weight in first["run"]["weights"].items():
        assert torch.equal(weight, second["run"]["weights"][name]), name
        assert torch.equal(weight, first["resumed"]["weights"][name]), name


def check_whole(found, folder):
    """What was sharded in training is whole afterwards, and both the model and its checkpoint load."""
    assert found["kind"] == "BertForSequenceClassification"
    for saved in (folder / "run", folder / "run" / "checkpoint-6"):
        for name, weight in load_pretrained(saved).state_dict().items():
            assert torch.equal(weight, found["run"]["weights"][name]), name


def test_each_file_is_written_once(launch):
    _, folder = launch("replicated")
    written = [{str(f.relative_to(part)) for f in part.rglob("*") if f.is_file()} for part in sorted(folder.glob("out-*"))]
    assert written[1] == {"checkpoint-4/rng_state_1.pth", "checkpoint-6/rng_state_1.pth"}
    assert {"model.safetensors", "plan.json", "checkpoint-6/model.safetensors", "checkpoint-6/optimizer.pt"} <= written[0]
    assert "checkpoint-4/rng_state_0.pth" in written[0]


def test_a_sharded_model_is_whole_again_and_loads(launch):
    (first, second), folder = launch("sharded")
    check_whole(first, folder)
    assert first["best"] == second["best"] in (2, 4, 6)
    assert (folder / "best" / "checkpoint-2" / "kdprune_trained_only.safetensors").is_file()


@pytest.mark.parametrize("file", sorted((processes.ROOT / "scripts" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configs_say_only_what_accelerate_knows(file):
    config = load_config_from_file(str(file))  # refuses other fields
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    assert file.read_text().startswith("# ") and f"--config_file scripts/accelerate/{file.name}" in file.read_text()
    assert config.num_processes == 2
    expected = {"fsdp2": ("FSDP_VERSION", "2"), "zero2": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")}
    expected |= {"zero3": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"), "cpu_2": ("CUDA_VISIBLE_DEVICES", "-1,-1")}
    name, value = expected.get(file.stem, ("ACCELERATE_MIXED_PRECISION", "no"))
    assert processes.environment_of(file)[name] == value


def plugin(**changes):
    return SimpleNamespace(
        **{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False, **changes}
    )


@pytest.mark.parametrize(
    ("fsdp", "zero", "model", "rule"),
    [
        (plugin(fsdp_version=1), None, "plain", "fsdp_version must be 2, got 1"),
        (plugin(state_dict_type="SHARDED_STATE_DICT"), None, "plain", "must be FULL_STATE_DICT, .*got SHARDED_STATE_DICT"),
        (plugin(cpu_ram_efficient_loading=True), None, "plain", "fsdp_cpu_ram_efficient_loading must be false"),
        (plugin(), None, "lora", "without adapters"),
        (None, SimpleNamespace(zero_stage=3), "lora", "without adapters"),
        (None, SimpleNamespace(zero_stage=3), "partitioned", "set zero3_init_flag to false"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny, lora, fsdp, zero, model, rule):
    given = lora(tiny()) if model == "lora" else tiny()
    if model == "partitioned":
        next(given.parameters()).ds_id = 0  # as DeepSpeed marks what it partitioned
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=zero)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=state),
        is_fsdp_enabled=fsdp is not None,
        is_deepspeed_enabled=zero is not None,
        model=given,
    )
    with pytest.raises(ValueError, match=rule):
        check_sharding(trainer)


def test_each_process_runs_every_so_many():
    batches = list("abcde")
    assert Ranks.alone().share(batches) == list(enumerate(batches))
    shares = [Ranks(i, 3).share(batches) for i in range(3)]
    assert shares == [[(0, "a"), (3, "d")], [(1, "b"), (4, "e")], [(2, "c")]]
    assert Ranks(2, 3).share(batches[:2]) == []
    assert Ranks.of(Accelerator(cpu=True)) == Ranks.alone()


def test_each_batch_has_its_own_chance():
    draws = {(s, n): torch.randn(4, generator=draw_for(s, n)).tolist() for s in range(3) for n in range(3)}
    assert len({tuple(found) for found in draws.values()}) == 9
    assert draws[1, 2] == torch.randn(4, generator=draw_for(1, 2)).tolist()
