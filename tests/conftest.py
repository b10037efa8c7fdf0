"""What the tests share: tiny random models, made-up and real calibration batches, and the real MiniLM."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine two threads wait for each other at every small operator
sys.path.insert(0, str(Path(__file__).parent))  # subfolders import hub_server

import copy
import warnings
from collections import Counter

import pyarrow.parquet
import pytest
import torch
import transformers
from small import trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_kdprune.demo.data import BANKING77, minilm
from hf_kdprune.layers import hidden_states, real_positions
from hf_kdprune.prune.sites import Plan, SitePlan

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
MODELS = {  # name -> configuration class, and what it needs beside SIZES
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {"hidden_dim": 64}),
    "deberta_v2": ("DebertaV2Config", {**DEBERTA, "norm_rel_ebd": "layer_norm"}),
    "opt": ("OPTConfig", OPT),
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", {}),
}


@pytest.hookimpl(trylast=True)  # after pytest-randomly
def pytest_collection_modifyitems(items):
    """Of several workers, none waits at the end for another's long file: the demo first, then files of many tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name != "test_demo.py", -tests[item.path], item.path))


@pytest.fixture
def tiny():
    """Build a small random model whose weights are large enough that every unit matters.

    tiny("opt", attention="sdpa", auto=AutoModel, seed=1, num_hidden_layers=4): the rest are fields of the config.
    """

    def build(name="bert", attention="eager", auto=AutoModelForSequenceClassification, seed=0, **changes):
        kind, extra = MODELS[name]
        common = {"vocab_size": 200, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3}
        fields = {**common, "initializer_range": 0.2, **SIZES, **extra, **changes}
        torch.manual_seed(seed)
        config = getattr(transformers, kind)(**fields)
        return auto.from_config(config, attn_implementation=attention).eval()

    return build


@pytest.fixture
def ragged():
    """Build batches of random tokens, right-padded to `seq`: ragged(count, size, seq=12, seed=0)."""

    def build(count, size, seq=12, seed=0):
        draw = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(count):
            lengths = torch.randint(3, seq + 1, (size, 1), generator=draw)
            lengths[0] = seq
            mask = (torch.arange(seq) < lengths).long()
            ids = torch.randint(5, 200, (size, seq), generator=draw) * mask
            batches.append({"input_ids": ids, "attention_mask": mask})
        return batches

    return build


@pytest.fixture
def lora():
    """Wrap a BERT in LoRA whose adapters do something: lora(model)."""
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own use of transformers
            wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value", "dense"], r=2))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2)
        return wrapped.eval()

    return wrap


@pytest.fixture(scope="session")
def minilm_shared():
    """The real MiniLM as a classifier of 77 intents, for tests that only read it; its head is random."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=77).eval()
    before = copy.deepcopy(model.state_dict())
    yield model
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items()), "a test changed it"


@pytest.fixture
def minilm_copy(minilm_shared):
    """The real MiniLM, to be changed."""
    return copy.deepcopy(minilm_shared)


@pytest.fixture(scope="session")
def banking():
    """Batches of real Banking77 questions, of like length together: banking(count, size, start=0)."""
    texts = pyarrow.parquet.read_table(BANKING77 / "train.parquet")["text"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def build(count, size, start=0):
        chosen = [texts[(61 * i) % len(texts)] for i in range(start, start + count * size)]  # rows are sorted by intent
        chosen.sort(key=len)
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
        return [dict(tokenizer(part, **options)) for part in parts]

    return build


@pytest.fixture
def make(tmp_path):
    """Build a trainer of the tiny classifier, see `small.trainer`; its output directory is new unless given."""

    def build(output=None, **settings):
        return trainer(output or tmp_path / "out", **settings)

    return build


@pytest.fixture
def keep():
    """A plan by hand: keep(sites, {site name: kept}) keeps everything of the sites that are not named."""

    def build(sites, kept):
        parts = [SitePlan(s.name, s.kind, s.layer, s.total, list(kept.get(s.name, range(s.total)))) for s in sites]
        return Plan(parts, {"asked": "by hand", "reached": None, "seq_len": sites.seq_len}, "by hand")

    return build


@pytest.fixture
def feature_loss():
    """The second loss by its definition, for tests to compare with: see `second_loss`."""
    return second_loss


@torch.no_grad()
def second_loss(model, batches, matches, targets, metric="covariance"):
    """Mean over real positions and weighted mean over layers of the squared error of the features, in float64.

    "covariance": each position over the target's root mean square, under Sigma / tr(Sigma)^2 of the targets, half of it in the
    last layer. "plain": over the variance, layers alike. `targets` are the teacher's features, a list of layers for each batch.
    """
    masks = [real_positions(batch) for batch in batches]
    positions, total = sum(int(mask.sum()) for mask in masks), 0.0
    states = [hidden_states(model, batch) for batch in batches]
    for i, match in enumerate(matches):
        wanted = torch.cat([target[i][mask] for target, mask in zip(targets, masks, strict=True)]).double()
        mine = torch.cat([state[match.student][mask] for state, mask in zip(states, masks, strict=True)]).double()
        if metric == "plain":
            total += float((mine - wanted).square().sum()) / float(match.variances.sum()) / len(matches)
            continue
        size = wanted.square().mean(1, keepdim=True).sqrt()
        sigma = torch.cov((wanted / size).T, correction=0)
        error = (mine - wanted) / size
        share = 1 if len(matches) == 1 else 0.5 if i == len(matches) - 1 else 0.5 / (len(matches) - 1)
        total += float(((error @ (sigma / sigma.trace() ** 2)) * error).sum()) * share
    return total / positions
