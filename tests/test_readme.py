"""The README's figures come from files that commands wrote, and its first screen keeps its promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CARDS = sorted(p.parent for p in (ROOT / "model_cards").glob("*/recipe.yaml"))


def test_tables_are_those_of_their_sources():
    command = [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_first_python_block_is_short_and_compiles():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(first.strip().splitlines()) <= 15
    compile(first, "README.md", "exec")


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.name)
def test_model_card_is_that_of_its_report(card, tmp_path):
    """The committed card is what today's template makes of the committed report."""
    from hf_kdprune.publish.card import write_card

    for name in ("report.json", "plan.json"):
        (tmp_path / name).write_text((card / name).read_text())
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == (card / "README.md").read_text()
    report = json.loads((card / "report.json").read_text())
    assert report["command"].startswith("kdprune demo") and not list(card.glob("*.safetensors"))
