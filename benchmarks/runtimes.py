"""ResNet-20 on CIFAR-10 in every runtime: Whet's int8 file beside the float file and the best peer's, in one process.

    python benchmarks/runtimes.py [--images 10000] [--runtimes onnxruntime openvino executorch]

The process is pinned to one core. All numbers come from the exported files, run by their runtimes; latency is that of a
batch of 8, all files in alternation; seconds are of processor time, which on one core is wall time where nothing else
runs, the least of several. Peers quantize with the same 512 images: ONNX Runtime's quantize_static (MinMax), NNCF, torchao
PT2E. Whet's file and the peer's are then timed against each other alone, in rounds that open both files anew: the ratio of
medians over all runs, with its interval; the median of the ratios of runs that came one after the other, which a burst of
other work disturbs least; and the ratios of the single rounds, whose spread says what the machine is worth.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cifar import images, resnet20  # noqa: E402
from executorch_part import pt2e  # noqa: E402
from peers import Peer, nncf_openvino, static  # noqa: E402

import whet  # noqa: E402
from whet.numerics.statistics import bootstrap, ratio_of_medians, sqnr_db  # noqa: E402
from whet.runtimes.latency import alternate  # noqa: E402
from whet.runtimes.sessions import Session, open_session, parts  # noqa: E402
from whet.specs import TARGETS  # noqa: E402
from whet.torch import export  # noqa: E402
from whet.torch.program import quietly  # noqa: E402

CALIBRATION, BATCH = 512, 64
REPEATS, ROUNDS = 4, 6
LEAST_TOP1, MOST_RATIO, MORE_BYTES = 0.88, 1.10, 1.02
LEAST_AGREEMENT = {"onnxruntime": 0.995, "openvino": 0.990, "executorch": 0.995}
Bar = tuple[str, float, str, float]  # what, its value, the relation, the bar
LEAST_GAIN_DB = {"onnxruntime": 3.0, "openvino": 1.0, "executorch": 3.0}


PEERS: dict[str, Peer] = {"onnxruntime": static(), "openvino": nncf_openvino, "executorch": pt2e}  # with their defaults


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--runtimes", nargs="+", default=[name for name in PEERS], choices=list(LEAST_AGREEMENT))
    given = options.parse_args()
    torch.set_num_threads(1)
    x, y = images("test", given.images)
    calibration, _ = images("train", CALIBRATION)
    batches = [calibration[i : i + BATCH] for i in range(0, CALIBRATION, BATCH)]
    model = resnet20()
    case = Case(model, batches, x, y, predict(model, x), forward_seconds(model, batches))
    print(f"plain forward of {CALIBRATION} images in PyTorch on one core: {case.seconds:.2f} s")
    print(f"float model in PyTorch: top-1 {top1(case.float_outputs, y):.2%} of {len(x):,} images\n")
    for name in given.runtimes:
        with tempfile.TemporaryDirectory() as folder:
            table(name, Path(folder), case)


@dataclass(frozen=True)
class Case:
    """What every runtime is given. seconds: of PyTorch's plain forward pass over the calibration batches."""

    model: Any
    batches: list[np.ndarray]
    x: np.ndarray
    y: np.ndarray
    float_outputs: np.ndarray
    seconds: float


def table(name: str, folder: Path, case: Case) -> None:
    """One runtime: its files measured, and whether Whet's reaches the bars."""
    files = {kind: folder / f"{kind}{TARGETS[name].suffix}" for kind in ("float", "whet", "peer")}
    export(case.model, None, TARGETS[name], files["float"], example=case.batches[0])
    made, took = whet_file(name, files["whet"], case)
    start = time.process_time()
    if name in PEERS:
        with quietly():
            PEERS[name](files["float"], case.batches, files["peer"])
    peer_seconds = time.process_time() - start
    sessions = {kind: open_session(path, threads=1) for kind, path in files.items() if path.exists()}
    if name == "openvino":
        from whet.runtimes.openvino import OpenVINOSession

        sessions["float, automatic"] = OpenVINOSession(files["float"], 1, precision=None)
    outputs = {kind: run(session, case.x) for kind, session in sessions.items()}
    simulated = predict(made.model, case.x)
    print(f"{name} {sessions['whet'].version}")
    print_files(files, sessions, outputs, simulated, case)
    against = duel(files["whet"], files["peer"], case.x[:8]) if "peer" in sessions else {}
    bars = own_bars(name, outputs["whet"], simulated, min(took[1:])[0], case)
    if against:
        bars += peer_bars(files, against["medians"])
    for what, value, relation, bar in bars:
        reached = value >= bar if relation == ">=" else value <= bar
        print(f"  {'reached' if reached else 'MISSED '} {what}: {value:.4g} ({relation} {bar:.4g})")
    for what, interval in against.items():
        print(f"  latency against the peer, {what}: {' '.join(f'{value:.3f}' for value in interval)}")
    total, solved = min(took[1:])
    print(
        f"  seconds to quantize: calibrate and solve {solved:.2f}, export {total - solved:.2f}; with imports {took[0][0]:.2f}; "
        f"peer, with imports, {peer_seconds:.2f}\n"
    )


def whet_file(name: str, path: Path, case: Case) -> tuple[Any, list[tuple[float, float]]]:
    """Whet's file, made several times: what was quantized, and the seconds of each time, all and without the export."""
    took = []
    for _ in range(REPEATS):  # the first also loads what exporting needs
        start = time.process_time()
        made = whet.quantize(case.model, whet.Quantize(), calibration=case.batches, target=name, progress=False)
        middle = time.process_time()
        made.export(path, overwrite=True)
        took.append((time.process_time() - start, middle - start))
    return made, took


def print_files(
    files: dict[str, Path],
    sessions: dict[str, Session],
    outputs: dict[str, np.ndarray],
    simulated: np.ndarray,
    case: Case,
) -> None:
    """A row for each file: how right, how fast, how large, and how near to the simulation it is."""
    times = dict(zip(sessions, alternate(list(sessions.values()), case.x[:8], budget_s=6.0), strict=True))
    print(f"  {'':18}{'top-1':>8}{'ms p50':>9}{'bytes':>11}{'agrees':>9}{'dB to simulation':>18}")
    for kind, session in sessions.items():
        size = bytes_of(files.get(kind, files["float"]))
        agreed = np.mean(outputs[kind].argmax(1) == simulated.argmax(1))
        noise = sqnr_db(simulated, outputs[kind])
        p50 = times[kind].latency(batch=8, threads=session.threads).p50
        print(f"  {kind:18}{top1(outputs[kind], case.y):8.2%}{p50:9.3f}{size:11,}{agreed:9.2%}{noise or np.inf:18.1f}")
    print(f"  simulation        {top1(simulated, case.y):8.2%}")


def own_bars(name: str, outputs: np.ndarray, simulated: np.ndarray, seconds: float, case: Case) -> list[Bar]:
    """What Whet's file must reach by itself; `seconds` is what quantizing took."""
    right = top1(outputs, case.y)
    agreed = float(np.mean(outputs.argmax(1) == simulated.argmax(1)))
    low = sqnr_db(simulated, case.float_outputs) or 0
    return [
        ("top-1", right, ">=", LEAST_TOP1),
        ("|file - simulation| in top-1", abs(right - top1(simulated, case.y)), "<=", 0.003),
        ("agreement with the simulation", agreed, ">=", LEAST_AGREEMENT[name]),
        ("dB, file against simulation", sqnr_db(simulated, outputs) or np.inf, ">=", low + LEAST_GAIN_DB[name]),
        ("seconds to quantize, imports done", seconds, "<=", 1.5 * case.seconds + 1),
    ]


def peer_bars(files: dict[str, Path], ratio: Sequence[float]) -> list[Bar]:
    """What it must reach beside the peer's; `ratio` is the interval of the ratio of medians."""
    return [
        ("latency against the peer, upper end of 95 %", ratio[1], "<=", MOST_RATIO),
        ("bytes against the peer", bytes_of(files["whet"]) / bytes_of(files["peer"]), "<=", MORE_BYTES),
    ]


def bytes_of(path: Path) -> int:
    """The size of a file and of what belongs to it."""
    return sum(item.stat().st_size for item in parts(path))


def duel(mine: Path, its: Path, x: np.ndarray) -> dict[str, Sequence[float]]:
    """Times of two files in alternation: intervals of the ratio of medians and of the median of ratios, and what each
    round says alone."""
    rounds = []
    for _ in range(ROUNDS):
        pair = alternate([open_session(mine, threads=1), open_session(its, threads=1)], x, budget_s=4.0)
        rounds.append((pair[0].ms, pair[1].ms, min(timed.cpu_per_wall for timed in pair)))
    first, second = (np.concatenate([item[index] for item in rounds]) for index in (0, 1))
    return {
        "medians": ratio_of_medians(first, second),
        "paired": bootstrap(first / second, np.median),
        "rounds": sorted(float(np.median(a) / np.median(b)) for a, b, _ in rounds),
        "processor's share of the time": [min(share for *_, share in rounds)],
    }


def forward_seconds(model: Any, batches: list[np.ndarray]) -> float:
    """The best of three plain passes over the calibration images."""
    tensors, best = [torch.from_numpy(batch) for batch in batches], float("inf")
    for _ in range(3):
        start = time.process_time()
        with torch.no_grad():
            for tensor in tensors:
                model(tensor)
        best = min(best, time.process_time() - start)
    return best


def predict(model: Any, x: np.ndarray) -> np.ndarray:
    """The outputs of a PyTorch model."""
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(x[i : i + 250])).numpy() for i in range(0, len(x), 250)])


def run(session: Session, x: np.ndarray) -> np.ndarray:
    """The outputs of a file."""
    return np.concatenate([session.run(x[i : i + 250]) for i in range(0, len(x), 250)])


def top1(outputs: np.ndarray, y: np.ndarray) -> float:
    """The fraction of examples whose highest output is their label."""
    return float(np.mean(outputs.argmax(1) == y))


if __name__ == "__main__":
    sys.exit(main())
