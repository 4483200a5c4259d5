"""Emission: a graph as one readable Python function, with the tables it looks up."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field

from difftrain.compiler.interpret import _inside
from difftrain.compiler.operations import FUNCTIONS, INFIX, ON_TENSORS
from difftrain.graph.graph import Graph

RANK = {"lt": 1, "le": 1, "gt": 1, "ge": 1, "eq": 1, "ne": 1}
RANK |= {"add": 2, "sub": 2, "mul": 3, "div": 3, "neg": 4, "pow": 5}
ATOM = 9
STATEMENTS = ("draw", "network", "jvp", "input")  # always on a line of their own
WIDTH = 92
# What a value without a name of its own is called.
PLAIN = {"mul": "product", "div": "ratio", "add": "total", "sub": "difference", "pow": "power"}
PLAIN |= {"stop": "held", "where": "chosen", "min": "least", "max": "most", "pick": "entry"}
TAKEN = {"torch", "nets", "draw", "inputs", "tables", "double", "device", "dtype", "value", "values"}


@dataclass
class Text:
    """The text of a node: an expression with the rank of its outermost operator."""

    text: str
    rank: int = ATOM

    def within(self, rank: int) -> str:
        return f"({self.text})" if self.rank < rank else self.text


@dataclass(eq=False)
class Writer:
    """Writes the nodes of one graph; `texts` is how each is referred to."""

    graph: Graph
    texts: dict[int, Text] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=lambda: set(TAKEN))
    uses: dict[int, int] = field(default_factory=dict)
    indent: str = "    "

    def __post_init__(self):
        for node in self.graph.order():
            for arg in self.graph[node]["args"]:
                self.uses[arg] = self.uses.get(arg, 0) + 1
        names = [n for node in self.graph.order() for n in self.graph[node]["names"]]
        self.plain = {n for n in names if "~" not in n}  # kept for the values that bear them
        for node in self.graph.outputs.values():
            self.uses[node] = self.uses.get(node, 0) + 2

    def write(self, node: int) -> None:
        """Puts the node on a line of its own, or keeps its text for the one place that uses it."""
        text = self.text(node)
        data = self.graph[node]
        if self._inline(node, text):
            self.texts[node] = text
            return
        name = self.name(node)
        if data["op"] == "network" and not data["attrs"].get("grad", True):
            self.lines.append(f"{self.indent}with torch.no_grad():")
            self.lines.append(f"{self.indent}    {name} = {text.text}")
        else:
            self.lines.append(f"{self.indent}{name} = {text.text}")
        self.texts[node] = Text(name)

    def _inline(self, node: int, text: Text) -> bool:
        data = self.graph[node]
        if data["op"] in ("const", "module", "word", "text", "variable"):
            return True
        if data["op"] in STATEMENTS or node in self.graph.outputs.values():
            return False
        if data["names"] and data["op"] != "widen" and len(text.text) > 12:
            return False
        return (self.uses.get(node, 0) <= 1 or data["op"] == "widen") and len(text.text) < WIDTH - 30

    def name(self, node: int) -> str:
        """A name that is free: what the spec calls the node, or a letter and a number."""
        op, called = self.graph[node]["op"], self.graph[node]["names"]
        plain = [n for n in called if "~" not in n]
        base = (plain or [n.partition("~")[0] for n in called] or [PLAIN.get(op, op)])[0]
        kept = bool(plain) or base not in self.plain
        base = re.sub(r"\W", "_", base)
        base = f"{base}_" if keyword.iskeyword(base) or base in FUNCTIONS or base in TAKEN else base
        name, count = base if kept else f"{base}_1", 1
        while name in self.called:
            count += 1
            name = f"{base}_{count}"
        self.called.add(name)
        return name

    def text(self, node: int) -> Text:
        data = self.graph[node]
        args = [self.texts[a] for a in data["args"] if a in self.texts]
        attrs, op = data["attrs"], data["op"]
        match op:
            case "const":
                return Text(repr(attrs["value"]), ATOM if _positive(attrs["value"]) else RANK["neg"])
            case "word" | "text":
                return Text(repr(attrs["value"]))
            case "module":
                return Text(f'nets["{attrs["name"]}"]')
            case "input":
                return Text(f'inputs["{attrs["name"]}"]')
            case "draw":
                listed = ", ".join([f'"{attrs["name"]}"', *(a.text for a in args)])
                return Text(f"draw.{attrs['law']}({listed})")
            case "network":
                return self._network(args, attrs)
            case "jvp":
                return self._derivative(node)
            case "neg":
                return Text(f"-{args[0].within(RANK['neg'])}", RANK["neg"])
            case "where" if data["kind"] == "condition":
                return Text(f"rows({', '.join(a.text for a in args)})")
        if op in INFIX:
            rank = RANK[op]
            left = args[0].within(rank + (op == "pow"))
            right = args[1].within(rank + (op in ("sub", "div") or rank == 1))
            gap = "" if op == "pow" and left.isidentifier() else " "
            return Text(f"{left}{gap}{INFIX[op][0]}{gap}{right}", rank)
        name = f"torch.{op}" if op in ON_TENSORS else FUNCTIONS[op].__name__
        return Text(f"{name}({', '.join(a.text for a in args)})")

    def _network(self, args: list[Text], attrs) -> Text:
        net, x, tau, cond, _, *extra = args
        pairs = ", ".join(f'"{n}": {e.text}' for n, e in zip(attrs["extras"], extra, strict=True))
        return Text(f"call_network({net.text}, {x.text}, {tau.text}, {cond.text}, {{{pairs}}})")

    def _derivative(self, node: int) -> Text:
        """Writes the function that is differentiated; the text calls `torch.func.jvp` on it."""
        body, t_variable, xt_variable, *rest = self.graph[node]["args"]
        t, xt, one, flow = (self.texts[a].text for a in rest)
        inner = Writer(self.graph, dict(self.texts), [], self.called, self.uses, self.indent + "    ")
        names = [inner.name(v) for v in (t_variable, xt_variable)]
        inner.texts |= {v: Text(n) for v, n in zip((t_variable, xt_variable), names, strict=True)}
        inside, below = _inside(self.graph), self.graph.below(body)
        for member in self.graph.order():
            if member in inside and member in below and self.graph[member]["op"] != "variable":
                inner.write(member)
        function = f"along_{names[0]}"
        self.lines += ["", f"{self.indent}def {function}({', '.join(names)}):", *inner.lines]
        self.lines += [f"{self.indent}    return {inner.texts[body].text}", ""]
        tangents = f"({one} * torch.ones_like({t}), {flow})"
        return Text(f"torch.func.jvp({function}, ({t}, {xt}), {tangents})[1]")


def _positive(value) -> bool:
    return isinstance(value, bool) or value >= 0


def emit(graph: Graph, title: str) -> str:
    """The source of a module with `tables(device)` and `compute(inputs, draw, nets, tables)`."""
    fixed = _fixed(graph)
    looked_up = {a for n in graph.order() if n not in fixed for a in graph[n]["args"] if a in fixed}
    tables = Writer(graph)
    names: dict[int, str] = {}
    for node in graph.order():
        if node in fixed or graph[node]["op"] == "const":
            tables.write(node)
            if node in fixed and node in looked_up:
                names[node] = _stored(tables, node)
    step = Writer(graph)
    step.texts = {n: Text(f'tables["{name}"]') for n, name in names.items()}
    inside = _inside(graph)
    for node in graph.order():
        if node not in fixed and node not in inside and node not in step.texts:
            step.write(node)
    outputs = ", ".join(f'"{k}": {step.texts[n].text}' for k, n in graph.outputs.items())
    return _module(title, tables.lines, names, step.lines, outputs)


def _stored(writer: Writer, node: int) -> str:
    """The name under which a table is kept."""
    text = writer.texts[node].text
    if not text.isidentifier():
        text = writer.name(node)
        writer.lines.append(f"    {text} = {writer.texts[node].text}")
        writer.texts[node] = Text(text)
    return text


def _fixed(graph: Graph) -> set[int]:
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


def _module(title: str, tables: list[str], names: dict, step: list[str], outputs: str) -> str:
    body = "\n".join([*tables, *step])
    used = {f.__name__ for f in FUNCTIONS.values()} | {"rows"}
    imports = sorted(n for n in used if re.search(rf"\b{n}\(", body))
    lines = [f'"""{title}"""', "", "import torch", ""]
    if "call_network(" in body:
        lines.append("from difftrain.compiler.network import call_network")
    if imports:
        lines.append(f"from difftrain.compiler.operations import {', '.join(imports)}")
    stored = ", ".join(f'"{n}": {n}' for n in dict.fromkeys(names.values()))
    lines += ["", "", "def tables():"]
    lines += ['    """What depends on an index alone, in float64: looked up in every step."""']
    lines += [*tables, f"    return {{{stored}}}", "", ""]
    lines += ["def compute(inputs, draw, nets, tables):"]
    lines += ['    """The wanted quantities, for one batch."""', *step, f"    return {{{outputs}}}", ""]
    return "\n".join(lines)
