"""scripts/compress.py: a recipe run by one process and by two, and the recipes that it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_kdprune import load_pretrained
from hf_kdprune.demo.data import load_text_data, minilm

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
ENV |= {"OMP_NUM_THREADS": "1"}  # as accelerate gives each of several processes; more threads wait for a busy core

spec = importlib.util.spec_from_file_location("compress", SCRIPTS / "compress.py")
compress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compress)

# The script as it is, but timings are cut short, and each save says which process made it.
QUICK = f"""
import os, runpy, sys
from hf_kdprune import measure, trainer
measure.SECONDS = 0.05
save = trainer.save_pretrained
def noted(*args, **kwargs):
    print("saved by", os.environ.get("RANK", "0"), "to", args[1], file=sys.__stderr__)
    return save(*args, **kwargs)
trainer.save_pretrained = noted
runpy.run_path({str(SCRIPTS / "compress.py")!r}, run_name="__main__")
"""


def recipe(**changes):
    """A recipe for a few seconds of work."""
    trainer = {"output_dir": "out", "budget": "macs=0.5", "learning_rate": "1e-4", "num_train_epochs": 1}
    trainer |= {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    files = {"train": "train.csv", "validation": "validation.csv"}
    return {"model": "model", "dataset": {"data_files": files}, "text": "text", "trainer": trainer} | changes


def write(path, content):
    """Write a recipe; numbers such as 1e-4 as people do, without a dot and without quotes."""
    path.write_text(yaml.safe_dump(content, sort_keys=False).replace("'1e-4'", "1e-4"))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny classifier, 200 rows of Banking77 as CSV with names and as JSON with ids, and recipes."""
    folder = tmp_path_factory.mktemp("work")
    data = load_text_data(None)
    names = dict(enumerate(data.labels))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(**sizes, id2label=names, label2id={name: i for i, name in names.items()})
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "model")
    for split, part, count in (("train", data.train, 160), ("validation", data.test, 40)):
        rows = part.shuffle(seed=0).select(range(count)).to_list()
        Dataset.from_list(rows).to_json(folder / f"{split}.json")
        Dataset.from_list([row | {"label": names[row["label"]]} for row in rows]).to_csv(folder / f"{split}.csv")
    (folder / "quick.py").write_text(QUICK)
    return folder


def launch(work, name, content, *launcher):
    """Run a recipe in `work`; gives its standard output and error."""
    path = write(work / name, content)
    command = [sys.executable, *launcher, "quick.py", path.name]
    env = ENV | {"HF_HOME": str(work / f"{path.stem}-cache")}
    child = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-5000:]
    return child.stdout, child.stderr


@pytest.fixture(scope="module")
def single(work):
    """What one process said; its model is in out/compact."""
    return launch(work, "single.yaml", recipe())


@pytest.fixture(scope="module")
def double(work):
    """What two processes said; their model is in double/compact, and their labels are ids."""
    content = recipe(dataset={"data_files": {"train": "train.json", "validation": "validation.json"}})
    content["trainer"]["output_dir"] = "double"
    config = str(SCRIPTS / "accelerate" / "cpu_2.yaml")
    return launch(work, "double.yaml", content, "-m", "accelerate.commands.launch", "--config_file", config)


def kept(folder):
    """Site -> the units that a saved plan keeps."""
    return {site["name"]: site["kept"] for site in json.loads((folder / "plan.json").read_text())["sites"]}


def check_loads(folder):
    """The checkpoint loads, is as small as its plan says, and reads text."""
    model, tokenizer = load_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for i, layer in enumerate(model.bert.encoder.layer):
        assert layer.intermediate.dense.out_features == len(kept(folder)[f"bert.encoder.layer.{i}.ffn"])
    with torch.no_grad():
        assert model(**tokenizer("Where is my card?", return_tensors="pt")).logits.shape == (1, 77)


def test_one_process_leaves_a_checkpoint_that_loads(work, single):
    check_loads(work / "out" / "compact")
    report = json.loads((work / "out" / "compact" / "report.json").read_text())
    assert report["metrics"]["compact"].keys() >= {"accuracy"}
    assert report["budget"]["asked"] == "macs=0.5"
    assert report["settings"]["learning_rate"] == 1e-4
    assert report["command"].startswith("accelerate launch --num_processes 1 ")
    assert report["command"].endswith("scripts/compress.py single.yaml")
    assert 'from_pretrained("out/compact", trust_remote_code=True)' in single[0]
    assert "latency, batch 32" in single[0]


def test_two_processes_make_the_plan_of_one(work, single, double):
    assert kept(work / "double" / "compact") == kept(work / "out" / "compact")
    check_loads(work / "double" / "compact")


def test_one_of_two_processes_writes_and_tells(work, double):
    out, error = double
    assert [line for line in error.splitlines() if line.startswith("saved by")] == ["saved by 0 to double/compact"]
    assert out.count("from_pretrained(") == 1
    assert error.count("repair: 100%") <= 2  # a bar is drawn at its end and when it closes
    assert [path.name for path in (work / "double").iterdir()] == ["compact"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "model"}, "a recipe has the keys .*'modle'"),
        ({"trainer": {"output_dir": "out", "budgett": "macs=0.5"}}, "budgett"),
        ({"trainer": {"output_dir": "out", "budget": "mac=0.5"}}, 'a budget is "macs="'),
        ({"trainer": {"output_dir": "out", "feature_loss": "msee"}}, "msee"),
    ],
)
def test_typo_is_refused_before_any_work(tmp_path, changes, message):
    path = write(tmp_path / "typo.yaml", recipe(**changes))
    with pytest.raises(ValueError, match=message):
        compress.read_recipe(path)
    assert [p.name for p in tmp_path.iterdir()] == ["typo.yaml"]


def test_recipe_without_a_model_is_refused(tmp_path):
    content = recipe()
    del content["model"]
    with pytest.raises(ValueError, match="has no {'model'}"):
        compress.read_recipe(write(tmp_path / "short.yaml", content))
    with pytest.raises(ValueError, match="has no"):
        compress.read_recipe(write(tmp_path / "empty.yaml", None))


def test_encoder_without_a_classifier_is_refused(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "model")
    asked, args = compress.read_recipe(write(tmp_path / "recipe.yaml", recipe()))
    with pytest.raises(ValueError, match="must be a fine-tuned text classifier"):
        compress.compress(asked, args)


def test_documented_recipe_reads_and_its_data_are_there():
    asked, args = compress.read_recipe(SCRIPTS / "recipes" / "banking77.yaml", model="some/classifier")
    assert asked.model == "some/classifier"
    assert all(Path(place).exists() for place in (asked.dataset["path"], asked.metric))
    assert (args.budget, args.learning_rate) == ("macs=0.5", 1e-4)
    assert args.output_dir == str(ROOT / "runs" / "banking77")


def labels(names, feature=None):
    """A data set with the column `label`."""
    return Dataset.from_dict({"label": names}, Features({"label": feature}) if feature else None)


def config(*names):
    """Of a model with these labels."""
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("data", "model", "ids"),
    [
        (labels(["cat", "dog"]), config("dog", "cat"), {"cat": 1, "dog": 0}),
        (labels([0, 1], ClassLabel(names=["cat", "dog"])), config("DOG", "CAT"), {0: 1, 1: 0}),
        (labels([0, 1], ClassLabel(names=["cat", "dog"])), BertConfig(num_labels=2), {0: 0, 1: 1}),
        (labels([1, 0], Value("int8")), config("cat", "dog"), {1: 1, 0: 0}),
    ],
)
def test_labels_are_the_models_by_name_where_there_are_names(data, model, ids):
    assert compress.label_ids(data, "label", model) == ids


@pytest.mark.parametrize(
    ("data", "model", "wrong"),
    [
        (labels(["cat", "bird"]), config("cat", "dog"), "bird"),
        (labels([0, 1], ClassLabel(names=["cat", "bird"])), config("cat", "dog"), "bird"),
        (labels(["cat", "dog"]), BertConfig(num_labels=2), "cat"),
        (labels([0, 2]), config("cat", "dog"), "2"),
        (labels([0, -1], ClassLabel(names=["cat", "dog"])), config("cat", "dog"), "-1"),
        (labels([0.0, 0.5]), config("cat", "dog"), "0.5"),
        (labels(["cat", None]), config("cat", "dog"), "None"),
    ],
)
def test_label_that_the_model_lacks_is_refused(data, model, wrong):
    with pytest.raises(ValueError, match=rf"every label must be one of the model's 2.*\['?{wrong}'?.*\]: take a model"):
        compress.label_ids(data, "label", model)


def test_wrong_column_is_refused():
    asked = compress.Recipe(model=minilm(), dataset={}, text=["text", "text2"], trainer={})
    with pytest.raises(ValueError, match="must be columns of the data set.*text2"):
        compress.encode(Dataset.from_dict({"text": ["a"], "label": [0]}), asked, config("cat", "dog"))


def test_accuracy_needs_no_network():
    metric = evaluate.load(str(SCRIPTS / "metrics" / "accuracy"), keep_in_memory=True)
    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0]) == {"accuracy": 0.75}
