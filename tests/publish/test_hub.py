"""push_to_hub with the real client against a Hub on loopback, then loading by id in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

TESTS = Path(__file__).parents[1]

PUSH = """
import json, sys
sys.path.insert(0, sys.argv[1])
from small import VOCAB, logits, rows, tiny_bert
from transformers import BertTokenizerFast
from hf_kdprune import KDPruneConfig, KDPruneTrainer
open("vocab.txt", "w").write("\\n".join(VOCAB))
args = KDPruneConfig("compact", max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True,
                     dataloader_pin_memory=False, hub_model_id="user/compact", hub_private_repo=True)
trainer = KDPruneTrainer(tiny_bert(), args, train_dataset=rows(), processing_class=BertTokenizerFast("vocab.txt"))
trainer.train()
trainer.push_to_hub(commit_message="smaller")
print(json.dumps(logits(trainer.model).tolist()))
"""
PULL = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, pipeline
model = AutoModelForSequenceClassification.from_pretrained("user/compact", trust_remote_code=True)
pipe = pipeline("text-classification", "user/compact", trust_remote_code=True)
ids = torch.tensor(((2, 10, 20, 3), (2, 60, 70, 3)))
print(json.dumps([model(ids).logits.tolist(), pipe("w1 w2")[0]["label"]]))
"""


def run(code, *args, cwd, env):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path


def test_push_then_load_by_id(home):
    with HubServer() as hub:
        pushed = run(PUSH, TESTS, cwd=home / "work", env=hub.env(home=home / "a"))
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        files = hub.files("user/compact")
        pulled = run(PULL, cwd=home, env=hub.env(home=home / "b"))
        assert pulled.returncode == 0, pulled.stderr[-3000:]
    expected = json.loads(pushed.stdout.splitlines()[-1])
    got, label = json.loads(pulled.stdout.splitlines()[-1])
    assert [row == pytest.approx(other, abs=1e-5) for row, other in zip(got, expected, strict=True)] == [True, True]
    assert label in ("bad", "good")
    assert {"config.json", "model.safetensors", "modeling_kdprune.py", "plan.json", "report.json"} <= set(files)
    assert not [name for name in files if name.endswith(".bin") or name.startswith(("runs", "checkpoint"))]
    card = files["README.md"].decode()
    assert 'from_pretrained("user/compact", trust_remote_code=True)' in card
    assert json.loads(files["report.json"])["name"] == "compact"


def test_failed_push_says_so_and_keeps_the_directory(home):
    with HubServer() as hub:
        hub.fail_next(status=500, path_contains="/commit/", times=20)
        pushed = run(PUSH, TESTS, cwd=home / "work", env=hub.env(home=home / "a"))
        assert pushed.returncode != 0 and "500" in pushed.stderr
        assert "model.safetensors" not in hub.files("user/compact")
    assert (home / "work" / "compact" / "model.safetensors").is_file()
