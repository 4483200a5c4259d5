"""Terms: what an equation says once every name in it has been read.

A term is an operation on terms. Equal terms are one object (they are interned), so a shared
sub-expression is shared from the start and `is` compares. Building goes through `make`, which
folds constants and drops neutral elements; it never changes a value.

Every term has a `kind`, the shape it has at run time:

    scalar   one number (a constant, or a function of `step`)
    table    [N] numbers, such as the levels of a discrete process
    sample   [B], one number per sample
    field    [B, ...], shaped like the data
    tokens   [B, T, D]
    word, text, module   exist only while compiling
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from difftrain.language.operations import OPERATIONS, KindError, apply
from difftrain.language.tree import Span

_interned: WeakValueDictionary = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Term:
    op: str
    args: tuple[Term, ...]
    attrs: tuple[tuple[str, object], ...]
    kind: str
    span: Span | None = field(default=None, repr=False)
    __weakref__: object = field(default=None, init=False, repr=False)

    def __getitem__(self, name: str):
        return dict(self.attrs)[name]

    @property
    def value(self) -> float:
        """The number of a constant."""
        return self["value"]

    def __str__(self) -> str:
        return show(self)

    def __add__(self, other):
        return make("add", self, lift(other))

    def __radd__(self, other):
        return make("add", lift(other), self)

    def __sub__(self, other):
        return make("sub", self, lift(other))

    def __rsub__(self, other):
        return make("sub", lift(other), self)

    def __mul__(self, other):
        return make("mul", self, lift(other))

    def __rmul__(self, other):
        return make("mul", lift(other), self)

    def __truediv__(self, other):
        return make("div", self, lift(other))

    def __rtruediv__(self, other):
        return make("div", lift(other), self)

    def __pow__(self, other):
        return make("pow", self, lift(other))

    def __neg__(self):
        return make("neg", self)


def lift(value) -> Term:
    """A term for a plain number; a term stays what it is."""
    return value if isinstance(value, Term) else const(value)


def const(value) -> Term:
    return leaf("const", "scalar", value=value)


def word(name: str) -> Term:
    """A word such as `zero`: a choice made while compiling."""
    return leaf("word", "word", value=name)


def is_const(term: Term, value=None) -> bool:
    if term.op != "const":
        return False
    return value is None or (term.value == value and not isinstance(term.value, bool))


def leaf(op: str, kind: str, *args: Term, span: Span | None = None, **attrs) -> Term:
    """The one term with this operation, these arguments and attributes."""
    items = tuple(sorted(attrs.items()))
    # 1, 1.0 and True are equal in Python and different here
    key = (op, args, items, kind, tuple(type(v) for _, v in items))
    found = _interned.get(key)
    if found is None:
        found = _interned[key] = Term(op, args, items, kind, span)
    return found


def make(op: str, *args: Term, span: Span | None = None, **attrs) -> Term:
    """`op(args)` with its kind, folded where it is constant. Raises KindError where kinds clash."""
    kind = OPERATIONS[op].kind(*(a.kind for a in args))
    folded = _fold(op, args, kind)
    if folded is not None:
        return folded
    return leaf(op, kind, *args, span=span, **attrs)


def _fold(op: str, args: tuple[Term, ...], kind: str) -> Term | None:
    if op == "where" and args[0].op == "const":
        return args[1] if args[0].value else args[2]
    if op in ("eq", "ne") and all(a.op == "word" for a in args):
        return const((args[0] is args[1]) == (op == "eq"))
    known = kind == "scalar" and all(a.op == "const" for a in args)
    if known and args and OPERATIONS[op].scalar:
        try:
            return const(apply(op, *(a.value for a in args)))
        except (ZeroDivisionError, ValueError, OverflowError):
            return None  # `1 / 0` stays as written: what it means is decided where it is read
    return _neutral(op, args)


def _neutral(op: str, args: tuple[Term, ...]) -> Term | None:
    """`x + 0`, `x * 1`, `x ^ 1` and the like."""
    match op, args:
        case ("add", (a, b)) if is_const(b, 0):
            return a
        case ("add", (a, b)) if is_const(a, 0):
            return b
        case ("sub", (a, b)) if is_const(b, 0):
            return a
        case ("sub", (a, b)) if is_const(a, 0):
            return make("neg", b)
        case ("add", (a, b)) if b.op == "neg":
            return make("sub", a, b.args[0])
        case ("add", (a, b)) if a.op == "neg":
            return make("sub", b, a.args[0])
        case ("sub", (a, b)) if b.op == "neg":
            return make("add", a, b.args[0])
        case ("mul", (a, b)) if is_const(a, 0) or is_const(b, 0):
            return const(0)
        case ("mul" | "div", (a, b)) if is_const(b, -1):
            return make("neg", a)
        case ("mul", (a, b)) if is_const(a, -1):
            return make("neg", b)
        case ("mul", (a, b)) if is_const(b, 1):
            return a
        case ("mul", (a, b)) if is_const(a, 1):
            return b
        case ("div", (a, b)) if is_const(b, 1) or is_const(a, 0):
            return a
        case ("pow", (a, b)) if is_const(b, 1):
            return a
        case ("pow", (a, b)) if is_const(b, 0):
            return const(1)
        case ("neg", (a,)) if a.op == "neg":
            return a.args[0]
        case ("stop", (a,)) if a.op in ("const", "draw", "input", "stop"):
            return None if a.kind == "condition" else a  # whose encoder may be trained
        case ("where", (_, a, b)) if a is b:
            return a
    return None


def walk(*roots: Term):
    """Every term under the roots once, arguments before what uses them."""
    seen: set[Term] = set()
    for root in roots:
        stack = [(root, False)]
        while stack:
            term, ready = stack.pop()
            if ready:
                yield term
            elif term not in seen:
                seen.add(term)
                stack.append((term, True))
                stack.extend((a, False) for a in reversed(term.args) if a not in seen)


def rebuild(root: Term, change) -> Term:
    """The root with `change(term, new_args) -> Term | None` applied bottom up (None keeps it)."""
    done: dict[Term, Term] = {}
    for term in walk(root):
        args = tuple(done[a] for a in term.args)
        new = change(term, args)
        done[term] = new if new is not None else with_args(term, args)
    return done[root]


def with_args(term: Term, args: tuple[Term, ...]) -> Term:
    """The same operation on other arguments."""
    if all(a is b for a, b in zip(args, term.args, strict=True)):
        return term
    if term.op in OPERATIONS:
        return make(term.op, *args, span=term.span, **dict(term.attrs))
    return leaf(term.op, term.kind, *args, span=term.span, **dict(term.attrs))


_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "^"}
_SYMBOLS |= {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_RANK = {"add": 2, "sub": 2, "mul": 3, "div": 3, "neg": 4, "pow": 5}


def show(term: Term, names: dict[Term, str] | None = None, top: bool = True) -> str:
    """The term in the language's own notation; `names` stand for whole sub-terms."""
    if names and not top and term in names:
        return names[term]

    def inner(arg: Term, rank: int) -> str:
        text = show(arg, names, top=False)
        low = _RANK.get(arg.op, 1 if arg.op in _SYMBOLS or arg.op == "where" else 9)
        if names and arg in names:
            low = 9
        return f"({text})" if low < rank else text

    match term.op:
        case "const":
            return number(term.value)
        case "word" | "text":
            return str(term.value)
        case "input" | "draw" | "module" | "variable":
            return term["name"]
        case "neg":
            return f"-{inner(term.args[0], 4)}"
        case "where":
            test, then, other = (inner(a, 2) for a in term.args)
            return f"if {test} then {then} else {other}"
        case "tap":
            return f"features({inner(term.args[0], 0)})"
        case "apply":
            return f"{term.args[0]['name']}({inner(term.args[1], 0)})"
        case op if op in _SYMBOLS:
            rank = _RANK.get(op, 1)
            left = inner(term.args[0], rank + (op == "pow"))
            right = inner(term.args[1], rank + (op in ("sub", "div")))
            gap = "" if op == "pow" else " "
            return f"{left}{gap}{_SYMBOLS[op]}{gap}{right}"
        case op:
            return f"{op}({', '.join(inner(a, 0) for a in term.args)})"


def number(value) -> str:
    """A number as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value == int(value) < 1e15:
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


__all__ = ["KindError", "Term", "const", "leaf", "lift", "make", "rebuild", "show", "walk", "word"]
