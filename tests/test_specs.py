"""The specs that ship: each is clean, in the one layout, and compiles to Python that parses."""

import ast
import re
from inspect import signature
from pathlib import Path

import pytest

from difftrain.compiler.texts import PARTS
from difftrain.language.check import check
from difftrain.language.format import format_text
from difftrain.language.part import Part
from difftrain.language.scope import formals, lineage
from difftrain.language.spec import read_text
from difftrain.language.tree import Define, Formal, Interval, Number, Quantity
from difftrain.models import PLACES, builder
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


def made(definition) -> str:
    """The name of what builds a block's part."""
    body = [s for d in lineage(definition) for s in d.node.body if isinstance(s, Define)]
    return next((s.value.span.text for s in reversed(body) if s.name == "module"), "")


@pytest.mark.parametrize("path", [p for p in ALL if p.parent.name == "std"], ids=name)
def test_whole_numbers_are_those_that_builders_take(path):
    for definition in check(read_text(path))[0].names.own.values():
        module = made(definition) if hasattr(definition.node, "body") else ""
        if module not in PLACES:
            continue
        takes = signature(builder(Part(definition.kind, module, {}))).parameters
        found = {n: formal.whole for n, (formal, _) in formals(definition).items() if n in takes}
        wanted = {n: bool(re.search(r"\bint\b", str(takes[n].annotation))) for n in found}
        assert found == wanted, definition.name


# what counts nothing, though it is a whole number by default: of the block that declares it
MEASURED = {
    "custom": "dropout",
    "transformer": "dropout time_scale",
    "unet": "dropout time_scale",
    "mean_flow": "omega kappa start end p",
    "scd": "scale",
    "ct": "high rho",
    "ict": "std high rho",
    "lcm": "low high scaling",
    "vp": "high",
    "subvp": "high",
    "ve": "high",
    "shifted": "k",
    "train": "clip",
    "sample": "guidance guidance_rescale",
    "euler": "high rho",
    "ddim": "eta",
    "heun": "s_churn s_min s_max s_noise",
    "euler_maruyama": "scale",
    "dpm_solver_pp": "scale",
    "dream": "p",
    "min_snr": "gamma",
    "p2": "k g",
    "direction": "coefficient",
    "soft_min_snr": "gamma",
}


def test_what_is_whole_by_default_counts_or_is_known_not_to():
    names = (check(read_text(p))[0].names for p in ALL if p.parent.name == "std")
    blocks = [d for own in names for d in own.own.values() if hasattr(d.node, "body")]
    own = ((d.name, f) for d in blocks for f, home in formals(d).values() if home is d)
    found = {(block, f.name) for block, f in own if may_count(f) and not f.whole}
    assert found == {(block, n) for block, text in MEASURED.items() for n in text.split()}


def may_count(formal: Formal) -> bool:
    """Whether a parameter is a whole number by default, or a number without a default."""
    if formal.default is None:
        return isinstance(formal.domain, Interval)
    number = isinstance(formal.default, (Number, Quantity))
    return number and float(formal.default.value).is_integer()
