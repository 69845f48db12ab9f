"""Training on Whet's own copy: a plain loop that holds masks, listens to a teacher and gives the best weights back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from whet.errors import DataError, ModelError
from whet.graph.epochs import Epochs, Judge, TrainingRun
from whet.graph.rate_search import search, search_run, search_spec
from whet.graph.views import Masks
from whet.numerics.schedules import Ramp
from whet.records import Step
from whet.specs import Train
from whet.torch.attention import plain_attention
from whet.torch.compiling import Compiler, compiling, failed
from whet.torch.distill import teaching
from whet.torch.learner import scale_names
from whet.torch.model import call, device_of, dtype_of, evaluating, on_device, to_numpy, to_tensors
from whet.torch.objective import Objective
from whet.torch.processes import Processes
from whet.torch.prune import Masker
from whet.torch.sharding import check_sharded, clip_, divided, gather_, own_part, sharded
from whet.torch.standing import generator_states, load_optimizer, optimizer_state, packed, set_generator_states, unpacked


def train(model: Any, spec: Train, run: TrainingRun) -> tuple[Masks, Step]:
    """*In place*: train with the techniques in `spec.apply`, masks held after every step, best weights restored.

    The record's `history` has a row for each epoch, its `notes` say in words what was decided and left out.

    Raises:
        SpecError: the pruning schedule does not fit into the training steps.
        ModelError: nothing to train or to prune, a teacher that cannot teach, or a loss that is not finite; after that the
            model has the best weights so far, else those it came with.
        DataError: batches that the model or the loss cannot take.
    """
    started = time.perf_counter()
    with _looping(model, spec, run) as loop:
        stop = loop.run()
        if loop.alone:
            loop.notes.append(f"{loop.alone} batches of one example were left out: batch norm cannot train on them")
        notes = [] if loop.compiler is None else loop.compiler.notes()
        return loop.told(stop, started, [*notes, *loop.objective.notes])


def search_rates(model: Any, spec: Train, run: TrainingRun, rates: Sequence[float]) -> list[float]:
    """The loss of a step of `spec` at each of `rates` until it diverges; `model` is afterwards as it was.

    Raises:
        ModelError, DataError: as in `train`.
    """
    with _looping(model, search_spec(spec, rates[0]), search_run(run)) as loop:
        return search(loop, rates)


@contextmanager
def _looping(model: Any, spec: Train, run: TrainingRun) -> Iterator[_Loop]:
    """The loop that trains `model`, on its device, with its teacher."""
    ramp = run.ramp(spec)
    with (
        seeded(run.seed, run.device),
        compiling(spec.compile) as compiler,
        _placed(model, spec, run.device) as (work, where),
        teaching(spec.distill, run.teacher, work, where, compiler) as tutor,
    ):
        masker = Masker(work, spec.prune, run.masks, run.train, spec.loss)
        judge = Judge(run, lambda inputs: _predict(work, inputs, where))
        if tutor is not None:
            tutor.begin(work, *run.train.first())
        yield _Loop(work, Objective(spec, tutor, where, dtype_of(work)), spec, run, judge, masker, ramp, compiler)


@contextmanager
def _placed(model: Any, spec: Train, device: str | None) -> Iterator[tuple[Any, Any]]:
    """What trains in the place of `model`, and where: the model itself, or a sharded copy, whose weights it gets at the end."""
    if not spec.shard:
        with on_device(model, device) as where:
            yield model, where
        return
    check_sharded(spec)
    work = sharded(model, device)
    yield work, device_of(work)
    gather_(work, model)


def _predict(model: Any, inputs: Any, device: Any) -> Any:
    with evaluating(model), torch.no_grad(), plain_attention():
        outputs = call(model, to_tensors(inputs, device, dtype_of(model)))
    found = to_numpy(outputs)
    if found is None:
        raise ModelError(f"{type(model).__name__} returned no tensor: there is nothing to score.")
    return found


class _Loop(Epochs):
    """A plain loop with AdamW."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        spec: Train,
        run: TrainingRun,
        judge: Judge,
        masker: Masker,
        ramp: Ramp | None,
        compiler: Compiler | None,
    ) -> None:
        super().__init__(spec, run, judge, masker, ramp)
        self.model, self.objective, self.compiler = model, objective, compiler
        self.forward = model if compiler is None else compiler(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError("No parameter has requires_grad=True: there is nothing to train. Unfreeze some, or use prune().")
        groups = [*_decaying(model), *objective.groups()]
        self.optimizer = torch.optim.AdamW(groups, lr=spec.rate, weight_decay=spec.weight_decay)
        masker.optimizer = self.optimizer
        device = device_of(model).type
        self.scaler = torch.amp.GradScaler(device, enabled=spec.precision == "float16")  # small gradients would be zero
        self.processes = Processes()
        if not spec.shard:
            self.processes.agree(self._tensors())
        self.alone = 0  # batches left out: one example, which batch norm cannot train on

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Training mode where the model is not in it already: one that is may hold parts in inference mode on purpose."""
        modes = [(module, module.training) for module in self.model.modules()]
        if not self.model.training:
            self.model.train()
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training

    def train_on(self, inputs: Any, targets: Any, where: str) -> float | None:
        """One optimizer step; its loss, or None for a batch of one that batch norm refuses."""
        place, together = self.place
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group.get("relative", 1.0)
        if place == 0:
            self.optimizer.zero_grad(set_to_none=True)
        inputs, targets, share = self.processes.own(inputs, targets)
        try:
            with self._autocast():
                loss = self.objective(self.model, inputs, targets, self.forward)
        except DataError as error:
            self._explain(error)
            if "Expected more than 1 value per channel when training" not in str(error.__cause__) or self.processes.count > 1:
                raise
            self.alone += 1
            return None
        if self.compiler is not None:
            self.compiler.check()
        value = self.processes.total(share * float(loss.detach()))
        if math.isfinite(value):
            self.scaler.scale(loss * (share / together)).backward()
            if place == together - 1:
                self._update()
        return value

    def _explain(self, error: DataError) -> None:
        """Raise what it means where the cause of a forward pass that failed is how the model was asked to run."""
        if self.compiler is not None and (told := failed(error)) is not None:
            raise told from error
        if self.spec.shard and "DTensor" in str(error):
            raise ModelError(
                "A weight is read outside of the block that holds it, where Train(shard=True) has gathered none: a parent that "
                f"reads its layer's weight, or a method that is not forward. Leave shard out. ({error.__cause__})"
            ) from error

    def join(self) -> None:
        """Batch norm's statistics, and observed ranges, become the mean over the processes."""
        self.processes.mean(self.model.buffers())

    def _autocast(self) -> Any:
        """The context of the forward pass."""
        if self.spec.precision is None:
            return nullcontext()
        return torch.autocast(device_of(self.model).type, getattr(torch, self.spec.precision))

    def _update(self) -> None:
        """The optimizer's step on the gradients of all batches and processes, clipped."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.processes.add_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        if self.spec.clip is not None:
            if self.spec.shard:
                clip_(parameters, self.spec.clip, self.processes)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, self.spec.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def writes(self) -> bool:
        """The first process."""
        return self.processes.rank == 0

    def hint(self) -> str:
        """float16 overflows."""
        dtype = dtype_of(self.model)
        return f" The model is in {str(dtype).removeprefix('torch.')}: train it in float32." if dtype == torch.float16 else ""

    def snapshot(self) -> dict[str, Any]:
        """Copies of all parameters and buffers by name."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Give the parameters and buffers their values back."""
        for name, tensor in self._tensors():
            if name not in saved:
                continue
            if tensor.shape == saved[name].shape:
                own_part(tensor).copy_(own_part(divided(saved[name], tensor)))
            else:  # a buffer that the forward replaced
                tensor.data = saved[name].clone()

    def packed(self, saved: dict[str, Any]) -> Any:
        """A snapshot for a file."""
        return packed(saved)

    def unpacked(self, packed: Any) -> dict[str, Any]:
        """A snapshot from a file."""
        found: dict[str, Any] = unpacked(packed)
        return found

    def state(self) -> dict[str, Any]:
        """The optimizer's moments, torch's random numbers, and what the teacher's losses have learned."""
        found = {
            "optimizer": optimizer_state(self.optimizer),
            "generators": generator_states(self.given.train.source),
            "teacher": self.objective.state(),
            "alone": self.alone,
            "scaler": self.scaler.state_dict(),
        }
        return packed(found)  # type: ignore[no-any-return]

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        found = unpacked(state)
        load_optimizer(self.optimizer, found["optimizer"])
        self.objective.load(found["teacher"])
        self.alone = found["alone"]
        self.scaler.load_state_dict(found["scaler"])
        set_generator_states(self.given.train.source, found["generators"])

    def _tensors(self) -> list[tuple[str, Any]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]


def _decaying(model: Any) -> list[dict[str, Any]]:
    """The trainable parameters in the optimizer's groups: learned scales are never decayed."""
    scales = scale_names(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [parameter for name, parameter in trainable if name not in scales]}]
    kept = [parameter for name, parameter in trainable if name in scales]
    return [*groups, {"params": kept, "weight_decay": 0.0}] if kept else groups


@contextmanager
def seeded(seed: int, device: str | None) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python drawn from `seed` while the block runs; the global states come back."""
    on_gpu = torch.cuda.is_initialized() or (device is not None and device.startswith("cuda") and torch.cuda.is_available())
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
