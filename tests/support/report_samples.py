"""A whole report.json as the pipeline writes it, with awkward names in it."""

from __future__ import annotations

import copy
from typing import Any

EVIL = "<script>alert(1)</script>"


def evidence(file: str, *, size: int, gzip_size: int, accuracy: float, p50: float, integer: bool) -> dict[str, Any]:
    """One `E` of report.json."""
    stored = {"int8": 20_900, "int32": 320, "float32": 96} if integer else {"float32": 82_400}
    computed = (
        {"QLinearConv": {"uint8": 2}, "QGemm": {"uint8": 2}, "QuantizeLinear": {"uint8": 1}}
        if integer
        else {"Conv": {"float32": 2}, "Gemm": {"float32": 2}}
    )
    return {
        "file": file,
        "bytes": size,
        "gzip_bytes": gzip_size,
        "metric": {
            "name": "accuracy",
            "value": accuracy,
            "ci95": [accuracy - 0.02, accuracy + 0.01],
            "n": 360,
            "higher_is_better": True,
        },
        "latency_ms": {"p50": p50, "p90": p50 * 1.2, "batch": 1, "threads": 1, "runs": 400, "cpu_per_wall": 0.99},
        "runtime": {"name": "onnxruntime", "version": "1.31.1"},
        "placement": {"target": "onnxruntime", "quantized_values": 9} if integer else None,
        "dtypes": {"stored": stored, "computed": computed},
        "warnings": [],
    }


def _history() -> list[dict[str, Any]]:
    rows = []
    for epoch in range(24):
        ramp = min(1.0, epoch / 14)
        rows.append(
            {
                "epoch": epoch,
                "loss": 1.9 * 0.86**epoch + 0.08,
                "metric": 0.95 - 0.10 * ramp * (1 - ramp) + 0.001 * epoch,
                "sparsity": 0.8 - 0.8 * (1 - ramp) ** 3,
                "learning_rate": 1e-3 * (1 - epoch / 30),
            }
        )
    return rows


def histogram(seed: int, removed: float) -> dict[str, Any]:
    """A bell of 32 bins, and what is left of it when its middle is moved to zero."""
    before = [int(900 * 2.718 ** (-(((i - 15.5) / 7) ** 2))) + seed for i in range(32)]
    gone = [i for i in range(32) if abs(i - 15.5) < 16 * removed]
    after = [0 if i in gone else n for i, n in enumerate(before)]
    after[16] += sum(before) - sum(after)
    return {"edges": [-0.125, 0.125], "before": before, "after": after}


def on_val(size: int, accuracy: float, p50: float) -> dict[str, Any]:
    """What a candidate says of one file on the validation data."""
    plain = evidence("", size=size, gzip_size=size, accuracy=accuracy, p50=p50, integer=False)
    return {key: plain[key] for key in ("metric", "bytes", "gzip_bytes", "latency_ms")}


RECIPE = {
    "format": 1,
    "recipe": [
        {
            "Train": {
                "epochs": 30,
                "apply": [
                    {"Prune": {"sparsity": 0.8, "schedule": {"Cubic": {}}}},
                    {"Distill": {"loss": [{"SoftTargets": {}}]}},
                ],
                "early_stopping": {"EarlyStopping": {"patience": 5}},
            }
        },
        {"Quantize": {}},
    ],
}

_WEIGHTS = (("conv1.weight", 90), ("conv2.weight", 1800), (f"{EVIL}.weight", 16_000), ("fc2.weight", 500))

_REPORT: dict[str, Any] = {
    "format": 1,
    "created": "2026-07-01T12:00:00+00:00",
    "seed": 0,
    "environment": {
        "python": "3.11.9",
        "os": "Linux 6.1",
        "cpu": "Example CPU <b>2.1 GHz</b>",
        "cores": 2,
        "features": ["avx2", "avx512_vnni"],
        "versions": {"whet": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1"},
    },
    "original": evidence("original.onnx", size=89_412, gzip_size=82_230, accuracy=0.975, p50=0.021, integer=False),
    "compressed": {
        **evidence("model.onnx", size=27_104, gzip_size=11_870, accuracy=0.972, p50=0.027, integer=True),
        "parity": {"agreement": 0.989, "max_error": 2.1, "mean_error": 0.22, "sqnr_db": 18.3},
    },
    "change": {
        "metric_drop": {"value": 0.0028, "ci95": [-0.0083, 0.0139]},
        "size_ratio": 0.3031,
        "gzip_ratio": 0.1443,
        "latency_ratio": {"value": 1.286, "ci95": [1.21, 1.33]},
    },
    "steps": [
        {
            "spec": RECIPE["recipe"][0],
            "changed": [
                {"name": name, "sparsity": 0.8, "parameters": n, "histogram": histogram(i, 0.4)}
                for i, (name, n) in enumerate(_WEIGHTS)
            ],
            "skipped": [{"name": "conv1.bias", "reason": "biases are not pruned"}],
            "seconds": 14.2,
            "train": {
                "history": _history(),
                "stop": {"reason": "stopped: no improvement for 5 epochs", "best_epoch": 18, "epochs": 24},
                "metric": "accuracy",
            },
            "unmatched": [],
        },
        {
            "spec": RECIPE["recipe"][1],
            "changed": [
                {
                    "name": name,
                    "bits": 8,
                    "scheme": "symmetric per channel",
                    "error_db": 38.1 + i,
                    "parameters": n,
                    "histogram": histogram(i, 0.03),
                }
                for i, (name, n) in enumerate(_WEIGHTS)
            ],
            "skipped": [{"name": f"norm {EVIL}", "reason": "operation 'layer_norm' is not quantized on onnxruntime"}],
            "seconds": 1.1,
            "train": None,
            "unmatched": ["classifier*"],
        },
    ],
    "simulation_parity": {"agreement": 0.9972, "sqnr_db": 41.7},
    "recipe": RECIPE,
    "budget": {
        "spec": {"Budget": {"size": 0.4}},
        "met": True,
        "missed": [],
        "decided_on": "val",
        "reported_on": "test",
    },
    "candidates": [
        {
            "recipe": [{"Prune": {"sparsity": 0.95}}, {"Quantize": {}}],
            "metric_drop": 0.094,
            "bytes": 27_090,
            "met": False,
            "missed": ["accuracy drops by 0.094, allowed 0.01"],
            "chosen": False,
            "on_val": on_val(27_090, 0.886, 0.0268),
            "original_on_val": on_val(89_412, 0.98, 0.0213),
        },
        {
            "recipe": RECIPE,
            "metric_drop": 0.0028,
            "bytes": 27_104,
            "met": True,
            "missed": [],
            "chosen": True,
            "on_val": on_val(27_104, 0.9772, 0.0271),
            "original_on_val": on_val(89_412, 0.98, 0.0211),
        },
    ],
    "warnings": ["SLOWER here: 1.29 × the original's latency. A model this small spends its time outside the arithmetic."],
}


def sample_report(**changes: Any) -> dict[str, Any]:
    """A fresh copy of the sample with top-level entries replaced."""
    return {**copy.deepcopy(_REPORT), **changes}
