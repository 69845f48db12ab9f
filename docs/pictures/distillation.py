"""Draws the pictures of docs/distillation.md from the losses' own functions: python docs/pictures/distillation.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from whet.numerics.losses_features import attention_map
from whet.numerics.namespace import numpy_namespace as xp

BLUE, ORANGE, GREY = "#3b7dd8", "#e08a2b", "#808080"
NAMES = ("cat", "dog", "fox", "car", "van")
TEACHER, STUDENT = np.array([6.0, 4.2, 3.4, -1.0, -1.6]), np.array([5.0, 1.0, 3.0, 1.0, -2.0])


def text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "middle", colour: str = GREY) -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def box(x: float, y: float, w: float, h: float, colour: str, opacity: float = 1.0) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}" fill-opacity="{opacity:.2f}"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GREY, width: float = 1.0, dash: str = "") -> str:
    """A line, dashed if said."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}" fill="none"{dashed}/>'


def bars(
    x: float, y: float, values: Sequence[float], colour: str, names: Sequence[str], title: str, top: float = 1.0
) -> list[str]:
    """Bars over names, `y` the base line, 70 high for `top`."""
    made = [text(x + 11 * len(values), y - 80, title), line(x - 4, y, x + 22 * len(values), y)]
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        height = 70 * max(value, 0.0) / top
        made += [box(x + 22 * i, y - height, 17, height, colour), text(x + 22 * i + 8, y + 12, name, size=9)]
    return made


def heat(x: float, y: float, values: np.ndarray, colour: str, title: str, cell: float = 15) -> list[str]:
    """A matrix as squares, the largest value full."""
    most = float(values.max()) or 1.0
    made = [text(x + cell * values.shape[1] / 2, y - 6, title)]
    for i, row in enumerate(values):
        made += [box(x + cell * j, y + cell * i, cell - 1, cell - 1, colour, 0.06 + 0.94 * v / most) for j, v in enumerate(row)]
    return made


def softmax(z: np.ndarray) -> np.ndarray:
    """Of a row."""
    return np.exp(xp.log_softmax(z))


def soft_targets() -> tuple[int, int, Iterable[str]]:
    """What a temperature shows of the classes that are wrong."""
    parts = []
    for i, temperature in enumerate((1, 4, 20)):
        parts += bars(10 + 140 * i, 100, softmax(TEACHER / temperature), BLUE, NAMES, f"teacher, T = {temperature}")
    return 420, 120, parts


def dkd() -> tuple[int, int, Iterable[str]]:
    """The target against the rest, and the rest among themselves."""
    p = softmax(TEACHER / 4)
    pair, rest = [p[0], 1 - p[0]], p[1:] / p[1:].sum()
    return 330, 120, [*bars(20, 100, pair, BLUE, ("cat", "others"), "TCKD"), *bars(150, 100, rest, ORANGE, NAMES[1:], "NCKD")]


def dist() -> tuple[int, int, Iterable[str]]:
    """A row is an example, a column a class: both are correlated with the teacher's."""
    rng = np.random.default_rng(3)
    table = np.stack([softmax(row) for row in rng.normal(size=(6, 5)) * 1.5])
    parts = [
        *heat(70, 24, table, BLUE, "examples × classes", 16),
        box(66, 55, 88, 17, ORANGE, 0.35),
        text(160, 67, "inter", anchor="start"),
    ]
    return 260, 140, [*parts, box(101, 20, 17, 104, ORANGE, 0.35), text(109, 136, "intra")]


def logits() -> tuple[int, int, Iterable[str]]:
    """Numbers are drawn to numbers."""
    parts = [text(90, 16, "logits: teacher (blue) and student")]
    for i, (t, s) in enumerate(zip(TEACHER, STUDENT, strict=True)):
        x, a, b = 20 + 34 * i, 80 - 8 * t, 80 - 8 * s
        parts += [
            line(x, a, x, b, GREY, 1, "2 2"),
            box(x - 9, a - 2, 18, 4, BLUE),
            box(x - 9, b - 2, 18, 4, ORANGE),
            text(x, 118, NAMES[i], size=9),
        ]
    return 190, 124, parts


def features() -> tuple[int, int, Iterable[str]]:
    """Layers by name, with a map of the channels between them."""
    parts = []
    for i, (height, name) in enumerate(((60, "layer1"), (44, "layer2"), (30, "layer3"), (20, "head"))):
        parts += [box(20 + 44 * i, 62 - height, 30, height, BLUE, 0.8), text(35 + 44 * i, 74, name, size=9)]
    for i, (height, name) in enumerate(((40, "layer1"), (30, "layer2"), (20, "head"))):
        parts += [box(20 + 64 * i, 170 - height, 22, height, ORANGE, 0.8), text(31 + 64 * i, 182, name, size=9)]
    parts += [
        line(95, 140, 79, 80, GREY, 1.5),
        text(104, 112, "r: a map of channels, trained and thrown away", anchor="start", size=9),
    ]
    return 320, 190, [*parts, text(215, 40, "teacher", anchor="start"), text(215, 160, "student", anchor="start")]


def attention_transfer() -> tuple[int, int, Iterable[str]]:
    """Where features are strong, whatever their channels."""
    y, x = np.mgrid[0:6, 0:6]
    maps = []
    for centre, channels in (((2, 3), 8), ((3, 2), 3)):
        strength = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 4)[None, ..., None]
        noise = np.random.default_rng(channels).normal(size=(1, 6, 6, channels))
        maps.append(attention_map(strength * (1 + 0.3 * noise), xp=xp).reshape(6, 6))
    return (
        250,
        125,
        [*heat(15, 24, maps[0], BLUE, "teacher, 8 channels"), *heat(140, 24, maps[1], ORANGE, "student, 3 channels")],
    )


def attention_matrices() -> tuple[int, int, Iterable[str]]:
    """Four heads of the teacher are two groups for a student of two; value relations have no heads to match."""
    rng = np.random.default_rng(0)
    parts = []
    for i in range(4):
        q, k = rng.normal(size=(2, 5, 4)) * 1.2
        scores = np.stack([softmax(row) for row in q @ k.T / 2])
        parts += heat(12 + 75 * i, 26, scores, BLUE, f"head {i + 1}", 12)
    for i in range(2):
        q, k = rng.normal(size=(2, 5, 4))
        scores = np.stack([softmax(row) for row in q @ k.T / 2])
        parts += [*heat(50 + 150 * i, 118, scores, ORANGE, "", 12), text(80 + 150 * i, 192, f"student's head {i + 1}")]
        parts += [line(80 + 150 * i, 114, 42 + 150 * i, 90), line(80 + 150 * i, 114, 117 + 150 * i, 90)]
    return 320, 200, parts


def relation() -> tuple[int, int, Iterable[str]]:
    """Distances and angles between examples, and how alike they are."""
    points = np.array([[0.15, 0.25], [0.8, 0.2], [0.45, 0.85], [0.7, 0.6]])
    parts = []
    for i, (colour, name, turn) in enumerate(((BLUE, "teacher", 0.0), (ORANGE, "student", 0.5))):
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        placed = 90 * ((points - 0.5) @ rotation.T * (0.8 + 0.2 * i) + 0.5) + np.array([15 + 130 * i, 22])
        parts += [text(60 + 130 * i, 14, name)]
        for a in range(4):
            parts += [line(*placed[a], *placed[b], colour, 1, "3 2") for b in range(a)]
            parts.append(f'<circle cx="{placed[a][0]:.1f}" cy="{placed[a][1]:.1f}" r="4" fill="{colour}"/>')
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    return 400, 120, [*parts, *heat(300, 30, (unit @ unit.T) ** 6, BLUE, "similarities", 18)]


def contrast() -> tuple[int, int, Iterable[str]]:
    """Each student's view is told from every other example's."""
    table = 0.15 + 0.85 * np.eye(6)
    return (
        300,
        130,
        [
            *heat(80, 28, table, BLUE, "teacher's examples", 15),
            text(70, 76, "student's", anchor="end"),
            text(180, 50, "together", anchor="start"),
            text(180, 100, "apart", anchor="start"),
        ],
    )


PICTURES = {
    "soft-targets": soft_targets,
    "dkd": dkd,
    "dist": dist,
    "logits": logits,
    "features": features,
    "attention-transfer": attention_transfer,
    "attention-matrices": attention_matrices,
    "relations": relation,
    "contrast": contrast,
}


def main() -> int:
    """Write every picture beside this file."""
    for name, draw in PICTURES.items():
        width, height, parts = draw()
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif">'
        )
        (Path(__file__).parent / f"{name}.svg").write_text("\n".join([head, *parts, "</svg>"]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
