"""What cannot be exported, told in one sentence."""


class ExportError(Exception):
    """`str()` says what cannot be exported and what to do."""


class Parted(ExportError):
    """What was exported is not what was trained; `str()` says where they part."""


def no_pipeline(what: str) -> str:
    """The sentence for what no pipeline of diffusers samples."""
    return f"diffusers has no pipeline for {what}: export to another target, such as `onnx`"
