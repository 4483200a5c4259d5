"""The training step: what the objective computes, with backward, clipping, AdamW and averaging,
emitted as one readable module of two functions, the gradient of a batch and the update, that run as
they stand and under `torch.compile(fullgraph=True)`.

Everything that changes from step to step is a tensor, so nothing is compiled twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from difftrain.compiler.emit import Writer, emit
from difftrain.graph.build import build
from difftrain.graph.graph import Graph, from_terms
from difftrain.graph.passes import run
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.language.term import Term, walk

DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


@dataclass(frozen=True)
class Recipe:
    """The options of `train` that the step depends on."""

    precision: str
    optimizer: Part
    clip: float
    warmup: int
    decay: str
    averages: tuple[Term, ...]  # the decays of the averaged weights, in `step`; the first samples

    @property
    def further(self) -> dict[str, Term]:
        """The decays of all but the first average, by the names of their buffers."""
        return {str(number): decay for number, decay in enumerate(self.averages[1:], 2)}


@dataclass(frozen=True)
class Inputs:
    """What a step reads from a batch: given quantities, and whether there is text, which a trained
    encoder reads in the step, and a frozen one there or before."""

    given: tuple[str, ...] = ()
    text: bool = False
    trained_text: bool = False
    image: bool = False  # whether the pictures themselves are read


@dataclass(frozen=True, eq=False)
class StepProgram:
    """The emitted step with the graphs it came from."""

    source: str
    derived: Graph
    graph: Graph


def emit_step(objective: Objective, recipe: Recipe, inputs: Inputs) -> StepProgram:
    """The program of one training step. Raises SpecError.

    The state holds a buffer `average.NAME` for each averaged copy that the objective reads, and
    for each average of the recipe after the first: `average.2` is the second.
    """
    derived = build(objective, ("loss", *logged(objective)), inputs.given)
    copies = Copies(modules_read(objective)[1], recipe.further)
    graph = run(derived)
    title = f"The training step of `{objective.name}`, as difftrain compiled it."
    used = ["adamw", "learning_rate"]
    used += ["follow"] * bool(copies.all)
    used += ["clipped"] * bool(recipe.clip) + ["rescale"] * (recipe.precision == "fp16")
    further = {
        "difftrain.compiler.draws": ["Draws"],
        "difftrain.compiler.update": sorted(used),
        "difftrain.compiler.whole": ["Step"],
    }
    decays = {"averaging": recipe.averages[0], **copies.functions}
    functions = [_decay(name, term) for name, term in decays.items()]
    functions.append(_gradient(graph, recipe, inputs, copies))
    functions.append(_update(recipe, copies))
    functions.append("step = Step(gradient, update)\n")
    source = emit(graph, title, further, functions)
    return StepProgram(source, derived, graph)


def logged(objective: Objective) -> tuple[str, ...]:
    """The named quantities [B] that the loss reads with gradient: logged as batch means."""
    derivation = objective.derivation()
    loss = derivation.read("loss")
    live: set[Term] = set()
    stack = [loss]
    while stack:
        term = stack.pop()
        if term not in live and term.op != "stop":
            live.add(term)
            stack.extend(term.args)
    names = [key[0] for key in derivation.memo if key[0] not in ("~", "loss")]
    found = {}
    for name in dict.fromkeys(names):
        term = derivation.read(name)
        if term in live and term.kind == "sample" and _trains(term) and term is not loss:
            found.setdefault(term, name)
    return tuple(found.values())


def _trains(term: Term) -> bool:
    return any(t.op == "network" for t in walk(term))


def modules_read(objective: Objective) -> tuple[tuple[str, ...], dict[str, Term]]:
    """The names of the modules that the loss reads, and the decay of each averaged copy, in
    `step`."""
    derivation = objective.derivation()
    loss = derivation.read("loss")
    names = {t["name"] for t in walk(loss) if t.op == "module"}
    averages = {n: d for n, d in derivation.averages.items() if n in names}
    return tuple(sorted(names)), averages


def inputs_read(objective: Objective) -> tuple[str, ...]:
    """The names of the inputs that the loss reads."""
    loss = objective.derivation().read("loss")
    return tuple(sorted({t["name"] for t in walk(loss) if t.op == "input"}))


@dataclass(frozen=True)
class Copies:
    """The averages of the state beside the first, with their decays: copies of the student that the
    objective `reads`, and others that only follow the weights."""

    reads: Mapping[str, Term]
    others: Mapping[str, Term]

    @property
    def all(self) -> dict[str, Term]:
        return {**self.reads, **self.others}

    @property
    def functions(self) -> dict[str, Term]:
        """What the emitted function of each decay is called."""
        return {self.function(n): d for n, d in self.all.items()}

    def function(self, name: str) -> str:
        return "decay_of_" + name.replace(".", "_")


def _decay(name: str, decay: Term) -> str:
    graph = from_terms({"decay": decay}, {})
    writer = Writer(graph)
    for node in graph.order():
        writer.write(node)
    text = writer.texts[graph.outputs["decay"]].text
    lines = [line.replace('inputs["step"]', "step") for line in writer.lines]
    return "\n".join(
        [f"def {name}(step):", '    """How much of the averaged weights stays at an update."""']
        + [*lines, f"    return {text}", ""]
    )


def _gradient(graph: Graph, recipe: Recipe, inputs: Inputs, copies: Copies) -> str:
    """The text of `gradient`: that of the loss as a function of the weights."""
    scale = ' * state["scale"]' * (recipe.precision == "fp16")
    low = recipe.precision != "fp32"
    lines = [
        "def gradient(read, state, batch, modules, plan, tables):",
        '    """The gradient of a batch, as one buffer or two, and what is logged of the batch."""',
        '    draw = Draws(state["seed"], state["turn"], batch["index"])',
        "",
        "    def objective(weights):",
        "        nets = plan.bind(modules, weights)",
        *[f'        nets["{n}"] = plan.copy(modules, read["average.{n}"])' for n in copies.reads],
        *_indented(_forward(recipe, inputs), 8),
        '        loss = values["loss"].float().mean()',
        f"        return loss{scale}, (loss, values)",
        "",
        "    differentiated = torch.func.grad(objective, has_aux=True)",
        '    found, (loss, values) = differentiated(read["weights"])',
        '    log = {"loss": loss}',
    ]
    for name in (n for n in graph.outputs if n != "loss"):
        lines.append(f'    log["{name}"] = values["{name}"].float().mean()')
    return "\n".join([*lines, f"    return plan.flat(found, cut={low}), log", ""])


def _indented(lines: list[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


def _forward(recipe: Recipe, inputs: Inputs) -> list[str]:
    """The quantities of a batch, in the precision of the recipe."""
    lines = ['inputs = {"x0": batch["x0"], "step": state["updates"]}']
    read = (*inputs.given, *["image"] * inputs.image)
    lines += [f'inputs["{name}"] = batch["{name}"]' for name in read]
    lines += _conditions(inputs)
    lines.append("values = compute(inputs, draw, nets, tables)")
    if recipe.precision == "fp32":
        return lines
    cast = f'with torch.autocast(batch["x0"].device.type, {DTYPES[recipe.precision]}):'
    return [cast, *_indented(lines, 4)]


def _conditions(inputs: Inputs) -> list[str]:
    """The condition and the empty one, encoded here, where a frozen encoder gets no gradient, or as
    the batch has them: encoded by a frozen one before the run."""
    if not inputs.text:
        return ['inputs["cond"] = inputs["null"] = None']
    lines = [
        'inputs["cond"] = nets["text"](batch["input_ids"])',
        'inputs["null"] = nets["text"](batch["null_ids"])',
    ]
    if inputs.trained_text:
        return lines
    return [
        'if "cond" in batch:',
        '    inputs["cond"], inputs["null"] = batch["cond"].float(), batch["null"].float()',
        "else:",
        *_indented(["with torch.no_grad():", *_indented(lines, 4)], 4),
    ]


def _update(recipe: Recipe, copies: Copies) -> str:
    """The text of `update`: clipping, the learning rate, AdamW and averaging; after an overflow
    nothing moves."""
    scaled, low = recipe.precision == "fp16", recipe.precision != "fp32"
    options = recipe.optimizer.options
    numbers = [f"{n}={options[n]}" for n in ("beta1", "beta2", "eps", "weight_decay")]
    cosine = ', cosine=state["steps"]' if recipe.decay == "cosine" else ""
    fine = ", fine=fine" * scaled
    followed = [
        f'follow(state, "average.{n}", {copies.function(n)}, count{fine})' for n in copies.all
    ]
    lines = [
        "gradient = torch.cat([part.float() for part in parts])" if low else "(gradient,) = parts",
        *['gradient = gradient / state["scale"]'] * scaled,
        "norm = gradient.norm()",
        *["fine = torch.isfinite(norm)"] * scaled,
        *[f"gradient = clipped(gradient, norm, {recipe.clip})"] * bool(recipe.clip),
        'count = state["updates"] + 1.0',
        f"rate = learning_rate(count, {options['lr']}, warmup={recipe.warmup}{cosine})",
        f"numbers = dict({', '.join(numbers)})",
        f"adamw(state, gradient, count, rate, averaging, **numbers{fine})",
        *followed,
        *["rescale(state, fine)"] * scaled,
        'state["turn"].add_(1)',
        'log = {"gradient": norm, "rate": rate}',
        *['log["scale"] = state["scale"].clone()'] * scaled,
        "return log",
    ]
    title = '    """What a gradient does to the state, in place. What is returned is logged."""'
    return "\n".join(["def update(state, parts):", title, *_indented(lines, 4), ""])
