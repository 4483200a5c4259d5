"""The specs that ship: each is clean, in the one layout, and compiles to Python that parses."""

import ast
from pathlib import Path

import pytest

from difftrain.compiler.texts import PARTS
from difftrain.language.check import check
from difftrain.language.format import format_text
from difftrain.language.spec import read_text
from difftrain.training.bundle import compile_spec

SPECS = Path(__file__).parent.parent / "specs"
ALL = sorted(SPECS.rglob("*.diff"))
COMPLETE = [p for p in ALL if p.parent.name != "std"]


def name(path: Path) -> str:
    return str(path.relative_to(SPECS))


@pytest.mark.parametrize("path", ALL, ids=name)
def test_it_is_clean_and_formatted(path):
    source = read_text(path)
    _, found = check(source)
    assert not found
    assert format_text(source) == source.text


@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_it_compiles(path):
    bundle = compile_spec(path)
    for file, text in bundle.texts.items():
        if file.endswith(".py") and not file.startswith(PARTS):
            functions = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
            assert {"tables", "compute"} <= functions, file
    assert "eps" in bundle.manifest["streams"]
