"""Rules about what has no value: roots of negative numbers, 0 / 0, entries outside a table.

A quantity is computed at a few points: draws over their support, and what only a run knows (data,
what networks return) at numbers of either sign. What fails there would fail in some run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from difftrain.language.finding import Finding, Label
from difftrain.language.numbers import ENDS, points, values
from difftrain.language.rules.case import Case, shown
from difftrain.language.scope import Equation
from difftrain.language.term import Term, const, leaf, show, walk
from difftrain.language.tree import Span
from difftrain.language.weighting import NUMBERS
from difftrain.language.worlds import HERE

FEW = 24  # points at which a loss is looked at
SIGNS = ((0.9, -0.7, 0.4), (-0.8, 0.6, -0.3), (0.3, 0.8, -0.9))  # of what only a run knows
SLIGHT = 1e-9  # negative by rounding
PATH = ("t", "time", "alpha", "sigma")
UNKNOWN = ("network", "apply", "tap", "input", "cosine")
PLAIN = ("mean", "sum", "pool", "stop")  # of a value that is the same everywhere, but for a factor
SIZE = ("norm", "rms")


def numbers(case: Case, found: list[Finding]) -> None:
    """The loss has a value, and so has the path at some time at least."""
    if any(f.severity == "error" for f in found):
        return  # which may be why
    for name in (*PATH, "loss"):
        term = case.term(name)
        told = term is not None and _first_failure(term, everywhere=name in PATH)
        if told:
            found.append(_no_value(case, *told))
            return


def _first_failure(root: Term, everywhere: bool) -> tuple[Term, dict[Term, object]] | None:
    """The innermost term without a value at some point (at every point), and all values there."""
    parts = list(walk(root))
    plain = _as_numbers(parts)
    last = None
    for known in _points(plain[root]):
        row = values([plain[p] for p in parts], [known])[0]
        last = _failing(root, dict(zip(parts, row, strict=True)), everywhere)
        if bool(last) != everywhere:
            return last
    return last


def _failing(root: Term, at: dict[Term, object], divided: bool):
    """The innermost term without a value under a root that has none; what is not taken of an `if`
    does not count, and 0 / 0 only where it is `divided`."""
    term = root
    while _missing(at[term]):
        args = term.args
        if term.op == "where" and not _missing(at[args[0]]):
            args = (args[1] if at[args[0]] is True or at[args[0]] == 1 else args[2],)
        inner = next((a for a in args if _missing(at[a])), None)
        if inner is None:
            told = _outside(term, at) or (divided and term.op == "div")
            return (term, at) if told else None
        term = inner
    return None


def _missing(value: object) -> bool:
    if isinstance(value, list):
        return any(math.isnan(v) for v in value)
    return isinstance(value, float) and math.isnan(value)


def _outside(term: Term, at: dict[Term, object]) -> bool:
    """Whether an argument is one that the operation has no value for."""
    first = at[term.args[0]] if term.args else 0.0
    if isinstance(first, list):  # of a table every digit counts
        return term.op in ("sqrt", "log", "pow") and min(first, default=0) < 0
    if not isinstance(first, (int, float)):
        return False
    match term.op:
        case "sqrt" | "log":
            return first < -SLIGHT
        case "pow":
            power = at[term.args[1]]
            return first < -SLIGHT and isinstance(power, float) and not power.is_integer()
        case "acos":
            return abs(first) > 1 + SLIGHT
    return False


# ---- terms as numbers


def _as_numbers(parts: list[Term]) -> dict[Term, Term]:
    """Each term as one number of a sample: the same for all elements of data."""
    made: dict[Term, Term] = {}
    for part in parts:
        args = tuple(made[a] for a in part.args)
        known = part.op == "input" and part["name"] == "step"
        if part.op in PLAIN:
            made[part] = args[0]
        elif part.op in SIZE:
            made[part] = leaf("abs", "sample", args[0])
        elif part.op == "numel":
            made[part] = const(NUMBERS)
        elif part.op == "draw" or known:
            made[part] = part
        elif part.op in UNKNOWN or (part.op == "jvp" and _unknown(part)):
            made[part] = leaf("variable", "sample", name=f"unknown {len(made)}")
        else:
            made[part] = leaf(part.op, part.kind, *args, **dict(part.attrs))
    return made


def _points(root: Term) -> Iterator[dict[Term, object]]:
    """A few values of everything under a term that has no value of its own."""
    at = points(root)
    unknown = [t for t in walk(root) if t.op == "variable" and t["name"].startswith("unknown")]
    noise = [t for t in walk(root) if t.op == "draw" and t["law"] == "noise"]
    for i, known in enumerate(at[:: max(1, len(at) // FEW)]):
        signs = SIGNS[i % len(SIGNS)]
        free = {t: signs[k % len(signs)] for k, t in enumerate([*unknown, *noise])}
        yield {**known, **free}


# ---- telling


def _no_value(case: Case, term: Term, at: dict[Term, object]) -> Finding:
    equation = _source(case, term)
    place = case.place(equation) if equation else case.objective.block.head
    names = _names(case, place)
    whose = f" of {case.owner(equation)}" if equation and equation.scope.home.shipped else ""
    where, because, hint = _why(case, term, at, names)
    text = f"`{_short(term, names)}`{whose} has no value{where}"
    severity = "warning" if _unknown(term.args[0]) else "error"
    return Finding("DIF220", text, Label(place), because=because, help=hint, severity=severity)


def _why(case: Case, term: Term, at: dict[Term, object], names) -> tuple[str, str, str]:
    """Where an operation has no value, because of which number, and what to do."""
    first = term.args[0]
    inner, number, t = _short(first, names), at[first], at.get(case.term("t"))
    if isinstance(number, list):
        because = f"an entry of `{inner}` is {shown(min(number))}"
        return "", because, "choose other numbers for the table"
    if term.op == "div":
        return "", f"it is `{show(term, names)}`, and both are 0", "choose other numbers"
    because = f"`{inner}` may be of either sign"
    if not _unknown(first) and isinstance(t, (int, float)):
        because = f"at t = {shown(t)} it is {shown(number)}"
    if term.op == "acos":
        hint = f"keep `{inner}` between -1 and 1, with `min` and `max`"
        return f" where `{inner}` is beyond 1", because, hint
    return f" where `{inner}` is negative", because, f"write `abs({inner})` or `max({inner}, 0)`"


def _unknown(term: Term) -> bool:
    """Whether what only a run knows is under a term."""
    return any(t.op in UNKNOWN and t.kind != "scalar" for t in walk(term))


def _short(term: Term, names: dict[Term, str]) -> str:
    text = show(term, names, top=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(case: Case, place: Span) -> dict[Term, str]:
    """Terms by the name of a quantity that is one: of several the one that is read there, or else
    the shortest."""
    read = set(re.findall(r"\w+", place.text))
    order = sorted(case.objective.equations.versions, key=lambda n: (n in read, -len(n)))
    terms = {n: case.term(n) for n in order if n != "loss"}
    return {t: n.rpartition(".")[2] for n, t in terms.items() if t is not None and t.op != "const"}


def _source(case: Case, term: Term) -> Equation | None:
    """The smallest equation that a term is in, one of the user's where there are some."""
    holding = [(len(list(walk(t))), e) for e, t in _equations(case) if term in set(walk(t))]
    own = [row for row in holding if not row[1].scope.home.shipped]
    return min(own or holding, key=lambda row: row[0], default=(0, None))[1]


def _equations(case: Case) -> Iterator[tuple[Equation, Term]]:
    for name, versions in case.objective.equations.versions.items():
        for i, equation in enumerate(versions):
            world = HERE if equation is versions[-1] else HERE.cap(**{name: i})
            term = case.term(name, world)
            if term is not None:
                yield equation, term


# ---- tables


def entries(case: Case, found: list[Finding]) -> None:
    """Every entry that is read of a table is one that the table has."""
    if any(f.code in ("DIF130", "DIF206", "DIF214") for f in found):
        return  # which may be why
    terms = [t for n in ("loss", *PATH) if (t := case.term(n)) is not None]
    for pick in dict.fromkeys(t for t in walk(*terms) if t.op == "pick"):
        told = _beyond(pick)
        if told and not any(f.code == "DIF221" for f in found):
            found.append(_no_entry(case, pick, *told))


def _beyond(pick: Term) -> tuple[int, float] | None:
    """(how many entries a table has, which one is asked for) where it has none."""
    table, index = pick.args
    if any(t.op == "input" for t in walk(index)):
        return None  # which only a run knows
    rows = values([index, table], points(index, coarse=ENDS))
    known = [(len(t), i) for i, t in rows if isinstance(t, list) and isinstance(i, (int, float))]
    return next(((size, i) for size, i in known if not (i != i or -1 < i < size)), None)


def _no_entry(case: Case, pick: Term, size: int, asked: float) -> Finding:
    equation = _source(case, pick)
    place = case.place(equation) if equation else case.objective.block.head
    index = _short(pick.args[1], _names(case, place))
    text = f"there is no entry {shown(asked)} in the table that is read at `{index}`"
    because = f"the table has the entries 0 to {size - 1}"
    hint = f"write `max({index}, 0)`" if asked < 0 else f"write `min({index}, {size - 1})`"
    hint = "write one of these" if pick.args[1].op == "const" else hint
    return Finding("DIF221", text, Label(place), because=because, help=hint)
