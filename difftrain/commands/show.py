"""`explain`, `graph` and `diff`: commands that show what a spec means."""

from __future__ import annotations

import re
import textwrap
from argparse import Namespace

from difftrain.commands.failure import CLEAN, FINDINGS, USAGE, Failure
from difftrain.commands.paths import one_spec, read, settings, specs
from difftrain.language.explain import explain as explain_spec
from difftrain.language.nearest import nearest
from difftrain.language.scope import GIVEN
from difftrain.language.spec import Spec


def explain(args: Namespace) -> int:
    """Tells what specs train, or what the code of a finding means."""
    if re.fullmatch(r"[A-Za-z]{3}\d+", args.spec):
        print(_code(args.spec.upper()), end="")
        return CLEAN
    for path in specs([args.spec]):
        spec = read(path, settings(args.settings))
        print(explain_spec(spec, args.objective), end="")
        if args.passes:
            print(_passes(spec, args.objective), end="")
    return CLEAN


def _code(code: str) -> str:
    """The title of a code, why it is so, and its examples."""
    from difftrain.language.codes import CODES, examples

    if code not in CODES:
        close = nearest(code, CODES)
        hint = f": did you mean `{close}`?" if close else ""
        raise Failure(f"there is no code `{code}`{hint}", USAGE)
    rule = CODES[code]
    text = f"{code}: {rule.title}\n\n{textwrap.fill(rule.doc, 98)}\n"
    for example in examples(code):
        options = f"  (difftrain {example.options})" if example.options else ""
        text += f"\n{example.kind}:{options}\n{textwrap.indent(example.text, '    ')}"
    return text


def _passes(spec: Spec, name: str | None) -> str:
    """What each pass of the compiler needs and ensures, and what it did to this loss."""
    from difftrain.graph.build import build
    from difftrain.graph.passes import PASSES, run

    says = {p.__name__: " ".join((p.__doc__ or "").split()) for p in PASSES}
    start = build(spec.objective(name), ("loss",))
    lines = ["", "passes", f"  {'derived':15} {len(start.net)} operations"]

    def watch(title: str, before, after) -> None:
        lines.append(f"  {title:15} {len(before.net)} -> {len(after.net)} operations")
        lines.append(f"  {'':15} {says[title]}")

    run(start, watch)
    return "\n".join(lines) + "\n"


def graph(args: Namespace) -> int:
    """Prints the graph of a quantity before, between or after the passes."""
    from difftrain.graph.build import build
    from difftrain.graph.passes import PASSES, run

    for name in filter(None, (args.before, args.after)):
        _known_pass(name, [p.__name__ for p in PASSES])
    spec = read(one_spec(args.spec), settings(args.settings))
    objective = spec.objective(args.objective)
    _known_quantity(args.quantity, [*objective.equations.versions, *GIVEN])
    seen = {}

    def watch(title: str, before, after) -> None:
        seen["before", title], seen["after", title] = before, after

    last = run(build(objective, (args.quantity,)), watch)
    wanted = [("before", args.before), ("after", args.after)]
    chosen = [seen[side, name] for side, name in wanted if name] or [last]
    print("\n\n".join(map(str, chosen)))
    return CLEAN


def _known_pass(name: str, known: list[str]) -> None:
    if name not in known:
        close = nearest(name, known)
        listed = ", ".join(f"`{n}`" for n in known)
        hint = f"did you mean `{close}`?" if close else f"there are {listed}"
        raise Failure(f"there is no pass `{name}`: {hint}", USAGE)


def _known_quantity(name: str, known: list[str]) -> None:
    """Refuses a quantity that the objective has not; one of a block is `block.name`."""
    first = name.partition("@")[0]
    if first not in known and "." not in first:
        close = nearest(first, known)
        hint = f"did you mean `{close}`?" if close else "`difftrain explain` shows them"
        raise Failure(f"there is no quantity `{name}`: {hint}", USAGE)


def diff(args: Namespace) -> int:
    """Says whether two specs train the same; 1 if they do not."""
    from difftrain.language.likeness import compare

    first, second = (
        read(one_spec(path), settings(args.settings)) for path in (args.first, args.second)
    )
    verdict = compare(first, second)
    print(verdict.text, end="")
    return CLEAN if verdict.same else FINDINGS
