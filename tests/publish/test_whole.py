"""Which training checkpoints are passed over: each file of a real one is cut off, and taken away, in turn."""

import json
import logging
import re
import shutil

import pytest
import torch
from small import rows, tiny_bert
from transformers import BertTokenizerFast

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.publish.whole import SENTINEL, last_whole, sweep, why_broken

NOT_READ = {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}  # when training goes on
NO_END = {"modeling_kdprune.py"}  # a text that says nowhere how long it is; it is written long before trainer_state.json
FILES = (
    *("config.json", "plan.json", "kdprune_state.json", "trainer_state.json", "modeling_kdprune.py"),
    *("model.safetensors", "kdprune_before.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *sorted(NOT_READ),
)


def trainer_in(folder, tokens, **settings):
    common = {"save_strategy": "steps", "save_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = KDPruneConfig(
        str(folder), **{**common, "per_device_train_batch_size": 8, "max_steps": 2, "repair": False, **settings}
    )
    return KDPruneTrainer(tiny_bert(), args, train_dataset=rows(), processing_class=tokens)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    return BertTokenizerFast(str(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokens):
    """The output directory of a run with the checkpoints 1 and 2; tests copy it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    trainer_in(folder, tokens).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")


def test_a_whole_one(run, checkpoint):
    assert why_broken(checkpoint) is None
    assert {file.name for file in checkpoint.iterdir()} == set(FILES)  # so that the tests below leave none out
    assert last_whole(run) == str(run / "checkpoint-2")


@pytest.mark.parametrize("name", sorted(set(FILES) - NO_END))
@pytest.mark.parametrize("left", [0, 1, 0.5, -2])
def test_a_file_that_is_cut_off(checkpoint, name, left):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: int(len(data) / 2) if left == 0.5 else left])
    assert re.match(rf"{re.escape(name)} is (cut off|no JSON)", why_broken(checkpoint))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(checkpoint, name):
    (checkpoint / name).unlink()
    said = why_broken(checkpoint)
    if name in NOT_READ:
        assert said is None
    else:
        assert said == "there are no weights in it" if name == "model.safetensors" else said.startswith(f"{name}")
        assert "missing" in said or name == "model.safetensors"


def test_training_goes_on_without_what_it_does_not_read(run, tokens, tmp_path):
    """And with nothing less: what is said to be whole resumes."""
    out = shutil.copytree(run, tmp_path / "out")
    for name in NOT_READ:
        (out / "checkpoint-1" / name).unlink()
    shutil.rmtree(out / "checkpoint-2")
    trainer = trainer_in(out, tokens)
    trainer.train(resume_from_checkpoint=last_whole(out))
    fresh, first = ((folder / "checkpoint-2" / "optimizer.pt") for folder in (out, run))
    states = [torch.load(file)["state"] for file in (fresh, first)]
    assert states[0] and all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[1])


def test_the_newest_by_step_that_is_whole_and_why_others_are_not(run, tmp_path, caplog):
    out = tmp_path / "out"
    for step in (9, 10, 100):
        shutil.copytree(run / "checkpoint-2", out / f"checkpoint-{step}")
    (out / "checkpoint-100" / SENTINEL).write_text("in progress")
    for other in ("checkpoint-best", "checkpoint-200-old"):
        (out / other).mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_whole(out) == str(out / "checkpoint-10")
    assert caplog.messages == [f"{out / 'checkpoint-100'} is passed over, for it is not whole: {SENTINEL} lies in it"]


def test_none_at_all(run, tmp_path):
    with pytest.raises(ValueError, match=r"there is none: train without resume_from_checkpoint, with save_strategy"):
        last_whole(tmp_path / "nowhere")
    broken = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (broken / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="none of the 1 there is whole"):
        last_whole(tmp_path)


def test_a_model_only(tokens, tmp_path):
    trainer_in(tmp_path / "out", tokens, save_only_model=True, save_steps=2).train()
    assert "save_only_model" in why_broken(tmp_path / "out" / "checkpoint-2")


def test_what_other_ranks_write(checkpoint):
    state = json.loads((checkpoint / "kdprune_state.json").read_text())
    (checkpoint / "kdprune_state.json").write_text(json.dumps({**state, "ranks": 2}))
    assert why_broken(checkpoint).startswith("rng_state_0.pth is missing")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert why_broken(checkpoint).startswith("rng_state_1.pth is missing")
    shutil.copyfile(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert why_broken(checkpoint) is None
    del state["ranks"]
    (checkpoint / "kdprune_state.json").write_text(json.dumps(state))
    assert why_broken(checkpoint) is None


def test_weights_in_several_files(checkpoint):
    whole, parts = checkpoint / "model.safetensors", [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part in parts:
        shutil.copyfile(whole, checkpoint / part)
    whole.unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}))
    assert why_broken(checkpoint) is None
    (checkpoint / parts[1]).unlink()
    assert why_broken(checkpoint) == f"{parts[1]} is missing, which model.safetensors.index.json names"


def test_what_fsdp_and_deepspeed_write(checkpoint):
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):  # .metadata is the last that torch.distributed.checkpoint writes
        (checkpoint / name).mkdir()
        (checkpoint / name / "__0_0.distcp").write_bytes(b"tensors")
        assert why_broken(checkpoint) is not None
        (checkpoint / name / ".metadata").write_bytes(b"where they are")
    assert why_broken(checkpoint) is None
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.rmtree(checkpoint / name)
    (checkpoint / "scheduler.pt").unlink()
    file = checkpoint / "global_step2" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"module": torch.ones(3)}, file)
    assert why_broken(checkpoint) is None
    file.write_bytes(file.read_bytes()[:-9])
    assert why_broken(checkpoint).startswith(f"{file.name} is cut off")


def test_what_cannot_be_read_is_not_whole(checkpoint, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hf_kdprune.publish.whole.cut_off", refuse)
    assert why_broken(checkpoint) == "it cannot be read ([Errno 13] Permission denied)"


def test_leftovers_of_killed_saves_go(checkpoint, tmp_path):
    for name in (".checkpoint-4-a1b2c3d4", ".checkpoint-12-a1_2c3d4-old", ".checkpoint-mine", ".other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-2", ".checkpoint-mine", ".other"}
