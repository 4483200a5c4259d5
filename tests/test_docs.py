"""The pages of docs and the README: their examples run, and their tables are the library's."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from difftrain.cli import COMMANDS, parse
from difftrain.commands.failure import Failure
from difftrain.commands.launch import OPTIONS
from difftrain.language.check import check
from difftrain.language.codes import CODES
from difftrain.language.format import format_text
from difftrain.language.forms import SPECIAL
from difftrain.language.names import TARGETS, Definition, Names, standard
from difftrain.language.operations import LAWS, OPERATIONS
from difftrain.language.render import render
from difftrain.language.scope import REMARKS, lineage
from difftrain.language.scope import formals as declared
from difftrain.language.tree import Block, Define, Draw, Source

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/language.md", "docs/objectives.md", "docs/house.md")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SLOTS = {"process": "linear", "prediction_type": "flow", "backbone": "custom"}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *kinds: str) -> list[str]:
    """The fenced blocks of these kinds."""
    return [text for kind, text in BLOCK.findall(page(name)) if kind in kinds]


def tables(name: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(the first cell of the head, the rows) of every table of a page."""
    for table in re.findall(r"(?:^\|.*\|\n)+", page(name), re.MULTILINE):
        head, _, *rows = [cells(line) for line in table.splitlines()]
        yield head[0], rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(name: str, head: str) -> list[list[str]]:
    (rows,) = [rows for title, rows in tables(name) if title == head]
    return rows


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# ---- examples


def whole(text: str) -> bool:
    return text.startswith("diff 1\n")


def specs() -> list[str]:
    """Every whole spec on the pages, and every part in a spec around it."""
    found = [text for name in PAGES for text in blocks(name, "diff", "") if whole(text)]
    for text in (t for name in PAGES for t in blocks(name, "diff-part")):
        slots = [f"{k} = {v}" for k, v in SLOTS.items() if f"{k} " not in text]
        found.append("diff 1\nobjective o {\n" + "\n".join([*slots, text]) + "}\n")
    for text in (t for name in PAGES for t in blocks(name, "diff-part run")):
        slots = "\n".join(f"{k} = {v}" for k, v in SLOTS.items())
        found.append(f"diff 1\nobjective o {{\n{slots}\n}}\n{text}")
    return found


@pytest.mark.parametrize("text", specs())
def test_examples_are_clean(text):
    _, found = check(Source("example.diff", text))
    assert not found, render(found)


@pytest.mark.parametrize("text", [t for n in PAGES for t in blocks(n, "diff", "") if whole(t)])
def test_examples_are_in_the_one_layout(text):
    assert format_text(Source("example.diff", text)) == text


def counting(names: Names) -> Iterator[tuple[str, bool]]:
    """The parameters of every block, and whether it says that they count something."""
    for definition in names.own.values():
        if isinstance(definition.node, Block):
            yield from ((name, formal.whole) for name, (formal, _) in declared(definition).items())


def test_examples_count_what_the_library_counts():
    library = (*standard(), *imported().values())
    known = {name for names in library for name, whole in counting(names) if whole}
    recipes = [path.read_text() for path in (ROOT / "specs/recipes").glob("*.diff")]
    for text in (*specs(), *recipes):
        names = check(Source("a.diff", text))[0].names
        assert not [n for n, whole in counting(names) if n in known and not whole], text


SPEC = """diff 1
param gamma in 1..20 = 5
objective o {
  process         = ddpm
  prediction_type = v_prediction
  strategy        = [min_snr(gamma), dream]
  backbone        = custom
}
"""


@pytest.mark.parametrize("name", [n for n in PAGES if blocks(n, "python")])
def test_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.diff").write_text(SPEC)
    given = {"x0": torch.randn(2, 3, 4, 4), "eps": torch.randn(2, 3, 4, 4), "cond": None}
    given |= {"t": torch.tensor([3, 900]), "network": lambda x, t, cond=None: x}
    for text in blocks(name, "python"):
        exec(text, given)
    assert given["objective"](given["x0"]).shape == (2,)


def test_the_error_in_the_readme_is_real():
    (spec,) = [t for t in blocks("README.md", "") if whole(t)]
    (told,) = [t for t in blocks("README.md", "") if t.startswith("error")]
    _, found = check(Source("a.diff", spec.replace("v_prediction", "epsilon")))
    assert render(found).startswith(told)


def test_settings_are_accepted():
    (spec,) = [t for t in blocks("docs/language.md", "diff") if "objective photos" in t]
    extended = spec.replace("prediction_type", "clean = 1\n  loss = fit + clean\n  prediction_type")
    for cell, *_ in table("docs/language.md", "`--set`"):
        name, value = quoted(cell)[0].split("=")
        _, found = check(Source("a.diff", extended), {name: value})
        assert not [f for f in found if f.code in ("DIF150", "DIF151")], render(found)


# ---- tables of names


def signature(name: str, formals) -> str:
    """A definition as a person would call it: every parameter, with its default."""
    inside = [f.name + (f" = {f.default.span.text}" if f.default else "") for f in formals or ()]
    return f"{name}({', '.join(inside)})" if inside else name


def defined(kind: str, spaces: tuple[Names, ...] | None = None) -> set[str]:
    """The signatures of everything of a kind in the library."""
    own = [d for names in spaces or standard() for d in names.own.values()]
    return {signature(d.name, d.node.formals) for d in own if d.kind == kind}


KINDS = ("process", "prediction", "strategy", "function", "source", "optimizer", "solver")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_definitions(kind):
    named = [quoted(row[0])[0] for row in table("docs/language.md", kind)]
    assert set(named) == defined(kind) and len(named) == len(set(named))


def imported() -> dict[str, Names]:
    """The libraries that have to be imported, by name."""
    folder = ROOT / "specs/std"
    prelude = folder / "prelude.diff"
    common = {"prelude", *re.findall(r"import std\.(\w+)", prelude.read_text())}
    names = sorted({f.stem for f in folder.glob("*.diff")} - common)
    text = "\n".join(["diff 1", *(f"import std.{name}" for name in names)]) + "\n"
    return check(Source("a.diff", text))[0].names.spaces


def parts(kind: str) -> dict[str, Definition]:
    """Every definition of a kind in the library, by the name that a spec calls it."""
    own = {d.name: d for n in standard() for d in n.own.values() if d.kind == kind}
    for library, names in imported().items():
        own |= {f"{library}.{d.name}": d for d in names.own.values() if d.kind == kind}
    return own


@pytest.mark.parametrize("kind", ["backbone", "encoder", "codec"])
def test_parts(kind):
    """What is made from another part has its name on the page, all else a row with its options."""
    listed = {quoted(row[0])[0] for row in table("docs/language.md", kind)}
    whole = {name: d for name, d in parts(kind).items() if not d.node.base}
    assert listed == {signature(name, d.node.formals) for name, d in whole.items()}
    text = page("docs/language.md")
    assert not [name for name in parts(kind).keys() - whole.keys() if f"`{name}`" not in text]


def test_sizes_of_parts():
    known = parts("backbone")
    for names, *numbers in table("docs/language.md", "sizes"):
        for name in quoted(names):
            found = {f.name: f.default.span.text for f in formals(known[name])}
            assert [found[n] for n in ("depth", "width", "heads")] == numbers, name


def formals(definition: Definition):
    """The parameters of a block with those of its bases, the newest last."""
    return [f for d in lineage(definition) for f in d.node.formals]


def test_processes_of_parts():
    listed = {quoted(row[0])[0] for row in table("docs/language.md", "sd")}
    assert listed == {f"sd.{s}" for s in defined("process", (imported()["sd"],))}


@pytest.mark.parametrize("kind", ["data", "train", "sample", *TARGETS])
def test_options(kind):
    (names,) = [n for n in standard() if ("options", kind) in n.own]
    formals = names.own["options", kind].node.formals
    expected = [
        [f.name, f.domain.span.text if f.domain else "", f.default.span.text] for f in formals
    ]
    rows = table("docs/language.md", kind)
    assert [[cell.strip("`") for cell in row[:3]] for row in rows] == expected


INPUTS = {"x0", "cond", "null", "image", "step", "student", "teacher", "row_a", "row_b"}
OPEN = {"t", "r", "alpha", "sigma", "target"}


def test_quantities():
    (prelude,) = [n.own["prelude", ""].node for n in standard() if ("prelude", "") in n.own]
    base = {s.name for s in prelude.body if isinstance(s, (Define, Draw))}
    rows = table("docs/language.md", "name")
    assert {n for row in rows for n in quoted(row[0])} == base | INPUTS | OPEN


def test_operations():
    listed = {n for row in table("docs/language.md", "operations") for n in quoted(row[1])}
    assert listed == {name for name, row in OPERATIONS.items() if row.doc} | {"stop"}
    for law in LAWS.values():
        assert f"`{law.partition(':')[0]}`" in page("docs/language.md")


def test_calls():
    listed = {quoted(row[0])[0].partition("(")[0] for row in table("docs/language.md", "call")}
    assert listed == {*SPECIAL, "stop"}


def test_remarks():
    assert [quoted(row[0])[0] for row in table("docs/language.md", "remark")] == list(REMARKS)


def test_codes():
    ranges = [re.findall(r"DIF\d+", row[0]) for row in table("docs/language.md", "codes")]
    assert all(any(low <= code <= high for code in CODES) for low, high in ranges)
    for code in CODES:
        assert sum(low <= code <= high for low, high in ranges) == 1, code


def test_commands():
    rows = table("README.md", "command")
    assert {quoted(row[0])[0].split()[1] for row in rows} == COMMANDS.keys()


def flags(options) -> set[str]:
    return {flag for names, _ in options for flag in names if flag.startswith("-")}


def test_options_of_sample():
    """Each has its row, by one of its spellings."""
    rows = table("docs/language.md", "`difftrain sample`")
    named = {quoted(row[0])[0].split()[0] for row in rows}
    options = [names for names, _ in COMMANDS["sample"].options if names[0].startswith("-")]
    assert len(rows) == len(options) and all(named & set(names) for names in options)
    (short,) = [row[1] for row in table("README.md", "command") if "sample RUN" in row[0]]
    assert set(quoted(short)) <= flags(COMMANDS["sample"].options)


COMMAND = re.compile(
    r"(?:^|`|    |&& )(difftrain (\w+)|\./(?:emoji|photos)) ([^`\n]*)", re.MULTILINE
)
DRAWS = {"--prompt", "-n", "--seed", "-o"}  # of a file of engines, which `./photos` may be as well


@pytest.mark.parametrize("name", [*PAGES, "docs/performance.md"])
def test_commands_take_the_options_that_are_shown(name):
    for program, command, rest in COMMAND.findall(page(name)):
        known = flags(COMMANDS[command].options) if command else flags(OPTIONS) | DRAWS
        shown = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest))
        assert shown <= known | {"--help"}, f"{program} {rest}"


def test_targets_of_export():
    named = [quoted(row[0])[0] for row in table("docs/language.md", "target")]
    with pytest.raises(Failure) as problem:
        parse("", "", COMMANDS["export"].options, ["RUN", "--to", "nothing"])
    assert named == quoted(str(problem.value))[1:]
    assert set(TARGETS) < set(named) and all(f"`{n}`" in page("README.md") for n in named)


def test_extras():
    project = tomllib.loads(page("pyproject.toml"))["project"]
    named = {quoted(row[0])[0] for row in table("README.md", "extra")}
    assert named == project["optional-dependencies"].keys()


def test_the_solver_on_the_page_is_tested():
    (text,) = [t for t in blocks("docs/language.md", "python") if t.startswith("def go(")]
    assert text in page("tests/test_walks.py")


def test_every_solver_has_its_source():
    _, _, rest = page("docs/objectives.md").partition("\n## Solvers\n")
    listed = re.findall(r"^- `(\w+)`:", rest.partition("\n## ")[0], re.MULTILINE)
    assert sorted(listed) == sorted(name.partition("(")[0] for name in defined("solver"))


@pytest.mark.parametrize("kind", ["process", "prediction", "strategy", "function"])
def test_every_method_has_its_source(kind):
    text = page("docs/objectives.md")
    names = [d.name for n in standard() for d in n.own.values() if d.kind == kind]
    missing = [name for name in names if f"`{name}`" not in text and f"`{name}(" not in text]
    assert not missing


def test_recipes():
    files = {f"specs/recipes/{f.name}" for f in (ROOT / "specs/recipes").glob("*.diff")}
    assert {quoted(row[0])[0] for row in table("docs/objectives.md", "recipe")} == files


def test_golden_numbers_are_there():
    """A key that the page names is in the file, and a test reads it."""
    keys = json.loads(page("tests/golden.json"))
    read = (
        page("tests/test_golden.py") + page("tests/test_solvers.py") + page("tests/test_sampler.py")
    )
    named = re.findall(r"\*Golden \(([^)]*)\)", page("docs/objectives.md"))
    assert named
    for key in (key for text in named for key in quoted(text)):
        assert key in keys and f'"{key}"' in read, key


# ---- the house


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name):
    folders = "difftrain|specs|tests|tools|grammars|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", page(name)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", page(name)):
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), target
        heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
        assert not anchor or anchor in slugs, anchor


def test_every_folder_is_described():
    folders = {f.parent.name for f in (ROOT / "difftrain").glob("*/__init__.py")}
    assert all(f"`difftrain/{folder}/`" in page("docs/house.md") for folder in folders)


@pytest.mark.parametrize("folder", ["difftrain/training", "difftrain/sampling", "difftrain/export"])
def test_every_file_is_described(folder):
    rows = table("docs/house.md", f"`{folder}/`")
    files = {f.name for f in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert files == {name for row in rows for name in quoted(row[0])}


def test_every_tool_is_described():
    named = {quoted(row[0])[0].strip("/") for row in table("docs/house.md", "`tools/`")}
    assert named == {f.name for f in (ROOT / "tools").iterdir() if f.name != "__pycache__"}


def test_whole_specs_are_checked():
    """The pattern finds what it should: several whole specs, each with a block."""
    found = [check(Source("a.diff", t))[0] for t in specs()]
    assert len(found) > 8 and all(any(isinstance(n, Block) for n in s.tree.body) for s in found)
