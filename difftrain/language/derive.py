"""Derivation: the term of a quantity, read in a world.

A world says which version each name stands at and which names are replaced. Reading a name means
evaluating its newest equation in the current world, with one exception: inside `n' = e` the name
`n` stands one version back. `q(n = value)` derives q again in the world where n is replaced.
See docs/language.md, "Worlds".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

from difftrain.language import mistakes
from difftrain.language.algebra import NotLinear, linear
from difftrain.language.domains import check_domain
from difftrain.language.finding import Finding, Label
from difftrain.language.forms import SPECIAL
from difftrain.language.names import Definition
from difftrain.language.operations import CONSTANTS, LAWS, NAMES, OPERATIONS, KindError
from difftrain.language.part import Interface
from difftrain.language.references import circle, circular
from difftrain.language.scope import DERIVED, NETS, OPEN, Equation, Equations, Scope, own_name
from difftrain.language.teacher import taught
from difftrain.language.term import Term, const, leaf, make, rebuild, walk, word
from difftrain.language.tree import (
    Argument,
    Binary,
    Call,
    Expr,
    Formal,
    If,
    Name,
    Negate,
    Number,
    Quantity,
    Text,
)
from difftrain.language.worlds import ALL, HERE, Frame, Function, Problem, Thunk, World

TAUGHT = ("output", "pred", "x0_hat", "eps_hat")  # what a teacher's own equations say
OPS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "^": "pow"}
OPS |= {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
INPUTS = {"x0": "field", "cond": "condition", "null": "condition", "step": "scalar"}
INPUTS |= {"image": "field"}
sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))  # equations may form a long chain


@dataclass(eq=False)
class Derivation:
    """Reads quantities of one objective. `given` names are inputs instead of what defines them."""

    equations: Equations
    given: frozenset[str] = frozenset()
    interface: Interface = Interface()
    teacher: Derivation | None = None  # of the teacher's own objective, where it has one
    net: str = "student"  # the net that these equations are about
    home: World = HERE  # the world that `read` starts from
    averages: dict[str, Term] = field(default_factory=dict)  # name -> decay, as met
    copied: dict[int | str, str] = field(default_factory=dict)  # stream -> what it is `again` of
    memo: dict = field(default_factory=dict)
    active: list = field(default_factory=list)
    read_equations: set = field(default_factory=set)
    read_names: set = field(default_factory=set)
    moments: list = field(default_factory=list)  # (term, what was written) of each other time
    depth: int = 0
    drawing: bool = False  # inside the law of a draw
    streams: int = 0

    # ---- names

    def fix(self, names) -> None:
        """From here on these quantities are inputs that nothing redefines (replacements, rule 4).
        With xt among them nothing is trained, and no condition is dropped."""
        inputs = {n: leaf("input", self._kind(n), name=n) for n in names}
        calm = {"dropped": const(False), "dropout": const(False)} if "xt" in inputs else {}
        if calm and "r" in self.equations.versions:
            calm["r"] = inputs.get("t", inputs.get("time"))  # an estimate is one of this moment
        self.home = HERE.swap({**calm, **inputs})

    def read(self, name: str, world: World | None = None, at: Expr | None = None) -> Term:
        """The term of a quantity in a world. Raises Problem."""
        world = self.home if world is None else world
        swaps = dict(world.swaps)
        if name in swaps:
            return swaps[name]
        key = (name, world)
        if key in self.memo:
            return self.memo[key]
        if key in self.active:
            raise Problem(self._cycle(name, at))
        self.active.append(key)
        try:
            term = self._derive(name, world, at)
        finally:
            self.active.pop()
        if not self.drawing:  # inside a law its draws have no names yet
            self.memo[key] = term
        return term

    def _derive(self, name: str, world: World, at) -> Term:
        self.read_names.add(name)
        if name in TAUGHT and self.teacher and _taught(world):
            return taught(self, name, world, at)
        if name in DERIVED:
            return self.row(world, at)[DERIVED.index(name)]
        versions = self.equations.versions.get(name)
        if name in INPUTS and not versions:
            return leaf("input", INPUTS[name], name=name)
        if not versions:
            raise Problem(self._nothing(name, at))
        version = dict(world.caps).get(name, len(versions) - 1)
        if name in self.given and not {name, ALL} & world.plain:
            stands = max(
                (i for i, e in enumerate(versions) if not own_name(e.value, name)), default=0
            )
            if version == stands:
                return leaf("input", self._kind(name), name=name)
        return self._equation(versions[version], version, world)

    def _equation(self, equation: Equation, version: int, world: World) -> Term:
        self.read_equations.add(equation)
        try:
            if equation.form == "~":
                return self._draw(equation, world)
            inner = world.cap(**{equation.name: version - 1}) if version else world
            read = self.value if equation.argument else self.number
            return read(equation.value, Frame(equation.scope, {}, inner))
        except Problem as problem:
            problem.trail.append(equation)
            raise

    def _kind(self, name: str) -> str:
        """The kind a given quantity has: that of its own equation."""
        return self.read(name, World(plain=frozenset({ALL}))).kind

    def _draw(self, equation: Equation, world: World) -> Term:
        """A draw is made once a step: its law is read in a world of its own."""
        law_world = World(plain=world.plain & {ALL}).cap(**equation.before)
        key = ("~", equation.name, law_world.plain)
        if key not in self.memo:
            self.memo[key] = self.law(equation, law_world)
        return self.memo[key]

    def law(self, equation: Equation, world: World = HERE) -> Term:
        """What an equation says when it is read as a law, its base draws named after it."""
        outside, self.drawing = self.drawing, True
        try:
            law = self.number(equation.value, Frame(equation.scope, {}, world))
        finally:
            self.drawing = outside
        prefix = "" if self.net == "student" else f"{self.net}."
        return self._named(law, prefix + equation.name)

    def _named(self, law: Term, name: str) -> Term:
        """The law with its nameless base draws named after the draw: `t`, `t.1`, `t.2`, ..."""
        nameless = [t for t in walk(law) if t.op == "draw" and not t["name"]]
        names = {t: f"{name}.{i}" if i else name for i, t in enumerate(nameless)}
        for term, new in names.items():
            if origin := self.copied.get(term["stream"]):
                self.copied[new] = origin

        def change(term: Term, args):
            if term in names:
                return leaf(
                    "draw", term.kind, *args, span=term.span, law=term["law"], name=names[term]
                )

        return rebuild(law, change)

    def is_copy(self, stream: str, of: str) -> bool:
        """Whether a named stream is another one, or was made by `again` of it."""
        while stream != of and stream in self.copied:
            stream = self.copied[stream]
        return stream == of

    def stream(self, kind: str, law: str, args, expr: Expr) -> Term:
        """A base draw of its own, not named yet."""
        if not self.drawing:
            raise Problem(mistakes.not_drawn(expr))
        self.streams += 1
        return leaf("draw", kind, *args, span=expr.span, law=law, name="", stream=self.streams)

    def row(self, world: World, at: Expr | None = None) -> tuple[Term, Term]:
        """(a, b) of `target = a * x0 + b * eps`, from the prediction's own equation."""
        x0, eps = (leaf("variable", "field", name=n) for n in ("x0", "eps"))
        inner = world.cap(target=0, flow=0).swap({"x0": x0, "eps": eps})
        inner = replace(inner, plain=inner.plain | {"target", "flow"})
        target = self.read("target", inner, at)
        try:
            found = linear(target, frozenset((x0, eps)))
        except NotLinear:
            raise Problem(mistakes.not_linear(self.equations)) from None
        return found.get(x0, const(0)), found.get(eps, const(0))

    # ---- expressions

    def value(self, expr: Expr, frame: Frame):
        """A term (or a function) for an expression."""
        match expr:
            case Number(value=number) | Quantity(value=number):
                return const(int(number) if number == int(number) else number)
            case Text(value=text):
                return leaf("text", "text", value=text)
            case Negate(value=inner):
                return self.make("neg", expr, self.number(inner, frame))
            case Binary(op=op, left=left, right=right):
                sides = [self.number(e, frame) for e in (left, right)]
                return self.make(OPS[op], expr, *sides)
            case If(test=test, then=then, other=other):
                return self._choice(expr, self.number(test, frame), then, other, frame)
            case Name(path=path):
                return self._name(path, expr, frame)
            case Call():
                return self._call(expr, frame)
        raise Problem(mistakes.no_number(expr))

    def number(self, expr: Expr, frame: Frame) -> Term:
        """The value of an expression that must be a term, not a function left open."""
        value = self.value(expr, frame)
        if isinstance(value, Term):
            return value
        raise Problem(mistakes.left_open(value, expr))

    def make(self, op: str, expr: Expr, *args) -> Term:
        try:
            return make(op, *args, span=expr.span)
        except KindError as problem:
            finding = Finding("DIF121", str(problem), Label(expr.span), help=problem.help)
            raise Problem(finding) from None

    def _choice(self, expr, test: Term, then, other, frame) -> Term:
        """Only the side that is taken is read where the test is known while compiling."""
        if test.op == "const":
            return self.number(then if test.value else other, frame)
        return self.make("where", expr, test, *(self.number(e, frame) for e in (then, other)))

    def _name(self, path: tuple[str, ...], expr, frame: Frame):
        name = ".".join(path)
        if name in frame.env:
            return self._force(frame.env[name], frame.world)
        qualified = self.qualified(path, frame.scope)
        if qualified is not None:
            return self.read(qualified, frame.world, expr)
        if name in CONSTANTS:
            return const(CONSTANTS[name])
        if name in NETS:
            return leaf("module", "module", name=name)
        parameter = frame.scope.home.find("param", path)
        if parameter is not None:
            self._check_circle(parameter)
            self.read_equations.add(parameter)
            return self.value(parameter.node.default, Frame(frame.scope, {}, HERE))
        function = frame.scope.home.find("function", path)
        if function is not None:
            return self._apply(Function(function, {}, _open(function)), (), expr, frame, ())
        if name in frame.scope.words:
            return word(name)
        raise Problem(self._unknown(path, expr, frame))

    def qualified(self, path: tuple[str, ...], scope: Scope) -> str | None:
        """The quantity that a name means in a scope."""
        name = ".".join(path)
        local = scope.locals.get(name)
        for candidate in (local, name):
            if candidate and (candidate in self.equations.versions or candidate in INPUTS):
                return candidate
        return name if name in DERIVED else None

    def _force(self, bound, world: World):
        if not isinstance(bound, Thunk):
            return bound
        if world not in bound.memo:
            bound.memo[world] = self.value(bound.value, Frame(bound.scope, dict(bound.env), world))
        return bound.memo[world]

    # ---- calls

    def _call(self, expr: Call, frame: Frame):
        path, name = expr.path, expr.dotted
        if name in frame.env:
            target = self._force(frame.env[name], frame.world)
        elif self.qualified(path, frame.scope) and not _is_library_s_own(name, frame.scope):
            target = self._replaced(expr, frame)
        elif name in SPECIAL:
            return SPECIAL[name](self, expr, frame)
        elif name in OPERATIONS and not self._of_tables(expr, frame):
            return self.make(name, expr, *self.positional(expr, frame, OPERATIONS[name].arity))
        elif name in LAWS:
            return self._law(expr, frame)
        else:
            function = frame.scope.home.find("function", path)
            if function is None:
                raise Problem(self._unknown(path, expr, frame))
            target = Function(function, {}, _open(function))
            return self._apply(target, expr.args, expr, frame, tuple(_formals(function)))
        return (
            self._apply(target, expr.args, expr, frame, target.open)
            if isinstance(target, Function)
            else target
        )

    def _of_tables(self, expr: Call, frame: Frame) -> bool:
        """Whether a call is of a function that shares the name of an operation on data."""
        if frame.scope.home.find("function", expr.path) is None:
            return False
        given = [self.value(a.value, frame) for a in expr.args]
        return any(isinstance(g, Term) and g.kind == "table" for g in given)

    def _replaced(self, expr: Call, frame: Frame):
        """`q(n = value)`: q derived again with names replaced; a parameter that is a function is
        applied instead."""
        name = self.qualified(expr.path, frame.scope)
        if any(a.name is None for a in expr.args) or not expr.args:
            target = self.read(name, frame.world, expr)
            if isinstance(target, Function):
                return target
            given = self.equations.versions.get(name, (None,))[0]
            if expr.args and given is not None and given.argument:
                raise Problem(mistakes.no_function(name, given.value, expr))
            raise Problem(mistakes.not_callable(expr))
        values = {}
        block = name.rpartition(".")[0]
        within = self.equations.scopes[block] if block else frame.scope
        for argument in expr.args:
            inner = self.qualified((argument.name,), within)
            if inner is None:
                raise Problem(self._unknown((argument.name,), argument, frame))
            values[inner] = self.value(argument.value, frame)
            if inner == "t" and isinstance(values[inner], Term):
                self.moments.append((values[inner], argument.value))
            if inner == "net" and getattr(values[inner], "op", "") != "module":
                raise Problem(mistakes.no_net(argument.value))
        return self.read(name, frame.world.swap(values), expr)

    def _apply(self, function: Function, args, expr, frame: Frame, places: tuple[str, ...]):
        """The function on these arguments; a function again while required ones are open. `places`
        are what arguments by position fill: all in order for a name, the open ones for a value."""
        formals = _formals(function.definition)
        free = iter(places)
        bound = dict(function.bound)
        for argument in args:
            name = argument.name or next(free, None)
            if name not in formals or name in bound:
                raise Problem(mistakes.bad_argument(function, argument, name))
            bound[name] = Thunk(argument.value, frame.scope, tuple(frame.env.items()))
        still = tuple(n for n in function.open if n not in bound)
        if still:
            return Function(function.definition, bound, still)
        self._check_circle(function.definition)
        self.read_equations.add(function.definition)
        scope = Scope(function.definition.name, function.definition.home)
        env = {
            n: bound[n] if n in bound else Thunk(f.default, scope, ()) for n, f in formals.items()
        }
        for name in bound:
            self._check_range(formals[name], bound[name], frame.world)
        return self.value(function.definition.node.value, Frame(scope, env, frame.world))

    def _check_range(self, formal: Formal, given: Thunk, world: World) -> None:
        """A number that is known is in the range that the function states. Raises Problem."""
        value = self._force(given, world) if formal.domain is not None else None
        found: list[Finding] = []
        if isinstance(value, Term) and value.op == "const":
            check_domain(formal, given.value, value.value, found)
        if found:
            raise Problem(found[0])

    def only(self, expr: Call) -> Argument:
        """The argument of a form that takes exactly one."""
        if len(expr.args) != 1 or expr.args[0].name:
            raise Problem(mistakes.arity(expr, 1))
        return expr.args[0]

    def positional(self, expr: Call, frame: Frame, count: int) -> list[Term]:
        if len(expr.args) != count or any(a.name for a in expr.args):
            raise Problem(mistakes.arity(expr, count))
        return [self.number(a.value, frame) for a in expr.args]

    def _law(self, expr: Call, frame: Frame) -> Term:
        wanted = LAWS[expr.dotted].partition(":")[0].count(",") + 1
        args = self.positional(expr, frame, wanted)
        for arg, given in zip(args, expr.args, strict=True):
            self.make("neg", given.value, arg)  # a law is made of numbers
        kind = args[0].kind if expr.dotted == "noise" else "sample"
        if expr.dotted == "choice" and args[0].kind != "table":
            text = f"`choice` needs a table of weights, and is given {NAMES[args[0].kind]}"
            hint = "write a table, such as `choice(1 + count(8))`"
            raise Problem(Finding("DIF121", text, Label(expr.span), help=hint))
        return self.stream(kind, expr.dotted, args, expr)

    def _check_circle(self, definition: Definition) -> None:
        if chain := circle(definition):
            raise Problem(circular(chain))

    # ---- what is wrong

    def _cycle(self, name: str, at) -> Finding:
        span = at.span if at is not None else self.equations.versions[name][-1].span
        return mistakes.cycle([n for n, _ in self.active], name, span)

    def _nothing(self, name: str, at) -> Finding:
        return mistakes.nothing(name, self.equations, [n for n, _ in self.active], at)

    def _block(self, label: str):
        """The block in use under a label, such as the process."""
        return next((u for u in self.equations.uses if u.label == label), None)

    def _unknown(self, path: tuple[str, ...], at, frame: Frame) -> Finding:
        name, home, scope = ".".join(path), frame.scope.home, frame.scope
        if name in OPEN:
            return self._nothing(name, at)
        if len(path) == 2 and (use := self._block(path[0])):
            return mistakes.not_there(path, use, at)
        local = [*home.known("param"), *frame.env, *scope.locals, *scope.words]
        known = [*local, *self.equations.versions, *INPUTS, *NETS, *OPERATIONS, *LAWS, *SPECIAL]
        return mistakes.unknown(name, [*known, *home.known("function")], at, home)


def _is_library_s_own(name: str, scope: Scope) -> bool:
    """Whether a text of the library calls an operation or a law, whatever a spec has so named."""
    return scope.home.shipped and name in {*SPECIAL, *OPERATIONS, *LAWS} - {*scope.locals}


def _taught(world: World) -> bool:
    """Whether the net of a world is the teacher."""
    net = dict(world.swaps).get("net")
    return isinstance(net, Term) and net.op == "module" and net["name"] == "teacher"


def _formals(definition: Definition) -> dict[str, Formal]:
    return {f.name: f for f in definition.node.formals}


def _open(definition: Definition) -> tuple[str, ...]:
    return tuple(f.name for f in definition.node.formals if f.default is None)
