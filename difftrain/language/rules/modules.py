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


def _does(loss, op: str) -> bool:
    return any(term.op == op for term in walk(loss))
