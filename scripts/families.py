"""Make docs/families.md, the table of supported families, from what the tests of the families say when they are run.

    python scripts/families.py          # runs them, about 4 minutes on 2 cores

A cell is "yes" where every test of it passed, "-" where there is none to pass, and "NO" where one failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = ("tests/prune/test_families.py", "tests/publish/test_checkpoint_families.py")
COLUMNS = {  # heading -> the tests that must pass
    "exact": ("test_any_family_is_the_gated_one",),
    "free reload": ("test_saved_loaded_pruned_and_saved_again",),
    "stock reload": ("test_stock_shapes_load_without_our_code",),
    "generate": ("test_any_family_writes_what_the_gated_one_writes",),
}


def results(xml: str) -> dict[tuple[str, str], bool]:
    """(test, family) -> whether all of its cases passed."""
    found: dict[tuple[str, str], bool] = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[([^\]]+)\]", case.get("name", ""))
        if match:
            family = re.sub(r"-(eager|sdpa)$", "", match[2])
            key = (match[1], family)
            found[key] = found.get(key, True) and case.find("failure") is None and case.find("error") is None
    return found


def table(passed: dict[tuple[str, str], bool]) -> str:
    """The table; heads and neurons are those that the passing test of each family names."""
    sys.path.insert(0, str(ROOT / "tests"))
    sys.path.insert(0, str(ROOT / "tests" / "prune"))
    from families import FAMILIES
    from test_families import SITES

    def cell(tests: tuple[str, ...], family: str) -> str:
        ran = [passed[test, family] for test in tests if (test, family) in passed]
        return ("yes" if all(ran) else "NO") if ran else "-"

    lines = [f"| family | heads | FFN | {' | '.join(COLUMNS)} |", "|---|---|---|" + "---|" * len(COLUMNS)]
    for family in sorted(FAMILIES):
        kinds = {kind for kind, *_ in SITES[family][0]}
        found = cell(("test_every_block_gives_all_that_it_holds",), family)
        sites = [found if kind in kinds else "-" for kind in ("attention", "ffn")]
        lines.append(f"| {family} | {' | '.join([*sites, *(cell(tests, family) for tests in COLUMNS.values())])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the tests and write what they say."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, f"--junitxml={xml}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        made = table(results(xml.read_text()))
    note = "Made by `python scripts/families.py` from the results of the tests; tiny random models of each family."
    (ROOT / "docs" / "families.md").write_text(f"{note}\n\n{made}\n")
    print(made)


if __name__ == "__main__":
    main()
