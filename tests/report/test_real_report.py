"""A real job's report: every recipe tried is in the plots, every changed weight has its histograms, and the sinks are fed."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest

import whet
from bench import few_runs

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


def blobs(n: int, seed: int):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    centres = np.random.default_rng(9).normal(size=(3, 8))
    return (centres[y] * 2 + rng.normal(size=(n, 8))).astype(np.float32), y


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3)
    )
    x, y = blobs(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    out, seen = tmp_path_factory.mktemp("job") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        few_runs(patch)
        compressed = whet.compress(
            model.eval(),
            train=[(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)],
            val=[blobs(200, 1)],
            budget=whet.Budget(size="1 B"),  # none holds it, so all are tried
            progress=False,
            out=out,
            log=seen.append,
        )
    return compressed, out, seen


def test_all_candidates_are_in_both_plots(made) -> None:
    from whet.report.tradeoff import scatters

    compressed, _, _ = made
    data = compressed.report.data
    assert len(data["candidates"]) == 3 and sum(candidate["chosen"] for candidate in data["candidates"]) == 1
    size, latency = scatters(data)
    for plot in (size, latency):
        assert sorted(point.label for point in plot.points) == ["original", "recipe 1", "recipe 2", "recipe 3"]
        assert [point.kind for point in plot.points] == ["original", "candidate", "candidate", "chosen"]
        assert all(point.high <= point.y <= point.low for point in plot.points)  # SVG's y runs downwards
        assert "validation data" in plot.note
    original, *tried = size.points
    assert all(point.x < original.x for point in tried)


def test_every_changed_weight_has_the_histogram_of_each_step(made) -> None:
    compressed, _, _ = made
    steps = compressed.report.data["steps"]
    assert {row["name"] for row in steps[-1]["changed"]} == {"0.weight", "2.weight", "4.weight"}
    for row in (row for step in steps for row in step["changed"]):
        drawn = row["histogram"]
        assert sum(drawn["before"]) == sum(drawn["after"]) == row["parameters"]
        if "sparsity" in row:
            low, high = drawn["edges"]
            zero = int((0 - low) / (high - low) * 32)
            near = drawn["after"][zero] + drawn["after"][zero - 1]
            assert near >= round(row["sparsity"] * row["parameters"])


def test_the_folder_holds_the_numbers_and_log_gets_the_report(made) -> None:
    compressed, out, seen = made
    assert [report.data for report in seen] == [compressed.report.data]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(compressed.report.data))
    final = {row["name"]: row for row in csv.DictReader((out / "summary.csv").read_text().splitlines())}
    assert int(final["bytes"]["compressed"]) == (out / "model.onnx").stat().st_size
    history = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    trained = [step["train"]["history"] for step in compressed.report.data["steps"] if step["train"]]
    assert len(history) == sum(map(len, trained))
    assert (out / "report.html").stat().st_size < 100_000 and (out / "report.json").stat().st_size < 40_000


def test_log_must_be_a_function() -> None:
    with pytest.raises(whet.WhetError, match="log must be a function of one report, got 'runs'"):
        whet.compress(torch.nn.Linear(2, 2), train=[], val=[], log="runs")


def test_a_job_shows_itself_in_a_notebook(made) -> None:
    compressed, _, _ = made
    shown = compressed._repr_html_()
    assert "Compressed Sequential: quantized for onnxruntime" in shown and "Budget MISSED" in shown and "<script" not in shown


def test_the_numbers_below_a_plot_do_not_run_into_one_another(made) -> None:
    from whet.report.tradeoff import scatters

    for plot in scatters(made[0].report.data):
        *inner, last = [(tick.at, 6.0 * len(tick.label)) for tick in plot.x_ticks]  # 11 px wide digits are 6 px apart
        ends = [(at - width / 2, at + width / 2) for at, width in inner] + [(last[0] - last[1], last[0])]
        assert all(one[1] < two[0] for one, two in itertools.pairwise(ends)), plot.x_ticks
