"""Rules about the modules that an objective reads beside its network, and what they must offer."""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.rules.case import Case
from difftrain.language.term import walk


def features(case: Case, found: list[Finding]) -> None:
    """A network whose features are read returns some, of a block that it has."""
    backbone, loss = case.objective.backbone, case.term("loss")
    if backbone is None or loss is None or not _does(loss, "tap"):
        return
    name, options = backbone.uses[0].definition.name, backbone.part.options
    tap, depth = options.get("tap", 1), options.get("depth")
    if tap == 0:
        text = "the objective reads `tap`, and the network returns its output alone"
        because = "`tap = 0` asks for no features beside the output"
        hint = f"write `{name}(tap = 1)`, or the block whose features you want"
    elif depth and tap and tap > depth and not options.get("weights"):
        text = f"there is no block {tap} whose features could be `tap`"
        because = f"`{name}` has {depth} block{'s' * (depth != 1)}"
        hint = f"write `tap = {max(1, depth // 3)}`, or another block up to {depth}"
    else:
        return
    at = Label(backbone.uses[0].call.span)
    found.append(Finding("DIF217", text, at, because=because, help=hint))


def forward_mode(case: Case, found: list[Finding]) -> None:
    """A network that is differentiated along the path has attention that can be."""
    backbone, loss = case.objective.backbone, case.term("loss")
    if backbone is None or loss is None or not _does(loss, "jvp"):
        return
    if backbone.part.options.get("attention") != "fused":
        return
    text = "`attention = fused` cannot be differentiated along the path"
    because = "the loss reads `ddt`, and fused attention has no forward-mode derivative"
    at = Label(backbone.uses[0].call.span)
    found.append(
        Finding("DIF218", text, at, because=because, help="write `attention = math`, or leave it")
    )


def absent(case: Case, found: list[Finding]) -> None:
    """A file that trains says where the frozen modules that the loss reads come from; to a network
    from Python they are given there."""
    backbone, loss, run = case.objective.backbone, case.term("loss"), case.spec.runs.get("train")
    if run is None or backbone is None or loss is None or backbone.part.module == "custom":
        return
    read = {t["name"] for t in walk(loss) if t.op == "module"}
    if "vision" in read and case.objective.vision is None:
        hint = "add `vision = …` to the objective"
        found.append(_no_module(case, "vision", "an encoder of pictures", hint))
    if "teacher" in read and not run["teacher"]:
        hint = 'say in `train` whose weights it has: `teacher = "runs/NAME"`'
        found.append(_no_module(case, "teacher", "a trained network", hint))


def _no_module(case: Case, name: str, what: str, hint: str) -> Finding:
    text = f"the objective reads `{name}`, {what}, and this file has none"
    return Finding("DIF321", text, Label(case.objective.block.head), help=hint)


def _does(loss, op: str) -> bool:
    return any(term.op == op for term in walk(loss))
