"""Emission: a graph as one readable Python function, with the tables it looks up."""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from difftrain.compiler.interpret import BINDERS, bound, inside_derivatives, members
from difftrain.compiler.operations import CHANNELS, FUNCTIONS, INFIX, ON_TENSORS
from difftrain.compiler.printing import (
    INDENT,
    WIDTH,
    assignment,
    imports,
    returned,
    without_doubles,
)
from difftrain.graph.graph import Graph

RANK = {"lt": 1, "le": 1, "gt": 1, "ge": 1, "eq": 1, "ne": 1}
RANK |= {"add": 2, "sub": 2, "mul": 3, "div": 3, "neg": 4, "pow": 5}
ATOM = 9
LEAVES = ("const", "module", "word", "text", "variable")  # written where they are used
CALLED = ("network", "primal")  # what a network returned
STATEMENTS = ("network", "jvp", "inverse", "apply", "input")  # always on a line of their own
SHORT, LONG = 12, 62
# What a value without a name of its own is called.
PLAIN = {
    "mul": "product",
    "div": "ratio",
    "add": "joint",
    "sqrt": "root",
    "sub": "difference",
    "pow": "power",
}
PLAIN |= {"stop": "held", "where": "chosen", "min": "least", "max": "most", "pick": "entry"}
PLAIN |= {"abs": "size", "first": "start", "last": "end", "draw": "drawn", "jvp": "slope"}
PLAIN |= {"apply": "made", "tap": "tokens", "inverse": "solved_time"}
PLAIN |= {"neg": "negative", "mean": "average", "sum": "summed", "network": "output"}
LOOKED_UP = "What depends on an index alone, in float64: looked up in every step."
NOTHING = "No table is looked up."
OPERATORS = "difftrain.compiler.operations"
OWN = {f.__name__ for f in FUNCTIONS.values()} | {"rows", "solved"}
CALLS = ("apply_module", "call_network", "call_tapped")
TAKEN = {"torch", "nets", "draw", "inputs", "tables", "compute", *CALLS, *OWN}
TAKEN |= {*keyword.kwlist, *dir(builtins)}


@dataclass
class Text:
    """The text of a node: an expression with the rank of its outermost operator."""

    text: str
    rank: int = ATOM

    def within(self, rank: int) -> str:
        return f"({self.text})" if self.rank < rank else self.text

    @property
    def short(self) -> bool:
        """Nothing would be gained by a name: a name, a number, an entry of a mapping."""
        return bool(re.fullmatch(r'-?[\w.]+|\w+\["\w+"\]', self.text))


@dataclass(eq=False)
class Writer:
    """Writes the nodes of one graph; `texts` is how each is referred to."""

    graph: Graph
    texts: dict[int, Text] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=lambda: set(TAKEN))
    functions: dict[int, str] = field(default_factory=dict)
    indent: str = INDENT

    def __post_init__(self):
        nodes = [self.graph[n] for n in self.graph.net]
        self.uses = Counter(arg for data in nodes for arg in data["args"])
        names = {n for data in nodes for n in data["names"]} | set(self.graph.outputs)
        self.plain = {n for n in names if "~" not in n}  # kept for the values that bear them
        self.last = Counter(n.rpartition(".")[2] for n in self.plain)

    def write(self, node: int) -> None:
        """Puts the node on a line of its own, or keeps its text for the one place that uses it."""
        if node in self.texts:
            return  # what another call returned beside its value
        if self.graph[node]["op"] in BINDERS:
            self._along(node)
        text = self.text(node)
        if self._inline(node, text):
            self.texts[node] = text
        else:
            self.state(node)

    def state(self, node: int) -> None:
        """Puts the node on a line of its own."""
        data = self.graph[node]
        self._shorten(node)
        text, name = self.text(node).text, self.name(node)
        left = f"_, {name}" if data["op"] == "jvp" else name
        for primal in self._primals(node):
            self.texts[primal] = Text(self.name(primal))
            left = f"_, {name}, {self.texts[primal].text}"
        for tap in self._taps(node):
            self.texts[tap] = Text(self.name(tap))
            left = f"{name}, {self.texts[tap].text}"
        if data["op"] == "network" and not data["attrs"].get("grad", True):
            self.lines.append(f"{self.indent}with torch.no_grad():")
            self.lines += assignment(left, text, self.indent + INDENT)
        else:
            self.lines += assignment(left, text, self.indent)
        self.texts[node] = Text(name)

    def _primals(self, node: int) -> list[int]:
        """The node that stands for the forward inside a derivative, if it is used outside."""
        users = self.graph.net.successors(node) if self.graph[node]["op"] == "jvp" else ()
        return [u for u in users if self.graph[u]["op"] == "primal"]

    def _taps(self, node: int) -> list[int]:
        """The nodes that stand for what a network returns beside its output."""
        users = self.graph.net.successors(node)
        return [u for u in users if self.graph[u]["op"] == "tap"]

    def _inline(self, node: int, text: Text) -> bool:
        data, size = self.graph[node], len(text.text)
        if data["op"] in LEAVES:
            return True
        if data["op"] in STATEMENTS or node in self.graph.outputs.values():
            return False
        if data["op"] == "pow" and data["kind"] != "field" and size <= SHORT:
            return True  # `alpha**2` says more than a name would
        if self.uses[node] > 1 or (size > SHORT and self._named(node)):
            return False
        return size < LONG and not (data["names"] and data["kind"] == "field")

    def _named(self, node: int) -> bool:
        """Whether the spec has a name for the value, which it then bears on a line of its own."""
        data = self.graph[node]
        if data["op"] == "widen":
            inner = data["args"][0]
            return bool(self.graph[inner]["names"]) and not self.texts[inner].text.isidentifier()
        return bool(data["names"]) and not self._only_widened(node)

    def _only_widened(self, node: int) -> bool:
        """Whether the node is there to be spread over a field, which then bears its name."""
        return [self.graph[u]["op"] for u in self.graph.net.successors(node)] == ["widen"]

    def _shorten(self, node: int) -> None:
        """Gives arguments lines of their own until the node fits on one."""
        while len(self.text(node).text) + len(self.indent) + 16 > WIDTH:
            given = [a for a in self.graph[node]["args"] if a in self.texts]  # not what is bound
            parts = [a for a in given if not self.texts[a].short]
            if not parts:
                return
            self.state(max(parts, key=lambda a: len(self.texts[a].text)))

    # ---- names

    def name(self, node: int) -> str:
        """A name that is free: what the spec calls the node, or what it is."""
        base, kept = self._base(node)
        base = f"{base}_" if base in TAKEN else base
        return self._free(base if kept else f"{base}_1", base)

    def _free(self, name: str, base: str) -> str:
        count = 1
        while name in self.called:
            count += 1
            name = f"{base}_{count}"
        self.called.add(name)
        return name

    def _base(self, node: int) -> tuple[str, bool]:
        """What the node would be called, and whether it is the value that bears the name."""
        data = self.graph[node]
        if data["op"] == "variable":
            return data["attrs"]["name"].partition(".")[0], False
        if data["op"] == "widen":
            (base, kept), inner = self._base(data["args"][0]), self.texts[data["args"][0]]
            return (f"{base}_wide", True) if inner.text.isidentifier() else (base, kept)
        wanted = [n for n, output in self.graph.outputs.items() if output == node and "@" not in n]
        plain = [n for n in (*wanted, *data["names"]) if "~" not in n]
        if plain:
            first = "pred" if data["op"] in CALLED and "pred" in plain else plain[0]
            return self._local(first), True
        other = [n.partition("~")[0] for n in data["names"]]
        if other:
            base = self._local(other[-1 if data["op"] in CALLED else 0])
        else:
            base = "shown" if data["kind"] == "condition" else PLAIN.get(data["op"], data["op"])
        return base, base not in self.plain

    def _local(self, name: str) -> str:
        """`level` of `blur.level`, where that is clear."""
        last = name.rpartition(".")[2]
        return last if self.last[last] <= 1 else re.sub(r"\W", "_", name)

    # ---- texts

    def text(self, node: int) -> Text:
        """The expression of a node in terms of its arguments' texts."""
        data = self.graph[node]
        args = [self.texts[a] for a in data["args"] if a in self.texts]
        attrs, op = data["attrs"], data["op"]
        match op:
            case "const":
                return _constant(attrs["value"])
            case "word" | "text":
                return Text(repr(attrs["value"]))
            case "module":
                return Text(f'nets["{attrs["name"]}"]')
            case "input":
                return Text(f'inputs["{attrs["name"]}"]')
            case "draw":
                return _call(f"draw.{attrs['law']}", f'"{attrs["name"]}"', *args)
            case "network":
                function = "call_tapped" if self._taps(node) else "call_network"
                return _network(function, args, attrs["extras"])
            case "apply":
                return _call("apply_module", *args)
            case "jvp":
                return self._derivative(node)
            case "inverse":
                return _call("solved", self.functions[node], *args[-3:])
            case "neg":
                return Text(f"-{args[0].within(RANK['pow'] + 1)}", RANK["neg"])
            case "where" if data["kind"] == "condition":
                return _call("rows", *args)
            case "cosine":
                kind = self.graph[data["args"][0]]["kind"]
                return _call("cosine", *args, str(CHANNELS[kind]))
            case _ if op in INFIX:
                return _infix(op, *args)
        return _call(f"torch.{op}" if op in ON_TENSORS else FUNCTIONS[op].__name__, *args)

    # ---- derivatives

    def _along(self, node: int) -> None:
        """Writes the function that is differentiated or solved."""
        body, variables, _ = bound(self.graph, node)
        inner = Writer(self.graph, dict(self.texts), [], self.called, {}, self.indent + INDENT)
        names = [inner.name(v) for v in variables]
        inner.texts |= {v: Text(n) for v, n in zip(variables, names, strict=True)}
        for member in members(self.graph, node):
            inner.write(member)
        function = self.functions[node] = self._free("along", "along")
        self.lines += ["", f"{self.indent}def {function}({', '.join(names)}):"]
        answer = [inner.texts[body].text]
        answer += [inner.texts[self.graph[p]["attrs"]["inner"]].text for p in self._primals(node)]
        self.lines += [*inner.lines, f"{inner.indent}return {', '.join(answer)}", ""]

    def _derivative(self, node: int) -> Text:
        t, xt, one, flow = (self.texts[a].text for a in self.graph[node]["args"][3:])
        pace = f"torch.ones_like({t})" if one == "1" else f"torch.full_like({t}, {one})"
        beside = ["has_aux=True"] * bool(self._primals(node))
        return _call(
            "torch.func.jvp", self.functions[node], f"({t}, {xt})", f"({pace}, {flow})", *beside
        )


def _constant(value) -> Text:
    if not math.isfinite(value):
        return Text("torch.nan" if value != value else "torch.inf" if value > 0 else "-torch.inf")
    return Text(repr(value), ATOM if isinstance(value, bool) or value >= 0 else RANK["neg"])


def _call(function: str, *args: Text | str) -> Text:
    listed = ", ".join(a if isinstance(a, str) else a.text for a in args)
    return Text(f"{function}({listed})")


def _network(function: str, args: list[Text], extras: Sequence[str]) -> Text:
    net, x, tau, cond, dropout, *extra = args
    named = [f"{n}={e.text}" for n, e in zip(extras, extra, strict=True)]
    named += ["masks=draw.masks"] * (dropout.text == "True")
    return _call(function, net, x, tau, cond, *named)


def _infix(op: str, a: Text, b: Text) -> Text:
    rank = RANK[op]
    left = a.within(rank + (op == "pow"))
    right = b.within(rank + (op in ("sub", "div") or rank == 1))
    hug = op == "pow" and all(re.fullmatch(r"-?[\w.]+", side) for side in (left, right))
    gap = "" if hug else " "
    return Text(f"{left}{gap}{INFIX[op][0]}{gap}{right}", rank)


# ---- modules


def emit(
    graph: Graph,
    title: str,
    further: Mapping[str, Sequence[str]] | None = None,
    functions: Sequence[str] = (),
) -> str:
    """The source of a module with `tables()` and `compute(inputs, draw, nets, tables)`, and behind
    them further functions. `further` names what else it imports: module -> names."""
    tables, stored = _tables(graph)
    step = _step(graph, stored)
    outputs = {name: step.texts[node].text for name, node in graph.outputs.items()}
    kept = {name: tables.texts[node].text for node, name in stored.items()}
    lines = [
        "def tables() -> dict[str, torch.Tensor]:",
        f'    """{LOOKED_UP if stored else NOTHING}"""',
        *without_doubles(tables.lines),
        *returned(kept),
        "",
        "",
        "def compute(inputs, draw, nets, tables) -> dict[str, torch.Tensor]:",
        '    """The wanted quantities, for one batch."""',
        *without_doubles(step.lines),
        *returned(outputs),
        "",
        *("\n" + text.rstrip("\n") + "\n" for text in functions),
    ]
    return "\n".join([*_head(title, "\n".join(lines), further or {}), *lines])


def _tables(graph: Graph) -> tuple[Writer, dict[int, str]]:
    """The lines of `tables()`, and the name under which each table is kept that a step reads."""
    fixed = fixed_nodes(graph)
    read = {a for n in graph.order() if n not in fixed for a in graph[n]["args"] if a in fixed}
    writer, names = Writer(graph), {}
    for node in graph.order():
        if node in fixed or graph[node]["op"] == "const":
            writer.write(node)
        if node in fixed and node in read:
            if not writer.texts[node].text.isidentifier():
                writer.state(node)
            names[node] = writer.texts[node].text
    return writer, names


def _step(graph: Graph, stored: Mapping[int, str]) -> Writer:
    """The lines of `compute`, what is given first."""
    writer = Writer(graph, {n: Text(f'tables["{name}"]') for n, name in stored.items()})
    done = fixed_nodes(graph) | inside_derivatives(graph)
    for node in sorted(graph.order(), key=lambda n: graph[n]["op"] != "input"):
        if node not in done:
            writer.write(node)
    return writer


def fixed_nodes(graph: Graph) -> set[int]:
    """Tables, and what is computed from tables alone: the same in every step."""
    result: set[int] = set()
    for node in graph.order():
        data = graph[node]
        constants = all(graph[a]["op"] == "const" or a in result for a in data["args"])
        of_table = data["kind"] == "table" or data["op"] in ("first", "last")
        of_fixed = data["kind"] in ("scalar", "table") and any(a in result for a in data["args"])
        if constants and (of_table or of_fixed) and data["op"] not in ("draw", "input"):
            result.add(node)
    return result


def _head(title: str, body: str, further: Mapping[str, Sequence[str]]) -> list[str]:
    """The docstring and the imports that the body needs."""
    wanted = {OPERATORS: [n for n in OWN if re.search(rf"(?<![\w.]){n}\(", body)]}
    wanted["difftrain.compiler.network"] = [n for n in CALLS if f"{n}(" in body]
    listed = imports({**wanted, **further})
    return [f'"""{title}"""', "", "import torch", *[""] * bool(listed), *listed, "", ""]


__all__ = ["Text", "Writer", "emit", "fixed_nodes"]
