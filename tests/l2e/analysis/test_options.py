"""What a notebook may ask of an analysis, and what it is told instead of a Python error."""

from pathlib import Path

import numpy as np
import pytest

from l2e.analysis import Subject, run
from l2e.analysis.features import make_features
from l2e.analysis.subject import SubjectOptions


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("fkr", {"knd": "post_max"}, "knd = 'post_max': unknown key; did you mean kind?"),
        ("fkr", {"share": 0.1}, "share = 0.1: unknown key; known are kind"),
        ("fkr", {"kind": "max"}, "kind max: choose from post_max"),
        ("fkr", {"kind": ["post_max"]}, "kind ['post_max']: a text is meant"),
        ("scale", {"top": 2.5}, "top 2.5: a whole number is meant"),
        ("scale", {"top": "ten"}, "top 'ten': a whole number is meant"),
        ("scale", {"top": True}, "top True: a whole number is meant"),
        ("decrease", {"learning_rate": "small"}, "learning_rate 'small': a number is meant"),
        ("decrease", {"learning_rate": -0.1}, "learning_rate -0.1: at least 0 is meant"),
        ("trajectory", {"measures": "scale"}, "measures 'scale': a list, each a text is meant"),
        ("trajectory", {"measures": ["scal"]}, "measures ['scal']: choose from scale, fkr"),
        ("fk", {}, "no analysis 'fk'"),
    ],
)
def test_an_option_that_is_not_there_or_cannot_be(name, options, told) -> None:
    with pytest.raises(ValueError) as refused:  # before anything is opened
        run(name, Subject("no/model"), **options)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"passage": 5}, "did you mean passages?"),
        ({"devices": "cuda:0"}, "devices 'cuda:0': a list"),
        ({"passages": 0.5}, "passages 0.5: a whole number"),
    ],
)
def test_of_what_an_analysis_looks_at_too(options, told) -> None:
    with pytest.raises(ValueError) as refused:
        Subject("no/model", **options)
    assert told in str(refused.value)


def test_numbers_of_numpy_and_paths_are_as_good() -> None:
    chosen = SubjectOptions(passages=np.int64(5), cache=Path("kept"), devices=["cpu"])
    assert chosen.passages == 5


def test_every_passage_has_a_feature() -> None:
    with pytest.raises(ValueError, match="made: 3 texts with 2 features' names"):
        make_features("made", ["a", "b", "c"], ["x", "y"])
