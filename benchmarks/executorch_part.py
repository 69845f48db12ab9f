"""ExecuTorch's own way to an int8 file, beside which Whet's is measured: torchao PT2E with the XNNPACK quantizer.

`write_peer` is called by the benchmark of all runtimes. ExecuTorch ignores a thread setting: pin the process to one core.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

NAME = "torchao PT2E, XNNPACKQuantizer"
LARGEST = 64  # rows: the default of Whet's files
_TRACED = 16  # rows: with fewer, PyTorch bounds the batch to 15


def write_peer(model: Any, images: Any, path: Path, *, batch: int = 64) -> dict[str, float]:
    """Quantize `model` on `images` (n, ...) float32, in batches, and write a .pte file of dynamic batch size.

    Returns the seconds of calibrating and converting, and of lowering: `{"quantize": s, "lower": s}`.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    tensors: Sequence[Any] = torch.from_numpy(images).split(batch)
    example = (torch.from_numpy(images[:_TRACED]),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=LARGEST)},)
    started = time.perf_counter()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    traced = torch.export.export(model.eval(), example, dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(traced, quantizer)
    with torch.no_grad():
        for part in tensors:
            prepared(part)
    converted = convert_pt2e(prepared)
    quantized = time.perf_counter()
    program = torch.export.export(converted, example, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    return {"quantize": quantized - started, "lower": time.perf_counter() - quantized}


def pt2e(_: Path, batches: list[Any], path: Path) -> None:
    """As `write_peer`, of the CIFAR-10 ResNet-20, in the form of the other runtimes' peers in `runtimes.py`."""
    import numpy as np
    from cifar import resnet20

    write_peer(resnet20(), np.concatenate(batches), path)
