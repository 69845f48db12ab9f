"""The Python of README.md and docs/*.md, run as written: what a reader copies works, and prints what the page says."""

import pytest

from bench import convert_in_process, few_runs
from doc_pages import PAGES, blocks, run_page

PYTHON = {page.name: blocks(page.read_text()) for page in PAGES}
NOT_RUN = {"training.md": 1}  # blocks that need several processes


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page.name]], ids=lambda page: page.name)
def test_a_page_runs_as_written_and_prints_what_it_says(page, tmp_path, monkeypatch):
    convert_in_process(monkeypatch)
    few_runs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for said, printed in run_page(page):
        assert printed.startswith(said)


def test_every_block_is_run_but_for_those_that_say_why_not():
    left_out = {name: [block.left_out for block in found if block.left_out is not None] for name, found in PYTHON.items()}
    assert {name: len(reasons) for name, reasons in left_out.items() if reasons} == NOT_RUN
    assert all(len(reason) > 10 for reasons in left_out.values() for reason in reasons)
    assert sum(page.read_text().count("\n```python") for page in PAGES) == sum(map(len, PYTHON.values())) > 20


def test_the_reader_of_pages_sees_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nprint(1 + made)  # 3\nprint(made)  # 3 (not 2)\nprint(made)  # words\n```\n"
        "<!-- not run: it would fail -->\n```python\n1 / 0\n```\n\n<!-- run first -->\n```python\nmade = 2\n```\n"
    )
    assert [block.line for block in blocks(page.read_text())] == [15, 4, 10]
    assert run_page(page) == [("3", "3"), ("3", "2")]
    page.write_text("text\n\n```python\n>>> 1 + 1\n3\n\n```\n")
    with pytest.raises(Exception, match="page"):
        run_page(page)
    page.write_text("text\n\n```python\n\nraise KeyError('here')\n```\n")
    with pytest.raises(KeyError) as raised:
        run_page(page)
    assert raised.traceback[-1].path == page and raised.traceback[-1].lineno == 4
