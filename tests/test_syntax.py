"""Text to tree: what statements mean, what is said about broken ones, and that nothing raises."""

import json
import re
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

from difftrain import shipped
from difftrain.language import lexing, tree
from difftrain.language.complaints import RESERVED
from difftrain.language.finding import Finding
from difftrain.language.render import render
from difftrain.language.syntax import CODES, parse
from difftrain.language.tree import Source

ROOT = Path(__file__).parent.parent
FULL = """\
diff 1
import std.sd

param gamma in 1..20 = 5

objective sd15_v {
  process         = ddpm(beta = scaled_linear(0.00085, 0.012), steps = 1000, terminal_snr = zero)
  prediction_type = v_prediction
  strategy        = [dream(p = 1), drop_condition(0.1), min_snr(gamma)]
  backbone        = sd.unet(text = sd.clip)
}

data   { source = folder("photos", caption = "text"), size = 512px, batch = 16 }
train  { steps = 100k, precision = bf16, optimizer = adamw(1e-5), ema = 0.9999, resume_from = "" }
export { tensorrt { precision = fp16, batch = 1..8 } }
"""
LIBRARY = """\
process vp(low = 0.1, high = 20) {
  t ~ uniform(0.00001, 1), area = low * t + (high - low) * t^2 / 2
  alpha = exp(-area / 2), sigma = sqrt(1 - exp(-area))  # compiled as expm1
}
process subvp(low = 0.1, high = 20) from vp { sigma = 1 - exp(-area) }
strategy flowing(ratio in 0..1 = 0.25, total) {
  apart ~ bernoulli(ratio)
  r       = if apart then min(one, two) else t
  target' = stop(target - (t - r) * ddt(pred))
}
"""


def read(text: str) -> tuple[tree.Tree, list[Finding]]:
    found: list[Finding] = []
    return parse(Source("a.diff", text), found), found


def clean(text: str) -> tree.Tree:
    parsed, found = read(text)
    assert not found, render(found)
    return parsed


def value(text: str) -> tree.Expr:
    [define] = clean(f"x = {text}").body
    return define.value


def show(e: tree.Expr) -> str:
    """An expression with every grouping in parentheses."""
    match e:
        case tree.Number(number):
            return f"{number:g}"
        case tree.Binary(op, left, right):
            return f"({show(left)} {op} {show(right)})"
        case tree.Negate(inner):
            return f"(-{show(inner)})"
        case tree.If(test, then, other):
            return f"(if {show(test)} then {show(then)} else {show(other)})"
        case tree.Interval(low, high):
            return f"({show(low)} .. {show(high)})"
        case tree.Name():
            return e.dotted
    raise AssertionError(e)


# ---- statements


def test_a_whole_spec():
    spec = clean(FULL)
    assert spec.edition == 1
    kinds = [type(statement).__name__ for statement in spec.body]
    assert kinds == ["Import", "Param", "Block", "Block", "Block", "Block"]
    assert [s.name for s in spec.body[2].body] == [
        "process",
        "prediction_type",
        "strategy",
        "backbone",
    ]
    assert spec.body[5].body[0].kind == "tensorrt"


def test_the_edition_is_optional_and_may_follow_comments():
    assert clean("a = 1").edition is None
    assert clean("\n# a spec\n\ndiff 1\na = 1").edition == 1


def test_import_param_draw_and_prime():
    text = "import std.sd as s\nparam p in 0..1 = 0.5\nt ~ uniform(0, 1)\neps' = eps"
    imported, param, draw, prime = clean(text).body
    assert (imported.path, imported.alias) == (("std", "sd"), "s")
    assert (param.name, show(param.domain), show(param.default)) == ("p", "(0 .. 1)", "0.5")
    assert (draw.name, draw.law.dotted) == ("t", "uniform")
    assert (prime.name, prime.value) == ("eps", value("eps"))


def test_formals_have_domains_defaults_or_neither():
    [block] = clean("strategy s(rate in 0..1 = 0.1, mode in [a, b] = a, total) { }").body
    rate, mode, total = block.formals
    assert show(rate.domain) == "(0 .. 1)" and show(rate.default) == "0.1"
    assert [item.dotted for item in mode.domain.items] == ["a", "b"]
    assert (total.name, total.domain, total.default) == ("total", None, None)


def test_a_function_has_formals_and_a_quantity_has_none():
    function, thunk, quantity = clean("f(a, b = 1) = a\ng() = 1\nh = 2").body
    assert [formal.name for formal in function.formals] == ["a", "b"]
    assert thunk.formals == ()
    assert quantity.formals is None


def test_blocks_may_have_a_name_formals_and_a_base():
    [block] = clean("process subvp(low = 0.1) from lib.vp { sigma = 1 }").body
    assert (block.kind, block.name, block.base) == ("process", "subvp", ("lib", "vp"))
    [block] = clean("data { }").body
    assert (block.kind, block.name, block.formals, block.base) == ("data", None, (), None)


@pytest.mark.parametrize(
    "text",
    [
        "b { a = 1, c ~ d, e' = e }",
        "b { a = 1\n c ~ d\n e' = e }",
        "b {\n a = 1, c ~ d\n\n e' = e\n}",
        "b { # about\n a = 1, c ~ d, # rest\n e' = e, }\n",
        "b\t{\r\n a = 1\r\n c ~ d\r\n e' = e\r\n}\r\n",
    ],
)
def test_commas_and_newlines_separate_statements(text):
    assert clean(text) == clean("b {\na = 1\nc ~ d\ne' = e\n}\n")


def test_newlines_inside_brackets_do_not_count():
    assert value("f(\n  1,  # one\n\n  b = 2,\n)") == value("f(1, b = 2)")
    assert value("[\n1\n,\n2]") == value("[1, 2]")
    assert value("(\n1\n+ 2\n)") == value("1 + 2")


def test_spans_hold_what_was_written():
    [block] = clean("process vp(low = 1) {\n  sigma = f(low, (1 + 2))\n}\n").body
    assert block.head.text == "vp"
    assert block.span.text.startswith("process") and block.span.text.endswith("}")
    [define] = block.body
    assert define.span.text == "sigma = f(low, (1 + 2))"
    assert define.value.head.text == "f"
    assert define.value.args[1].value.span.text == "1 + 2"
    assert block.formals[0].span.text == "low = 1"


# ---- expressions


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1 + 2 * 3 - 4", "((1 + (2 * 3)) - 4)"),
        ("a / b * c", "((a / b) * c)"),
        ("-a^2", "(-(a ^ 2))"),
        ("2^-3^2", "(2 ^ (-(3 ^ 2)))"),
        ("- -a", "(-(-a))"),
        ("a - -b", "(a - (-b))"),
        ("a + 1 <= b", "((a + 1) <= b)"),
        ("a + 1 .. b", "((a + 1) .. b)"),
        ("1..20", "(1 .. 20)"),
        ("1e-5..1.5", "(1e-05 .. 1.5)"),
        ("if a < b then c else if d then e else f + 1",
         "(if (a < b) then c else (if d then e else (f + 1)))"),
        ("process.data", "process.data"),
        ("iffy + inner + notdiff", "((iffy + inner) + notdiff)"),
    ],
)  # fmt: skip
def test_operators_bind_as_in_mathematics(text, meaning):
    assert show(value(text)) == meaning


def test_calls_take_arguments_by_place_and_by_name():
    call = value("flow_hat(a, net = teacher, t = -s)")
    assert call.dotted == "flow_hat"
    assert [argument.name for argument in call.args] == [None, "net", "t"]
    assert value("f()").args == ()
    assert value("[]").items == ()


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("100k", 100_000, "k"),
        ("2M", 2_000_000, "M"),
        ("1.5G", 1.5e9, "G"),
        ("512px", 512, "px"),
        ("4GiB", 4 * 2**30, "GiB"),
        ("3KiB", 3072, "KiB"),
        ("30s", 30, "s"),
        ("5min", 300, "min"),
        ("2h", 7200, "h"),
    ],
)
def test_quantities_are_multiplied_out(text, number, unit):
    assert value(text) == tree.Quantity(number, unit, None)


def test_numbers_compare_by_value_and_are_floats():
    assert value("1e-5") == value("0.00001")
    assert isinstance(value("1000").value, float)


def test_strings_hold_any_text_and_four_escapes():
    assert value(r'"a \"b\" \\ \n # ü × \t."').value == 'a "b" \\ \n # ü × \t.'


# ---- findings, read as prose

GOLDEN = {
    "": "DIF001 this file has nothing in it | write `diff 1`, `import std.sd` and an `objective`",
    "# only words\n\n": "DIF001 this file has nothing in it"
    " | write `diff 1`, `import std.sd` and an `objective`",
    ",\n": "DIF001 this file has nothing in it"
    " | write `diff 1`, `import std.sd` and an `objective`",
    "a\0b": "DIF002 this file is not text | give the path of a `.diff` file",
    "diff 2\n": "DIF003 edition 2 of the language is not known here"
    " | write `diff 1`, or use a difftrain that knows edition 2",
    "a = 1; b = 2": "DIF004 `;` means nothing in this language"
    " | put the next statement on its own line, or write `,` between the two",
    "a: 1": "DIF004 `:` means nothing in this language"
    " | write `=` to define, or `in` to give a range",
    "a = 'x'": "DIF004 this `'` is neither a prime nor a quote"
    ' | write `"` around a string, and a prime right behind the name on the left of `=`',
    "a = \x07": "DIF004 the control character 7 means nothing in this language | delete it",
    "a = b × c": "DIF005 `×` is not ASCII | write `*`",
    "größe = 1": "DIF005 `öß` is not ASCII | spell it with the letters a to z",
    "\ufeffa = 1": "DIF005 a hidden zero width no-break space is not ASCII | delete it",
    'a = f("x)': 'DIF006 this string does not end on its line | close it with `"`',
    "a = f(1, 2\nb = 3": "DIF007 expected `)` to close the `(` opened here"
    " | write `)` at the end of the line",
    "a = [1, 2)": "DIF007 expected `]` to close the `[` opened here | write `]` before `)`",
    "p { a = f(1 }": "DIF007 expected `)` to close the `(` opened here | write `)` before `}`",
    "data {\n  a = 1\ntrain { b = 2 }": "DIF008 expected `}` to close the `{` opened here"
    " | write `}` before line 3",
    "data {\n  a = 1": "DIF008 expected `}` to close the `{` opened here"
    " | write `}` before the end of the file",
    "a = 1)": "DIF009 `)` closes nothing | delete `)`, or write the `(` that it closes",
    "data { a = 1 } }": "DIF009 `}` closes nothing | delete `}`, or write the `{` that it closes",
    "{ a = 1 }": "DIF009 `{` stands behind no block's name | delete `{`, or write `kind name {`",
    "diff x": "DIF010 expected a whole number after `diff`, found `x`"
    " | write a whole number after `diff`",
    "a == 1": "DIF010 `==` compares, it does not define | write `=`",
    "a = b = c": "DIF010 a statement has one `=` | compare with `==`, or use two statements",
    "a = b < c < d": "DIF010 comparisons do not chain, found a second one, `<`"
    " | write `if a < b then b < c else false`",
    "a = 2 ** 3": "DIF010 `**` is no operator | write `^` for a power",
    "a = b and c": "DIF010 `and` is no operator"
    " | write `if a then b else false` for both of two conditions",
    "a = b[0]": "DIF010 `[` opens a list, not an index | write `pick(table, i)`",
    "a = if b then c": "DIF010 expected `else` after `c`, found the end of the line"
    " | write `else` after `c`",
    "a = 1 else 2": "DIF010 `else` belongs to an `if` before it | write `if a then b else c`",
    "a = f(b c)": "DIF010 expected `,` or `)` after `b`, found `c`"
    " | write `,` before `c`, or delete `c`",
    "a = 1 2": "DIF010 expected an operator or the end of the line, found `2`"
    " | delete `2`, or write an operator before it",
    "import std.": "DIF010 expected a name after `.`, found the end of the line"
    " | write a name after `.`",
    "in = 3": "DIF011 `in` is a word of the language and cannot be a name"
    " | choose another name, such as `in_`",
    "a = eps' + 1": "DIF012 `eps'` cannot be read, it is only written on the left of `=`"
    " | write `eps`",
    "a = 1\ndiff 1": "DIF013 `diff` and the edition come before everything else"
    " | move this line to the top of the file",
    "a = 1 b = 2": "DIF014 expected an operator or a new line before `b`"
    " | put `b` on its own line, or write an operator or `,` before it",
    "a =\nb = 1": "DIF015 a value is missing after `=`"
    " | write an expression after `=`, or delete it",
    "a = 1 + * 2": "DIF015 a value is missing between `+` and `*`"
    " | write a value before `*`, or delete `*`",
    "a = if then 1 else 2": "DIF015 a value is missing between `if` and `then`"
    " | write what stands before `then`",
    "a = .5": "DIF016 a number starts with a digit | write a `0` before the point",
    "a = 5.": "DIF016 `5.` has no digit after its point | write `5.0`",
    "a = 1.2.3": "DIF016 a number has one point | delete this one",
    "a = 100kk": "DIF016 `kk` is no unit | write a unit, or `100 * kk`",
    "a = 1e400": "DIF016 this number is too large | write a smaller number",
    "a = " + "(" * 200 + "b" + " + 1)" * 200: "DIF017 this is nested more than 150 levels deep"
    " | give a part of it a name of its own, and use the name",
    r'a = "C:\photos"': r"DIF018 `\p` means nothing in a string"
    r" | write `\\` for a backslash, or `/` between folders",
    "foo": "DIF019 expected `=`, `~` or `{` after `foo`"
    " | write `foo = value`, `foo ~ law` or `foo name {`",
    "objective x\n": "DIF019 expected `{` after `x`"
    " | write `{` and the block's statements, up to its `}`",
    "f(a, b)": "DIF019 expected `=` or `{` after `)`"
    " | write `=` and the function's value, or `{` and the block's statements",
    "param x in 0..1": "DIF019 expected `=` after `1` | write `=` and a value",
    "a.b = 3": "DIF019 a name that is defined has no `.` in it | write one word on the left of `=`",
    "= 3": "DIF019 a statement cannot start with `=`"
    " | write `name = value`, `name ~ law`, `name' = value` or `kind name { ... }`",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_a_finding_says_what_is_wrong_and_what_to_do(text):
    _, found = read(text)
    assert [f"{f.code} {f.message} | {f.help}" for f in found] == [GOLDEN[text]]


def test_every_code_has_a_title_and_a_golden_message():
    assert {message[:6] for message in GOLDEN.values()} == set(CODES)


def test_an_unclosed_bracket_is_shown_with_its_opener():
    _, found = read("a = 1\nb = f(a,\n      2\nc = 3\n")
    assert (
        render(found)
        == """\
error[DIF007]: expected `)` to close the `(` opened here
 --> a.diff:3:8
  |
2 | b = f(a,
  |      - opened here
3 |       2
  |        ^ `)` is missing
  = help: write `)` at the end of the line          (difftrain explain DIF007)
"""
    )


def test_an_unclosed_block_is_shown_with_the_line_that_gives_it_away():
    _, found = read("a {\n  b = 1\n\nc { d = 2 }\n")
    assert (
        render(found)
        == """\
error[DIF008]: expected `}` to close the `{` opened here
 --> a.diff:1:3
  |
1 | a {
  |   ^ never closed
...
4 | c { d = 2 }
  | - this line starts at the left margin again
  = help: write `}` before line 4          (difftrain explain DIF008)
"""
    )


@pytest.mark.parametrize("text", ["a = b × c", "a = eps' + 1", "a == 1", "a = 2 ** 3"])
def test_a_fix_makes_the_text_clean(text):
    _, [finding] = read(text)
    span = finding.fix.span
    clean(text[: span.start] + finding.fix.text + text[span.end :])


# ---- recovery


def test_neighbours_of_a_broken_statement_survive():
    parsed, found = read("a = 1\nb = = 2\nc = 3\nd { e = )\n f = 4 }\n")
    assert len(found) == 2
    a, hole, c, block = parsed.body
    assert (a.name, c.name) == ("a", "c")
    assert isinstance(hole, tree.Hole) and hole.span.text == "b = = 2"
    assert isinstance(block.body[0], tree.Hole) and block.body[1].name == "f"


def test_the_block_of_a_broken_head_survives():
    parsed, found = read("objective 5 {\n  a = 1\n}\nb = 2\n")
    assert len(found) == 1
    hole, b = parsed.body
    assert (hole.body[0].name, b.name) == ("a", "b")


@pytest.mark.parametrize("text", ["a x\n  b = 1\n}\nc = 2\n", "a x {\n  b = 1\n\nc = 2\n"])
def test_a_missing_brace_is_put_where_it_belongs(text):
    parsed, found = read(text)
    assert len(found) == 1
    assert parsed == clean("a x {\n  b = 1\n}\nc = 2\n")


def test_a_line_has_one_finding():
    _, found = read("a = = ) × 'x'\n")
    assert len(found) == 1


JUNK = (")", "}", "{", "=", "foo", "@", '"', "if", "(")


def mutants(text: str):
    """Every text with one token deleted, doubled, replaced or preceded by junk."""
    for n, token in enumerate(lexing.lex(text)):
        if token.type in ("_NL", "COMMENT"):
            continue
        before, after = text[: token.start_pos], text[token.end_pos :]
        junk = JUNK[n % len(JUNK)]
        yield before + after
        yield f"{before}{token} {token}{after}"
        yield before + junk + after
        yield f"{before}{junk} {token}{after}"


def test_one_damaged_token_gives_a_tree_and_one_finding():
    counts = [len(read(mutant)[1]) for text in (FULL, LIBRARY) for mutant in mutants(text)]
    damaged = [count for count in counts if count]
    assert len(damaged) > 800
    assert damaged.count(1) / len(damaged) > 0.98
    assert max(damaged) <= 3


def test_every_beginning_of_a_spec_gives_a_tree():
    for end in range(0, len(FULL), 7):
        assert len(read(FULL[:end])[1]) <= 2, FULL[:end]


@pytest.mark.parametrize(
    "text",
    ["{" * 3000, "a{" * 400, "(" * 3000, "a=" + "-" * 3000 + "1", "}" * 50, "\x0b\x0c", "diff",
     "diff diff", "'\"'\"", "a=b" + "+b" * 3000, "if", "\r\r\n", "a = \\\n1", "x" * 100_000,
     "1" * 5000, "a = " + "1" * 5000, "[\n" * 500, "\U0001f600 = 1", "p(\n" * 40],
)  # fmt: skip
def test_no_text_raises(text):
    parsed, found = read(text)
    assert isinstance(parsed, tree.Tree)
    assert found
    render(found)


# ---- the grammar file, the tables and where they lie


def test_the_grammar_is_short_and_the_reserved_words_are_its_keywords():
    grammar = (ROOT / "grammars" / "diff.lark").read_text()
    assert len(grammar.splitlines()) < 80
    assert set(re.findall(r'"([a-z]+)"', grammar)) == set(RESERVED)


def test_the_editor_grammar_knows_the_same_words_and_units():
    editor = json.loads((ROOT / "grammars" / "diff.tmLanguage.json").read_text())
    expression = editor["repository"]["expression"]["patterns"]
    words = re.search(r"\(\?:(.*?)\)", expression[0]["match"])[1]
    assert set(words.split("|")) == set(RESERVED)
    grammar = (ROOT / "grammars" / "diff.lark").read_text()
    units = re.search(r"QUANTITY.*?\((k\|.*?)\)", grammar)[1]
    assert f"({units})" in expression[1]["match"]


def test_stored_tables_parse_as_the_grammar_does(tmp_path, monkeypatch):
    folder = tmp_path / "grammars"
    folder.mkdir()
    text = (ROOT / "grammars" / "diff.lark").read_text()
    (folder / "diff.lark").write_text(text)
    (folder / "diff.json").write_text(lexing.tables(text))
    expected = clean(FULL + LIBRARY)
    with monkeypatch.context() as patch:
        patch.setattr(shipped, "folder", lambda name: tmp_path / name)
        lexing.grammar.cache_clear()
        assert lexing.grammar().source_path == "<deserialized>"
        assert clean(FULL + LIBRARY) == expected
    lexing.grammar.cache_clear()


def test_tables_of_another_lark_are_not_read(tmp_path):
    tables = lexing.tables((ROOT / "grammars" / "diff.lark").read_text())
    stored = tmp_path / "diff.json"
    stored.write_text(json.dumps({**json.loads(tables), "lark": "0.1"}))
    assert lexing._stored(stored) is None
    assert lexing._stored(tmp_path / "absent.json") is None


def test_folders_are_found_beside_the_package_in_a_checkout():
    assert (shipped.folder("grammars") / "diff.lark").is_file()


def test_folders_are_found_inside_a_zip(tmp_path):
    package = tmp_path / "app" / "difftrain"
    (package / "grammars").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shipped.py").write_text((ROOT / "difftrain" / "shipped.py").read_text())
    (package / "grammars" / "diff.lark").write_text("start: A")
    (tmp_path / "app" / "__main__.py").write_text(
        "from difftrain.shipped import folder\n"
        "print((folder('grammars') / 'diff.lark').read_text())\n"
    )
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")
    run = [sys.executable, str(tmp_path / "app.pyz")]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout == "start: A\n"
