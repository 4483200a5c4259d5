"""The passes, in order. Each takes a graph and returns one with the same values; each says what
it needs and what it ensures. `run` verifies between them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from difftrain.graph.cancel import cancel
from difftrain.graph.graph import Graph, to_terms
from difftrain.graph.primals import share_primals
from difftrain.graph.verify import verify
from difftrain.language.operations import OPERATIONS
from difftrain.language.term import is_const

ELEMENTWISE = {name for name, op in OPERATIONS.items() if op.kind is OPERATIONS["add"].kind}
ELEMENTWISE |= {"where", "eq", "ne"}
TRAINED = ("network", "jvp", "apply")  # what a gradient can reach
CONDITIONS = ("cond", "null")  # and these, where their encoder is trained
SHAPED = ("x0", "xt")  # what says the shape of the data


def bind(graph: Graph) -> Graph:
    """Needs: named draws and inputs. Ensures: every draw has the number of its random stream."""
    graph = graph.copy()
    for node in graph.find("draw"):
        name = graph[node]["attrs"]["name"]
        graph[node]["attrs"] = {**graph[node]["attrs"], "stream": zlib.crc32(name.encode())}
    return graph


def tabulate(graph: Graph) -> Graph:
    """Needs: nothing. Ensures: what depends on nothing but an index is a table, so it is computed
    once, in float64, and looked up in the step."""
    graph = graph.copy()
    for node in graph.find("pick"):
        table, index = graph[node]["args"]
        size = _length(graph, table)
        if size is not None:
            _tabulate_index(graph, index, size)
    for node in graph.find("draw", "input"):
        size = _count(graph, node)
        titles = (graph[node]["attrs"]["name"], *graph[node]["names"])
        if size is not None and "t" in titles:
            _tabulate_index(graph, node, size)
    return graph


def _count(graph: Graph, node: int) -> int | None:
    """How many values an index has that is drawn, or given in the place of one."""
    attrs = graph[node]["attrs"]
    if graph[node]["op"] == "draw":
        terms = to_terms(graph)[node] if attrs["law"] == "integer" else None
    else:
        terms = graph.laws.get(attrs["name"])
    if terms is None or terms.op != "draw" or terms["law"] != "integer":
        return None
    size = terms.args[0]
    return int(size.value) if is_const(size) else None


def _length(graph: Graph, table: int) -> int | None:
    """The length of a table that holds constants."""
    below = graph.below(table)
    counts = [n for n in below if graph[n]["op"] == "count"]
    if any(graph[n]["op"] in ("input", "draw", "variable") for n in below) or not counts:
        return None
    sizes = {int(graph[graph[n]["args"][0]]["attrs"]["value"]) for n in counts}
    return sizes.pop() if len(sizes) == 1 else None


def _tabulate_index(graph: Graph, index: int, size: int) -> None:
    tables: dict[int, int] = {}
    for node in graph.order():
        data = graph[node]
        if data["kind"] != "sample" or node == index or data["op"] in ("draw", "input", "stop"):
            continue
        if data["op"] == "pick" and data["args"][1] == index:
            table = data["args"][0]
            if _length(graph, table) == size:
                tables[node] = table
                graph[table]["names"] = (*data["names"], *graph[table]["names"])
        elif data["op"] in ELEMENTWISE and any(a in tables or a == index for a in data["args"]):
            args = [_as_table(graph, a, tables, index, size) for a in data["args"]]
            if None not in args:
                tables[node] = graph.add(
                    data["op"], "table", args, data["names"], data["span"], **data["attrs"]
                )
    _look_up(graph, tables, index)


def _as_table(graph: Graph, arg: int, tables: dict, index: int, size: int) -> int | None:
    if arg in tables:
        return tables[arg]
    if graph[arg]["op"] == "const":
        return arg
    if arg == index:
        count = graph.add("const", "scalar", value=size)
        return graph.add("count", "table", (count,))
    return None


def _look_up(graph: Graph, tables: dict[int, int], index: int) -> None:
    """Puts a look-up where a tabulated node is used by one that is not."""
    for node, table in tables.items():
        users = [u for u in graph.net.successors(node) if u not in tables]
        wanted = node in graph.outputs.values()
        if graph[node]["op"] != "pick" and (users or wanted):
            new = graph.add("pick", "sample", (table, index), (), graph[node]["span"])
            graph.replace(node, new)


WHOLE = ("integer", "choice")  # laws of whole numbers


def real(graph: Graph) -> Graph:
    """Needs: tabulate. Ensures: arithmetic on a whole number has the precision of the data."""
    graph = graph.copy()
    data = [n for n in graph.find("input") if graph[n]["attrs"]["name"] in SHAPED]
    whole = [n for n in graph.find("draw", "input") if data and _is_whole(graph, n)]
    for node in whole:
        users = [u for u in graph.net.successors(node) if graph[u]["op"] in ELEMENTWISE]
        if users:
            new = graph.add("real", graph[node]["kind"], (node, data[0]))
            for user in users:
                args = graph[user]["args"]
                graph.set_args(user, (new if a == node else a for a in args))
    return graph


def _is_whole(graph: Graph, node: int) -> bool:
    attrs = graph[node]["attrs"]
    if graph[node]["op"] == "draw":
        return attrs["law"] in WHOLE
    law = graph.laws.get(attrs["name"])
    of_law = law is not None and law.op == "draw" and law["law"] in WHOLE
    return of_law or attrs["name"] == "step"


def dedupe(graph: Graph) -> Graph:
    """Needs: nothing. Ensures: no two nodes compute the same thing, forwards of a net included."""
    graph = graph.copy()
    seen: dict[tuple, int] = {}
    for node in graph.order():
        data = graph[node]
        attrs = tuple(sorted((k, type(v), v) for k, v in data["attrs"].items()))
        key = (data["op"], data["kind"], data["args"], attrs)
        if key in seen:
            graph.replace(node, seen[key])
            graph.remove([node])
        else:
            seen[key] = node
    return graph


def share_forwards(graph: Graph) -> Graph:
    """Needs: dedupe. Ensures: a forward whose inputs differ from another's only by `stop` is that
    one: stopping an input that needs no gradient changes nothing. Nor does choosing between two
    that are one."""
    graph = graph.copy()
    for node in graph.find("stop"):
        (inner,) = graph[node]["args"]
        if not any(_trained(graph[n]) for n in graph.below(inner)):
            graph.replace(node, inner)
            graph.remove([node])
    for node in graph.find("where"):
        _, then, other = graph[node]["args"]
        if then == other and graph[then]["kind"] == graph[node]["kind"]:
            graph.replace(node, then)
            graph.remove([node])
    return dedupe(graph)


def _trained(data: dict) -> bool:
    return data["op"] in TRAINED or (data["op"] == "input" and data["attrs"]["name"] in CONDITIONS)


def stop_gradients(graph: Graph) -> Graph:
    """Needs: share_forwards. Ensures: `grad` of a forward says whether a gradient passes it."""
    graph = graph.copy()
    live, stack = set(), list(graph.outputs.values())
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(graph[node]["args"] if graph[node]["op"] != "stop" else ())
    for node in graph.find("network"):
        graph[node]["attrs"] = {**graph[node]["attrs"], "grad": node in live}
    return graph


def prune(graph: Graph) -> Graph:
    """Needs: nothing. Ensures: every node is needed for an output."""
    graph = graph.copy()
    graph.remove(set(graph.net) - graph.below(*graph.outputs.values()))
    return graph


def widen(graph: Graph) -> Graph:
    """Needs: kinds. Ensures: one number per sample is spread over a field in a node of its own."""
    graph = graph.copy()
    data = [n for n in graph.find("input") if graph[n]["attrs"]["name"] in SHAPED]
    for node in graph.order():
        kind, args = graph[node]["kind"], graph[node]["args"]
        like = [a for a in args if graph[a]["kind"] == kind]
        if graph[node]["op"] in ELEMENTWISE and kind in ("field", "tokens") and like:
            shape = data[0] if data and kind == "field" else like[0]
            graph.set_args(node, [_wide(graph, a, shape) for a in args])
    return dedupe(graph)


def _wide(graph: Graph, arg: int, like: int) -> int:
    if graph[arg]["kind"] != "sample":
        return arg
    return graph.add("widen", graph[like]["kind"], (arg, like))


Pass = Callable[[Graph], Graph]
PASSES: tuple[Pass, ...] = (
    bind,
    cancel,
    tabulate,
    real,
    dedupe,
    share_forwards,
    stop_gradients,
    prune,
    widen,
    share_primals,
)


def run(
    graph: Graph,
    watch: Callable[[str, Graph, Graph], None] | None = None,
    passes: tuple[Pass, ...] = PASSES,
) -> Graph:
    """The graph after all passes; `watch(name, before, after)` sees each one."""
    verify(graph, "build")
    wanted = [name for name in graph.outputs if "~" not in name]
    for step in passes:
        after = step(graph)
        verify(after, step.__name__, wanted)
        if watch is not None:
            watch(step.__name__, graph, after)
        graph = after
    return graph


def forwards(graph: Graph) -> tuple[int, int]:
    """How many forward passes of networks a step makes, with gradient and without."""
    counted = [graph[n]["attrs"].get("grad", True) for n in graph.find("network")]
    return sum(counted), len(counted) - sum(counted)
