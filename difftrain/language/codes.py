"""The codes of findings: what each one means, and its examples.

Examples live in `tests/rules/<CODE>.diff`, where the tests hold them equal to what is really said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from difftrain.language import syntax
from difftrain.shipped import folder


@dataclass(frozen=True)
class Rule:
    """What a code stands for: a title, and a paragraph about why it is so."""

    title: str
    doc: str


@dataclass(frozen=True)
class Example:
    """One part of a file of examples: a "bad", "says", "fixed" or "good" text, or a "file" that is
    imported. `options` is what stands behind the colon, such as `train --set gamma=30`."""

    kind: str
    options: str
    text: str


# A code and its title on the left margin (syntax has its titles beside its complaints), and under
# them what it is about.
TEXTS = """
DIF001
    An empty file declares nothing, so there is nothing to check or train.
DIF002
    A spec is plain text; a picture, an archive or a checkpoint is not one.
DIF003
    The first line names the edition of the language, so that a spec keeps its meaning.
DIF004
    The character has no meaning in the language; the help names what is written instead.
DIF005
    Names and operators are ASCII; strings and comments may hold any text.
DIF006
    A string ends on the line where it begins.
DIF007
    A ( or [ is open until its partner; until then newlines do not end the statement.
DIF008
    A { opens a block that ends at its }.
DIF009
    A closing bracket needs an opening one of its kind, and a block its kind and name.
DIF010
    Something else could stand here; the help says what.
DIF011
    The words of the grammar itself cannot be names.
DIF012
    A prime stands on the left of `=` alone: an expression reads the newest version anyway.
DIF013
    The edition is the first line, because it says how the rest is read.
DIF014
    A line holds one statement; a comma separates two.
DIF015
    Something has to stand on both sides of an operator and behind `=`.
DIF016
    Numbers are written as 5, 0.5, 1e-5 or 100k.
DIF017
    Expressions may be nested only so deeply; name the inner ones.
DIF018
    Strings know the escapes of their quote and the backslash, and few others.
DIF019
    A statement is `name = …`, `name ~ …`, `name' = …`, or a block.
DIF101 a name defined twice
    Two definitions of one kind with one name: it would not be clear which is meant. Kinds are
    separate, so a process and a function may share a name.
DIF102 a block of an unknown kind
    Blocks are processes, predictions, strategies, backbones, encoders, codecs, objectives and
    the options of a run.
DIF103 an equation outside any block
    An equation belongs to an objective or to what an objective uses. What varies from outside
    is a `param`.
DIF104 an import that finds nothing
    `std.NAME` is shipped; every other import is a file beside the one that imports it.
DIF105 an objective that is not there
    Commands work on one objective, and a file may hold several or none.
DIF106 a statement in the wrong place
    Imports, parameters, functions and blocks stand at the top of a file; a block holds
    equations.
DIF107 imports in a circle
    A file that is needed to read itself cannot be read.
DIF108 a misspelt slot
    An objective is filled by `process`, `prediction_type`, `strategy` and `backbone`.
DIF109 two equations for one name
    Within one block a name has one equation; what changes it afterwards is a redefinition,
    written with a prime.
DIF110 an empty slot
    An objective needs a process, a prediction type and a backbone; strategies are optional.
DIF111 an argument that is not taken
    The arguments are those in the brackets of the definition.
DIF112 an argument given twice
    An argument has one value, by name or by position.
DIF113 a missing argument
    A parameter without a default has to be given.
DIF114 a base equation restated by a strategy
    A strategy is a rewrite of an objective: it redefines (`name' = …`), so that the order of
    strategies and what they change stay visible.
DIF115 a redefinition of nothing
    `name' = …` changes what a name means from here on, so the name has to mean something
    before.
DIF116 several parts in a slot for one
    Only `strategy` takes a list.
DIF117 a strategy listed twice
    Applying a rewrite twice is never what is meant.
DIF118 something else than a name in a slot
    A slot takes the name of a block, with or without arguments. What a block lists are names too:
    of options that it has, such as those that count something (`whole`), or of quantities.
DIF119 a block that is not there
    The name is neither in this file, nor in the library, nor in an import. What a network is given
    as `times` and `inputs` are quantities of the objective.
DIF120 an unknown name
    A name in an equation is a quantity, a local name of the block, a parameter, a function or
    an operation.
DIF121 shapes that do not go together
    Every value is one number, one number per sample, a value shaped like the data, tokens, or a
    table.
DIF122 a definition by itself
    The value could never be computed. Inside `name' = …` the name stands for its earlier
    version, which is no circle.
DIF123 a quantity without an equation
    The quantity is read, and nothing in the objective says what it is.
DIF124 a number is needed
    Texts, lists and ranges are values of options, not of equations; and an option takes a range or
    a list only where its default is one.
DIF125 a function where a number is needed
    A call that leaves arguments open is a function of them; here its value is needed.
DIF126 a quantity called like a function
    A quantity has no places to fill. `quantity(name = value)` derives it again with a name
    replaced.
DIF127 a value that is not known in time
    The option is read when the spec is compiled, before anything is drawn.
DIF128 a law where a number is needed
    Every draw has a name, so that it is drawn once a step, shared by every forward pass, and
    the same on every machine.
DIF129 an objective with arguments
    An objective stands for one training step. What should vary is a `param`, and what should be
    shared is a strategy or an import.
DIF130 a number out of range
    The definition states which numbers make sense.
DIF131 a word that is no choice
    The definition lists the words that may stand here.
DIF132 a range that is none
    Behind `in` stands a range of numbers (`0..1`) or a list of words (`[zero, free]`).
DIF140 an unknown option
    An option that nothing reads would be a mistake that says nothing.
DIF141 a statement among options
    A block of a run holds `option = value` and nothing else.
DIF142 an option set twice
    An option has one value.
DIF143 a unit that does not fit
    Sizes are counted in px, and steps and samples without a unit; k, M and G multiply.
DIF144 a block that nothing reads
    No command reads options from such a block.
DIF145 two blocks of options
    A file has one block of each kind of options, and every objective of the file uses it.
DIF150 a setting of nothing
    A setting names a `param`, an option such as `train.steps`, or a slot or an argument such as
    `process.steps`.
DIF151 a setting that is not a value
    A setting gives one value, written as in a spec.
DIF160 a teacher that is not declared
    `teacher` names the objective that a frozen network was trained on: its process, prediction
    type and preconditioning apply inside what is read from it.
DIF201 a time derivative of a table
    `dot(e)` is the derivative in t, and the levels of a discrete process are a table, which has
    none.
DIF202 a target that is not linear
    Clean data and noise are recovered by solving xt and the target for x0 and eps, so the
    target of a prediction is a multiple of x0 plus a multiple of eps. What bends it is a
    redefinition.
DIF203 a singular prediction
    With `target = a * x0 + b * eps` the estimates divide by `det = alpha * b - sigma * a`.
    Where that is 0 the prediction says nothing about the other unknown: the loss or the sampler
    divides by 0. A zero at the data end is harmless; one that only the noise end of a
    continuous law touches is a warning, because training does not notice it and sampling does.
DIF204 a network asked for its input
    A target that is a multiple of xt is known to the network already: the loss goes to 0 and
    nothing is denoised. Samplers read `sample` as clean data, x0.
DIF205 a condition that does not hold
    A block may state what it takes for granted in `needs`; the condition is evaluated on the
    times that are trained.
DIF206 times outside the process
    A process states by its own law of t where it is defined, and whether t is an index or a
    real number. A law that an objective or a strategy states instead has to stay there.
DIF207 a loss that is not per sample
    The loss is one number per sample: weights are per sample, and the mean over the batch comes
    last. `mean`, `sum` and `norm` reduce everything but the batch.
DIF208 a loss without gradient
    The network is trained only through what the loss reads outside `stop`.
DIF209 a weight before the wrong residual
    A weight means something only with the residual it is stated for: min(snr, gamma) before a
    residual in x0 is another weight before one in the noise or the velocity. State the
    residual, and the compiler carries the weight to what the network is trained on.
DIF210 a weight that the loss does not read
    Weights redefine `fit`; a loss that is written without it ignores them.
DIF211 a redefinition that is thrown away
    A redefinition that does not read its own name starts anew, and what earlier ones did is
    lost.
DIF212 a network without the second time
    An objective with two times needs a network that is given both.
DIF213 a network given what is not there
    `times` and `inputs` list quantities of the objective.
DIF214 a law that cannot be drawn from
    A uniform law needs a lower end below the upper one, a normal law a standard deviation above
    0, a probability lies between 0 and 1, and weights are not negative and not all 0.
DIF215 a law that does not say what t is
    A law may be put on any quantity that always rises or always falls with t: t is then the
    time at which the quantity has the drawn value. A density is that of a monotone map of one
    draw.
DIF216 an estimate without a meaning
    The network of a consistency function jumps to data and estimates no mean, so nothing that
    is read from a mean can be read from it. The score of noise that is not standard normal is
    not -eps_hat / sigma.
DIF217 features that the network does not return
    `tap` is what a network returns beside its output, and it has to be asked to, for a block that
    it has.
DIF218 attention without a forward-mode derivative
    `ddt` differentiates the network along the path. torch's fused attention has no such derivative;
    `attention = auto` and `attention = math` have.
DIF219 a law that leaves times out
    A law that stands in for the usual one, with the loss divided by how much more often a time
    comes, keeps the objective only where it gives every time that the usual one gives.
DIF220 a number that does not exist
    Roots and logarithms of negative numbers, fractional powers of them and 0 / 0 have no value. A
    quantity is computed at a few times, with data and outputs of either sign.
DIF221 an entry that a table does not have
    An index reads the table of a discrete process or one of a spec. Both sides of an `if` are
    computed, so it stays inside on both.
DIF301 an argument that changes nothing
    Whatever a spec says is read by training or sampling; what is not read is a mistake that
    says nothing. Noise between the steps of a solver needs two of them.
DIF302 a definition that nothing uses
    In a file with objectives, parameters and blocks are there to be used. A file without
    objectives is a library, and its definitions are the point.
DIF303 a strategy that changes nothing
    None of what the strategy redefines is read on the way to the loss or to a sample.
DIF304 an equation that nothing reads
    Neither the loss nor a sample depends on it.
DIF305 an import that nothing uses
    No name in the file begins with it.
DIF310 guidance without an empty condition
    Guided sampling compares the network with and without a condition, so training has to drop
    the condition now and then. Pretrained weights may have seen that already, hence only a
    note.
DIF311 an average that does not average
    The decay of the averaged weights is between 0 and 1: outside, the average runs away.
DIF312 a solver that finds nothing to read
    Every solver reads some estimates: `euler` follows `flow_hat`, which a process on a table of
    steps does not have; `ddim` reads `x0_hat` and `eps_hat`, which every process has.
DIF313 times that a network cannot tell apart
    An SD-style network embeds an index from 0 to about 1000 in sines and cosines. Times between
    0 and 1 all look alike to it until they are multiplied.
DIF314 a way of guiding that leads nowhere
    `guidance_interval`, `guidance_rescale` and `guide` say how guidance is applied, so there has to
    be some: a scale other than 1, outside the network. An interval has two noise levels, sigma over
    alpha.
DIF315 products in eight bits that cannot be
    Products in eight bits are taken of the copy of the weights in bf16, and have a backward
    derivative alone.
DIF316 options of a solver that contradict each other or the process
    The times of a solver are those that the process has, and fall from noise to data. Noise is
    added, and guidance applied, at levels that some step has.
DIF320 a missing block of options
    Training reads `data` and `train`, sampling reads `sample`.
DIF321 a module that nothing says
    A frozen network or encoder that the loss reads has to come from somewhere before a run can
    begin.
DIF401 a scheduler that cannot be adopted
    A process that is read from a scheduler_config.json needs a schedule that the language can
    write. The path is looked for beside the spec, then as it is given.
DIF402 a pretrained folder that cannot be compared
    What a pretrained folder says of itself is read when a spec is compiled and held against the
    spec. A file that is not there says nothing; a file that cannot be understood is told.
DIF403 another process than the pretrained network's
    A pretrained network knows the noise levels of its own process. Fine-tuning on another one
    works, but should be meant.
DIF404 another prediction type than the pretrained network's
    A pretrained network returns what it was trained to return. Fine-tuning it to return
    something else works, but starts from a wrong answer and should be meant.
DIF405 another shift of times than the pretrained network's
    On the straight path a shift by k moves the median of t to odds of k, so that larger
    pictures get more of the noisy times.
DIF406 latents of another shape than the pretrained network's
    The codec makes as many channels as the network takes.
DIF407 latents of another scale than the pretrained network's
    Latents are shifted and scaled to a standard deviation of about 1, by numbers that belong to
    the codec that the network was trained with.
DIF408 text of another width than the pretrained network's
    The text encoder gives tokens of the width that the network attends to.
"""


def _rules(texts: str) -> dict[str, Rule]:
    heads = re.finditer(r"^(DIF\d+) ?(.*)\n((?:    .*\n)+)", texts, re.MULTILINE)
    said = {head[1]: (head[2], " ".join(head[3].split())) for head in heads}
    return {code: Rule(title or syntax.CODES[code], doc) for code, (title, doc) in said.items()}


CODES = _rules(TEXTS)
PART = re.compile(r"^# (bad|says|fixed|good|file):(.*)\n", re.MULTILINE)


def split_examples(text: str) -> list[Example]:
    """The parts of a file of examples; in a "says" part the lines are comments."""
    marks = list(PART.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [_example(m, text[m.end() : end]) for m, end in zip(marks, ends, strict=True)]


def _example(mark: re.Match, text: str) -> Example:
    if mark[1] == "says":
        text = "".join(line[2:] or "\n" for line in text.splitlines(keepends=True))
    return Example(mark[1], mark[2].strip(), text.strip("\n") + "\n")


def examples(code: str) -> list[Example]:
    """The examples of a code; none where this installation has no file of them."""
    file = folder("tests") / "rules" / f"{code}.diff"
    return split_examples(file.read_text(encoding="utf-8")) if file.is_file() else []
