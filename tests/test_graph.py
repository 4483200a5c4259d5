"""The graph: building, changing, printing, and what a legal one is."""

import pytest
from objectives import DDPM, LINEAR, OTHERS, declared

from difftrain.graph.build import build
from difftrain.graph.graph import Graph, from_terms, to_terms
from difftrain.graph.passes import PASSES, run
from difftrain.graph.verify import BrokenGraph, verify
from difftrain.language.finding import SpecError
from difftrain.language.term import const, leaf, make

FLOW = f"{LINEAR}\nprediction_type = flow"


def small() -> tuple[Graph, list[int]]:
    """x + 1 and its square, of a number per sample."""
    graph = Graph()
    x = graph.add("input", "sample", (), ("x",), name="x")
    one = graph.add("const", "scalar", value=1)
    total = graph.add("add", "sample", (x, one))
    square = graph.add("mul", "sample", (total, total))
    graph.outputs = {"square": square}
    return graph, [x, one, total, square]


def test_terms_and_graph_are_the_same_thing():
    x = leaf("input", "sample", name="x")
    term = (x + 1) * (x + 1)
    graph = from_terms({"y": term}, {x: ("x",)})
    assert len(graph.net) == 4  # x + 1 is there once
    assert to_terms(graph)[graph.outputs["y"]] is term


def test_a_copy_does_not_share_changes():
    graph, (x, one, total, square) = small()
    other = graph.copy()
    other.set_args(total, (x, x))
    other.outputs["total"] = total
    assert graph[total]["args"] == (x, one) and "total" not in graph.outputs


def test_replacing_a_node_moves_users_outputs_and_names():
    graph, (x, one, total, square) = small()
    graph.replace(total, x)
    assert graph[square]["args"] == (x, x) and graph[x]["names"] == ("x",)
    graph.replace(square, one)
    assert graph.outputs == {"square": one}
    verify(graph, "replace")


def test_arguments_come_before_what_uses_them():
    graph = build(declared(OTHERS["linear-jumps"]), ("loss",))
    place = {node: i for i, node in enumerate(graph.order())}
    assert all(place[a] < place[n] for n in graph.net for a in graph[n]["args"])


SMALL = """\
%0   scalar    const value=1
%1   scalar    const value=0
%2   sample    draw %1 %0 law=uniform name=t                t sigma
%3   sample    sub %0 %2                                    alpha
%4   field     input name=x0                                x0
%5   field     mul %3 %4
%6   field     draw %4 law=noise name=eps                   eps
%7   field     mul %2 %6
%8   field     add %5 %7                                    xt
-> xt = %8"""
WIDE = """\
%9   field     widen %3 %4
%5   field     mul %9 %4
%10  field     widen %2 %4
%7   field     mul %10 %6
%8   field     add %5 %7                                    xt
-> xt = %8"""


def test_a_small_graph_prints_legibly():
    graph = build(declared(f"{LINEAR}\nprediction_type = epsilon"), ("xt",))
    assert str(graph) == SMALL
    assert str(run(graph)).endswith(WIDE)


def test_what_is_before_and_after_each_pass_can_be_seen():
    seen = []
    graph = run(build(declared(FLOW), ("loss",)), lambda *entry: seen.append(entry))
    assert [name for name, _, _ in seen] == [p.__name__ for p in PASSES]
    assert seen[-1][2] is graph
    assert all(
        before is after for (_, _, after), (_, before, _) in zip(seen, seen[1:], strict=False)
    )
    assert "grad=True" in str(graph) and "grad=" not in str(seen[0][1])


def test_values_before_redefinitions():
    body = f"{DDPM}\nprediction_type = epsilon\nstrategy = offset_noise"
    graph = build(declared(body), ("eps", "eps@0"))
    assert graph.outputs["eps"] != graph.outputs["eps@0"]
    assert graph[graph.outputs["eps@0"]]["op"] == "draw"


def test_what_is_given_is_an_input():
    graph = build(declared(FLOW), ("loss",), ("t", "eps"))
    assert not graph.find("draw")
    assert {graph[n]["attrs"]["name"] for n in graph.find("input")} >= {"x0", "t", "eps"}


def test_what_cannot_be_derived_is_a_finding():
    with pytest.raises(SpecError) as caught:
        build(declared(f"{DDPM}\nprediction_type = flow"), ("loss",))
    assert "no value" in caught.value.findings[0].message


# ---- what a legal graph is


def broken(change) -> str:
    """What the verifier says about the small graph after a change."""
    graph, nodes = small()
    change(graph, *nodes)
    with pytest.raises(BrokenGraph) as caught:
        verify(graph, "a pass", ["square"])
    return str(caught.value).removeprefix("after a pass: ")


def test_a_legal_graph_passes():
    verify(small()[0], "a pass", ["square"])


def test_a_cycle():
    assert "cycle" in broken(lambda g, x, one, total, square: g.set_args(total, (square, one)))


def test_a_wrong_number_of_arguments():
    said = broken(lambda g, x, one, total, square: g.set_args(total, (x,)))
    assert said == "%2 add has 1 arguments"


def test_a_wrong_kind():
    def change(graph, x, one, total, square):
        graph[total]["kind"] = "field"

    assert broken(change) == "%2 add is called field, and is sample"


def test_kinds_that_do_not_go_together():
    def change(graph, x, one, total, square):
        graph[one]["kind"] = "table"

    assert broken(change).startswith("%2 add a table and one number per sample do not go together")


def test_a_kind_and_an_operation_that_there_is_not():
    def kind(graph, x, one, total, square):
        graph[x]["kind"] = "row"

    def operation(graph, x, one, total, square):
        graph[square]["op"] = "times"

    assert broken(kind) == "%0 input has the kind row, which there is not"
    assert broken(operation) == "%3 times is not an operation"


def test_an_output_that_is_gone():
    assert broken(lambda g, *nodes: g.remove([nodes[-1]])) == "output square is gone"
    assert broken(lambda g, *nodes: g.outputs.clear()) == "output square is gone"


def test_edges_that_are_not_arguments():
    assert "edges" in broken(lambda g, x, one, total, square: g.net.add_edge(x, square))


def test_an_argument_that_is_gone():
    assert "edges" in broken(lambda g, x, one, total, square: g.net.remove_node(one))


def test_a_leaf_with_arguments():
    assert "leaf" in broken(lambda g, x, one, total, square: g.set_args(x, (one,)))


@pytest.mark.parametrize(
    ("attrs", "said"),
    [
        ({"law": "uniform"}, "draw does not say its name"),
        ({"law": "cauchy", "name": "t"}, "draw is drawn from cauchy, which is no law"),
    ],
)
def test_draws_that_mean_nothing(attrs, said):
    assert said in broken(lambda g, *_: g.add("draw", "sample", **attrs))


def test_a_forward_without_its_arguments():
    assert "network has 1" in broken(lambda g, x, *_: g.add("network", "field", (x,), extras=()))


def test_a_pass_that_loses_an_output_is_found():
    def forgetful(graph):
        graph = graph.copy()
        graph.outputs.pop("loss")
        return graph

    with pytest.raises(BrokenGraph, match="after forgetful: output loss is gone"):
        run(build(declared(FLOW), ("loss", "xt")), passes=(forgetful,))


def test_folding_never_changes_a_value():
    x = leaf("input", "sample", name="x")
    assert make("mul", const(-1), x) is -x
    assert (x + (-x)).op == "sub" and (x - (-x)).op == "add"
