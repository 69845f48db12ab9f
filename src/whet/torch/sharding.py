"""Models whose parameters lie in parts on several processes, by torch's own `fully_shard`; what reads and writes them whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from whet.errors import ModelError, SpecError
from whet.specs import RigL, Train, UserCriterion
from whet.specs.criteria import FROM_GRADIENTS, FROM_INPUTS
from whet.torch.model import copy, device_of
from whet.torch.processes import Processes

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


def check_sharded(spec: Train) -> None:
    """Raise `SpecError` where `spec` asks for what sharded parameters cannot do, or no processes train together."""
    if Processes().count < 2:
        raise SpecError(
            "Train(shard=True) divides the parameters among processes, and this is one alone. Start the program with torchrun "
            "--nproc-per-node, and call torch.distributed.init_process_group before; or leave shard out."
        )
    if spec.precision == "float16":
        raise SpecError("Train(shard=True) knows no scaled loss, which precision='float16' needs. Take 'bfloat16'.")
    if spec.compile:
        raise SpecError("Train(shard=True) gathers parameters in hooks, which torch.compile breaks at: leave one of them out.")
    if spec.group_lasso is not None:
        raise SpecError("GroupLasso reads whole weights outside of the layers: leave it or shard=True out.")
    prune = spec.prune
    if prune is None:
        return
    asks = prune.schedule if isinstance(prune.schedule, RigL) else prune.criterion
    if isinstance(asks, (RigL, UserCriterion, *FROM_GRADIENTS, *FROM_INPUTS)):
        raise SpecError(
            f"{type(asks).__name__} asks for gradients or inputs of whole weights, and Train(shard=True) has parts. Prune by "
            "Magnitude() or Random(), or once before with whet.prune(model, Prune(…), train=…): training holds those masks."
        )


def sharded(model: Any, device: str | None) -> Any:
    """A copy of `model` on `device` whose parameters lie in parts on all processes; `model` gets the first one's weights.

    Each member of a list or Sequential is gathered for its own computation alone; what lies outside of them, for all of the
    forward and backward pass. Single numbers are not divided. Gradients are sums over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = Processes()
    processes.agree((*model.named_parameters(), *model.named_buffers()))
    work = copy(model)
    kind = (torch.device(device) if device is not None else device_of(model)).type
    mesh = init_device_mesh(kind, (processes.count,))
    whole = {parameter for parameter in work.parameters() if parameter.ndim == 0}
    for block in (*_blocks(work), work):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # what gloo knows
    return work.to(kind) if whole or list(work.buffers()) else work


def _blocks(model: Any) -> list[Any]:
    """The members of lists of modules that share no parameter with others; not those inside of such members."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[Any] = []

    def visit(module: Any) -> None:
        for child in module.children():
            own = Counter(id(p) for part in child.modules() for p in part._parameters.values() if p is not None)
            listed = isinstance(module, _LISTS) and not isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict)
            if listed and own and child not in found and all(counts[key] == own[key] for key in own):
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def gather_(work: Any, model: Any) -> None:
    """*In place*: `model` gets the weights and buffers of its sharded copy `work`; a collective of all processes."""
    own = dict(_tensors(model))
    for name, tensor in _tensors(work):
        value = whole(tensor.detach()).to(own[name].device)
        if own[name].shape == value.shape:
            own[name].detach().copy_(value)
        else:  # a buffer that the forward replaced
            own[name].data = value.clone()


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` lies in parts on several processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """All of `tensor`; of a sharded one a copy, and a collective of all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Any) -> Any:
    """The part of `tensor` that lies here, without a history; writing to it writes to the tensor."""
    found = tensor.detach()
    return found.to_local() if is_sharded(found) else found


def divided(value: Any, like: Any) -> Any:
    """The whole tensor `value`, known to all processes, sharded as `like`; as it is where that is whole."""
    if not is_sharded(like) or is_sharded(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_(parameters: list[Any], norm: float, processes: Processes) -> None:
    """*In place*: scale all gradients together to a 2-norm of at most `norm`, where some are parts.

    Raises:
        ModelError: the norm is not finite.
    """
    graded = [parameter for parameter in parameters if parameter.grad is not None]
    squares = [0.0, 0.0]  # of parts, of whole ones
    for parameter in graded:
        squares[not is_sharded(parameter)] += float(own_part(parameter.grad).double().square().sum())
    total = (processes.total(squares[0]) + squares[1]) ** 0.5
    if total != total or total == float("inf"):
        raise ModelError("The gradients are not finite. Lower Train.learning_rate, or check the data.")
    for parameter in graded:
        own_part(parameter.grad).mul_(min(1.0, norm / (total + 1e-6)))
