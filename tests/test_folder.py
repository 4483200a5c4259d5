"""Run folders: where a new run may begin, and which run it may go on with."""

import json
import os

import pytest

from difftrain.compiler.texts import MANIFEST, SPEC
from difftrain.training.bundle import Bundle
from difftrain.training.folder import FolderError, begun, place, writable

BUNDLE = Bundle({MANIFEST: json.dumps({"name": "tiny", "graph": "a1"})})


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    found = tmp_path / "out"
    found.mkdir()
    return found


def test_a_place_without_a_folder_above_it():
    with pytest.raises(FolderError) as told:
        place(BUNDLE, "", "/")
    assert str(told.value).startswith(("`/` is there already, ", "nothing can be written in `/`: "))


def test_a_place_that_is_no_run(folder):
    (folder / "file").write_text("")
    for taken in (folder, folder / "file"):
        with pytest.raises(FolderError) as told:
            place(BUNDLE, "", str(taken))
        assert str(told.value) == (
            f"`{taken}` is there already, and a run has a folder of its own: give the name of"
            " another"
        )


@pytest.mark.parametrize("read_only", ["out", "."])
def test_a_folder_that_is_read_only_is_told(folder, monkeypatch, read_only):
    """Itself, or the one that it lies in: encoded data lie beside a run."""
    shut = (folder.parent / read_only).resolve()
    monkeypatch.setattr(os, "access", lambda path, mode: path != shut)  # whoever is root may write
    with pytest.raises(FolderError) as told:
        place(BUNDLE, "", str(folder))
    said = f"nothing can be written in `{shut}`: give another place for `{folder}`"
    assert str(told.value) == said


def test_a_file_asks_for_its_folder_alone(folder, monkeypatch):
    """It is replaced and not written to."""
    file = folder / "file"
    file.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: path == folder)
    writable(file)


def test_a_run_goes_on_where_it_began(folder):
    (folder / MANIFEST).write_text(BUNDLE.texts[MANIFEST])
    assert place(BUNDLE, "auto", str(folder)) == (folder, None, False)


@pytest.mark.parametrize("text", ["", '{"graph": "a', "{}", "[]", "\xe9", '{"graph": "b2"}', None])
def test_a_run_does_not_go_on_in_a_folder_that_is_not_its_own(folder, text):
    """Of another objective, or damaged."""
    (folder / SPEC).write_text("diff 1\n")
    if text is not None:
        (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(FolderError) as told:
        place(BUNDLE, "auto", str(folder))
    assert str(told.value) == (
        f"`{folder}` is there already and holds no run of this objective: give another folder"
    )
    assert (folder / SPEC).read_text() == "diff 1\n"


def test_of_two_runs_that_found_a_folder_new_one_gets_it(folder):
    _, _, new = place(BUNDLE, "", str(folder))
    assert new
    begun(folder, {MANIFEST: "theirs", "step.py": ""}, new)
    with pytest.raises(FolderError, match="another run began in `.*out` meanwhile"):
        begun(folder, {MANIFEST: "ours"}, new)
    assert (folder / MANIFEST).read_text() == "theirs"
    begun(folder, {MANIFEST: "theirs, gone on with"}, False)
    assert (folder / MANIFEST).read_text() == "theirs, gone on with"
