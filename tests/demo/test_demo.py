"""`kdprune demo` on the embedded data: what a newcomer runs first."""

import json
import subprocess
import sys

import pytest
from datasets import Dataset

from hf_kdprune.cli import main
from hf_kdprune.demo.data import load_text_data
from hf_kdprune.demo.run import Demo


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(work):
    """The whole job on a subset, as a user runs it; its stdout must be data and nothing else."""
    command = [sys.executable, "-m", "hf_kdprune.cli", "demo", "--quick", "--json", "--output", "kdprune-demo"]
    child = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


def test_report_is_whole(report):
    assert report["version"] == 1 and report["command"] == "kdprune demo --quick"
    assert 0.48 < report["budget"]["reached"] <= 0.5
    assert report["size"]["compact"]["params"] < report["size"]["teacher"]["params"]
    assert report["speed"]["ratio"]["32"] < 1
    assert all(0 < report["metrics"][name]["accuracy"] <= 1 for name in ("teacher", "pruned", "compact"))
    assert report["example"]["label"] in load_text_data(None).labels


def test_directory_is_whole(report, work):
    folder = work / report["path"]
    assert (folder / "report.json").is_file() and (folder / "plan.json").is_file()
    card = (folder / "README.md").read_text()
    assert report["load"] in card and report["example"]["text"] in card
    for picture in ("plan.png", "tradeoff.png", "loss.png"):
        assert picture in card and (folder / picture).stat().st_size > 1000
    assert [p.name for p in (work / "kdprune-demo").iterdir() if p.name.startswith(".")] == []


def test_teacher_is_kept(report, work):
    (teacher,) = [p for p in (work / "kdprune-demo").glob("teacher-*") if not p.name.endswith("-training")]
    assert (teacher / "model.safetensors").is_file()


def test_card_is_written_again(report, work, capsys):
    folder = work / report["path"]
    before = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == before


def test_inspect_counts_the_saved_model(report, work, capsys):
    assert main(["inspect", str(work / report["path"]), "--json", "--seq-len", str(report["budget"]["seq_len"])]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["params"] == report["size"]["compact"]["params"] and data["macs"] == report["size"]["compact"]["macs"]


@pytest.mark.parametrize("budget", ["macs=2", "params=0.1"])
def test_bad_budget_is_refused_before_the_teacher_is_trained(tmp_path, capsys, budget):
    assert main(["demo", "--budget", budget, "--output", str(tmp_path / "d")]) == 2
    assert repr(budget) in capsys.readouterr().err
    assert not list(tmp_path.rglob("teacher-*"))


def test_other_data_by_path(tmp_path):
    rows = {"premise": ["a", "b"] * 4, "hypothesis": ["c", "d"] * 4, "label": [0, 1, 2, 0, 1, 2, 0, 1], "idx": range(8)}
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = load_text_data(str(tmp_path))
    assert data.texts == ["premise", "hypothesis"] and data.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    Dataset.from_dict({**rows, "label": [0.5] * 8}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="whole-number classes"):
        load_text_data(str(tmp_path))


def test_name_and_command_of_a_run():
    demo = Demo(model="org/Big Model", budget="heads=0.5,ffn=0.25", seed=3, quick=True, output="x")
    assert demo.name == "big-model-banking77-heads50-ffn25"
    assert demo.command == "kdprune demo --model='org/Big Model' --budget=heads=0.5,ffn=0.25 --seed=3 --quick"
