"""`kdprune inspect`: what a budget would keep and what each size would lose, before anything is removed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kdprune import Plan, apply_plan, load_pretrained
from hf_kdprune.cli import main
from hf_kdprune.demo.data import minilm
from hf_kdprune.inspection import rank_on_text
from hf_kdprune.prune import latency
from hf_kdprune.prune.schedule import Pruning

FEW = ["--samples", "64"]


@pytest.fixture
def saved(tiny, tmp_path):
    """The folder of a tiny model that reads texts through MiniLM's tokenizer: saved("bert")."""

    def build(name="bert", **options):
        model = tiny(name, vocab_size=30522, max_position_embeddings=512, **options)
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


def told(capsys, *arguments):
    """What the command prints as data."""
    code = main(["inspect", *arguments, "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


@pytest.mark.parametrize(("name", "options"), [("bert", {}), ("llama", {"auto": AutoModelForCausalLM})])
def test_the_curve_rises_as_less_is_kept_and_ends_at_the_whole_model(saved, capsys, tmp_path, name, options):
    picture = tmp_path / "curve.png"
    data = told(capsys, saved(name, **options), "--curve", str(picture), "--least", "0", *FEW)
    assert picture.read_bytes().startswith(b"\x89PNG")
    points = data["curve"]
    shares, losses = [p["share"] for p in points], [p["loss"] for p in points]
    assert len(points) == 40 and shares == sorted(shares) and losses == sorted(losses, reverse=True)
    assert points[-1] == {"share": 1.0, "macs": data["macs"], "loss": 0.0}
    assert all(p["share"] == p["macs"] / data["macs"] for p in points)


def test_a_point_of_the_curve_is_the_score_of_what_its_plan_removes(saved):
    ranking = rank_on_text(saved(), None, 64, Pruning("macs=1", round_to=1, keep=["bert.encoder.layer.0.attention"]))
    first = ranking.curve(5)[0]
    everything = {n: float(v.sum()) for n, v in ranking.scores.values.items() if n != "bert.encoder.layer.0.attention"}
    assert first["loss"] == pytest.approx(sum(everything.values()))
    assert first["share"] == pytest.approx(ranking.scores.lowest("macs", ranking.pruning.rules()))


def test_a_plan_is_shown_saved_and_can_be_applied(saved, capsys, tmp_path):
    folder, file = saved(), tmp_path / "plan.json"
    flags = ["--plan", "macs=0.5", "--keep", "bert.encoder.layer.0.attention:3", "--least", "1", *FEW]
    data = told(capsys, folder, *flags, "--save", str(file), "--draw", str(tmp_path / "plan.png"))
    plan = Plan.load(file)
    assert json.loads(file.read_text()) == data["plan"] and (tmp_path / "plan.png").is_file()
    assert plan.budget["reached"] <= 0.5 and 3 in plan.sites[0].kept and all(site.kept for site in plan.sites)
    assert main(["inspect", folder, *flags]) == 0
    out = capsys.readouterr().out
    assert str(plan) in out
    apply_plan(load_pretrained(folder), plan)


def test_a_plan_in_time_and_one_in_loss(saved, capsys, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    folder = saved()
    budget = told(capsys, folder, "--plan", "latency=0.95", *FEW)["plan"]["budget"]
    assert budget["reached"] > 0 and budget["batch"] == 32
    budget = told(capsys, folder, "--plan", "loss=0.3", *FEW)["plan"]["budget"]
    assert 0 < budget["loss"] <= 0.3 and budget["reached"] < 1


def test_what_judges_a_loss_does_not_rank(saved):
    ranking = rank_on_text(saved(), None, 64, Pruning("loss=0.3", "magnitude"))
    texts = [
        {tuple(row[row > 0].tolist()) for b in part for row in b["input_ids"]} for part in (ranking.batches, ranking.judging)
    ]
    assert [len(t) for t in texts] == [56, 8] and not texts[0] & texts[1]
    assert rank_on_text(saved(), None, 64, Pruning("macs=0.5", "magnitude")).judging == []
    assert all("label" not in b and torch.is_tensor(b["input_ids"]) for b in ranking.batches)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--save", "plan.json"], "add --plan"),
        (["--draw", "c.png", "--curve", "d.png"], "add --plan"),
        (["--plan", "macs=0.001", "--least", "1"], "choose a share between"),
        (["--plan", "macs=2"], 'a budget is "macs="'),
        (["--plan", "loss=1%"], "give a KDPruneTrainer compute_metrics="),
        (["--plan", "macs=0.5", "--keep", "layer.9"], "no site or layer of this model"),
        (["--plan", "macs=0.5", "--shapes", "square"], "shapes must be one of"),
        (["--curve", "c.png", "--importance", "magic"], "importance must be one of"),
        (["--curve", "c.png", "--samples", "10"], "give --samples more"),
    ],
)
def test_what_cannot_be_inspected_is_refused(saved, capsys, tmp_path, monkeypatch, flags, said):
    folder = saved()
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", folder, *FEW, *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "c.png").exists()
