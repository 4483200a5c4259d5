"""A case: one objective as the rules look at it, with what they share."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from difftrain.language.derive import Derivation
from difftrain.language.names import is_shipped
from difftrain.language.numbers import Support, points, support, values
from difftrain.language.scope import Equation, Scope, Use
from difftrain.language.spec import Objective, Spec, build_objective
from difftrain.language.term import Term, leaf, number
from difftrain.language.tree import Define, Expr, Span
from difftrain.language.worlds import HERE, Frame, Problem, World

SAMPLED = ("x0_hat", "eps_hat", "flow_hat", "score_hat")  # what a sampler may ask for
TIME = leaf("variable", "sample", name="t")
ALONG = HERE.swap({"t": TIME})  # the world in which t is a plain variable


@dataclass(eq=False)
class Case:
    """An objective of a spec. Everything here is None, empty or silent where it has no answer."""

    spec: Spec
    objective: Objective

    @cached_property
    def derivation(self) -> Derivation:
        return self.objective.derivation()

    @cached_property
    def reading(self) -> Derivation:
        """A derivation that has read what training and sampling read, and nothing else."""
        derivation = self.objective.derivation()
        for name in ("loss", *SAMPLED):
            with suppress(Problem):
                derivation.read(name)
        for need in self.objective.equations.needs:
            with suppress(Problem):
                derivation.value(need.condition, Frame(need.scope, {}, HERE))
        return derivation

    @cached_property
    def used(self) -> frozenset:
        """The equations and definitions that are read."""
        return frozenset(self.reading.read_equations)

    @cached_property
    def complete(self) -> bool:
        """Whether the loss has a meaning, so that what it does not read is truly unread."""
        return self.term("loss") is not None

    def term(self, name: str, world: World = HERE) -> Term | None:
        """The term of a quantity, or None where it cannot be derived."""
        try:
            term = self.derivation.read(name, world)
        except Problem:
            return None
        return term if isinstance(term, Term) else None

    def expression(self, expr: Expr, scope: Scope, world: World = HERE) -> Term | None:
        """The term of an expression, or None where it cannot be derived."""
        try:
            return self.derivation.number(expr, Frame(scope, {}, world))
        except Problem:
            return None

    def newest(self, name: str) -> Equation:
        return self.objective.equations.versions[name][-1]

    # ---- numbers

    @cached_property
    def own_time(self) -> Equation | None:
        """The process's own equation of t, restated or not."""
        return self.objective.equations.process_time()

    @cached_property
    def times(self) -> Support:
        """The values of t that are trained."""
        t = self.term("t")
        found = support(t) if t is not None else Support()
        return found if found.values or self.own_time is None else self.own_times

    @cached_property
    def own_times(self) -> Support:
        """The values of t that the process's own law gives."""
        return self.law_support(self.own_time)

    def law_support(self, equation: Equation) -> Support:
        """The values that an equation gives when it is read as a law."""
        try:
            return support(self.derivation.law(equation))
        except Problem:
            return Support()

    def along(self, *terms: Term, at=None) -> list[tuple]:
        """The values of terms (derived in the world ALONG) at the times of the support."""
        rest = points(*terms)
        still = rest[len(rest) // 2] if rest else {}
        at = self.times.values if at is None else at
        return values(list(terms), [{**still, TIME: t} for t in at])

    # ---- places

    def place(self, equation: Equation) -> Span:
        """Where the user wrote what put an equation there."""
        if not is_shipped(equation.span):
            return equation.span
        use = self.use(equation.scope.label)
        return self.called(use) if use else self.objective.block.head

    def called(self, use: Use) -> Span:
        """Where a block was put to use, as near to the objective as it takes."""
        return self.objective.block.head if is_shipped(use.call.span) else use.call.span

    def use(self, label: str) -> Use | None:
        return next((u for u in self.objective.equations.uses if u.label == label), None)

    def owner(self, equation: Equation) -> str:
        """What an equation belongs to, in words."""
        use = self.use(equation.scope.label)
        return f"`{use.definition.name}`" if use else "the objective"

    def slot(self, name: str) -> Use | None:
        """The one block in a slot."""
        uses = self.objective.slots.get(name, ())
        return uses[0] if uses else None

    # ---- other specs

    def variant(self, slot: str, expr: Expr) -> Case:
        """The same objective with something else in a slot."""
        block = self.objective.block
        body = [s for s in block.body if not (isinstance(s, Define) and s.name == slot)]
        head = block.head
        changed = replace(block, body=(Define(slot, None, expr, head, head), *body))
        return Case(self.spec, build_objective(changed, self.spec.names, []))


def shown(value: float) -> str:
    """A number as a person writes it in a sentence."""
    if value in (float("inf"), float("-inf")):
        return "infinity" if value > 0 else "minus infinity"
    if value != value:
        return "no number"
    return number(value if value == int(value) else float(f"{value:.3g}"))


def name_span(equation: Equation) -> Span:
    """The place of the name that an equation defines."""
    span = equation.span
    length = len(equation.name.rpartition(".")[2]) + (equation.form == "'")
    return Span(span.source, span.start, span.start + length)


def inside(inner: Span, outer: Span) -> bool:
    """Whether one stretch of text is part of another."""
    same = inner.source is outer.source
    return same and outer.start <= inner.start and inner.end <= outer.end
