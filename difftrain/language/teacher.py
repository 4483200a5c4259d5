"""The teacher's own equations: its process, row and preconditioning, in the student's terms.

x0 and eps mean the same to both. At equal signal-to-noise the teacher's xt is the student's times
`alpha_teacher / alpha`, so what it says of (xt, t) is read at (scale * xt, its own time).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from difftrain.language.finding import Finding, Label
from difftrain.language.inverse import solved
from difftrain.language.numbers import support
from difftrain.language.term import Term, const, leaf, make
from difftrain.language.worlds import HERE, Problem, World

if TYPE_CHECKING:
    from difftrain.language.derive import Derivation

MOVING = leaf("variable", "sample", name="t")


def taught(student: Derivation, name: str, world: World, at) -> Term:
    """`name`, an estimate or an output, as the teacher's own equations give it in a world."""
    own = student.teacher
    inner = _inside(student, own, world, at)
    rows = [[d.read(n, w) for n in ("row_a", "row_b")] for d, w in ((student, world), (own, inner))]
    same = all(a is b for a, b in zip(*rows, strict=True))
    if name != "pred" or (same and _same_path(student, own)):
        return own.read(name, inner, at)
    a, b = rows[0]
    return a * own.read("x0_hat", inner, at) + b * own.read("eps_hat", inner, at)


def _inside(student: Derivation, own: Derivation, world: World, at) -> World:
    """The world of the teacher's equations at the student's (xt, t)."""
    xt, t = (student.read(n, world, at) for n in ("xt", "t"))
    cond = _shown(student, world, at)
    if not _same_path(student, own):
        level = student.read("logsnr", world, at)
        along = HERE.swap({"t": MOVING})
        t = solved(own.read("logsnr", along), MOVING, level, *own_range(own, at))
        xt = _scale(student, world, own, HERE.swap({"t": t})) * xt
    calm = {"dropped": const(False), "dropout": const(False), "cond": cond}
    net = leaf("module", "module", name="teacher")
    later = {"r": t} if "r" in own.equations.versions else {}
    return HERE.swap({"xt": xt, "t": t, "net": net, **calm, **later})


def _scale(student: Derivation, world: World, own: Derivation, there: World) -> Term:
    """alpha_teacher / alpha, or the same of sigma where that is the larger: at one noise level the
    two are equal, and one of them is never 0 / 0."""
    alpha, sigma = (student.read(n, world) for n in ("alpha", "sigma"))
    theirs = [own.read(n, there) for n in ("alpha", "sigma")]
    mostly = make("gt", alpha, sigma)
    return make("where", mostly, theirs[0] / alpha, theirs[1] / sigma)


def _shown(student: Derivation, world: World, at) -> Term:
    """The condition that a network would be given in a world."""
    cond = student.read("cond", world, at)
    dropped = student.read("dropped", world, at)
    return make("where", dropped, student.read("null", world, at), cond)


def _same_path(student: Derivation, own: Derivation) -> bool:
    """Whether both processes have the same alpha(t) and sigma(t)."""
    along = HERE.swap({"t": MOVING})
    pairs = [[d.read(n, along) for d in (student, own)] for n in ("alpha", "sigma")]
    return all(a is b for a, b in pairs)


def own_range(own: Derivation, at) -> tuple[float, float]:
    """The ends of t on a derivation's own process."""
    found = support(own.law(own.equations.process_time()))
    if found.whole:
        text = "this teacher knows a table of steps alone, and the student's times lie between"
        span = at.span if at is not None else own.equations.process_time().span
        hint = "use the teacher's own process for the student, or a continuous teacher"
        raise Problem(Finding("DIF160", text, Label(span), help=hint))
    return (found.low, found.high) if found else (0.0, 1.0)
