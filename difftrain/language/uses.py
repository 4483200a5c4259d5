"""What a name or a call in a slot puts to use, and with which arguments."""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.names import Definition, Names
from difftrain.language.nearest import edits, nearest
from difftrain.language.scope import Scope, Use, formals
from difftrain.language.tree import Argument, Call, Expr, Formal, Name, Span

PART_KINDS = ("backbone", "encoder", "codec", "source", "optimizer", "solver")


def use_of(item: Expr, kind: str, scope: Scope, found: list[Finding]) -> Use | None:
    """What `name` or `name(args)` puts to use, or None with a finding."""
    if not isinstance(item, (Name, Call)):
        found.append(not_a(kind, item, f"write the name of {_article(kind)}"))
        return None
    definition = scope.home.find(kind, item.path)
    if definition is None:
        found.append(unknown(item, kind, scope.home))
        return None
    label = kind if kind in ("process", "prediction") else definition.name
    return Use(definition, label, item, scope)


def not_a(kind: str, expr: Expr, hint: str) -> Finding:
    """That an expression stands where only something else can."""
    text = f"`{expr.span.text}` is not {_article(kind)}"
    return Finding("DIF118", text, Label(expr.span), help=hint)


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


SYNONYMS = {
    "velocity": "flow` or `v_prediction",
    "v": "v_prediction",
    "eps": "epsilon",
    "noise": "epsilon",
    "x0": "sample",
    "x_start": "sample",
    "rectified_flow": "linear",
    "rf": "linear",
    "cosine": "ddpm(beta = cosine)",
}


def unknown(item: Name | Call, kind: str, names: Names) -> Finding:
    """That there is no block of a kind by this name, and which there are, the most alike first."""
    known = sorted(names.known(kind), key=lambda name: (edits(item.dotted, name), name))
    close = SYNONYMS.get(item.dotted) if kind in ("process", "prediction") else None
    close = close or nearest(item.dotted, known)
    span = item.head if isinstance(item, Call) else item.span
    hint = f"write `{close}`" if close else listed(known)
    if kind in PART_KINDS and len(item.path) > 1 and item.path[0] not in names.spaces:
        hint = f"add `import std.{item.path[0]}` at the top of the file"
    return Finding("DIF119", f"there is no {kind} `{item.dotted}`", Label(span), help=hint)


def listed(names: list[str]) -> str:
    """Which names there are."""
    words = ", ".join(f"`{name}`" for name in names)
    return f"there {'is' if len(names) == 1 else 'are'} {words}" if names else ""


# ---- arguments


def bind(use: Use, found: list[Finding]) -> dict[str, tuple[Expr, Scope]]:
    """The expression of each parameter: given, or its default. Problems are findings."""
    wanted = formals(use.definition)
    args = use.call.args if isinstance(use.call, Call) else ()
    bound: dict[str, tuple[Expr, Scope]] = {}
    free = iter(wanted)
    for argument in args:
        name = argument.name or next(free, None)
        if name in bound:
            found.append(_twice(argument, name))
        elif name in wanted:
            bound[name] = (argument.value, use.scope)
        else:
            found.append(_no_parameter(use, argument, list(wanted)))
    for name, (formal, definition) in wanted.items():
        if name not in bound and formal.default is not None:
            bound[name] = (formal.default, Scope(use.label, definition.home))
        elif name not in bound:
            found.append(_missing(use, name, wanted))
    return bound


def _twice(argument: Argument, name: str) -> Finding:
    return Finding("DIF112", f"`{name}` is given twice", Label(argument.span), help="give it once")


def _no_parameter(use: Use, argument: Argument, names: list[str]) -> Finding:
    title, written = use.definition.name, argument.name
    if written is None:
        text = f"`{title}` takes {len(names) or 'no'} argument{'s' * (len(names) != 1)}"
        return Finding("DIF111", text, Label(argument.span, "one too many"), help="leave it out")
    close = nearest(written, names)
    taken = "it takes " + ", ".join(f"`{n}`" for n in names) if names else "it takes none"
    hint = f"write `{close}`" if close else taken
    span = Span(argument.span.source, argument.span.start, argument.span.start + len(written))
    return Finding("DIF111", f"`{title}` has no argument `{written}`", Label(span), help=hint)


def _missing(use: Use, name: str, wanted: dict[str, tuple[Formal, Definition]]) -> Finding:
    title, because, value = use.definition.name, "", "…"
    args = use.call.args if isinstance(use.call, Call) else ()
    if args and args[0].name is None:  # which went to the first parameter
        first, (_, owner) = next(iter(wanted.items()))
        whose = "" if owner is use.definition else f", of `{owner.name}`, which it is made from"
        value = args[0].value.span.text if whose else value
        because = f"by position the first argument is `{first}`{whose}"
    hint = f"write `{title}({name} = {value})`"
    text = f"`{title}` needs a value for `{name}`"
    return Finding("DIF113", text, Label(use.call.span), because=because, help=hint)
