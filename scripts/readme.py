"""Fill the tables of README.md from the files that commands wrote: no figure there is typed by hand.

python scripts/readme.py          # rewrites README.md
python scripts/readme.py --check  # exits with 1 if README.md is not what the files say (the tests run this)
"""

import argparse
import json
import re
import sys
from pathlib import Path

from hf_kdprune.publish.card import table

ROOT = Path(__file__).parents[1]


def card_table(file: Path) -> str:
    """The side-by-side table of a report."""
    rows = table(json.loads(file.read_text()))
    return "\n".join(["| | teacher | compact | |", "|---|---:|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)])


def divergences(file: Path) -> str:
    """Of the tables of the ranking comparison: KL to the teacher, and perplexity."""
    head, *sections = file.read_text().split("\n**")
    shown = ["**" + section.strip() for section in sections if re.match(r".*(KL to|perplexity)", section.splitlines()[0])]
    links = re.compile(r"\]\((?=\w+\.)")  # as seen from the README
    return links.sub(f"]({file.parent.name}/", "\n\n".join([head.strip(), *shown]))


SOURCES = {"table": card_table, "ablation": lambda file: file.read_text().strip(), "ranking": divergences}


def filled(text: str) -> str:
    """README with each marked part made anew: `<!-- KIND: FILE -->` up to `<!-- end -->`."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{SOURCES[match[2]](ROOT / match[3])}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+): (\S+) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    now = filled(readme.read_text())
    if check:
        sys.exit(now != readme.read_text() and "README.md is not what its sources say: python scripts/readme.py")
    readme.write_text(now)
