"""Checkpoints: whole or not there, and the same model after reload in a fresh process."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_kdprune import Plan, apply_plan, find_sites, load_pretrained, save_pretrained
from hf_kdprune.publish import checkpoint

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
SMALL = {"vocab_size": 100, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert():
    return BertForSequenceClassification(BertConfig(**TINY, **SMALL))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**TINY, **SMALL))


def distilbert():
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **SMALL)
    return DistilBertForSequenceClassification(config)


def pruned(make=bert, empty=False):
    """Half the MACs; with `empty`, no head in the first layer and no neuron in the second."""
    torch.manual_seed(0)
    model = make()
    plan = Plan.random(find_sites(model), "macs=0.5", seed=0)
    if empty:
        plan.sites[0].kept, plan.sites[3].kept = [], []
    apply_plan(model, plan)
    return model.eval()


IDS = torch.tensor([[2, 11, 12, 13, 14, 3], [2, 60, 61, 62, 63, 3]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def in_fresh_process(code, *args):
    child = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def test_stock_loader_and_pipeline_in_a_fresh_process(tmp_path, tokenizer):
    """Without hf_kdprune: its import is blocked in the process that loads."""
    model = pruned(empty=True)
    line = save_pretrained(model, tmp_path / "compact", tokenizer)
    code = (
        "import sys, json, torch; sys.modules['hf_kdprune'] = None\n"
        "from transformers import AutoModelForSequenceClassification, pipeline\n"
        f"model = {line}\n"
        f"out = model(torch.tensor({IDS.tolist()})).logits.tolist()\n"
        "pipe = pipeline('text-classification', sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps([out, pipe('w3 w4'), type(model).__name__]))"
    )
    out, answer, name = in_fresh_process(code, tmp_path / "compact")
    torch.testing.assert_close(torch.tensor(out), logits(model), atol=1e-5, rtol=0)
    assert answer[0]["label"] in ("bad", "good") and name == "BertForSequenceClassification"


@pytest.mark.parametrize("make", [bert, roberta, distilbert])
@pytest.mark.parametrize("empty", [False, True])
def test_load_pretrained(tmp_path, make, empty):
    model = pruned(make, empty)
    save_pretrained(model, tmp_path / "compact", verify=False)
    loaded = load_pretrained(tmp_path / "compact")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.kdprune_plan == model.kdprune_plan


def test_loaded_model_is_pruned_and_saved_again(tmp_path):
    save_pretrained(pruned(), tmp_path / "once", verify=False)
    model = load_pretrained(tmp_path / "once")
    apply_plan(model, Plan.random(find_sites(model), "macs=0.5", seed=1))
    save_pretrained(model, tmp_path / "twice")  # verified in a fresh process
    assert torch.equal(logits(load_pretrained(tmp_path / "twice")), logits(model))


def test_what_transformers_loaded_is_saved_by_transformers(tmp_path):
    """A user who never installs this package saves the model again with plain save_pretrained."""
    from transformers import AutoModelForSequenceClassification

    save_pretrained(pruned(), tmp_path / "ours", verify=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    model.save_pretrained(tmp_path / "theirs")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))


def test_bf16_checkpoint(tmp_path):
    model = pruned().to(torch.bfloat16)
    save_pretrained(model, tmp_path / "compact", verify=False)
    loaded = load_pretrained(tmp_path / "compact", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(model))


def test_model_that_was_not_pruned_needs_no_code(tmp_path):
    line = save_pretrained(bert(), tmp_path / "whole")
    assert "trust_remote_code" not in line
    assert not (tmp_path / "whole" / "modeling_kdprune.py").exists()


def test_config_states_the_shapes(tmp_path):
    model = pruned()
    save_pretrained(model, tmp_path / "compact", verify=False)
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    assert config["kdprune"]["version"] == 1
    weights = load_file(tmp_path / "compact" / "model.safetensors")
    for site in config["kdprune"]["sites"].values():
        for name, shape in site["tensors"].items():
            assert list(weights[name].shape) == shape
    assert config["auto_map"] == {"AutoModelForSequenceClassification": "modeling_kdprune.BertForSequenceClassification"}
    assert getattr(model.config, "auto_map", None) is None


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = pruned()
    save_pretrained(old, tmp_path / "compact", verify=False)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "verify_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(bert(), tmp_path / "compact")
    assert [p.name for p in tmp_path.iterdir()] == ["compact"]
    assert torch.equal(logits(load_pretrained(tmp_path / "compact")), logits(old))


def test_save_that_does_not_reload_fails_and_leaves_nothing(tmp_path, monkeypatch):
    write = checkpoint.write_model

    def spoiled(model, folder, *rest):
        write(model, folder, *rest)
        weights = load_file(folder / "model.safetensors")
        save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(checkpoint, "write_model", spoiled)
    with pytest.raises(RuntimeError, match="differ by"):
        save_pretrained(pruned(), tmp_path / "compact")
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_directory_stay(tmp_path):
    folder = tmp_path / "out"
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "events").write_text("logs")
    (folder / "notes.txt").write_text("mine")
    save_pretrained(pruned(), folder, verify=False)
    assert (folder / "runs" / "events").read_text() == "logs"
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_newer_section_is_refused(tmp_path):
    save_pretrained(pruned(), tmp_path / "compact", verify=False)
    file = tmp_path / "compact" / "config.json"
    config = json.loads(file.read_text())
    config["kdprune"]["version"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="kdprune version 2 and this file reads up to 1"):
        load_pretrained(tmp_path / "compact")


def test_load_pretrained_runs_no_code_of_the_checkpoint(tmp_path):
    save_pretrained(pruned(), tmp_path / "compact", verify=False)
    (tmp_path / "compact" / "modeling_kdprune.py").write_text("raise SystemExit('ran')")
    load_pretrained(tmp_path / "compact")
