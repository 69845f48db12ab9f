"""`Compressed`: what can be done with a result."""

import json

import numpy as np
import pytest

import whet
from bench import sqnr
from contract_table import made as technique
from whet import Prune, Quantize
from whet.pipeline.compressed import start


def refused(match, call, *arguments, **options):
    with pytest.raises(whet.WhetError, match=match):
        call(*arguments, **options)


def test_convert_stores_integers_and_computes_the_same(b):
    made = technique("quantize", b.name)
    converted = made.convert()
    inputs, _ = b.data(32, 1)
    assert sqnr(made.side.predict(made.model, inputs), made.side.predict(converted, inputs)) > 60
    arrays = converted.state_dict().values() if b.name == "torch" else converted.variables
    kinds = [str(array.dtype).removeprefix("torch.") for array in arrays]
    assert kinds.count("int8") == 2 and kinds.count("int32") == 2
    refused("needs a quantized model", technique("train", b.name).convert)


def test_export_refuses_what_it_would_replace(b, tmp_path):
    made, path = technique("quantize", b.name), tmp_path / f"model{b.suffix}"
    made.export(path)
    before = path.read_bytes()
    refused(r"exists.*overwrite=True", made.export, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    technique("prune_uniform", b.name).export(path, overwrite=True)
    assert path.read_bytes() != before and len(list(tmp_path.iterdir())) == 1


def test_export_needs_an_example(b, tmp_path):
    refused("needs example inputs.*example=", start(b.build()).export, tmp_path / f"m{b.suffix}")
    refused("is written from", technique("quantize", b.name).export, tmp_path / f"m{b.suffix}", b.other)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(b, tmp_path, monkeypatch):
    made = technique("quantize", b.name)

    def failing(model, plan, target, path, **_):
        path.write_bytes(b"half")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(made.side, "export", failing)
    refused("Input/output error", made.export, tmp_path / "new" / f"m{b.suffix}")
    assert list(tmp_path.iterdir()) == []


def test_measure_is_of_the_exported_file(b):
    made = technique("prune_then_quantize", b.name)
    evidence = made.measure(b.data(48, 1), progress=False)
    assert evidence.file == f"model{b.suffix}" and evidence.metric["n"] == 48 and evidence.latency_ms is not None
    assert evidence.placement == {
        "target": b.target,
        "quantized_weights": 2,
        "quantized_values": len(made.plan.values),
        "integer_biases": len(made.plan.biases),
    }


def test_save_refuses_what_it_would_replace(b, tmp_path):
    made, folder = technique("prune_uniform", b.name), tmp_path / "saved"
    made.save(folder)
    refused(r"exists.*overwrite=True", made.save, folder)
    technique("quantize", b.name).save(folder, overwrite=True)
    assert whet.load(folder, b.build()).is_simulated
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("mine")
    refused("not written by Whet and will not be replaced", made.save, foreign, overwrite=True)
    assert (foreign / "cat.jpg").read_text() == "mine"


def test_a_save_that_does_not_read_back_is_not_kept(b, tmp_path, monkeypatch):
    made = technique("prune_uniform", b.name)
    write = made.side.save_model

    def lossy(model, folder):
        other = made.side.copy(model)
        b.poison(other, 9.0)
        return write(other, folder)

    monkeypatch.setattr(made.side, "save_model", lossy)
    refused("does not read back the same", made.save, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_named(b, tmp_path):
    folder = technique("prune_then_quantize", b.name).save(tmp_path / "saved")
    refused("not a folder written by", whet.load, tmp_path / "nowhere", b.build())
    index = folder / "whet.json"
    text = index.read_text()
    index.write_text(json.dumps({**json.loads(text), "format": 99}))
    refused("format 99", whet.load, folder, b.build())
    index.write_text(text[: len(text) // 2])
    refused("damaged", whet.load, folder, b.build())
    index.write_text(text)
    arrays = folder / "whet.safetensors"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-40])
    refused("damaged", whet.load, folder, b.build())
    arrays.write_bytes(whole)
    assert whet.load(folder, b.build()).is_simulated  # nothing but the damage was wrong


def test_a_foreign_index_is_damaged(b, tmp_path):
    folder = technique("prune_uniform", b.name).save(tmp_path / "saved")
    index = json.loads((folder / "whet.json").read_text())
    for missing in ("framework", "masks", "steps"):
        (folder / "whet.json").write_text(json.dumps({key: value for key, value in index.items() if key != missing}))
        refused(rf"damaged.*{missing}", whet.load, folder, b.build())
    (folder / "whet.json").write_text("[]")
    refused("damaged|format", whet.load, folder, b.build())
    (folder / "whet.json").write_text(json.dumps(index))
    assert whet.load(folder, b.build()).masks


def test_loading_into_another_model_is_refused(b, tmp_path):
    folder = technique("prune_uniform", b.name).save(tmp_path / "saved")
    refused("(?i)original", whet.load, folder, b.regressor())
    assert whet.load(folder, b.build()).masks


def test_what_was_loaded_goes_on(b, tmp_path):
    folder = technique("prune_uniform", b.name).save(tmp_path / "saved")
    loaded = whet.load(folder, b.build)
    made = whet.quantize(loaded, Quantize(), calibration=b.data(64)[0], progress=False)
    assert [next(iter(step.spec)) for step in made.steps] == ["Prune", "Quantize"]
    for name, mask in technique("prune_uniform", b.name).masks.items():
        assert np.array_equal(made.masks[name], mask)
    refused("quantized already", whet.prune, made, Prune(0.9), progress=False)
