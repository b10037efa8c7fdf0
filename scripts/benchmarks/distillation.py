"""What distillation costs beside the peers: the losses between logits over a large vocabulary.

    pip install -e ".[benchmark]"
    python scripts/benchmarks/distillation.py kl                                        # 1024 x 151,936, float32, forward KL
    python scripts/benchmarks/distillation.py kl --kinds forward_kl reverse_kl js --dtype bfloat16 --device cuda
    python scripts/benchmarks/distillation.py table                                     # the table again, from what was run

`kl`: forward and backward pass of the loss alone, on the same logits. The methods take turns, so that a busy machine disturbs
all alike; seconds are medians over the rounds. Peak memory is measured in a process of its own a method, above the inputs: the
resident set on CPU, torch's allocator on CUDA. The temperature is 1 by default, which all peers know; torchtune knows no other,
so elsewhere its logits are divided first. TRL also has a loss that starts from hidden states and never makes logits
(`trl.kernels.chunked_divergence`): it takes other inputs, and is no method of `kl`.

Each run is a line of docs/distillation.jsonl, the last of the same name counts; the table is docs/distillation.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from kl_methods import CROSS_ENTROPIES, METHODS, plain
from torch import Tensor

from hf_kdprune.demo.run import say
from hf_kdprune.distill.logits import LOGITS_LOSSES
from hf_kdprune.publish.report import environment

RUNS = Path("docs") / "distillation.jsonl"
NAME = ("section", "kind", "method", "rows", "classes", "dtype", "temperature", "device")
JUDGED_ROWS = 16  # whose gradient is compared with autograd in float64
COLUMNS = (
    *("method", "version", "seconds", "CPU seconds", "times ours", "peak above the inputs, MiB", "in tensors of logits"),
    *("loss, relative error", "gradient, relative error"),
)


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(dest="section", required=True)
    kl, memory = (sections.add_parser(name, help=text) for name, text in (("kl", "the loss alone"), ("memory", "(internal)")))
    sections.add_parser("table", help="write the table again, run nothing")
    for section in (kl, memory):
        section.add_argument("--rows", type=int, default=1024)
        section.add_argument("--classes", type=int, default=151_936, help="%(default)s: the vocabulary of Qwen2.5")
        section.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
        section.add_argument("--device", default="cpu")
        section.add_argument("--temperature", type=float, default=1.0)
        section.add_argument("--kinds", nargs="+", default=["forward_kl"], choices=list(LOGITS_LOSSES))
        section.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    kl.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.section == "memory":
        print(json.dumps(peak(args)))
        return
    for kind in args.kinds if args.section == "kl" else []:
        compare(kind, args)
    write_table()


def compare(kind: str, args: argparse.Namespace) -> None:
    """All methods of one kind: memory in processes of their own, then time in turns; a line of the record each."""
    methods = [name for name in args.methods if kind in METHODS[name][2]]
    facts = {name: in_a_process(kind, name, args) for name in methods}
    times = {name: [] for name in methods}
    student, teacher = logits(args)
    exact, entropy = exact_loss(kind, student, teacher, args.temperature)
    for turn in range(args.rounds + 1):  # the first warms up
        for name in methods if turn % 2 else methods[::-1]:
            seconds = timed(METHODS[name][0], kind, student, teacher, args.temperature)
            times[name] += [seconds] if turn else []
            say(f"{kind}, round {turn}, {name}: {seconds[0]:.2f} s, {seconds[1]:.2f} CPU seconds")
    settings = {key: getattr(args, key) for key in ("rows", "classes", "dtype", "temperature", "device")}
    for name in methods:
        seconds, cpu_seconds = zip(*times[name], strict=True)
        named = {"section": "kl", "kind": kind, "method": name, "version": version(METHODS[name][1]), **settings}
        right = exact + entropy if (name, kind) in CROSS_ENTROPIES else exact
        error = abs(facts[name]["loss"] - right) / right
        record({**named, "seconds": seconds, "cpu_seconds": cpu_seconds, **facts[name], "loss_error": error})


def logits(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Student and teacher (rows, classes), alike but not equal, made in place: what is made has no peak of its own."""
    draw = torch.Generator(args.device).manual_seed(0)
    shape, place = (args.rows, args.classes), {"dtype": getattr(torch, args.dtype), "device": args.device}
    student = torch.empty(shape, **place).normal_(0, 3, generator=draw)
    teacher = torch.empty(shape, **place).normal_(0, 1, generator=draw).add_(student)
    student.leaves = [student.requires_grad_()]  # where the gradient arrives
    return student, teacher


def timed(method: Callable, kind: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, float]:
    """Seconds and CPU seconds of one forward and backward pass."""
    synchronise(student.device)
    start, cpu = time.perf_counter(), time.process_time()
    method(kind, student, teacher, temperature).backward()
    synchronise(student.device)
    taken = time.perf_counter() - start, time.process_time() - cpu
    student.grad, student.leaves = None, [student]
    return taken


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_a_process(kind: str, method: str, args: argparse.Namespace) -> dict:
    """`peak` in a fresh process."""
    settings = [f"--{key}={getattr(args, key)}" for key in ("rows", "classes", "dtype", "device", "temperature")]
    command = [sys.executable, __file__, "memory", f"--kinds={kind}", f"--methods={method}", *settings]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(args: argparse.Namespace) -> dict:
    """Peak memory of one forward and backward pass above the inputs, and how right loss and gradient are."""
    kind, method = args.kinds[0], METHODS[args.methods[0]][0]
    small = torch.randn(8, 64, device=args.device, requires_grad=True)
    method(kind, small, small.detach(), args.temperature).backward()  # loads what is loaded at first use
    student, teacher = logits(args)
    before = peak_bytes(student.device)
    value = method(kind, student, teacher, args.temperature)
    value.backward()
    above = peak_bytes(student.device) - before
    gradient, by_autograd = (
        torch.cat([leaf.grad for leaf in student.leaves])[:JUDGED_ROWS].double(),
        judged_gradient(kind, student, teacher, args),
    )
    return {
        "peak_bytes": above,
        "peak_in_logits": above / (student.numel() * student.element_size()),
        "loss": float(value.detach()),
        "gradient_error": float((gradient - by_autograd).norm() / by_autograd.norm()),
    }


def exact_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, float]:
    """The loss in float64, and the teacher's mean entropy times T^2, a few rows at a time."""
    loss = entropy = 0.0
    for s, t in zip(student.detach().split(JUDGED_ROWS), teacher.split(JUDGED_ROWS), strict=True):
        loss += float(plain(kind, s.double(), t.double(), temperature)) * len(s) / len(student)
        log_probs = (t.double() / temperature).log_softmax(-1)
        entropy -= float((log_probs.exp() * log_probs).sum()) * temperature**2 / len(student)
    return loss, entropy


def judged_gradient(kind: str, student: Tensor, teacher: Tensor, args: argparse.Namespace) -> Tensor:
    """The gradient of the first rows by autograd in float64."""
    leaf = student.detach()[:JUDGED_ROWS].double().requires_grad_()
    (plain(kind, leaf, teacher[:JUDGED_ROWS].double(), args.temperature) * len(leaf) / args.rows).backward()
    return leaf.grad


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far; on Linux, getrusage would count what its parent held as well."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def record(facts: dict) -> None:
    """Append one run; of runs of the same name the last counts."""
    with RUNS.open("a") as file:
        file.write(json.dumps({**facts, "environment": environment()}) + "\n")
    say(json.dumps(facts))


def write_table() -> None:
    """The tables of every section, one after the other."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    runs = list({tuple(run.get(key) for key in NAME): run for run in runs}.values())
    lines = kl_tables([run for run in runs if run["section"] == "kl"])
    RUNS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def kl_tables(runs: list[dict]) -> list[str]:
    """A table for each kind and setting: medians, lowest to highest."""
    groups = {tuple(run[key] for key in NAME if key != "method"): [] for run in runs}
    for run in runs:
        groups[tuple(run[key] for key in NAME if key != "method")].append(run)
    lines = [
        "## The loss between logits",
        "",
        f"Medians over rounds (lowest to highest) of each run in [{RUNS.name}]({RUNS.name}), by "
        "`python scripts/benchmarks/distillation.py kl`: one forward and backward pass of the loss alone, on the same logits. "
        "Times ours is the median over rounds of the ratio of CPU seconds (of seconds on CUDA). Errors are against float64; "
        f"that of the gradient is of the first {JUDGED_ROWS} rows. torchtune's forward KL is the cross entropy, and is judged "
        "as that: the gradient is the same. On CPU much of a peer's time at 1,024 rows goes to memory that malloc returns to "
        "the system and asks for anew: where it is made to keep it (`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000`), "
        "torchtune's chunks took 1.28 times as long as ours (0.92 and 0.72 CPU seconds, 3 rounds).",
    ]
    for (_, kind, rows, classes, dtype, temperature, _), mine in groups.items():
        machine = mine[0]["environment"]
        lines += [
            "",
            f"**{kind}**, {rows:,} x {classes:,}, {dtype}, T = {temperature:g}; {machine['device']}, "
            f"{machine['threads']} thread(s), torch {machine['torch']}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---|---|" + "---:|" * (len(COLUMNS) - 2),
            *(row_of(run, mine) for run in mine),
        ]
    return lines


def row_of(run: dict, group: list[dict]) -> str:
    """One method as a row of the table."""
    clock = "cpu_seconds" if run["device"] == "cpu" else "seconds"
    base = next((other[clock] for other in group if other["method"] == "ours"), None)
    ratio = f"{statistics.median(a / b for a, b in zip(run[clock], base, strict=True)):.2f}" if base else ""
    return (
        f"| {run['method']} | {run['version']} | {spread(run['seconds'])} | {spread(run['cpu_seconds'])} | {ratio} "
        f"| {run['peak_bytes'] / 2**20:,.0f} | {run['peak_in_logits']:.2f} "
        f"| {run['loss_error']:.0e} | {run['gradient_error']:.0e} |"
    )


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
