"""A checkpoint of every family loads again: by its own Auto class, by load_pretrained, by a pipeline, whole or in shards."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from families import CAUSAL, FAMILIES, MASKED, TOKENS
from families import build as build_with

from hf_kdprune import Plan, apply_plan, find_sites, load_pretrained, save_pretrained, score_units
from hf_kdprune.inputs import made_up_inputs
from hf_kdprune.publish.checkpoint import auto_class, probe_inputs, probe_output

NAMES = [name for name in FAMILIES if name != "squeezebert"]  # it has no linear layer to cut
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
for folder, auto in json.loads(sys.argv[1]):
    probe = load_file(f"{folder}/../probe.safetensors")
    expected = probe.pop("expected")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        got = model.eval()(**probe)[0].float()
    print(folder, float((got - expected).abs().max() / max(1.0, float(expected.abs().max()))))
"""


def build(name, auto=None):
    """With the attention that from_pretrained will choose."""
    return build_with(name, None, auto=auto)


def pruned(name, auto=None, seed=0):
    """Three quarters of the MACs, and as little as can be of the first site."""
    model = build(name, auto=auto)
    sites = find_sites(model)
    plan = Plan.random(sites, "params=0.85", seed=seed)
    plan.sites[0].kept = plan.sites[0].kept[: sites[0].least]
    apply_plan(model, plan)
    return model


def same(model, other):
    """Outputs of the probe to the last bit."""
    inputs = probe_inputs(model)
    return torch.equal(probe_output(model, inputs), probe_output(other, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_pruned_and_saved_again(name, tmp_path):
    model = pruned(name)
    save_pretrained(model, tmp_path / "once", verify=False, max_shard_size="20KB")
    once = load_pretrained(tmp_path / "once")
    assert same(model, once) and once.num_parameters() == model.num_parameters()
    sites = find_sites(once)
    apply_plan(once, Plan.random(sites, "params=0.9", seed=1))
    save_pretrained(once, tmp_path / "twice", verify=False)
    assert same(once, load_pretrained(tmp_path / "twice"))


def test_every_family_in_a_fresh_process_that_knows_nothing_of_us(tmp_path):
    """Stock Auto class with trust_remote_code; hf_kdprune cannot be imported there."""
    from safetensors.torch import save_file

    asked = []
    for name in NAMES:
        model, folder = pruned(name), tmp_path / name / "model"
        folder.parent.mkdir()
        save_pretrained(model, folder, verify=False)
        inputs = probe_inputs(model)
        save_file({**inputs, "expected": probe_output(model, inputs)}, folder.parent / "probe.safetensors")
        asked.append([str(folder), auto_class(model)])
    code = "import sys; sys.modules['hf_kdprune'] = None\n" + LOAD
    child = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    differences = {line.split()[0]: float(line.split()[1]) for line in child.stdout.splitlines()}
    assert len(differences) == len(NAMES) and max(differences.values()) <= 1e-5, differences


PIPELINES = [  # task, family, Auto class, what a user puts in
    ("text-classification", "roberta", None, "w3 w4"),
    ("token-classification", "electra", TOKENS, "w3 w4"),
    ("fill-mask", "bert", MASKED, "w3 [MASK]"),
    ("text-generation", "llama", CAUSAL, "w3 w4"),
    ("text-generation", "mixtral", CAUSAL, "w3 w4"),
    ("feature-extraction", "mpnet", "AutoModel", "w3 w4"),
    ("image-classification", "vit", None, "image"),
    ("audio-classification", "wav2vec2", "AutoModelForAudioClassification", "audio"),
]
PIPE = """
import json, sys, numpy, torch
from PIL import Image
from transformers import pipeline
inputs = {"image": Image.new("RGB", (32, 32), "red"), "audio": numpy.ones(400, dtype="float32")}
for task, folder, put in json.loads(sys.argv[1]):
    pipe = pipeline(task, folder, trust_remote_code=True, **({"max_new_tokens": 3} if task == "text-generation" else {}))
    print(json.dumps([type(pipe.model).__name__, pipe.model.num_parameters(), bool(pipe(inputs.get(put, put)))]))
"""


def test_pipelines_of_every_kind_in_a_fresh_process(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(195))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    readers = {
        "image": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        "audio": transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000),
    }
    asked, expected = [], []
    for i, (task, name, auto, put) in enumerate(PIPELINES):
        model = pruned(name, auto)
        save_pretrained(model, tmp_path / str(i), readers.get(put, tokenizer), verify=False)
        asked.append([task, str(tmp_path / str(i)), put])
        expected.append([type(model).__name__, model.num_parameters(), True])
    code = "import sys; sys.modules['hf_kdprune'] = None\n" + PIPE
    child = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert [json.loads(line) for line in child.stdout.splitlines()] == expected


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "phi3", "mixtral", "t5", "whisper", "vit"])
def test_bfloat16_and_another_dtype_and_a_device_map(name, tmp_path):
    save_pretrained(pruned(name), tmp_path / "whole", verify=False)
    model = load_pretrained(tmp_path / "whole", dtype=torch.bfloat16)  # .to() would also cast rotary frequencies
    save_pretrained(model, tmp_path / "half", verify=False)
    half = load_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and same(model, half)
    assert load_pretrained(tmp_path / "half", dtype=torch.float32).dtype == torch.float32
    auto = getattr(transformers, auto_class(model))
    mapped = auto.from_pretrained(tmp_path / "half", trust_remote_code=True, device_map="cpu")
    assert same(model, mapped)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "swin"])
def test_what_was_not_pruned_stays_byte_for_byte(name):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    sites = find_sites(model)
    plan = Plan.random(sites, "macs=0.999")
    plan.sites[0].kept = plan.sites[0].kept[:-1]
    for site, whole in list(zip(plan.sites, sites, strict=True))[1:]:
        site.kept = list(range(whole.total))
    apply_plan(model, plan)
    cut = {c.name for c in sites[0].cuts}
    for key, now in model.state_dict().items():
        assert key in cut or torch.equal(before[key], now), key


# ---------------------------------------------------------------------------------------------- stock shapes


NEURONS, HEADS_TOO = ("ffn",), ("attention", "ffn")
STOCK = {  # what a family's own class can have fewer of: heads, where its config states their size
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2"), NEURONS),
    **dict.fromkeys(("modernbert", "mpnet", "convbert", "nystromformer", "xlnet", "gpt2", "gptj", "gpt_bigcode"), NEURONS),
    **dict.fromkeys(("opt", "gpt_neox", "falcon", "olmo2", "stablelm", "bart", "mbart", "marian", "pegasus"), NEURONS),
    **dict.fromkeys(("whisper", "clip", "wav2vec2", "hubert", "data2vec-audio"), NEURONS),
    **dict.fromkeys(("llama", "llama_mqa", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), HEADS_TOO),
    **dict.fromkeys(("phi", "phi3", "olmo", "cohere", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe"), HEADS_TOO),
    **dict.fromkeys(("t5", "mt5", "vit", "deit", "beit", "ast"), HEADS_TOO),
    "dinov2": ("attention",),  # a whole ratio states its neurons
}
NOT_STOCK = ("bloom", "swin", "siglip")


@pytest.mark.parametrize("name", NOT_STOCK)
def test_a_class_that_cannot_says_so(name):
    model = build(name)
    inputs = made_up_inputs(model, 12, 4)
    scores = score_units(model, None, [inputs, inputs], "magnitude")
    assert scores.stock == ()
    with pytest.raises(ValueError, match="shapes='stock' needs a config field.*take shapes='uniform'"):
        scores.plan("macs=0.9", 8, "stock")


@pytest.mark.parametrize("name", STOCK)
def test_stock_shapes_load_without_our_code(name, tmp_path):
    model = build(name)
    inputs = made_up_inputs(model, 12, 4)
    scores = score_units(model, None, [inputs, inputs], "magnitude")
    assert scores.stock == STOCK[name]
    plan = scores.plan("params=0.9", 8, "stock")
    assert any(site.removed for site in plan.sites)
    apply_plan(model, plan)
    line = save_pretrained(model, tmp_path / "stock", verify=False)
    assert "trust_remote_code" not in line and not list((tmp_path / "stock").glob("*.py"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "kdprune" not in config and "auto_map" not in config
    loaded = getattr(transformers, auto_class(model)).from_pretrained(tmp_path / "stock")
    assert same(model, loaded) and type(loaded).__module__.startswith("transformers.")
    assert same(model, load_pretrained(tmp_path / "stock"))


@pytest.mark.parametrize("shapes", ["uniform", "stock"])
def test_layers_are_alike(shapes):
    model = build("llama")
    inputs = made_up_inputs(model, 12, 4)
    plan = score_units(model, None, [inputs, inputs]).plan("macs=0.7", 8, shapes)
    for kind in ("attention", "ffn"):
        assert len({len(s.kept) for s in plan.sites if s.kind == kind}) == 1
    assert 0.5 < plan.budget["reached"] <= 0.7


def test_stock_says_what_the_class_cannot():
    model = build("bert")
    scores = score_units(model, None, [made_up_inputs(model, 12, 4)] * 2, "magnitude")
    with pytest.raises(ValueError, match="none that states fewer attention units .*fewer of: ffn.*take shapes='uniform'"):
        scores.plan("heads=0.5,ffn=0.5", 8, "stock")
    swin = build("swin")
    scores = score_units(swin, None, [made_up_inputs(swin, rows=4)] * 2, "magnitude")
    with pytest.raises(ValueError, match=r"need layers that are alike; this model has attention sites of \[2, 4\] units"):
        scores.plan("macs=0.7", 8, "uniform")


# ---------------------------------------------------------------------------------------------- bad checkpoints


def edited(folder, change):
    """Change config.json as `change` does."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_who_forgets_the_argument_reads_it(tmp_path, caplog):
    save_pretrained(pruned("bert"), tmp_path / "m", verify=False)
    logger = transformers.utils.logging.get_logger("transformers")
    level = logger.level
    logger.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    assert "load_it_with.trust_remote_code=True" in caplog.text


def test_a_section_that_is_missing_or_of_another_model_is_refused(tmp_path):
    save_pretrained(pruned("bert"), tmp_path / "m", verify=False)
    save_pretrained(pruned("bert", seed=5), tmp_path / "other", verify=False)
    section = json.loads((tmp_path / "other" / "config.json").read_text())["kdprune"]
    edited(tmp_path / "m", lambda config: config.update(kdprune=section))
    with pytest.raises(ValueError, match="weights must have the shapes that config.json states under 'kdprune'"):
        load_pretrained(tmp_path / "m")
    edited(tmp_path / "m", lambda config: config.pop("kdprune"))
    with pytest.raises(ValueError, match="must state the shapes under 'kdprune', and does not: save the model again"):
        load_pretrained(tmp_path / "m")


def test_an_adapted_model_is_saved_with_its_adapters_merged(lora, tmp_path):
    model = lora(build("bert"))
    sites = find_sites(model)
    plan = Plan.random(sites, "macs=0.7")
    plan.sites[0].kept = []
    apply_plan(model, plan)
    save_pretrained(model, tmp_path / "m", verify=False)
    loaded = load_pretrained(tmp_path / "m")
    inputs = made_up_inputs(model, 12, 2)
    torch.testing.assert_close(probe_output(loaded, inputs), probe_output(model, inputs), atol=1e-5, rtol=1e-5)


def test_the_code_that_travels_is_the_code_that_cuts():
    """One class, two homes: the file in the checkpoint imports nothing of this package."""
    import inspect

    from hf_kdprune.prune import cutting
    from hf_kdprune.publish import modeling_kdprune

    for name in ("EmptiedAttention", "LayerConfig", "set_number"):
        assert inspect.getsource(getattr(cutting, name)) == inspect.getsource(getattr(modeling_kdprune, name))
    assert len(inspect.getsource(modeling_kdprune).splitlines()) <= 120
