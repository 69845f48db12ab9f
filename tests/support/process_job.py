"""One of several processes that train together: `process_job.py RANK COUNT FOLDER [shard]` writes its weights and history."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import whet
from whet import QAT, Cubic, Distill, Features, Int, Prune, Quantize, SoftTargets, Train
from whet.errors import MetricError


def examples():
    """Seven batches of 12 and one of 1: a process may be without a row."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(85, 8)).astype(np.float32)
    return [(x[i : i + 12], (x[i : i + 12, :4].sum(1) > 0).astype(np.int64)) for i in range(0, 85, 12)]


def network(width, seed):
    """A small classifier."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


def run(rank, folder, counts, shard=False, last=None):
    """Train as the test does, counting the rows of val that are scored; until `last` of its batches were."""

    def metric(outputs, targets):
        if last is not None and len(counts) == last:
            raise ArithmeticError
        counts.append(len(targets))
        return (outputs.argmax(-1) == targets).astype(np.float64)

    apply = [Prune(0.5, schedule=Cubic(end=0.5, frequency=1)), Distill([SoftTargets(), Features("0", "0")])]
    spec = Train(epochs=3, learning_rate=0.01, apply=apply, accumulate=2, clip=0.3, shard=shard)
    return whet.fit(
        network(16, rank),  # every process comes with other weights, and takes the first one's
        spec,
        train=examples(),
        val=examples()[:3],
        metric=metric,
        teacher=network(24, 5),
        progress=False,
        checkpoint=folder / "checkpoint",
    )


def main():
    """Join the others, train, write."""
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if count > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    counts, shard = [], sys.argv[4:] == ["shard"]
    if shard:
        try:
            run(rank, folder, counts, shard, last=3)
        except MetricError:
            counts.clear()
    made = run(rank, folder, counts, shard)
    qat = Quantize(Int(4), qat=QAT(epochs=1, learning_rate=1e-3, observe=0.4))
    trained = whet.quantize(
        made, qat, calibration=examples()[:2], train=examples(), fit=Train(shard=shard, decay=None), progress=False
    )
    codes = {
        name: trained.plan.encode(name, trained.float_model.get_parameter(name).detach().numpy())
        for name in trained.plan.weights
    }
    np.savez(folder / f"codes-{rank}.npz", **codes)
    np.savez(folder / f"weights-{rank}.npz", **{name: t.numpy() for name, t in made.model.state_dict().items()})
    (folder / f"told-{rank}.json").write_text(
        json.dumps({"rows": counts, "history": made.steps[-1].train["history"], "notes": made.steps[-1].train["notes"]})
    )
    if count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
