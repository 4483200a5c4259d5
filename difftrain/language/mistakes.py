"""What can be wrong when a quantity is read, in words: one finding each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from difftrain.language.finding import Finding, Label
from difftrain.language.names import Names, is_shipped
from difftrain.language.nearest import nearest
from difftrain.language.numbers import Support
from difftrain.language.operations import LAWS, NAMES
from difftrain.language.scope import REMARKS, Equations, Use, formals
from difftrain.language.term import number
from difftrain.language.tree import Argument, Call, Expr, Span
from difftrain.language.worlds import Function

BLOCKS = {"strategy": "strategy", "process": "process", "prediction": "prediction_type"}
SLOTS = {"target": "prediction_type", "alpha": "process", "sigma": "process", "t": "process"}


def cycle(names: Sequence[str], name: str, span: Span) -> Finding:
    """`names` are being read, the innermost last, and `name` is one of them."""
    start = len(names) - 1 - list(names)[::-1].index(name)
    text = f"`{name}` is defined by itself: " + " -> ".join([*names[start:], name])
    hint = f"`{name}' = …` reads the value it had before"
    return Finding("DIF122", text, Label(span), help=hint)


def nothing(name: str, equations: Equations, reading: Sequence[str], at: Expr | None) -> Finding:
    """No equation gives `name`, and the names in `reading` lead to it, the innermost last."""
    because = "" if name != "target" else "the prediction type says what is compared"
    filled = [u.label for u in equations.uses]
    hint = f"define it: `{name} {'~' if name == 't' else '='} …`"
    if name in SLOTS and SLOTS[name].removesuffix("_type") not in filled:
        hint = f"add `{SLOTS[name]} = …`"
    versions = equations.versions
    readers = [n for n in reversed(reading) if n in versions and n != name]
    span = at.span if at is not None else versions[(*readers, "loss")[0]][-1].span
    text = f"nothing here defines `{name}`"
    return Finding("DIF123", text, Label(span), because=because, help=hint)


def unknown(name: str, known: Sequence[str], at: Expr | Argument, home: Names) -> Finding:
    """`name` means nothing here; `known` is what would."""
    close = nearest(name, known)
    span = at.head if isinstance(at, Call) else at.span
    hint = f"write `{close}`" if close else "define it here, or add it as a parameter"
    if name in LAWS:
        hint = f"write `{LAWS[name].partition(':')[0]}`"
    if name in REMARKS:
        hint = f"give the quantity another name: `{name}` is a remark of a block"
    for kind, slot in BLOCKS.items():
        if home.find(kind, (name,)):
            text = f"`{name}` is a {kind}, not a quantity"
            return Finding("DIF120", text, Label(span), help=f"write `{slot} = {name}`")
    return Finding("DIF120", f"there is no `{name}`", Label(span), help=hint)


def leaves_range(quantity: Argument, law: Argument, asked, reached, expr: Call) -> Finding:
    """A law of a quantity that gives values which the quantity never has."""
    name = quantity.span.text
    low, high = _ends(reached)
    cut = kept_inside(law, asked, reached)
    return Finding(
        "DIF206",
        f"this law of `{name}` leaves what the process has",
        Label(expr.span),
        because=f"it gives {asked.low:.4g} to {asked.high:.4g}, and `{name}` is {low} to {high}",
        help=f"choose other numbers, or write `{name} ~ {cut}`",
    )


def kept_inside(law: Expr | Argument, asked: Support, reached: tuple[float, float]) -> str:
    """The text of a law, with what keeps it between the ends that can be reached."""
    low, high = _ends(reached)
    cut = " ".join(law.span.text.split())
    cut = f"max({cut}, {low})" if asked.low < reached[0] else cut
    return f"min({cut}, {high})" if asked.high > reached[1] else cut


def _ends(reached: tuple[float, float]) -> tuple[str, str]:
    return number(_inward(reached[0], 1)), number(_inward(reached[1], -1))


def _inward(value: float, sign: int) -> float:
    """A number with four digits, not outside an end."""
    if not math.isfinite(value) or value == float(f"{value:.4g}"):
        return value
    unit = 10 ** (math.floor(math.log10(abs(value))) - 3)
    ends = math.ceil if sign > 0 else math.floor
    return float(f"{ends(value / unit) * unit:.6g}")


def not_there(path: tuple[str, ...], use: Use, at: Expr | Argument) -> Finding:
    """A name that is read from a block in use, which has no such name."""
    title, last = use.definition.name, path[1]
    close = nearest(last, formals(use.definition))
    others = [
        d.name for d in use.definition.home.definitions(use.definition.kind) if last in formals(d)
    ]
    span = at.head if isinstance(at, Call) else at.span
    hint = f"write `{path[0]}.{close}`" if close and not is_shipped(span) else ""
    if not hint and others:
        hint = f"use `{others[0]}`, which has one, or a block of your own with `{last}`"
    text = f"`{title}` has no `{last}`"
    return Finding("DIF120", text, Label(span), help=hint or "leave it out")


def not_linear(equations: Equations) -> Finding:
    return Finding(
        "DIF202",
        "the target is not a multiple of `x0` plus a multiple of `eps`",
        Label(equations.versions["target"][0].span),
        because="clean data and noise are recovered by solving two linear equations",
        help="write `target = a * x0 + b * eps`, and what bends it as `target' = …`",
    )


def no_number(expr: Expr) -> Finding:
    text, hint = f"`{expr.span.text}` is not a number here", "write a number, a name or a call"
    return Finding("DIF124", text, Label(expr.span), help=hint)


def not_drawn(expr: Call) -> Finding:
    text = f"`{expr.span.text}` is a law, and here a number is needed"
    because = "a draw has a name, so that it is drawn once and shared"
    hint = f"draw it first: `name ~ {expr.span.text}`, and read `name` here"
    return Finding("DIF128", text, Label(expr.span), because=because, help=hint)


def left_open(function: Function, expr: Expr) -> Finding:
    names = ", ".join(f"`{n}`" for n in function.open)
    text = f"`{function.definition.name}` still needs {names}"
    hint = f"add `{function.open[0]} = …` to its arguments"
    return Finding("DIF125", text, Label(expr.span), help=hint)


def no_function(name: str, given: Expr, expr: Call) -> Finding:
    """An argument that its block calls, and that is a number."""
    last = name.rpartition(".")[2]
    text = f"`{last}` has to be a function, and `{given.span.text}` is none"
    because = f"it is called as `{' '.join(expr.span.text.split())}`"
    hint = "write the name of a function, with all but these arguments given"
    return Finding("DIF126", text, Label(given.span), because=because, help=hint)


def not_callable(expr: Call) -> Finding:
    return Finding(
        "DIF126",
        f"`{expr.dotted}` is a quantity, not a function",
        Label(expr.span),
        help=f"`{expr.dotted}(t = …)` derives it again with a name replaced",
    )


def bad_argument(function: Function, argument: Argument, name: str | None) -> Finding:
    """An argument that the function does not have, or has already."""
    title = function.definition.name
    formals = [f.name for f in function.definition.node.formals]
    if name in formals:
        text = f"`{name}` of `{title}` is given twice"
    elif argument.name:
        text = f"`{title}` has no argument `{argument.name}`"
    else:
        text = f"`{title}` takes {len(formals)} argument{'s' * (len(formals) != 1)}"
    close = nearest(argument.name or "", formals)
    hint = f"write `{close}`" if close else f"it is `{title}({', '.join(formals)})`"
    return Finding("DIF111", text, Label(argument.span), help=hint)


def arity(expr: Call, count: int) -> Finding:
    text = f"`{expr.dotted}` takes {count} argument{'s' * (count != 1)} by position"
    return Finding("DIF111", text, Label(expr.span))


def head(expr: Call, takes: str, given: str) -> Finding:
    """A module is applied to a value of another shape than it takes."""
    text = f"`{expr.dotted}` takes {NAMES[takes]}, and is given {NAMES.get(given, given)}"
    usual = {"project": "project(tap)", "vision": "vision(image)", "logvar": "logvar(c_noise)"}
    hint = f"write `{usual[expr.dotted]}`"
    return Finding("DIF121", text, Label(expr.span), help=hint)


def no_net(expr: Expr) -> Finding:
    """Something else stands for the network."""
    text = f"`net` is a network, and `{expr.span.text}` is none"
    hint = "write `student`, `teacher`, or the name of an `average`"
    return Finding("DIF121", text, Label(expr.span), help=hint)


def no_density(law: Argument, equations: Equations, block: str) -> Finding:
    """A density is asked of a law that has none; `block` is where it is asked."""
    text = f"`{law.span.text}` has no density that could be written down"
    because = "a density is that of a monotone map of one uniform or normal draw"
    others = [e.scope.label for e in equations.versions.get("t", ()) if e.form == "'"]
    made = next((label for label in others if label not in ("", block)), None)
    hint = "choose a law of one draw, such as `uniform(0, 1)`"
    if made and block in others[others.index(made) :]:
        hint = f"list `{block}` before `{made}`, which makes `t` of several draws"
    return Finding("DIF215", text, Label(law.span), because=because, help=hint)


def never_drawn(lost, usual, law: Argument, other: Argument) -> Finding:
    """A law that stands in for another leaves out values; `lost` holds the ends of each gap."""
    gaps = " and ".join(f"{number(low)}..{number(high)}" for low, high in lost)
    low, high = (number(v) for v in usual)
    return Finding(
        "DIF219",
        "this law leaves out times that the objective is about",
        Label(other.span),
        (Label(law.span),),
        because=f"times in {gaps} are never drawn, and no weight brings them back",
        help=f"choose a law that gives all of {low}..{high}",
    )


def not_monotone(quantity: Argument, expr: Call) -> Finding:
    return Finding(
        "DIF215",
        f"a law of `{quantity.span.text}` does not say what `t` is",
        Label(expr.span),
        because=f"`{quantity.span.text}` neither always rises nor always falls with `t`",
        help="put the law on `t`, or on `logsnr`",
    )
