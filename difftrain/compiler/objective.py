"""A declared objective around a network, as a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from difftrain.compiler.draws import Draws
from difftrain.compiler.program import Program, compile_quantities
from difftrain.language.algebra import reaches
from difftrain.language.spec import Objective as Declared

NEEDED = ("cond", "null")  # inputs that may be left out: no condition


class Objective(nn.Module):
    """What a spec declares, around `network(x, t, cond, **extra)`.

    `parameters()` holds the network and every trained part; frozen modules (`modules`: "teacher",
    ...) are kept outside. Calling it is `loss`.
    """

    def __init__(self, declared: Declared, network, modules: Mapping | None = None):
        super().__init__()
        self.declared = declared
        if isinstance(network, nn.Module):
            self.network = network
        frozen = dict(modules or {})
        nets = {"student": network, **frozen}
        object.__setattr__(self, "nets", nets)  # outside the registry: frozen parts are not trained
        self._programs: dict[tuple, Program] = {}

    # ---- quantities

    def program(self, wanted: Iterable[str], given: Iterable[str]) -> Program:
        """The compiled program of some quantities; made once."""
        key = (tuple(wanted), frozenset(given))
        if key not in self._programs:
            self._programs[key] = compile_quantities(self.declared, key[0], sorted(key[1]))
        return self._programs[key]

    def evaluate(
        self, wanted: Iterable[str], given: Mapping[str, object], *, step=0, seed=0, index=None
    ) -> dict[str, Tensor]:
        """Any named quantities after all redefinitions, for given values of any others.

        `name@0` is the value before every redefinition. A given value stands at the newest equation
        of its name that does not read that name, so later redefinitions still apply. What is
        neither given nor derived is drawn from its stream, keyed by (seed, step, index [B]).
        Numbers have the type of what is given: float64 in, float64 out.
        Raises SpecError for a name that the objective does not have.
        """
        wanted = tuple(wanted)
        inputs = {n: None for n in NEEDED} | {"step": torch.as_tensor(step)} | dict(given)
        program = self.program(wanted, [n for n in given if n not in NEEDED and n != "x0"])
        like = _like(given)
        rows = torch.arange(len(like), device=like.device) if index is None else index
        draws = Draws(seed, step, rows, _wide(like.dtype))
        return program.compute(inputs, draws, self.nets, program.tables(like.device, draws.dtype))

    def _one(self, name: str, given: Mapping, **key) -> Tensor:
        present = {k: v for k, v in given.items() if v is not None}
        return self.evaluate((name,), present, **key)[name]

    # ---- the unified interface

    def sample_t(self, shape, *, step=0, seed=0, index=None) -> Tensor:
        """Times [B] for a shape `(B,)` or the batch's."""
        return self._one("t", {"x0": torch.zeros(tuple(shape))}, step=step, seed=seed, index=index)

    def sample_n(self, shape, *, step=0, seed=0, index=None) -> Tensor:
        """Noise of the batch's shape [B, ...]."""
        x0 = torch.zeros(tuple(shape))
        return self._one("eps@0", {"x0": x0}, step=step, seed=seed, index=index)

    def c_in(self, t: Tensor) -> Tensor:
        """What scales the network's input, [B]."""
        return self._per_sample("c_in", t)

    def c_out(self, t: Tensor) -> Tensor:
        """What scales the network's output, [B]."""
        return self._per_sample("c_out", t)

    def c_skip(self, t: Tensor) -> Tensor:
        """How much of xt is added to the output, [B]."""
        return self._per_sample("c_skip", t)

    def c_noise(self, t: Tensor) -> Tensor:
        """The time value that the network receives, [B]."""
        return self._per_sample("c_noise", t)

    def _per_sample(self, name: str, t: Tensor) -> Tensor:
        value = self._one(name, {"t": t})
        return (
            value
            if isinstance(value, Tensor)
            else torch.full(t.shape, float(value), device=t.device)
        )

    def sample_x_t(self, x: Tensor, n: Tensor, t: Tensor, cond=None) -> Tensor:
        """The noisy input [B, ...] after all redefinitions."""
        return self._one("xt", {"x0": x, "eps": n, "t": t, "cond": cond})

    def target(self, x: Tensor, n: Tensor, t: Tensor, cond=None) -> Tensor:
        """What the prediction is compared with, [B, ...]."""
        return self._one("target", {"x0": x, "eps": n, "t": t, "cond": cond})

    def pred(self, x_t: Tensor, t: Tensor, cond=None) -> Tensor:
        """The ODE tangent at (x_t, t): the language's `flow_hat`, [B, ...]."""
        return self._one("flow_hat", {"xt": x_t, "t": t, "cond": cond})

    def score(self, x_t: Tensor, t: Tensor, cond=None) -> Tensor:
        """The score at (x_t, t), -eps_hat / sigma, [B, ...]."""
        return self._one("score_hat", {"xt": x_t, "t": t, "cond": cond})

    def loss(
        self, x: Tensor, cond=None, *, null=None, t=None, eps=None, step=0, seed=0, index=None,
        return_aux=False,
    ):  # fmt: skip
        """The loss per sample, [B]. With `return_aux`, also every named quantity on the way."""
        given = {"x0": x, "cond": cond, "null": null, "t": t, "eps": eps}
        given = {k: v for k, v in given.items() if v is not None}
        wanted = ("loss", *self._logged()) if return_aux else ("loss",)
        values = self.evaluate(wanted, given, step=step, seed=seed, index=index)
        return (values["loss"], values) if return_aux else values["loss"]

    forward = loss

    def _logged(self) -> list[str]:
        """The named quantities that the loss is computed from."""
        derivation = self.declared.derivation()
        loss = derivation.read("loss")
        terms = {t: n for (n, *_), t in derivation.memo.items() if n not in ("~", "loss", "cond")}
        named = {
            n for t, n in terms.items() if t.kind in ("sample", "field") and reaches(loss, {t})
        }
        return [n for n in derivation.equations.versions if n in named]

    # ---- the scheduler contract of discrete processes

    @property
    def prediction_type(self) -> str:
        """The name of the prediction type."""
        return self.declared.slots["prediction_type"][0].definition.name

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at every index of a discrete process, float64 [N]."""
        index = torch.arange(self._indices())
        return self._one("alpha@0", {"t": index, "x0": index.double()}) ** 2

    def _indices(self) -> int:
        t = self.declared.quantity("t")
        if t.op == "draw" and t["law"] == "integer":
            return int(t.args[0].value)
        raise AttributeError("only a discrete process has a table of levels")

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at integer timesteps [B]."""
        return self._one("xt@0", {"x0": x0, "eps": noise, "t": timesteps})

    def get_velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * noise - sigma * x0 at integer timesteps [B]."""
        levels = self.evaluate(("alpha@0", "sigma@0"), {"x0": x0, "t": timesteps})
        alpha, sigma = (v.reshape(-1, *(1,) * (x0.dim() - 1)) for v in levels.values())
        return alpha * noise - sigma * x0


def _like(given: Mapping) -> Tensor:
    """A given tensor that says batch, type and place: real ones first."""
    tensors = [v for v in given.values() if isinstance(v, Tensor) and v.dim() > 0]
    if not tensors:
        raise TypeError("at least one tensor with a batch must be given")
    return next((v for v in tensors if v.is_floating_point()), tensors[0])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
