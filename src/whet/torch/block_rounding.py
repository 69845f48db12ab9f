"""Block-wise reconstruction: the codes of all weights of a block learned together, on the block's output.

Li et al. 2021, BRECQ (arXiv:2102.05426), with straight-through gradients in place of a soft rounding, since it begins at the
layer-wise codes, which may be more than a step from the float weight. The block alone is computed: the operations before it
are skipped, and return tensors of their shape without content; the pass ends at the block's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.data import Batches
from whet.graph.blocks import BATCH, CACHE_BYTES, Block, learn_blocks
from whet.graph.nodes import Graph
from whet.graph.placement import Plan
from whet.graph.views import WeightView
from whet.specs.quantization import AdaRound
from whet.torch.interception import Call, Session, map_tensors
from whet.torch.model import call, device_of, dtype_of, to_tensors
from whet.torch.moments import EnoughSeenError, QuantizedWatching, TorchRunner, Wanted
from whet.torch.quantize import Simulator, rounded_copy

Tensor = Any
LEARNING_RATE = 0.003  # in steps of the codes
NEAR = 0.49  # of a step: latent values begin within it of their codes
CHECKS = 8  # times that the block's error is looked at; the best codes are kept


@dataclass(frozen=True, slots=True, eq=False)
class _Cached:
    """A block's data: quantized inputs, and the float outputs, (examples, …) each. inputs: a batch of the model's."""

    quantized: Tensor
    wanted: Tensor
    inputs: Any

    @property
    def first(self) -> int:
        """Examples in that batch."""
        return _examples(self.inputs)


def round_blocks(
    plan: Plan,
    graph: Graph,
    weights: Mapping[str, WeightView],
    calibration: Batches,
    runner: TorchRunner,
    spec: AdaRound,
    *,
    progress: bool,
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """See `learn_blocks`: every block by the data that calibration gives it."""

    def learn(plan: Plan, block: Block, names: list[str]) -> tuple[Plan, float, float] | None:
        model = rounded_copy(runner.model, plan)
        with QuantizedWatching(model, plan) as own:
            data = _cached(block, calibration, runner, model, own)
        if data is None:
            return None
        model = rounded_copy(runner.model, plan)
        with _BlockRun(model, plan, block) as running:
            return _learn(plan, names, weights, data, model, running, spec)

    return learn_blocks(plan, graph, learn, progress=progress)


def _cached(block: Block, calibration: Batches, runner: TorchRunner, model: Any, own: QuantizedWatching) -> _Cached | None:
    """The block's data from as many batches as fit; None where its values are no tensors with one row for each example."""
    quantized, wanted = [], []
    asked = Wanted(Counter(), {block.end})
    size, batch = 0, None
    for inputs, _ in calibration:
        batch = inputs if batch is None else batch
        seen = runner.forward(runner.reference, runner.watching, inputs, asked).shown
        own_seen = runner.forward(model, own, inputs, replace(asked, values={block.start})).shown
        if not seen or not own_seen or own_seen[block.start].shape[0] != seen[block.end].shape[0]:
            return None
        quantized.append(own_seen[block.start])
        wanted.append(seen[block.end])
        size += max(quantized[-1].nbytes, wanted[-1].nbytes)
        if size >= CACHE_BYTES:
            break
    same = all(t.shape[1:] == quantized[0].shape[1:] for t in quantized) and all(
        t.shape[1:] == wanted[0].shape[1:] for t in wanted
    )
    return _Cached(torch.cat(quantized), torch.cat(wanted), batch) if same else None


def _learn(
    plan: Plan,
    learned: list[str],
    weights: Mapping[str, WeightView],
    data: _Cached,
    model: Any,
    running: _BlockRun,
    spec: AdaRound,
) -> tuple[Plan, float, float]:
    device = device_of(model)
    soft = {name: _Learned(plan, name, np.asarray(weights[name].array, np.float32), device) for name in learned}
    size = min(BATCH, data.first)
    inputs = to_tensors(_rows(data.inputs, size), device, dtype_of(model))
    running.record(model, inputs)
    optimizer = torch.optim.Adam([item.latent for item in soft.values()], lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.steps)
    generator = torch.Generator().manual_seed(0)
    before = least = running.error(model, inputs, data, {})
    unit, best = max(before, 1e-30), None
    for step in range(spec.steps):
        index = torch.randint(data.wanted.shape[0], (size,), generator=generator)
        made = running.outputs(model, inputs, data.quantized[index], {name: item.weight() for name, item in soft.items()})
        optimizer.zero_grad()
        ((made - data.wanted[index]).square().mean() / unit).backward()
        optimizer.step()
        decay.step()
        if (step + 1) % max(spec.steps // CHECKS, 1) == 0 or step + 1 == spec.steps:
            found = running.error(model, inputs, data, {name: item.weight() for name, item in soft.items()})
            if found < least:
                least, best = found, {name: item.codes() for name, item in soft.items()}
    if best is not None:
        plan = replace(plan, codes={**plan.codes, **best})
    power = float(data.wanted.double().square().mean())
    return plan, _db(power, before), _db(power, least)


class _Learned:
    """The rounding of one weight while it is learned: latent values in steps, rounded with straight-through gradients."""

    def __init__(self, plan: Plan, name: str, array: npt.NDArray[np.float32], device: Any) -> None:
        params: Any = plan.weights[name]
        scale = np.broadcast_to(params.broadcast(array.shape)[0], array.shape)
        present = plan.encode(name, array).astype(np.float32)
        # As near to the float weight as the present code allows, so that what is learned begins at the present codes.
        latent = np.clip(array / scale, present - NEAR, present + NEAR)
        self.limits = float(params.spec.qmin), float(params.spec.qmax)
        self.scale, self.latent, self.kept = (
            torch.from_numpy(np.ascontiguousarray(t, np.float32)).to(device) for t in (scale, latent, array != 0)
        )
        self.latent.requires_grad_()

    def weight(self) -> Tensor:
        """The rounded weight."""
        inside = self.latent.clamp(*self.limits)
        return (inside + (inside.round() - inside).detach()) * self.scale * self.kept

    def codes(self) -> npt.NDArray[np.int32]:
        """The codes as they now are."""
        codes = self.latent.detach().clamp(*self.limits).round() * self.kept
        found: npt.NDArray[np.int32] = codes.cpu().numpy().astype(np.int32)
        return found


class _BlockRun(Simulator):
    """Runs one block of a simulated model, on values and with weights that are given."""

    def __init__(self, model: Any, plan: Plan, block: Block) -> None:
        super().__init__(model, plan)
        self.kernels.active = False
        self.block = block
        self.empty: dict[str, Any] = {}
        self.start: Tensor | None = None
        self.given: Mapping[str, Tensor] = {}
        self.made: Tensor | None = None
        self.recording = False

    def record(self, model: Any, inputs: Any) -> None:
        """Note what the operations before the block return, in shape."""
        self.recording = True
        self._run(model, inputs)
        self.recording = False

    def outputs(self, model: Any, inputs: Any, start: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The block's output for its input `start`, with the weights `given` in place of the model's."""
        self.start, self.given = start, given
        self._run(model, inputs)
        return self.made

    def error(self, model: Any, inputs: Any, data: _Cached, given: Mapping[str, Tensor]) -> float:
        """Mean squared error of the block's output on quantized inputs, over whole batches."""
        size, total, count = _examples(inputs), 0.0, 0
        with torch.no_grad():
            for at in range(0, data.wanted.shape[0] - size + 1, size):
                made = self.outputs(model, inputs, data.quantized[at : at + size], given)
                total += float((made - data.wanted[at : at + size]).double().square().mean())
                count += 1
        return total / max(count, 1)

    def _run(self, model: Any, inputs: Any) -> None:
        try:
            call(model, inputs)
        except EnoughSeenError:
            return

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """A block may begin at the model's input."""
        args, kwargs = super().enter(session, args, kwargs)
        if self.block.start != "input:0" or self.recording or self.start is None:
            return args, kwargs
        given = self.start

        def change(tensor: Tensor) -> Tensor:
            return given if tensor.is_floating_point() else tensor

        return map_tensors(args, change), map_tensors(kwargs, change)

    def substitute(self, session: Session, tensor: Tensor) -> Tensor:
        """Weights that are learned."""
        name = session.parameter(tensor) if self.given else None
        return self.given.get(name, tensor) if name is not None else tensor

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """Nothing before the block."""
        if self.recording or site is None or site in self.block.nodes or site not in self.empty:
            return super().compute(session, call, site)
        return self.empty[site]

    def after(self, session: Session, call: Call, site: str, result: Any) -> Any:
        """The block's input and output."""
        if not self.recording and site == self.block.start:
            return self.start
        if not self.recording and site in self.empty and site not in self.block.nodes:
            return result
        result = super().after(session, call, site, result)
        if self.recording and site not in self.block.nodes:
            self.empty[site] = map_tensors(result, lambda t: t.new_zeros(()).expand(t.shape))
        if site == self.block.end:
            self.made = result
            raise EnoughSeenError("The block's output is there.")
        return result


def _rows(inputs: Any, count: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _rows(item, count) for key, item in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_rows(item, count) for item in inputs)
    return inputs[:count]


def _examples(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    return _examples(inputs[0]) if isinstance(inputs, tuple) else int(inputs.shape[0])


def _db(power: float, error: float) -> float:
    return float(10 * np.log10(power / error)) if power > 0 and error > 0 else float("inf")
