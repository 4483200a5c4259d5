"""What cannot be exported, told in one sentence."""


class ExportError(Exception):
    """`str()` says what cannot be exported and what to do."""


class Parted(ExportError):
    """What was exported is not what was trained; `str()` says where they part."""
