"""What pretrained folders say of themselves, held against the spec that names them.

Reads their json files and needs no torch. What cannot be read because it is not there says
nothing; what disagrees is a finding with both values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from difftrain.language.adopt import adopts
from difftrain.language.finding import Finding, Label
from difftrain.language.names import is_shipped
from difftrain.language.numbers import support, value
from difftrain.language.part import Part
from difftrain.language.rules.case import ALONG, Case, shown
from difftrain.language.scope import Use, formals
from difftrain.language.spec import Objective, Spec
from difftrain.language.tree import Argument, Call, Name, Number, Span, Text
from difftrain.language.uses import bind
from difftrain.models.errors import PartError
from difftrain.models.pretrained import FILES, Absent, facts, is_hub_name, located

CLOSE = 1e-6  # configurations hold rounded numbers


def disagreements(spec: Spec) -> list[Finding]:
    """What the pretrained folders named in a spec say otherwise."""
    found: list[Finding] = []
    for objective in spec.objectives.values():
        backbone = objective.backbone
        if backbone and backbone.part.options.get("weights"):
            pair = Pair(spec, objective, found)
            for compare in COMPARISONS:
                compare(pair)
    return list(dict.fromkeys(found))


@dataclass(eq=False)
class Pair:
    """An objective, and the pretrained folder that its network comes from."""

    spec: Spec
    objective: Objective
    found: list[Finding]

    def __post_init__(self):
        self.case = Case(self.spec, self.objective)
        self.use = self.objective.backbone.uses[0]
        self.weights = self.objective.backbone.part.options["weights"]
        self.scheduler = self.read("scheduler", self.weights)
        self.network = self.read("unet", self.weights).get("network", {})

    def read(self, file: str, weights: str) -> dict:
        """The facts of a file of a folder; empty where it is not there."""
        try:
            return facts(weights, [file])
        except Absent:
            return {}
        except PartError as problem:
            text, _, hint = str(problem).rpartition(": ")
            at = Label(self.place("weights", self.use))
            self.found.append(Finding("DIF402", text, at, help=hint, severity="warning"))
            return {}

    def part(self, kind: str) -> Part | None:
        """The backbone's codec or encoder."""
        options = self.objective.backbone.part.options.values()
        return next((p for p in options if isinstance(p, Part) and p.kind == kind), None)

    # ---- the folder's process

    @cached_property
    def adopting(self) -> str:
        """What adopts it in this spec, such as `sd.scheduler("folder")`; or nothing."""
        known = self.use.definition.home.definitions("process")
        name = next((d.name for d in known if adopts(d)), None)
        space = ".".join(self.use.call.path[:-1])
        return f'{space}.{name}("{self.weights}")' if name and space and self.scheduler else ""

    @cached_property
    def theirs(self) -> Case | None:
        """The objective with the folder's process."""
        if not self.adopting:
            return None
        place = self.place("weights", self.use)
        path = tuple(self.adopting.partition("(")[0].split("."))
        file = Text(str(Path(located(self.weights, "scheduler")).absolute()), place)
        call = Call(path, (Argument(None, file, place),), place, place)
        case = self.case.variant("process", call)
        return case if case.own_times and self.case.own_times else None

    @property
    def edit(self) -> str:
        """What to write for the folder's process; of a hub name, which holds no file here, the
        process itself."""
        use = self.theirs.slot("process")
        known = self.spec.names.find("process", (use.definition.name,))
        space = "" if known else f"{self.use.call.path[0]}."
        text = space + _one_line(use.call.span) if is_hub_name(self.weights) else self.adopting
        return f"write `process = {text}` unless the change is meant"

    @cached_property
    def same_levels(self) -> bool:
        """Whether alpha and sigma are those of the folder's process, at the same times."""
        if self.theirs is None:
            return False
        mine, theirs = self.case, self.theirs
        pairs = zip(levels(mine), levels(theirs), strict=False)
        same_times = near(mine.own_times.values, theirs.own_times.values)
        return same_times and all(near(a, b) for a, b in pairs)

    # ---- telling

    def place(self, name: str, use: Use) -> Span:
        """Where an argument of a use stands in the spec, or else the whole use."""
        expr, _ = bind(use, []).get(name, (None, None))
        return self.case.called(use) if expr is None or is_shipped(expr.span) else expr.span

    def written(self, kind: str) -> Span:
        """Where the codec or the encoder is written, or else the backbone."""
        uses = [u for u in self.objective.backbone.uses if u.definition.kind == kind]
        return next((u.call.span for u in uses if not is_shipped(u.call.span)), self.use.call.span)

    def instead(self, kind: str) -> str:
        """The edit that takes the codec or the encoder from the folder."""
        options, uses = self.objective.backbone.part.options, self.objective.backbone.uses
        name = next(n for n, p in options.items() if isinstance(p, Part) and p.kind == kind)
        made = next(u for u in uses if u.definition.kind == kind)
        space = made.call if made.scope.home is self.spec.names else self.use.call
        path = ".".join((*space.path[:-1], made.definition.name))
        return f'write `{name} = {path}("{self.weights}")`'

    def disagree(self, code: str, at: Span, here: str, there: str, file: str, **more) -> None:
        """A finding with both values; a warning, since training something else may be meant."""
        text = f"{here} here, and the network in `{self.weights}` was trained with {there}"
        also = (Label(self.place("weights", self.use), f"says its {FILES[file]}"),)
        self.found.append(Finding(code, text, Label(at), also, **{"severity": "warning", **more}))


# ---- the process


def process(pair: Pair) -> None:
    """The levels of the process are those of the folder's scheduler."""
    mine, theirs = pair.case, pair.theirs
    if theirs is None or pair.same_levels:
        return
    here, there = mine.slot("process"), theirs.slot("process")
    more = {"help": pair.edit}
    if here.definition is not there.definition:
        at, texts = mine.called(here), [f"`{_one_line(use.call.span)}`" for use in (here, there)]
        because = _difference(mine, theirs)
        pair.disagree("DIF403", at, *texts, "scheduler", because=because, **more)
        return
    for name in formals(here.definition):
        values = [_argument(case, name, theirs) for case in (mine, theirs)]
        if None not in values and not near(*values):
            at, texts = pair.place(name, here), [_written(case, name) for case in (mine, theirs)]
            because = _entry(name, *values) or _difference(mine, theirs)
            pair.disagree("DIF403", at, *texts, "scheduler", because=because, **more)


def levels(case: Case) -> list[tuple]:
    """(alpha, sigma) at every time of the process's own law."""
    terms = [case.term(name, ALONG) for name in ("alpha", "sigma")]
    return case.along(*terms, at=case.own_times.values)


def near(a, b) -> bool:
    """Whether two numbers, words or tables are the same up to rounding."""
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    a, b = (v if isinstance(v, list | tuple) else (v,) for v in (a, b))
    close = (math.isclose(x, y, rel_tol=CLOSE, abs_tol=CLOSE) for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(close)


def _argument(case: Case, name: str, sized: Case):
    """The value of an argument; of a function of an index and a number, its table for another
    case's number of times."""
    term = case.term(f"process.{name}")
    if term is None:
        place = case.objective.block.head
        number = Number(len(sized.own_times.values), place)
        index = Call(("count",), (Argument(None, number, place),), place, place)
        arguments = tuple(Argument(None, e, place) for e in (index, number))
        scope = case.objective.equations.scopes["process"]
        term = case.expression(Call((name,), arguments, place, place), scope)
    return None if term is None else value(term, {})


def _written(case: Case, name: str) -> str:
    equation = case.objective.equations.versions[f"process.{name}"][0]
    return f"`{name} = {_one_line(equation.value.span)}`"


def _one_line(span: Span) -> str:
    return " ".join(span.text.split())


def _entry(name: str, here, there) -> str:
    """Where two tables differ most; nothing for what are no tables."""
    if not isinstance(here, list):
        return ""
    index = max(range(len(here)), key=lambda i: abs(here[i] - there[i]))
    return f"`{name}` of step {index} is {here[index]:.4g} here and {there[index]:.4g} there"


def _difference(mine: Case, theirs: Case) -> str:
    """Where two processes differ most, in numbers."""
    here, there = mine.own_times, theirs.own_times
    if not near(here.values, there.values):
        spans = [f"{shown(t.low)} to {shown(t.high)}" for t in (here, there)]
        return f"t is {spans[0]} here and {spans[1]} there"
    rows = zip(here.values, levels(mine), levels(theirs), strict=True)
    t, a, b = max(((t, x[0], y[0]) for t, x, y in rows), key=lambda row: abs(row[1] - row[2]))
    return f"alpha at t = {shown(t)} is {shown(a)} here and {shown(b)} there"


# ---- what the network is asked for


def prediction(pair: Pair) -> None:
    """The prediction type is the one that the folder's scheduler states."""
    name, use = pair.scheduler.get("prediction_type"), pair.case.slot("prediction_type")
    if name is None or use is None or use.definition.name == name:
        return
    theirs = pair.case.variant("prediction_type", Name((name,), use.call.span))
    if _rows(theirs) and _rows(theirs) == _rows(pair.case):
        return
    texts = (f"`{use.definition.name}`", f"`{name}`")
    because = f"it returns `{_target(theirs)}`, and is asked for `{_target(pair.case)}`"
    edit = f"write `prediction_type = {name}` unless the change is meant"
    at = pair.case.called(use)
    pair.disagree("DIF404", at, *texts, "scheduler", because=because, help=edit)


def _rows(case: Case) -> list | None:
    """What the network returns, as numbers before x0 and eps."""
    rows = [case.term(name, ALONG) for name in ("row_a", "row_b")]
    return None if None in rows else case.along(*rows)


def _target(case: Case) -> str:
    body = case.slot("prediction_type").definition.node.body
    return _one_line(next(s.value.span for s in body if s.name == "target"))


def shift(pair: Pair) -> None:
    """On a straight path, times are shifted as much as the folder's scheduler does.

    A shift by k moves the median of t to odds of k. A law of the objective's own may mean any.
    """
    t, equation = pair.case.term("t"), pair.case.own_time
    own = equation in pair.case.objective.equations.versions["t"]
    if not (pair.same_levels and own and t) or pair.scheduler["process"].kind == "betas":
        return
    half, there = support(t).middle, float(pair.scheduler["process"].arguments.get("k", 1))
    here = half / (1 - half)
    if near(here, there):
        return
    at = pair.case.place(pair.case.newest("t"))
    medians = f"{shown(half)} here and {shown(there / (1 + there))} there"
    more = {"because": f"half of the times lie above {medians}", "help": pair.edit}
    pair.disagree("DIF405", at, f"a shift of {here:g}", f"{there:g}", "scheduler", **more)


# ---- what stands around the network


def latents(pair: Pair) -> None:
    """The codec makes latents of the kind that the network was trained on."""
    codec = pair.part("codec")
    weights = codec.options.get("weights") if codec else None
    if not weights:
        return
    ours = pair.read("vae", weights).get("latent", {})
    theirs = pair.read("vae", pair.weights).get("latent", {})
    at, edit = pair.written("codec"), pair.instead("codec")
    makes, takes = ours.get("channels"), pair.network.get("channels")
    if None not in (makes, takes) and makes != takes:
        more = {"because": "the network has no place for them", "severity": "error", "help": edit}
        pair.disagree("DIF406", at, f"latents of {makes} channels", f"{takes}", "unet", **more)
        return
    values = [[latent.get(key, 0) for key in ("scale", "shift")] for latent in (ours, theirs)]
    if ours and theirs and not near(*values):
        formulas = [_latent(*both) for both in values]
        because = "latents of another size have another amount of noise at the same t"
        pair.disagree("DIF407", at, *formulas, "vae", because=because, help=edit)


def _latent(scale: float, shift: float) -> str:
    moved = f"(z {'-' if shift > 0 else '+'} {abs(shift):g})" if shift else "z"
    return f"latents `{moved} * {scale:g}`"


def width(pair: Pair) -> None:
    """The text encoder gives what the network attends to."""
    text, reads = pair.part("encoder"), pair.network.get("cross_attention_dim")
    if text is None or not isinstance(reads, int):
        return
    weights = text.options.get("weights")
    read = pair.read("text", weights).get("text", {}) if weights else text.options
    gives = read.get("width", reads)
    if gives != reads:
        more = {"because": "the network has no place for it", "severity": "error"}
        at, more["help"] = pair.written("encoder"), pair.instead("encoder")
        pair.disagree("DIF408", at, f"text of width {gives}", f"{reads}", "unet", **more)


COMPARISONS = (process, prediction, shift, latents, width)
