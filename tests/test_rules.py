"""Every code of a finding, by its examples: tests/rules/<CODE>.diff."""

import re
import shlex
from pathlib import Path

import pytest

from difftrain.language.check import check, need
from difftrain.language.codes import CODES, split_examples
from difftrain.language.finding import SpecError
from difftrain.language.render import in_order, render
from difftrain.language.tree import Source
from difftrain.training.pretrained import disagreements

HERE = Path(__file__).parent
FILES = sorted((HERE / "rules").glob("*.diff"))


def findings(text: str, options: str = "") -> list:
    """What is said about a text: `--set a=b`, `--objective o`, or a command that needs blocks."""
    words = shlex.split(options.replace("\\n", "\n"))
    given = list(zip(words, words[1:], strict=False))
    settings = dict(v.split("=", 1) for k, v in given if k == "--set")
    spec, found = check(Source("spec.diff", text), settings)
    found = [*found, *need(spec, words[0] if words else "")]
    found += disagreements(spec) if words[:1] == ["compile"] else []
    for option, name in given:
        if option == "--objective":
            try:
                spec.objective(name)
            except SpecError as problem:
                found += problem.findings
    return in_order(found)


def said(text: str, options: str = "") -> str:
    return render(findings(text, options))


def texts(file: Path) -> list:
    return split_examples(file.read_text(encoding="utf-8"))


def with_fixes(text: str, found: list) -> str:
    for finding in sorted(found, key=lambda f: -f.at.span.start):
        if finding.fix:
            span = finding.fix.span
            text = text[: span.start] + finding.fix.text + text[span.end :]
    return text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_examples(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = None
    for part in texts(file):
        file_name = Path(part.options if part.kind == "file" else "spec.diff")
        file_name.parent.mkdir(parents=True, exist_ok=True)
        file_name.write_text(part.text)
        if part.kind == "bad":
            last = part
            found = findings(part.text, part.options)
            assert [f.code for f in found] == [file.stem]
        elif part.kind == "says":
            assert said(last.text, last.options) == part.text
        elif part.kind == "fixed":
            assert with_fixes(last.text, findings(last.text, last.options)) == part.text
            assert said(part.text) == ""
        elif part.kind == "good":
            assert said(part.text, part.options) == ""


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_examples(code):
    kinds = [part.kind for part in texts(HERE / "rules" / f"{code}.diff")]
    assert "bad" in kinds
    assert kinds.count("bad") == kinds.count("says")
    assert "good" in kinds


def test_codes_are_those_in_the_sources():
    package = HERE.parent / "difftrain"
    sources = [p for p in package.rglob("*.py") if p.name != "codes.py"]
    used = {c for p in sources for c in re.findall(r'"(DIF\d{3})"', p.read_text(encoding="utf-8"))}
    assert used == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_messages_keep_the_voice(code):
    for part in texts(HERE / "rules" / f"{code}.diff"):
        if part.kind == "says":
            first = part.text.splitlines()[0].partition(": ")[2]
            assert first[0] in "`" or not first[0].isupper()
            assert not first.endswith(".")
            assert "invalid" not in part.text
            assert "  = help: " in part.text.replace("   =", "  =")
