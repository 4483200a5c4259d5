"""The one layout: what it looks like, and the laws it keeps."""

import re

import pytest

from difftrain.language.format import format_text
from difftrain.language.lexing import lex
from difftrain.language.syntax import parse
from difftrain.language.tree import Source
from difftrain.language.wrapping import WIDTH


def formatted(text: str) -> str:
    return format_text(Source("a.diff", text))


SPEC = """\
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
sample { solver = ddim(steps = 30), guidance = 7.5, prompts = ["a red apple"] }
export { tensorrt { precision = fp16, batch = 1..8 } }
"""

LIBRARY = """\
# ---- laws
earlier(t, ratio) = if bernoulli(ratio) then min(t, again(t)) else t
mode(s) = mode_map(uniform(0, 1), s)

process trig(data = 0.5, mean = -1, std = 1.4) {
  ratio ~ log_normal(mean, std)
  t     = atan(ratio / data)
  alpha = cos(t), sigma = data * sin(t)
}
process subvp(low = 0.1, high = 20) from vp { sigma = 1 - exp(-area) }
prediction epsilon { target = eps }
prediction flow    { target = flow }

strategy edm_precondition(data = 0.5) {  # any process
  c_in'    = 1 / sqrt(sigma^2 + (alpha * data)^2)
  c_noise' = log(sigma / alpha) / 4  # a quarter
  fit'     = mse(pred, target)       # over c_out
}
strategy mean_flow(
  ratio in 0..1 = 0.25, omega = 1, kappa = 0, start = 0, end = 1, p = 1, c = 0.001
) {
  one ~ again(t), two ~ again(t)
  apart ~ bernoulli(ratio)
  t' = max(one, two)
  r  = if apart then min(one, two) else t
  guided = flow + flow_hat(
    r = t,
    cond = null,
    dropped = false,
    dropout = false,
    another_name = something_rather_long,
    yet_another = 1
  )
  target' = stop(target - (t - r) * ddt(pred))
}
"""

MESSY = """\


#top
diff   1   #edition
a=f( 1,# one
   b=2 , #two
   # alone
   c # three
   , [1,2,  # four
   3],(x + # within
   y), # behind
   # last
   )
process   p (a=1,){ #opening


   a=- 1*-2^- 3,b=if a<b then-c else[ -1 .. 2 ]# x
   #before


   y{}
   z{
   }
   q{a=1},c=2
   n { m { k = 1
   }
   }
   w{a=f(xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx,yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy),bb=2,c=zzzzz}
   #end

}
data { source=folder( "photos",caption="a  ü # b" ),size=512px }#c
train { a=1e-05, b = 00.50 }    #d
x = (LONG + 1) * LONG * LONG
y = LONG * LONG * LONG

""".replace("LONG", "a_name_of_thirty_seven_letters_or_so_")

TIDY = """\
#top
diff 1  #edition
a = f(
  1,      # one
  b = 2,  #two
  # alone
  c,  # three
  [
    1,
    2,  # four
    3
  ],
  (
    # within
    x + y
  )  # behind
  # last
)
process p(a = 1) {  #opening
  a = -1 * -2^-3, b = if a < b then -c else [-1..2]  # x
  #before

  y { }
  z { }
  q { a = 1 }, c = 2
  n {
    m {
      k = 1
    }
  }
  w {
    a  = f(xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy)
    bb = 2
    c  = zzzzz
  }
  #end
}
data  { source = folder("photos", caption = "a  ü # b"), size = 512px }  #c
train { a = 1e-05, b = 00.50 }                                           #d
x = (
  LONG + 1
) * LONG * LONG
y = LONG * LONG * LONG
""".replace("LONG", "a_name_of_thirty_seven_letters_or_so_")


@pytest.mark.parametrize("text", [SPEC, LIBRARY, TIDY])
def test_the_layout_is_left_alone(text):
    assert formatted(text) == text


def test_a_mess_is_tidied():
    assert formatted(MESSY) == TIDY


def test_line_ends_are_made_the_same():
    assert formatted(MESSY.replace("\n", "\r\n")) == TIDY
    assert formatted("a = 1") == "a = 1\n"


# ---- laws, on the texts above and on what becomes of them when they are written otherwise

TEXTS = {
    "spec": SPEC,
    "library": LIBRARY,
    "messy": MESSY,
    "narrow": re.sub(r"([(\[,]) *(?=[^\n]*[)\]])", r"\1\n ", SPEC),
    "wide": SPEC.replace("gamma", "a_name_that_is_rather_long_for_what_it_says"),
    "no spaces": re.sub(r" *([-+*/=,<>~]+) *", r"\1", LIBRARY),
    "more spaces": re.sub(r" ", "   ", LIBRARY),
    "margin": re.sub(r"^ +", "", LIBRARY, flags=re.M),
    "blank lines": SPEC.replace("\n", "\n\n\n"),
    "comments": SPEC.replace("\n", "  # said\n"),
    "comments within": SPEC.replace(", ", ", # said\n  "),
}


@pytest.fixture(params=TEXTS, ids=str)
def text(request) -> str:
    return TEXTS[request.param]


def test_formatting_twice_is_formatting_once(text):
    assert formatted(formatted(text)) == formatted(text)


def test_the_meaning_is_kept(text):
    found = []
    assert parse(Source("a", formatted(text)), found) == parse(Source("a", text), found)
    assert not found


def test_every_comment_is_kept(text):
    def comments(text):
        return sorted(token.strip() for token in lex(text) if token.type == "COMMENT")

    assert comments(formatted(text)) == comments(text)


def test_lines_are_tidy(text):
    result = formatted(text)
    assert result.endswith("\n") and not result.endswith("\n\n")
    assert "\n\n\n" not in result
    for line in result.splitlines():
        assert line == line.rstrip() and "\t" not in line
        code = line.split("#")[0].rstrip()
        assert len(code) <= WIDTH or not set("([,") & set(code)


# ---- single choices


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("a=f( x )^2", "a = f(x)^2\n"),
        ("a = ( - b )*c", "a = (-b) * c\n"),
        ("a = 1 .. 20", "a = 1..20\n"),
        ("a = b . c", "a = b.c\n"),
        ("a=if b==c then-1 else-2", "a = if b == c then -1 else -2\n"),
        ("a = [ 1,2, ]", "a = [1, 2]\n"),
        ("s(a in[ b,c ]=b){a=1}", "s(a in [b, c] = b) { a = 1 }\n"),
        ("eps'=eps - -b", "eps' = eps - -b\n"),
        ("a = 1.50, b = 1e-05", "a = 1.50, b = 1e-05\n"),
        ("import   std . sd  as  s", "import std.sd as s\n"),
        ("p { a = 1\n}", "p {\n  a = 1\n}\n"),
        ("p { a = 1\n bb = 2 }", "p {\n  a  = 1\n  bb = 2\n}\n"),
        ("p { a = 1\n\n bb = 2 }", "p {\n  a = 1\n\n  bb = 2\n}\n"),
        ("a = f(b # one\n# two\n)", "a = f(\n  b  # one\n  # two\n)\n"),
        ("a = f(b\n# two\n, c)", "a = f(\n  b,\n  # two\n  c\n)\n"),
        ("a = 1\nbb = 2", "a = 1\nbb = 2\n"),
    ],
)
def test_spaces_and_lines(text, layout):
    assert formatted(text) == layout


def test_a_run_that_would_become_too_wide_is_not_aligned():
    long = "a = " + " + ".join(["abcdefg"] * 9)
    text = f"p {{\n  {long}\n  a_name_of_twenty_six_letters = 1\n}}\n"
    assert formatted(text) == text


@pytest.mark.parametrize("text", ["a =  (1", "", "\0", "a = 'x'", "a  =  1\r\n}"])
def test_text_with_syntax_findings_is_left_as_it_is(text):
    assert formatted(text) == text
