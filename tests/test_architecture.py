"""The line of the house: which room may import which (DESIGN.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_kdprune"
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = ("distill", "prune", "publish")


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Absolute names of what a file imports, module or name alike."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_the_reader_of_imports_sees_relative_ones():
    assert "hf_kdprune.prune.sites.Plan" in imports_of(ROOT / "publish" / "checkpoint.py")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_do_not_import_each_other(path):
    module, imported = module_of(path), imports_of(path)
    room = module.split(".")[1] if module.count(".") else ""
    if room in ROOMS:
        for other in set(ROOMS) - {room}:
            taken = {name for name in imported if name.startswith(f"hf_kdprune.{other}")}
            if room == "publish":
                taken = {name for name in taken if not name.startswith("hf_kdprune.prune.sites")}
            assert not taken, f"{module} reaches into {other}"
    if any(name.startswith("hf_kdprune.trainer") for name in imported):
        assert module in ("hf_kdprune", "hf_kdprune.cli") or room == "demo"


def test_the_file_that_travels_imports_torch_and_transformers_only():
    roots = {name.split(".")[0] for name in imports_of(ROOT / "publish" / "modeling_kdprune.py")}
    assert roots <= {"torch", "transformers"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_sizes(path):
    tree = ast.parse(path.read_text())
    assert path.read_text().count("\n") <= 300
    assert path.name not in ("utils.py", "helpers.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
            assert node.end_lineno - node.lineno + 1 - docstring <= 40, f"{node.name} is too long"
            arguments = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert len(arguments) <= 6, f"{node.name} takes {arguments}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_names_are_documented(path):
    if path.name == "modeling_kdprune.py":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            inner = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and node in ast.walk(n) and n is not node]
            assert inner or ast.get_docstring(node), f"{node.name} has no docstring"
