"""A job that removes channels and solves the rest anew: the page shows every weight's shapes, and every solved weight's error."""

from __future__ import annotations

import numpy as np
import pytest

import whet
from bench import few_runs
from whet.report.console import report_text
from whet.report.html import render_html
from whet.specs import Channel, Prune, Reconstruct

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).eval()
    x = np.random.default_rng(0).normal(size=(192, 8)).astype(np.float32)
    data = [(x[i : i + 64], x[i : i + 64].argmax(1) % 3) for i in range(0, 192, 64)]
    recipe = [Prune(0.5, granularity=Channel(), reconstruct=Reconstruct())]
    with pytest.MonkeyPatch.context() as patch:
        few_runs(patch)
        made = whet.compress(
            model, recipe=recipe, train=data, val=data, out=tmp_path_factory.mktemp("job") / "out", progress=False
        )
    return made.report


def test_the_page_shows_shapes_and_solved_weights(report):
    page, (row,) = render_html(report), report.data["steps"][0]["removal"]["reconstructed"]["layers"]
    assert row["output_db"] > row["silenced_db"]
    assert "32×8 → 16×8" in page and "3×32 → 3×16" in page and "Weights solved anew" in page
    for value in (row["silenced_db"], row["output_db"]):
        assert f'data-value="{value}">{value:.1f}<' in page
    assert ">removed</button>" in page and ">sparsity</button>" not in page


def test_the_terminal_tells_what_left_and_how_it_was_checked(report):
    text = " ".join(report_text(report).split())
    assert "384 → 192 parameters in the weights that lost some" in text and "1 weight solved anew" in text
