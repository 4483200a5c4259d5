"""A declared objective around a network, as a torch module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from difftrain.answer import unwrap
from difftrain.compiler.draws import Draws
from difftrain.compiler.heads import LogVariance
from difftrain.compiler.program import Program, compile_quantities
from difftrain.compiler.step import modules_read
from difftrain.graph.build import BEFORE
from difftrain.language.derive import INPUTS
from difftrain.language.finding import Finding, Label, SpecError
from difftrain.language.meaning import lacking
from difftrain.language.nearest import nearest
from difftrain.language.numbers import value
from difftrain.language.scheduler import with_scheduler
from difftrain.language.scope import DERIVED
from difftrain.language.spec import Objective as Declared
from difftrain.language.term import Term, walk
from difftrain.language.worlds import Problem

OPTIONAL = ("cond", "null")  # inputs that may be left out: no condition
TRAINED = ("project", "logvar")  # modules beside the network that are trained with it
HALF = (torch.float16, torch.bfloat16)


class Objective(nn.Module):
    """What a spec declares, around `network(x, t, cond, **extra)`.

    `parameters()` holds the network and every trained part: "project" and "logvar" of `modules`
    are trained with it (a `logvar` that is not given is made). The others ("teacher", "vision",
    averaged copies by name, or as "ema") are frozen: they move with `.to`, but are never trained,
    saved or switched to training. A "scheduler" among them, or the path of its configuration,
    stands in for the process. Calling the objective is `loss`.
    """

    def __init__(self, declared: Declared, network, modules: Mapping | None = None):
        super().__init__()
        frozen = dict(modules or {})
        scheduler = frozen.pop("scheduler", None)
        self.declared = declared if scheduler is None else with_scheduler(declared, scheduler)
        heads = {name: frozen.pop(name) for name in TRAINED if name in frozen}
        read, self.averages = modules_read(self.declared)
        if "logvar" in read and "logvar" not in heads:
            heads["logvar"] = LogVariance()
        if isinstance(network, nn.Module):
            self.network = network
        for name, head in heads.items():
            if isinstance(head, nn.Module):
                self.add_module(name, head)
        for name in self.averages:
            frozen[name] = _average(name, frozen, network)
        # outside the registry: frozen parts are not among the parameters
        object.__setattr__(self, "nets", {"student": network, **heads, **frozen})
        object.__setattr__(self, "frozen", [m for m in frozen.values() if _is_other(m, network)])
        for module in self.frozen:
            module.requires_grad_(False).eval()
        self._programs: dict[tuple, Program] = {}

    def _apply(self, fn, recurse=True):
        for module in self.frozen:
            module._apply(fn)
        return super()._apply(fn, recurse)

    # ---- quantities

    def program(
        self, wanted: Iterable[str], given: Iterable[str] = (), fixed: Iterable[str] = ()
    ) -> Program:
        """The compiled program of some quantities; made once. Raises SpecError for a name that the
        objective does not have, ValueError for a module that is missing."""
        key = (tuple(wanted), frozenset(given), frozenset(fixed))
        if key not in self._programs:
            for name in (*key[0], *sorted(key[1])):
                self._check_name(name)
            made = compile_quantities(self.declared, key[0], sorted(key[1]), sorted(key[2]))
            self._check_modules(made)
            self._programs[key] = made
        return self._programs[key]

    def evaluate(
        self, wanted: Iterable[str], given: Mapping[str, object], *, step=0, seed=0, index=None
    ) -> dict[str, Tensor]:
        """Any named quantities after all redefinitions, for given values of any others.

        `name@0` is the value before every redefinition. A given value stands at the newest equation
        of its name that does not read that name, so later redefinitions still apply. What is
        neither given nor derived is drawn from its stream, keyed by (seed, step, index [B]).
        Numbers have the type of what is given: float64 in, float64 out; for data in half precision
        all but the network is float32. Raises SpecError for a name that the objective lacks,
        ValueError for a `t` that is no index of a discrete process.
        """
        return self._compute(tuple(wanted), given, (), step=step, seed=seed, index=index)

    def _compute(self, wanted, given: Mapping, fixed, *, step=0, seed=0, index=None) -> dict:
        given = {n: v for n, v in given.items() if v is not None}
        self._check_index(given.get("t"))
        free = [n for n in given if n not in OPTIONAL and n not in fixed and n != "x0"]
        program = self.program(wanted, free, fixed)
        like = _like(given)
        rows = torch.arange(len(like), device=like.device) if index is None else index
        draws = Draws(seed, step, rows, _wide(like.dtype), dropout=self.training)
        step = torch.as_tensor(step, device=like.device)
        counted = {n for n, law in program.graph.laws.items() if _counts(law)}
        data = {n: v if n in OPTIONAL else _widened(v) for n, v in given.items()}
        data |= {n: _real(v, draws.dtype) for n, v in data.items() if n not in counted}
        inputs = {**dict.fromkeys(OPTIONAL), "step": step, **data}
        nets = {name: _in_own_type(net, like.dtype) for name, net in self.nets.items()}
        values = program.compute(inputs, draws, nets, program.tables(like.device, draws.dtype))
        return {name: _as_tensor(value, like, draws.dtype) for name, value in values.items()}

    def _check_name(self, name: str) -> None:
        known = (*self.declared.equations.versions, *INPUTS, *DERIVED)
        if name.removesuffix(BEFORE) in known:
            return
        close = nearest(name, known)
        hint = f"write `{close}`" if close else "name a quantity that the objective has"
        text = f"there is no `{name}` in objective `{self.declared.name}`"
        raise SpecError([Finding("DIF120", text, Label(self.declared.block.head), help=hint)])

    def _check_index(self, t) -> None:
        """On a GPU an index outside the table would end the process."""
        if not isinstance(t, Tensor) or not t.numel() or self._levels is None:
            return
        for asked in (t.min().item(), t.max().item()):
            if not 0 <= asked <= self._levels - 1:
                process = self.declared.slots["process"][0].definition.name
                raise ValueError(
                    f"`t` is {asked:g}, and `{process}` has the steps 0 to {self._levels - 1}: "
                    "give one of these"
                )

    def _check_modules(self, program: Program) -> None:
        graph = program.graph
        for name in sorted({graph[n]["attrs"]["name"] for n in graph.find("module")}):
            if name not in self.nets:
                title = self.declared.name
                raise ValueError(
                    f"objective `{title}` reads `{name}`: give it in modules={{{name!r}: ...}}"
                )

    def _at(self, name: str, t: Tensor, given: Mapping, fixed=("t",), **key) -> Tensor:
        """One quantity at a time t that nothing redefines any more."""
        return self._compute((name,), {**given, "t": t}, fixed, **key)[name]

    # ---- the unified interface: here t is the time itself, redefinitions of t lie behind it

    def sample_t(self, shape, *, step=0, seed=0, index=None) -> Tensor:
        """Times [B] for a shape `(B,)` or the batch's, after all redefinitions of t."""
        x0 = torch.zeros(tuple(shape), device=self._device())
        return self.evaluate(("t",), {"x0": x0}, step=step, seed=seed, index=index)["t"]

    def sample_n(self, shape, *, step=0, seed=0, index=None) -> Tensor:
        """Noise of the batch's shape [B, ...], before redefinitions."""
        x0 = torch.zeros(tuple(shape), device=self._device())
        return self.evaluate(("eps@0",), {"x0": x0}, step=step, seed=seed, index=index)["eps@0"]

    def c_in(self, t: Tensor) -> Tensor:
        """What scales the network's input, [B]."""
        return self._at("c_in", t, {})

    def c_out(self, t: Tensor) -> Tensor:
        """What scales the network's output, [B]."""
        return self._at("c_out", t, {})

    def c_skip(self, t: Tensor) -> Tensor:
        """How much of xt is added to the output, [B]."""
        return self._at("c_skip", t, {})

    def c_noise(self, t: Tensor) -> Tensor:
        """The time value that the network receives, [B]."""
        return self._at("c_noise", t, {})

    def sample_x_t(self, x: Tensor, n: Tensor, t: Tensor, cond=None, *, null=None, **key) -> Tensor:
        """The noisy input [B, ...] after all redefinitions of the noise n [B, ...]."""
        return self._at("xt", t, {"x0": x, "eps": n, "cond": cond, "null": null}, **key)

    def target(self, x: Tensor, n: Tensor, t: Tensor, cond=None, *, null=None, **key) -> Tensor:
        """What the prediction is compared with, [B, ...]."""
        return self._at("target", t, {"x0": x, "eps": n, "cond": cond, "null": null}, **key)

    def pred(self, x_t: Tensor, t: Tensor, cond=None, **given) -> Tensor:
        """The ODE tangent at (x_t, t): the language's `flow_hat`, [B, ...].

        With two times it is the tangent of this moment (r = t), unless `r` is given; `given` holds
        further inputs of the network. Raises SpecError where the objective has no such thing.
        """
        return self._estimate("flow_hat", x_t, t, cond, given)

    def score(self, x_t: Tensor, t: Tensor, cond=None, **given) -> Tensor:
        """The score at (x_t, t), -eps_hat / sigma, [B, ...]; `given` as in `pred`.

        Raises SpecError where the objective has no score: a consistency function is no estimate of
        the mean, and noise that is not standard normal has another score.
        """
        return self._estimate("score_hat", x_t, t, cond, given)

    def _estimate(self, name: str, x_t: Tensor, t: Tensor, cond, given: Mapping) -> Tensor:
        if problem := lacking(self.declared, name):
            raise SpecError([problem])
        own = {"xt": x_t, "cond": cond, **given}
        return self._at(name, t, own, ("t", "xt", *(n for n in given if n not in OPTIONAL)))

    def update_averages(self, step: int) -> None:
        """Moves every averaged copy towards the network, after the optimizer's update number
        `step` (from 1)."""
        with torch.no_grad():
            for name, decay in self.averages.items():
                weight = value(decay, _steps(decay, step))
                theirs = self.nets[name].parameters()
                for own, new in zip(theirs, self.network.parameters(), strict=True):
                    own.lerp_(new, 1 - weight)
                for own, new in zip(self.nets[name].buffers(), self.network.buffers(), strict=True):
                    own.copy_(new)

    def loss(
        self, x: Tensor, cond=None, *, null=None, t=None, eps=None, step=0, seed=0, index=None,
        return_aux=False, **given,
    ):  # fmt: skip
        """The loss per sample, [B]. With `return_aux`, also every named quantity on the way.
        `given` holds further inputs, such as `image`, and values of any quantity."""
        given = {"x0": x, "cond": cond, "null": null, "t": t, "eps": eps, **given}
        wanted = ("loss", *self._named()) if return_aux else ("loss",)
        fixed = () if t is None else ("t",)
        values = self._compute(wanted, given, fixed, step=step, seed=seed, index=index)
        return (values["loss"], values) if return_aux else values["loss"]

    forward = loss

    def _named(self) -> list[str]:
        """The named quantities that the loss is computed from, after all redefinitions."""
        derivation = self.declared.derivation()
        below = set(walk(derivation.read("loss")))
        met = {key[0] for key in derivation.memo} & derivation.equations.versions.keys()
        terms: dict[str, Term] = {}
        for name in met - {"loss"}:
            with suppress(Problem):  # a name that has no meaning outside its world
                terms[name] = derivation.read(name)
        shaped = {n for n, t in terms.items() if t in below and t.kind in ("sample", "field")}
        return [n for n in derivation.equations.versions if n in shaped]

    def _device(self):
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    # ---- the scheduler contract of discrete processes

    @property
    def prediction_type(self) -> str:
        """The name of the prediction type."""
        return self.declared.slots["prediction_type"][0].definition.name

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at every index of a discrete process, float64 [N]."""
        if self._levels is None:
            raise AttributeError("only a discrete process has a table of levels")
        index = torch.arange(self._levels, device=self._device())
        return self._at("alpha", index, {"x0": index.double()}) ** 2

    @cached_property
    def _levels(self) -> int | None:
        """How many levels a discrete process has; None for any other."""
        tables = [t.args[0] for t in walk(self.declared.quantity("alpha")) if t.op == "pick"]
        if tables:
            return len(value(tables[0], {}))
        own = self.declared.equations.process_time()
        law = own and self.declared.derivation().law(own)
        return int(value(law.args[0], {})) if law and _counts(law) else None

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at timesteps [B]."""
        return self._at("xt" + BEFORE, timesteps, {"x0": x0, "eps": noise})

    def get_velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * noise - sigma * x0 at timesteps [B]."""
        given = {"x0": x0, "t": timesteps}
        levels = self._compute(("alpha", "sigma"), given, ("t",)).values()
        alpha, sigma = (v.reshape(-1, *(1,) * (x0.dim() - 1)) for v in levels)
        return alpha * noise - sigma * x0


def _average(name: str, given: Mapping, network):
    """An averaged copy: the one that is given, or a copy of the network as it is."""
    for key in (name, name.rpartition(".")[2], "ema"):
        if key in given:
            return given[key]
    return copy.deepcopy(network) if isinstance(network, nn.Module) else network


def _steps(term: Term, step: int) -> dict[Term, object]:
    return {t: step for t in walk(term) if t.op == "input" and t["name"] == "step"}


def _is_other(module, network) -> bool:
    return isinstance(module, nn.Module) and module is not network


def _in_own_type(net, given: torch.dtype):
    """The network as a function of x in float32, where it or what is given has half precision."""
    first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    own = given if first is None else first.dtype
    if own not in HALF:
        return net
    return lambda x, *args, **extra: unwrap(net(x.to(own), *args, **extra)).float()


def _widened(value):
    """Data in half precision as float32: levels and residuals need the digits."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _counts(law: Term) -> bool:
    """Whether a law is that of an index, which stays a whole number."""
    return law.op == "draw" and law["law"] in ("integer", "choice")


def _real(value, dtype: torch.dtype):
    """One whole number a sample, where a real one is meant, in the precision of the draws."""
    whole = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return value.to(dtype) if whole and value.dim() == 1 else value


def _like(given: Mapping) -> Tensor:
    """A given tensor that says batch, type and place: real ones first."""
    tensors = [v for v in given.values() if isinstance(v, Tensor) and v.dim() > 0]
    if not tensors:
        raise ValueError("give at least one tensor with a batch, such as `x0`")
    return next((v for v in tensors if v.is_floating_point()), tensors[0])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_tensor(value, like: Tensor, dtype: torch.dtype):
    """A quantity that is one plain number, as [B]."""
    if isinstance(value, (int, float)):
        return torch.full((len(like),), value, dtype=dtype, device=like.device)
    return value
