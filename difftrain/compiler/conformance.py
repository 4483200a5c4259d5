"""Conformance: what must hold of every objective, whoever wrote it, on small data in float64.

A point is a function of a subject and the data it is given. It raises `Broken` with a sentence
where it does not hold, and `LeftOut` where it says nothing about this objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from difftrain.compiler.interpret import interpret
from difftrain.compiler.objective import OPTIONAL
from difftrain.compiler.report import Broken, LeftOut, Point, Report
from difftrain.compiler.subject import ROWS, SEED, STEP, Subject, draws, inputs
from difftrain.graph.passes import prune
from difftrain.language.finding import SpecError
from difftrain.language.operations import NAMES
from difftrain.language.term import walk
from difftrain.language.weighting import forwards

SHAPES = ((1, 2, 2), (2, 3, 4), (2, 8))  # of one sample: two pictures and a signal
WHOLE = ("eps", "xt", "output", "pred", "target")  # shaped like the data, no axis of 1
COMPARED = ("loss", "xt", "target", "pred")
DIFFERENCE = 1e-6


def _row(given: Mapping, row: int) -> dict:
    return {n: v if n == "null" or v is None else v[row : row + 1] for n, v in given.items()}


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to what is compared; nan counts where one has it alone."""
    a, b = (v.detach().double() for v in torch.broadcast_tensors(a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    size = torch.where(b.isfinite(), b.abs(), 0).amax() if b.numel() else 0
    off = torch.where(same, torch.zeros_like(a), (a - b).abs() / (1 + size)).nan_to_num(torch.inf)
    return off.amax().item() if off.numel() else 0.0


# ---- shapes, draws, rows


def shapes(subject: Subject, given: Mapping) -> None:
    kinds = {n: t.kind for n, t in subject.terms.items() if t.kind in ("sample", "field", "tokens")}
    values, x0 = subject.evaluate(given, kinds), given["x0"]
    for name, kind in kinds.items():
        shape = tuple(values[name].shape)
        if not _fits(shape, kind, tuple(x0.shape), name in WHOLE):
            text = f"`{name}` is {NAMES[kind]}, and has shape {list(shape)}"
            raise Broken(f"{text} where the data have {list(x0.shape)}")


def _fits(shape: tuple, kind: str, data: tuple, whole: bool) -> bool:
    match kind:
        case "sample":
            return shape == data[:1]
        case "tokens":
            return len(shape) == 3 and shape[0] == data[0]
    sizes = zip(shape, data, strict=False)
    part = len(shape) == len(data) and shape[0] == data[0]
    return shape == data or (not whole and part and all(s in (1, d) for s, d in sizes))


def finite(subject: Subject, given: Mapping) -> None:
    loss = subject.evaluate(given, ("loss",))["loss"]
    if not loss.isfinite().all():
        raise Broken(f"the loss is {loss.tolist()}")


def drawn(subject: Subject, given: Mapping) -> None:
    versions = subject.objective.declared.equations.versions
    names = [n for n in subject.terms if n in versions and versions[n][0].form == "~"]
    if not names:
        raise LeftOut("nothing is drawn")
    for wanted in (COMPARED, [f"{n}@0" for n in names]):
        once, again = (subject.evaluate(given, wanted) for _ in range(2))
        if other := [n for n in wanted if _gap(once[n], again[n]) > 0]:
            raise Broken(f"`{other[0]}` differs between two runs of one seed, step and index")
    noise = [f"{n}@0" for n in names if subject.terms[n].kind == "field"]
    for key in ({"seed": SEED + 1}, {"step": STEP + 1}, {"index": torch.arange(ROWS) + 9}):
        other = subject.evaluate(given, wanted, **key)
        if same := [n for n in noise if _gap(other[n], once[n]) < 1e-3]:
            raise Broken(f"`{same[0]}` is the same for another {next(iter(key))}")


def alone(subject: Subject, given: Mapping) -> None:
    whole = subject.evaluate(given, COMPARED)
    for row in range(ROWS):
        index = torch.tensor([row])
        part = subject.evaluate(_row(given, row), COMPARED, index=index)
        for name, value in part.items():
            if _gap(value, whole[name][row : row + 1]) > 1e-9:
                raise Broken(f"`{name}` of a sample depends on the batch that it is in")


# ---- the compiled program against the interpreter of what was derived


def compiled(subject: Subject, given: Mapping) -> None:
    plain, quick = (
        _pair(subject, given, how) for how in (subject.run, partial(_interpreted, subject))
    )
    for name in COMPARED:
        gap = _gap(plain[0][name], quick[0][name])
        if gap > 1e-9:
            raise Broken(f"`{name}` differs from its equations by {gap:.1e}")
    gaps = [_gap(a, b) for a, b in zip(plain[1], quick[1], strict=True)]
    if max(gaps, default=0) > 1e-8:
        raise Broken(f"the gradient differs from that of the equations by {max(gaps):.1e}")


def _interpreted(subject: Subject, given: Mapping, wanted: Iterable[str]) -> dict:
    graph = subject.program(given, wanted).derived
    return interpret(graph, inputs(given), draws(given), subject.objective.nets)


def _pair(subject: Subject, given: Mapping, how: Callable) -> tuple[dict, list[Tensor]]:
    """Values, and the gradients of the mean loss."""
    values = how(given, COMPARED)
    return values, _gradient(values["loss"], subject.trained)


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# ---- gradients


def gradient(subject: Subject, given: Mapping) -> None:
    loss = subject.evaluate(given, ("loss",))["loss"]
    found = _gradient(loss, subject.trained)
    if not all(g.isfinite().all() for g in found):
        raise Broken("a gradient is not finite")
    if not any(g.abs().sum() > 0 for g in found):
        raise Broken("no gradient reaches what is trained")


def frozen(subject: Subject, given: Mapping) -> None:
    kept = {id(p) for m in subject.objective.frozen for p in m.parameters()}
    if not kept:
        raise LeftOut("no module is frozen")
    mixed = [p for p in subject.objective.parameters() if id(p) in kept]
    if mixed:
        raise Broken("a frozen module shares parameters with what is trained")
    subject.evaluate(given, ("loss",))["loss"].mean().backward()
    got = [p.grad is not None for m in subject.objective.frozen for p in m.parameters()]
    subject.objective.zero_grad(set_to_none=True)
    if any(got):
        raise Broken("a gradient reaches a frozen module")


def slope(subject: Subject, given: Mapping) -> None:
    """What is under `stop` stands still while the parameters move."""
    loss, parameters = _held(subject, given), subject.trained
    made = torch.Generator().manual_seed(1)
    along = [torch.randn(p.shape, generator=made, dtype=p.dtype) for p in parameters]
    length = sum(d.square().sum() for d in along).sqrt()

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p += by * d / length
            return loss().mean().item()

    found = _gradient(subject.run(given, ("loss",))["loss"], parameters)
    claimed = sum((g * d / length).sum().item() for g, d in zip(found, along, strict=True))
    ahead, behind = moved(DIFFERENCE), moved(-2 * DIFFERENCE)
    size = abs(moved(DIFFERENCE))  # back where it was
    measured = (ahead - behind) / (2 * DIFFERENCE)
    if abs(claimed - measured) > 1e-4 * max(abs(measured), size, 1e-3):
        raise Broken(f"the gradient says {claimed:.6g} where the loss rises by {measured:.6g}")


def _held(subject: Subject, given: Mapping) -> Callable[[], Tensor]:
    """The loss by the interpreter, every `stop` an input with the value that it has now."""
    graph = subject.program(given, ("loss",)).derived.copy()
    loss, stops = graph.outputs["loss"], {f"stop.{n}": n for n in graph.find("stop")}
    graph.outputs |= stops
    nets, known = subject.objective.nets, inputs(given)
    values = interpret(graph, known, draws(given), nets)
    for name, node in stops.items():
        if name in values:  # a stop inside a derivative has no value of its own
            graph.set_args(node, ())
            graph[node].update(op="input", attrs={"name": name})
    graph.outputs = {"loss": loss}
    graph = prune(graph)
    if graph.find("stop"):
        raise LeftOut("there is a `stop` inside a derivative")
    return lambda: interpret(graph, {**known, **values}, draws(given), nets)["loss"]


def counted(subject: Subject, given: Mapping) -> None:
    if any(t.op == "jvp" for t in walk(subject.loss)):
        raise LeftOut("a derivative runs its forward itself")
    calls = _watched(subject, given)
    told, made = forwards(subject.loss)[:2], (sum(calls), len(calls) - sum(calls))
    if told != made:
        text = "{} forwards with gradient and {} without"
        raise Broken(f"there should be {text.format(*told)}, and there are {text.format(*made)}")


def _watched(subject: Subject, given: Mapping) -> list[bool]:
    """Whether each forward of a network was to pass a gradient. None may change its input."""
    calls: list[bool] = []

    def watched(net):
        def call(x, *args, **further):
            calls.append(torch.is_grad_enabled())
            before = x.detach().clone()
            answer = net(x, *args, **further)
            if not torch.equal(before, x):
                raise Broken("the network changes its input in place")
            return answer

        return call

    program = subject.program(given, ("loss",))
    graph = program.graph
    names = {graph[graph[n]["args"][0]]["attrs"]["name"] for n in graph.find("network")}
    nets = {n: watched(m) if n in names else m for n, m in subject.objective.nets.items()}
    tables = program.tables("cpu", torch.float64)
    program.compute(inputs(given), draws(given), nets, tables)
    return calls


# ---- estimates


def estimates(subject: Subject, given: Mapping) -> None:
    """A network that returns the target is told (x0, eps) by its estimates."""
    time = {"t": subject.run(given, ("t", "xt"))["t"]}  # xt says how fine t is
    level = ("alpha", "sigma", "xt@0", "eps@0", "target@0")
    start = subject.run({**given, **time}, level, time)
    fixed = {**time, "xt": start["xt@0"], "pred": start["target@0"]}
    found = subject.run({**given, **fixed}, ("x0_hat", "eps_hat"), fixed)
    scales = [_column(start[n], given["x0"]) for n in ("alpha", "sigma")]
    for name, wanted, scale in zip(found, (given["x0"], start["eps@0"]), scales, strict=True):
        # an error of one estimate counts as much as its share of xt
        if _gap(scale * found[name], scale * wanted) > 1e-8:
            raise Broken(f"`{name}` of the target is not what the target was made of")


def _column(value, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=like.dtype).expand(len(like))
    return value.reshape(-1, *(1,) * (like.dim() - 1))


# ---- the unified interface


def _members(subject: Subject, given: Mapping) -> dict[str, Callable[[], Tensor]]:
    """Every member, called on times and noise that the objective itself draws."""
    own, x = subject.objective, given["x0"]
    key = {"step": STEP, "seed": SEED}
    t = own.sample_t(x.shape, **key)
    t = t.double() if t.is_floating_point() else t
    n = own.sample_n(x.shape, **key).double()
    cond, null = given.get("cond"), given.get("null")
    more = {k: v for k, v in given.items() if k not in ("x0", *OPTIONAL)}
    return {
        "sample_t": lambda: own.sample_t((len(x),), **key),
        "sample_n": lambda: n,
        **{c: partial(getattr(own, c), t) for c in ("c_in", "c_out", "c_skip", "c_noise")},
        "sample_x_t": lambda: own.sample_x_t(x, n, t, cond, null=null, **key),
        "target": lambda: own.target(x, n, t, cond, null=null, **key),
        "pred": lambda: own.pred(x, t, cond),
        "score": lambda: own.score(x, t, cond),
        "loss": lambda: own.loss(x, cond, null=null, **key, **more),
        "call": lambda: own(x, cond, null=null, t=t, eps=n, **key, **more),
    }


PER_SAMPLE = ("sample_t", "c_in", "c_out", "c_skip", "c_noise", "loss", "call")
MEMBERS = (*PER_SAMPLE, "sample_n", "sample_x_t", "target", "pred", "score")


def member(name: str, subject: Subject, given: Mapping) -> None:
    x = given["x0"]
    shape = tuple(_members(subject, given)[name]().shape)
    wanted = tuple(x.shape[:1] if name in PER_SAMPLE else x.shape)
    if shape != wanted:
        raise Broken(f"it answers with shape {list(shape)} where {list(wanted)} is due")


def auxiliary(subject: Subject, given: Mapping) -> None:
    more = {k: v for k, v in given.items() if k != "x0"}
    key = {"step": STEP, "seed": SEED}
    loss, values = subject.objective.loss(given["x0"], **more, **key, return_aux=True)
    if _gap(subject.objective(given["x0"], **more, **key), loss) > 0:
        raise Broken("calling the objective gives another loss than `loss`")
    if _gap(subject.evaluate(given, ("loss",))["loss"], loss) > 0:
        raise Broken("`evaluate` gives another loss than `loss`")
    if missing := {"loss", "xt", "fit"} & subject.terms.keys() - values.keys() - _unread(subject):
        raise Broken(f"`{min(missing)}` is on the way to the loss and not among what is returned")


def _unread(subject: Subject) -> set[str]:
    below = set(walk(subject.loss))
    return {n for n, t in subject.terms.items() if t not in below}


POINTS: dict[str, Callable[[Subject, Mapping], None]] = {
    "draws and quantities have their shapes": shapes,
    "the loss is finite": finite,
    "equal keys draw equal numbers, others differ": drawn,
    "a sample does not depend on its batch": alone,
    "the compiled step is the equations": compiled,
    "gradients reach what is trained": gradient,
    "frozen modules get no gradient": frozen,
    "the gradient is the slope of the loss": slope,
    "forwards are those that the loss needs": counted,
    "estimates of the target give back x0 and eps": estimates,
    **{f"`{name}` answers": partial(member, name) for name in MEMBERS},
    "`loss` with what it is made of": auxiliary,
}


def conform(subject: Subject, samples: Iterable[tuple[int, ...]] = SHAPES) -> Report:
    """Every point, on data of every shape; a point is broken by the first that breaks it."""
    data = [subject.given(tuple(shape)) for shape in samples]
    points = tuple(_point(name, holds, subject, data) for name, holds in POINTS.items())
    return Report(subject.objective.declared.name, points)


def _point(name: str, holds: Callable, subject: Subject, data: list[dict]) -> Point:
    for given in data:
        try:
            holds(subject, given)
        except (LeftOut, SpecError) as reason:
            return Point(name, "left out", _sentence(reason))
        except Broken as broken:
            return Point(name, "broken", str(broken))
        except Exception as stopped:  # a network's own error is a point that does not hold
            shape = list(given["x0"].shape)
            return Point(name, "broken", f"for data of shape {shape} it stops with: {stopped}")
    return Point(name, "holds")


def _sentence(reason: Exception) -> str:
    if isinstance(reason, SpecError):
        return "; ".join(f.message for f in reason.findings)
    return str(reason)
