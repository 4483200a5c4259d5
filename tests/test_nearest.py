"""Did you mean."""

import pytest

from difftrain.language.nearest import edits, nearest

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow", "score")


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [
        ("", "", 0),
        ("flow", "", 4),
        ("flow", "flow", 0),
        ("folw", "flow", 1),
        ("flwo", "flow", 1),
        ("sampel", "sample", 1),
        ("smple", "sample", 1),
        ("epsilom", "epsilons", 2),
        ("kitten", "sitting", 3),
    ],
)
def test_edits_counts_a_swap_of_neighbours_once(a, b, count):
    assert edits(a, b) == edits(b, a) == count


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("epsilonn", "epsilon"),
        ("Epsilon", "epsilon"),
        ("v_predicton", "v_prediction"),
        ("sampel", "sample"),
        ("folw", "flow"),
        ("scroe", "score"),
        ("velocity", None),
        ("x", None),
        ("", None),
    ],
)
def test_nearest_is_at_most_two_edits_away(word, meant):
    assert nearest(word, PREDICTIONS) == meant


def test_short_words_are_one_edit_away():
    assert nearest("vpp", ["vp", "ve"]) == "vp"
    assert nearest("abc", ["vp", "ve"]) is None
    assert nearest("q", ["t", "r"]) is None


def test_a_synonym_wins_where_its_meaning_is_known():
    synonyms = {"velocity": "flow", "noise": "eps"}
    assert nearest("velocity", PREDICTIONS, synonyms) == "flow"
    assert nearest("noise", PREDICTIONS, synonyms) is None


def test_ties_are_settled_by_the_alphabet():
    assert nearest("bat_", {"bath", "bats", "bate"}) == "bate"


def test_the_word_itself_is_no_advice():
    assert nearest("flow", PREDICTIONS) is None
