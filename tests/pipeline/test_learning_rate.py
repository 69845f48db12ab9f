"""`whet.learning_rate`, and trainings that begin with what it finds."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import whet
from bench import same
from whet import Distill, Prune, Train
from whet.errors import OutputError, SpecError
from whet.pipeline import rates

QUIET = {"progress": False}


def test_the_greatest_rate_is_found_and_the_model_is_untouched(b, tmp_path):
    model = whet.prune(b.build(), Prune(0.3), **QUIET)
    before, data = b.frozen(model.float_model), (b.data(96)[0], np.random.default_rng(5).integers(0, 3, 96))
    found = whet.learning_rate(model, data, high=10.0, steps=60, **QUIET)
    assert same(before, b.frozen(model.float_model))
    assert len(found.rates) == len(found.losses) == len(found.smoothed) and found.rates[0] == pytest.approx(1e-6)
    assert 1e-6 < found.suggestion < found.greatest < 10.0 and found.diverged == (len(found.rates) < 60)
    assert max(found.losses[-10:]) > 1.5 * min(found.smoothed)  # labels drawn by chance: it falls, and then diverges
    again = whet.learning_rate(model, data, high=10.0, steps=60, **QUIET)
    assert again.suggestion == found.suggestion and str(found).startswith("Learning rate ")
    picture = ET.fromstring(found.plot(tmp_path / "rates.svg"))
    assert len(picture.findall("{*}polyline")) == 2 and found._repr_html_() == (tmp_path / "rates.svg").read_text()
    with pytest.raises(OutputError, match="exists"):
        found.plot(tmp_path / "rates.svg")


def test_a_training_begins_with_the_rate_that_is_found_and_ends_as_with_its_number(b, monkeypatch):
    monkeypatch.setattr(rates, "searched", partial(rates.searched, steps=20))
    asked = Train(epochs=1, learning_rate="find", decay=None, apply=[Prune(0.5)])
    found = whet.learning_rate(b.build(), b.data(96), spec=asked, steps=20, **QUIET)
    given = replace(asked, learning_rate=found.suggestion)
    one, other = (whet.fit(b.build(), spec, train=b.data(96), **QUIET) for spec in (asked, given))
    (row,) = one.steps[0].train["history"]
    assert row["learning_rate"] == found.suggestion and one.steps[0].train["notes"][0] == str(found)
    assert same((b.weights(one.model), 0), (b.weights(other.model), 0))


def test_what_cannot_be_searched_is_said(b):
    model, data = b.build(), b.data(48)
    with pytest.raises(SpecError, match="at least 10 steps from low to a higher rate"):
        whet.learning_rate(model, data, low=1.0, high=0.1)
    with pytest.raises(SpecError, match=r"whet\.Train\(…\)"):
        whet.learning_rate(model, data, spec=Prune(0.5))
    with pytest.raises(SpecError, match="needs a teacher"):
        whet.learning_rate(model, data, spec=Train(apply=Distill()))
    with pytest.raises(SpecError, match=r"Train\.learning_rate must be a number"):
        Train(learning_rate="best")
    with pytest.raises(SpecError, match="learning_rate='find'"):
        _ = Train(learning_rate="find").rate
