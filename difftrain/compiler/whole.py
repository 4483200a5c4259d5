"""A training step of its two functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from difftrain.compiler.layout import Layout, Views


class Seen(NamedTuple):
    """A state, and the views of it that a step reads."""

    state: Mapping[str, Tensor]
    read: dict[str, Views]


@dataclass(eq=False)
class Step:
    """One training step, in place: the `gradient` of a batch, then the `update` of the state, each
    as emitted or compiled. What is returned is logged.

    Between them lies the gradient, which is written out in any case: its norm is a sum over all of
    it, and no weight moves before that is known. So nothing is lost where each is compiled alone.
    The tensors of a state stay the same ones for as long as it is stepped: views are made once.
    """

    gradient: Callable
    update: Callable
    seen: Seen | None = field(default=None, repr=False)

    def __call__(
        self,
        state: dict[str, Tensor],
        batch: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        plan: Layout,
        tables: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.seen is None or self.seen.state is not state:
            self.seen = Seen(state, plan.read(state))
        parts, log = self.gradient(self.seen.read, state, batch, modules, plan, tables)
        return {**log, **self.update(state, parts)}

    def each(self, change: Callable[[Callable], Callable]) -> Step:
        """The step of both functions, changed."""
        return Step(change(self.gradient), change(self.update))
