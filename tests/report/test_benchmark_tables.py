"""Tables of benchmarks: kept in a record, put into a document, told whether a goal was reached."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("benchmark_tables", PATH)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def made(tables, record, name="uniform", value="88.06"):
    table = tables.Table(name, f"Title of {name}", ("", "top-1"), "python benchmarks/uniform.py", record=record)
    table.add("W8A8", value)
    return table


def test_a_record_holds_every_row_and_replaces_tables_of_the_same_name(tables, tmp_path):
    record = tmp_path / "out" / "record.json"
    made(tables, record)
    made(tables, record, "steps", "1.4")
    table = made(tables, record, value="88.13")
    table.note("A note.")
    found = {item.name: item for item in tables.read(record)}
    assert found.keys() == {"uniform", "steps"}
    assert found["uniform"].rows == [["W8A8", "88.13"]] and found["uniform"].notes == ["A note."]
    assert found["steps"].rows == [["W8A8", "1.4"]]


def test_a_document_gets_the_tables_it_has_a_place_for(tables, tmp_path, capsys):
    record, document = tmp_path / "record.json", tmp_path / "page.md"
    made(tables, record)
    made(tables, record, "steps")
    document.write_text("Before\n<!-- bench-uniform -->\nold\n<!-- /bench-uniform -->\nAfter\n", encoding="utf-8")
    assert tables.into(record, document) == 1
    text = document.read_text(encoding="utf-8")
    assert "| W8A8 | 88.06 |" in text and "old" not in text and text.startswith("Before") and text.endswith("After\n")
    assert "Title of uniform" in text and "`python benchmarks/uniform.py`" in text
    assert "no place <!-- bench-steps -->" in capsys.readouterr().out


def test_times_of_a_busy_machine_say_so(tables):
    table = made(tables, None)
    table.made |= {"load": 9.0, "cores": 2}
    assert "busy" in table.markdown()
    table.made |= {"load": 1.0}
    assert "busy" not in table.markdown()


def test_goals_and_intervals(tables):
    assert tables.against(87.3, 87.3) == "≥ 87.3: reached" and "missed" in tables.against(87.29, 87.3)
    assert tables.against(1.4, 1.4, most=True) == "≤ 1.4: reached" and "missed" in tables.against(1.41, 1.4, most=True)
    assert tables.top1(8806, 10_000) == "88.06 [87.41, 88.68]"
