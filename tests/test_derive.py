"""What equations mean: redefinitions, replacements, draws, layers and scopes."""

import pytest

from difftrain.language.check import check
from difftrain.language.numbers import draws
from difftrain.language.term import leaf, walk
from difftrain.language.tree import Source
from difftrain.language.worlds import HERE

LINEAR = "process = linear\nprediction_type = flow\n"
DDPM = "process = ddpm\nprediction_type = epsilon\n"


def read(body: str, top: str = "", backbone: str = "custom"):
    text = f"diff 1\n{top}\nobjective o {{\n{body}\nbackbone = {backbone}\n}}\n"
    spec, found = check(Source("test.diff", text))
    return spec.objective("o"), found


def objective(body: str, top: str = "", backbone: str = "custom"):
    declared, found = read(body, top, backbone)
    assert [f.message for f in found if f.severity == "error"] == []
    return declared


def codes(body: str, top: str = "") -> list[str]:
    return [f.code for f in read(body, top)[1]]


def networks(term) -> list:
    return [t for t in walk(term) if t.op == "network"]


# ---- redefinition


def test_strategies_on_different_names_commute():
    one = objective(DDPM + "strategy = [min_snr, dream]").quantity("loss")
    other = objective(DDPM + "strategy = [dream, min_snr]").quantity("loss")
    assert one is other


def test_strategies_on_one_name_are_ordered():
    first = objective(DDPM + "strategy = [offset_noise, dream]").quantity("loss")
    second = objective(DDPM + "strategy = [dream, offset_noise]").quantity("loss")
    assert first is not second


def test_a_later_strategy_sees_the_earlier_one():
    declared = objective(DDPM + "strategy = [offset_noise, dream]")
    inner = [n for t in walk(declared.quantity("loss")) if t.op == "stop" for n in networks(t)]
    assert any(d["name"] == "offset_noise.level" for d in draws(*inner))
    declared = objective(DDPM + "strategy = [dream, offset_noise]")
    inner = [n for t in walk(declared.quantity("loss")) if t.op == "stop" for n in networks(t)]
    assert inner
    assert not any(d["name"] == "offset_noise.level" for d in draws(*inner))


def test_inside_a_redefinition_the_name_stands_one_version_back():
    declared = objective(LINEAR + "eps' = 2 * eps\neps' = eps + x0")
    eps, x0 = declared.derivation().read("eps", HERE.cap(eps=0)), declared.quantity("x0")
    assert declared.quantity("eps") is 2 * eps + x0


def test_nothing_is_frozen_by_an_earlier_redefinition():
    top = "strategy weighted { fit' = sigma * fit }\nstrategy early { t' = t / 2 }"
    first = objective(LINEAR + "strategy = [weighted, early]", top)
    assert first.quantity("loss") is objective(
        LINEAR + "strategy = [early, weighted]", top
    ).quantity("loss")
    half = first.derivation().read("t", HERE.cap(t=0)) / 2
    assert first.quantity("sigma") is half
    assert first.quantity("loss").args[0] is half


def test_no_grad_forward_of_dream_comes_from_the_undreamed_noise():
    loss = objective(DDPM + "strategy = dream").quantity("loss")
    assert len(networks(loss)) == 2
    stopped = [t for t in walk(loss) if t.op == "stop"]
    assert len(networks(*stopped[:1])) == 1


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("a = b\nb = a\nloss = fit * a", {"a", "b"}),
        ("snr = 2 * logsnr\nloss = snr * fit", {"snr", "logsnr"}),
        ("t = sigma\nt' = t", {"t", "sigma"}),
    ],
)
def test_a_circle_is_found_once(body, names):
    _, found = read(LINEAR + body)
    (finding,) = [f for f in found if f.code == "DIF122"]
    assert set(finding.message.rpartition(": ")[2].split(" -> ")) == names


def test_a_redefinition_makes_no_circle():
    top = "strategy later { one ~ again(t), two ~ again(t), t' = max(one, two) }"
    t = objective(LINEAR + "strategy = later", top).quantity("t")
    assert [d["name"] for d in draws(t)] == ["later.one", "later.two"]


# ---- replacement


def test_replacing_t_derives_everything_again_with_the_same_noise():
    declared = objective(LINEAR + "s = t / 2\nfit' = mse(pred, stop(pred(t = s)))")
    x0, eps, t = (declared.quantity(n) for n in ("x0", "eps", "t"))
    inputs = {n.args[1] for n in networks(declared.quantity("loss"))}
    assert inputs == {(1 - t) * x0 + t * eps, (1 - t / 2) * x0 + t / 2 * eps}


def test_replacing_xt_as_well_keeps_it():
    declared = objective(LINEAR + "xs = 2 * xt\nfit' = mse(pred, stop(pred(t = t / 2, xt = xs)))")
    inputs = {n.args[1] for n in networks(declared.quantity("loss"))}
    assert inputs == {declared.quantity("xt"), declared.quantity("xs")}


def test_arguments_are_read_where_they_stand():
    declared = objective(LINEAR + "fit' = mse(pred(t = t / 2), target)")
    (network,) = networks(declared.quantity("loss"))
    assert network.args[2] is declared.quantity("t") / 2


def test_another_net_is_a_replacement():
    declared = objective(LINEAR + "fit' = mse(pred, stop(pred(net = teacher)))")
    nets = {n.args[0]["name"] for n in networks(declared.quantity("loss"))}
    assert nets == {"student", "teacher"}


def test_equal_worlds_are_one_forward():
    declared = objective(LINEAR + "fit' = mse(pred, target) + mse(pred(t = t), target)")
    assert len(networks(declared.quantity("loss"))) == 1


def test_locals_are_replaced_too():
    declared = objective(LINEAR + "w = 2\nheavy = w * fit\nloss = heavy(w = 3)")
    assert declared.quantity("loss") is 3 * declared.quantity("fit")


# ---- draws


def test_a_draw_is_shared_by_every_forward():
    declared = objective(DDPM + "strategy = dream")
    assert {d["name"] for d in draws(declared.quantity("loss"))} == {"eps", "t"}


def test_again_is_a_fresh_copy():
    declared = objective(LINEAR + "s ~ again(t)\nfit' = s * fit")
    assert {d["name"] for d in draws(declared.quantity("fit"))} == {"eps", "s", "t"}


def test_two_base_draws_of_one_law_are_two():
    t = objective(LINEAR + "t ~ max(uniform(0, 1), uniform(0, 1))").quantity("t")
    assert [d["name"] for d in draws(t)] == ["t", "t.1"]


def test_a_copy_of_such_a_law_has_two_as_well():
    body = "t ~ max(uniform(0, 1), uniform(0, 1))\ns ~ again(t)\nfit' = s * fit"
    s = objective(LINEAR + body).quantity("s")
    assert [d["name"] for d in draws(s)] == ["s", "s.1"]


def test_an_argument_that_is_a_law_is_drawn_once():
    t = objective(LINEAR + "t ~ squared(uniform(0, 1))", "squared(u) = u * u").quantity("t")
    assert len(draws(t)) == 1


def test_a_law_outside_a_draw_is_found():
    assert codes(LINEAR + "eps' = eps + noise(x0)") == ["DIF128"]


# ---- given values


def test_given_values_stand_where_nothing_reads_its_own_name():
    declared = objective(LINEAR + "t' = t / 2")
    given = leaf("input", "sample", name="t")
    assert declared.derivation({"t"}).read("t") is given / 2


def test_a_given_value_stands_for_a_redefinition_that_starts_anew():
    top = "strategy later { one ~ again(t), two ~ again(t), t' = max(one, two) }"
    declared = objective(LINEAR + "strategy = later", top)
    assert declared.derivation({"t"}).read("t") is leaf("input", "sample", name="t")


def test_given_noise_is_still_redefined():
    declared = objective(DDPM + "strategy = dream")
    eps = declared.derivation({"eps"}).read("eps")
    assert eps.op == "add" and eps.args[0] is leaf("input", "field", name="eps")


def test_locals_are_given_by_their_long_names():
    declared = objective(DDPM + "strategy = offset_noise")
    assert leaf("input", "field", name="offset_noise.level") in set(
        walk(declared.derivation({"offset_noise.level"}).read("eps"))
    )


# ---- layers and scopes


def test_the_objective_restates_the_process():
    declared = objective(LINEAR + "t ~ uniform(0.1, 0.9)")
    assert [a.value for a in declared.quantity("t").args] == [0.1, 0.9]
    (before,) = declared.equations.replaced
    assert (before.name, before.scope.label) == ("t", "process")


def test_a_strategy_may_not_restate():
    top = "strategy later { sigma = t^2 }"
    assert codes(LINEAR + "strategy = later", top) == ["DIF114"]


def test_a_strategy_may_define_what_has_no_equation():
    top = "strategy two { r = t / 2, target' = (t - r) * target }"
    declared = objective(LINEAR + "strategy = two", top, "custom(times = [t, r])")
    assert declared.quantity("r") is declared.quantity("t") / 2


def test_names_of_a_block_are_local_and_read_from_outside_by_their_long_name():
    declared = objective("process = ddpm(steps = 500)\n" + DDPM[15:] + "loss = process.steps * fit")
    assert declared.quantity("loss").args[0].value == 500
    assert codes(DDPM + "loss = steps * fit") == ["DIF120"]


TWICE = "strategy heavy(w = 2) { half = w / 2, fit' = half * fit }\n"


def test_a_block_made_from_another_has_its_parameters_and_statements():
    top = TWICE + "strategy heavier from heavy { eps' = eps + half * x0 }"
    declared = objective(LINEAR + "strategy = heavier(w = 6)", top)
    assert declared.quantity("loss").args[0].value == 3
    assert declared.quantity("eps").args[1].args[0].value == 3


def test_its_own_equations_win():
    top = TWICE + "strategy heavier from heavy { half = 5 * w }"
    declared = objective(LINEAR + "strategy = heavier(w = 2)", top)
    assert declared.quantity("loss").args[0].value == 10


def test_a_base_that_is_listed_too_is_applied_once():
    top = "strategy heavy { fit' = 2 * fit }\nstrategy more from heavy { eps' = 2 * eps }"
    declared = objective(LINEAR + "strategy = [heavy, more]", top)
    assert declared.quantity("loss").args[0].value == 2
    assert len(declared.equations.versions["fit"]) == 2


def test_kinds_are_separate_name_spaces():
    declared = objective("process = ddpm(beta = linear)\nprediction_type = epsilon")
    assert declared.quantity("alpha").op == "pick"
    assert objective(LINEAR).quantity("alpha") is 1 - objective(LINEAR).quantity("t")


# ---- row and direction


@pytest.mark.parametrize(
    "change", ["eps' = 2 * eps", "xt' = 2 * xt", "target' = 2 * target", "flow' = 2 * flow"]
)
def test_redefinitions_do_not_move_the_row(change):
    declared = objective(LINEAR + change)
    assert [declared.quantity(n).value for n in ("row_a", "row_b")] == [-1, 1]


def test_flow_hat_does_not_move_with_flow():
    plain, moved = objective(LINEAR), objective(LINEAR + "flow' = stop(flow)")
    assert plain.quantity("flow_hat") is moved.quantity("flow_hat")


def test_dot_is_the_derivative_in_t():
    declared = objective(LINEAR + "sigma = sin(t)\nloss = dot(sigma) * fit")
    slope = declared.quantity("loss").args[0]
    assert slope.op == "cos" and slope.args[0] is declared.quantity("t")


def test_ddt_moves_t_and_xt_and_nothing_else():
    declared = objective(LINEAR + "target' = stop(target - t * ddt(pred))")
    (slope,) = [t for t in walk(declared.quantity("target")) if t.op == "jvp"]
    body, _, _, at_t, at_xt, one, flow = slope.args
    assert (at_t, at_xt) == (declared.quantity("t"), declared.quantity("xt"))
    assert one.value == 1 and flow is declared.quantity("flow")
    assert not draws(body)


# ---- where findings point


def test_what_is_wrong_in_the_library_is_told_at_the_spec():
    _, found = read("process = ddpm\nprediction_type = flow")
    (finding,) = found
    assert finding.at.span.text == "flow"
    assert finding.also[0].span.source.path == "std/objective.diff"


def test_conditions_known_early_take_one_side_alone():
    top = "strategy pick_one(on = true) { fit' = if on then 2 * fit else nothing * fit }"
    declared = objective(LINEAR + "strategy = pick_one", top)
    assert declared.quantity("loss").args[0].value == 2
