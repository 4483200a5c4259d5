"""Puts the parser's tables into the wheel, so that nobody waits for the grammar at run time."""

import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


class ParserTables(BuildHookInterface):
    """Writes difftrain/grammars/diff.json from grammars/diff.lark."""

    def initialize(self, version: str, build_data: dict) -> None:
        # A checkout may change its grammar, so there it is compiled when it is read.
        if version == "editable" or self.target_name != "wheel":
            return
        sys.path.insert(0, str(ROOT))
        from difftrain.language.lexing import tables

        built = Path(self.directory) / "diff.json"
        built.parent.mkdir(parents=True, exist_ok=True)
        built.write_text(tables((ROOT / "grammars" / "diff.lark").read_text(encoding="utf-8")))
        build_data["force_include"][str(built)] = "difftrain/grammars/diff.json"
