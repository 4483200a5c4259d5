"""Findings as people, GitHub and programs read them."""

import json
import re

from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.render import render, render_github, render_json
from difftrain.language.tree import Source, Span

TEXT = """diff 1
import std.sd

objective sd15 {
  # zero terminal snr


  process         = ddpm(steps = 1000, terminal_snr = zero)
  prediction_type = epsilon
}
"""
SOURCE = Source("specs/sd15.diff", TEXT)
BOX = """\
error[DIF203]: `epsilon` cannot be trained on a process whose last step is pure noise
 --> specs/sd15.diff:9:21
  |
8 |   process         = ddpm(steps = 1000, terminal_snr = zero)
  |                                        ------------------- alpha(T) = 0 here
9 |   prediction_type = epsilon
  |                     ^^^^^^^ needs division by alpha
  = because: x0 = (xt - sigma * eps) / alpha has no value at step 1000
  = help: use `v_prediction`, or drop `terminal_snr = zero`          (difftrain explain DIF203)
"""


def spot(text: str, source: Source = SOURCE) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def box(**changes) -> Finding:
    fields = {
        "code": "DIF203",
        "message": "`epsilon` cannot be trained on a process whose last step is pure noise",
        "at": Label(spot("epsilon"), "needs division by alpha"),
        "also": (Label(spot("terminal_snr = zero"), "alpha(T) = 0 here"),),
        "because": "x0 = (xt - sigma * eps) / alpha has no value at step 1000",
        "help": "use `v_prediction`, or drop `terminal_snr = zero`",
    }
    return Finding(**{**fields, **changes})


def test_the_box_of_the_documentation():
    assert render([box()]) == BOX


def test_color_adds_nothing_but_color():
    colored = render([box(), box(severity="warning"), box(severity="note")], color=True)
    plain = render([box(), box(severity="warning"), box(severity="note")])
    assert "\x1b[1;31merror" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_a_label_in_another_file_has_its_own_place():
    other = Source("std/process.diff", "process ddpm {\n  alpha = 0\n}\n")
    shown = render([box(also=(Label(spot("alpha = 0", other), "zero here"),), because="", help="")])
    assert (
        shown
        == """\
error[DIF203]: `epsilon` cannot be trained on a process whose last step is pure noise
 --> specs/sd15.diff:9:21
  |
9 |   prediction_type = epsilon
  |                     ^^^^^^^ needs division by alpha
 --> std/process.diff:2:3
  |
2 |   alpha = 0
  |   --------- zero here
  = help: difftrain explain DIF203
"""
    )


def test_lines_that_are_left_out_are_marked():
    shown = render([box(also=(Label(spot("import"), "first"),), because="")])
    assert "\n2 | import std.sd\n  | ------ first\n...\n9 |   prediction_type" in shown


def test_two_labels_on_one_line_stand_below_each_other():
    shown = render([box(also=(Label(spot("prediction_type")),))])
    assert "  |   ---------------\n  |                     ^^^^^^^ needs" in shown


def test_a_wide_gutter_keeps_its_columns():
    source = Source("a.diff", "\n" * 9 + "a = 1\n" * 2)
    at = Span(source, source.starts[9], source.starts[9] + 1)
    shown = render([Finding("DIF001", "no", Label(at), help="yes")])
    assert (
        shown
        == """\
error[DIF001]: no
  --> a.diff:10:1
   |
10 | a = 1
   | ^
   = help: yes          (difftrain explain DIF001)
"""
    )


def test_a_long_span_is_underlined_to_the_end_of_its_line():
    start = TEXT.index("objective")
    shown = render([box(at=Label(Span(SOURCE, start, len(TEXT)), "all"), also=())])
    assert "4 | objective sd15 {\n  | ^^^^^^^^^^^^^^^^ all\n" in shown


def test_tabs_and_control_characters_take_one_column():
    source = Source("a.diff", "\ta =\x1b[31m 1\n")
    shown = render([Finding("DIF004", "no", Label(Span(source, 1, 2)))])
    assert "1 |  a = [31m 1\n  |  ^\n" in shown


def test_an_empty_file_can_be_pointed_at():
    empty = Source("a.diff", "")
    assert "1 |\n  | ^\n" in render([Finding("DIF001", "no", Label(Span(empty, 0, 0)))])


def test_findings_stand_in_order_of_place():
    first = box(at=Label(spot("import")), also=(), code="DIF100")
    shown = render([box(), first])
    assert shown == render([first, box()])
    assert re.findall(r"DIF\d+(?=\])", shown) == ["DIF100", "DIF203"]
    assert "\n\nerror[DIF203]" in shown


def test_no_finding_is_no_text():
    assert render([]) == render_github([]) == ""
    assert json.loads(render_json([])) == []


def test_github_commands_escape_what_github_reads():
    source = Source("a,b:c.diff", "x = 1\n")
    at = Label(Span(source, 0, 1))
    shown = render_github([Finding("DIF401", "50% done", at, help="stop", severity="note")])
    assert shown == (
        "::notice file=a%2Cb%3Ac.diff,line=1,col=1,endLine=1,title=DIF401"
        "::50%25 done%0Ahelp: stop\n"
    )


def test_json_holds_everything():
    [record] = json.loads(render_json([box(fix=Fix(spot("epsilon"), "v_prediction"))]))
    assert record["code"] == "DIF203"
    assert (record["path"], record["line"], record["column"]) == ("specs/sd15.diff", 9, 21)
    assert (record["end_line"], record["end_column"]) == (9, 28)
    assert record["also"][0]["label"] == "alpha(T) = 0 here"
    assert record["fix"]["text"] == "v_prediction"
    assert json.loads(render_json([box()]))[0]["fix"] is None
