"""What ranking and repair cost as models grow: seconds and memory on Llamas of several sizes, and what follows for larger ones.

    python scripts/benchmarks/scale.py                       # random Llamas of 10 to 120M parameters; minutes on 2 cores
    python scripts/benchmarks/scale.py --sizes 1b            # a random 1B Llama: rank, prune, repair; wants a GPU of 24 GB

Each size runs in a process of its own, so that its peak memory is its own. Cost grows with tokens times parameters, whatever
the number of units: the slope is that of the sizes measured. Writes docs/scale.json and docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kdprune import apply_plan, repair, score_units
from hf_kdprune.publish.report import environment

SIZES = {  # hidden, layers, heads, groups, neurons
    "10m": (320, 6, 10, 5, 864),
    "30m": (512, 8, 8, 4, 1408),
    "60m": (640, 12, 10, 5, 1728),
    "120m": (832, 14, 13, 13, 2304),
    "1b": (2048, 16, 32, 8, 8192),
    "8b": (4096, 32, 32, 8, 14336),
}
VOCABULARY = 8192
MEASURED = ("10m", "30m", "60m", "120m")
ROWS, LENGTH = 16, 256


def build(size: str, device: str) -> LlamaForCausalLM:
    """A random Llama."""
    hidden, layers, heads, groups, neurons = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=neurons,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def block_params(size: str) -> int:
    """Parameters of the blocks: what each token passes through."""
    hidden, layers, heads, groups, neurons = SIZES[size]
    return layers * (hidden * hidden * (2 + 2 * groups / heads) + 3 * hidden * neurons).__int__()


def measure_one(size: str, device: str) -> dict:
    """Seconds of each step on one model, and its peak memory."""
    torch.set_num_threads(1)
    model = build(size, device)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw).to(device).split(4)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows]
    seconds, found = {}, {}

    def timed(name: str, work) -> None:
        start = clock(device)
        found[name] = work()
        seconds[name] = clock(device) - start

    timed("rank", lambda: score_units(model, None, batches))
    after_rank = peak(device)
    plan = found["rank"].plan("macs=0.6")
    teacher = build(size, device)  # the same weights: a copy from before surgery
    timed("prune", lambda: apply_plan(model, plan, {k: v[:1] for k, v in batches[0].items()}))
    timed("repair", lambda: repair(model, teacher, batches))
    return {
        "size": size,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "block_params": block_params(size),
        "params": sum(p.numel() for p in teacher.parameters()),
        "tokens": ROWS * LENGTH,
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "peak_gib": {"after ranking": round(after_rank, 2), "after repair": round(peak(device), 2)},
    }


def clock(device: str) -> float:
    """Seconds; on a CPU those that one thread computed, which a busy machine does not stretch."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak(device: str) -> float:
    """Peak memory so far, GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure each size in a process of its own, and write what follows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(MEASURED), choices=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="write the table again, run nothing")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one, args.device)))
        return
    if args.table:
        (args.output / "scale.md").write_text(report(json.loads((args.output / "scale.json").read_text())["runs"]))
        return
    runs = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", size, "--device", args.device]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(json.dumps(runs[-1]), flush=True)
    facts = {"command": "python scripts/benchmarks/scale.py", "environment": environment(), "runs": runs}
    (args.output / "scale.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.output / "scale.md").write_text(report(runs))


def report(runs: list[dict]) -> str:
    """The table, the slope, and what a larger model will cost with 262,144 tokens."""
    lines = ["| Llama | parameters | rank, s | prune, s | repair, s | peak memory, GiB | rank, ns per token and parameter |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    slopes = {"rank": [], "repair": []}
    for run in runs:
        work = run["block_params"] * run["tokens"]
        for step, found in slopes.items():
            found.append(run["seconds"][step] / work)
        s = run["seconds"]
        lines.append(
            f"| {run['size']} | {run['params'] / 1e6:.0f} M | {s['rank']} | {s['prune']} | {s['repair']} "
            f"| {run['peak_gib']['after repair']} | {slopes['rank'][-1] * 1e9:.4f} |"
        )
    where = "CPU seconds of one thread" if runs[0]["device"] == "cpu" else runs[0]["device"]
    lines += ["", f"{ROWS * LENGTH:,} tokens, {where}. Predicted from the median slope, for 262,144 tokens:", ""]
    for size in ("1b", "8b"):
        work = block_params(size) * 262144
        rank, fix = (statistics.median(slopes[step]) * work for step in ("rank", "repair"))
        weights, p = block_params(size) * 4 / 2**30, SIZES[size][4]
        matrix = p * p * 8 / 2**30
        lines.append(
            f"- {size}: rank {rank / 60:,.0f} min, repair {fix / 60:,.0f} min here; weights {weights:.1f} GiB in fp32, "
            f"{weights / 2:.1f} in bf16; one p x p matrix in fp64 {matrix:.2f} GiB. {fits(weights / 2, matrix)}"
        )
    return "\n".join(lines) + "\n"


def fits(weights: float, matrix: float) -> str:
    """Whether ranking, with one copy of the blocks in bf16, and repair, with two, fit on a card of 24 GB beside a matrix."""
    card, said = 24e9 / 2**30, []
    for step, copies in (("ranking", 1), ("repair, which keeps the model of before", 2)):
        needed = copies * weights + matrix
        said.append(
            f"{step}: {needed:.1f} GiB in bf16 before activations, of {card:.1f}{'' if needed < card else ': does not fit'}"
        )
    return "; ".join(said) + "."


if __name__ == "__main__":
    main()
