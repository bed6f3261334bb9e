"""Looks and bodies of the objects in the synthetic pictures: outlines, and what of a canvas they cover."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]


SHAPES = (
    "disc", "square", "triangle", "star", "cross", "heart", "hexagon", "crescent",
    "arrow", "drop", "bolt", "gear", "leaf", "house", "fish", "bottle",
)  # fmt: skip


TEXTURES = ("plain", "striped", "dotted", "checked", "ringed", "rimmed", "halved", "wavy")


COLOURS = {
    "red": (0.99, 0.85, 0.80),
    "green": (0.34, 0.75, 0.58),
    "blue": (0.61, 0.80, 0.78),
    "yellow": (0.14, 0.85, 0.92),
    "purple": (0.78, 0.62, 0.66),
    "cyan": (0.50, 0.70, 0.82),
    "orange": (0.07, 0.90, 0.93),
    "pink": (0.93, 0.42, 0.95),
    "brown": (0.06, 0.62, 0.42),
    "white": (0.12, 0.06, 0.93),
}


SUPERSAMPLE = 4


class Look(NamedTuple):
    """What a class looks like."""

    shape: str
    texture: str
    colour: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.texture} {self.shape}"


@dataclass
class Body:
    """Geometry of one thing in the scene, with its coverage on a patch that may reach over the border."""

    outline: NDArray[np.floating]  # pixels, [P, 2]
    corner: tuple[int, int]  # x, y of the patch's first pixel
    alpha: Array  # coverage, [h, w]
    inverse: NDArray[np.floating]  # 2 x 2, pixels from the centre -> unit coordinates
    centre: NDArray[np.floating]
    radius: float
    look: Look | None
    size: int

    @property
    def pixels(self) -> int:
        return int(np.count_nonzero(self.alpha >= 0.5))

    @property
    def window(self) -> tuple[slice, slice]:
        """Where the patch lies on the canvas."""
        (x, y), (h, w) = self.corner, self.alpha.shape
        starts = max(y, 0), max(x, 0)  # a patch beyond the canvas has an empty window
        return slice(starts[0], max(starts[0], min(y + h, self.size))), slice(
            starts[1], max(starts[1], min(x + w, self.size))
        )

    @property
    def inside(self) -> tuple[slice, slice]:
        """The part of the patch that lies on the canvas."""
        (x, y), (rows, columns) = self.corner, self.window
        return slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)


def rasterise(
    outline: NDArray[np.floating],
    matrix: NDArray[np.floating],
    centre: NDArray[np.floating],
    radius: float,
    look: Look | None,
    size: int,
) -> Body:
    points = outline @ matrix.T + centre
    low = np.floor(points.min(0)).astype(int) - 2
    high = np.ceil(points.max(0)).astype(int) + 2
    alpha = _coverage(points - low, high - low)
    return Body(points, (int(low[0]), int(low[1])), alpha, np.linalg.inv(matrix), centre, radius, look, size)


def _coverage(points: NDArray[np.floating], shape: NDArray[np.int_]) -> Array:
    """Antialiased fill of a polygon (patch pixels) on a patch of (width, height)."""
    patch = Image.new("L", (int(shape[0]) * SUPERSAMPLE, int(shape[1]) * SUPERSAMPLE))
    # Pillow's integer points are pixel centres, and it fills the border too
    ImageDraw.Draw(patch).polygon([tuple(p) for p in (points * SUPERSAMPLE - 0.5).tolist()], fill=255)
    return np.asarray(patch.reduce(SUPERSAMPLE), np.float32) / np.float32(255)


def unit_vector(angle: float) -> NDArray[np.float64]:
    return np.array([math.cos(angle), math.sin(angle)])


def rotation_matrix(angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def polar_points(angle: NDArray[np.float64], radius: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _outlines() -> dict[str, NDArray[np.float64]]:
    """Unit outlines, float64 [P, 2], y downwards."""
    up = -math.pi / 2

    def ring(count: int, start: float = up) -> NDArray[np.float64]:
        return start + np.linspace(0, 2 * math.pi, count, endpoint=False)

    def points(*xy: float) -> NDArray[np.float64]:
        return np.array(xy, np.float64).reshape(-1, 2)

    t = ring(36, 0.0)
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1
    )
    outer = polar_points(np.linspace(0.7, 2 * math.pi - 0.7, 24), 1.0)
    bite = np.array([0.62, 0.0]) + polar_points(np.linspace(2 * math.pi - 1.52, 1.52, 18), 0.66)
    drop_angle = np.linspace(-0.62, math.pi + 0.62, 22)
    leaf_x = np.linspace(-1, 1, 14)
    leaf_y = 0.52 * (1 - leaf_x**2) ** 0.8
    return {
        "disc": 0.92 * polar_points(ring(36), 1.0),
        "square": 0.8 * points(-1, -1, 1, -1, 1, 1, -1, 1),
        "triangle": points(0, -1, 0.98, 0.75, -0.98, 0.75),
        "star": 1.1 * polar_points(ring(10), np.tile([1.0, 0.45], 5)),
        "cross": points(-0.34, -1, 0.34, -1, 0.34, -0.34, 1, -0.34, 1, 0.34, 0.34, 0.34,
                        0.34, 1, -0.34, 1, -0.34, 0.34, -1, 0.34, -1, -0.34, -0.34, -0.34),
        "heart": heart / 16.5,
        "hexagon": 0.95 * polar_points(ring(6, 0.0), 1.0),
        "crescent": np.concatenate([outer, bite]) + [0.1, 0],
        "arrow": points(-1, -0.3, 0.1, -0.3, 0.1, -0.8, 1.05, 0, 0.1, 0.8, 0.1, 0.3, -1, 0.3),
        "drop": np.concatenate([points(0, -1.1), points(0, 0.3) + 0.72 * polar_points(drop_angle, 1.0)]),
        "bolt": points(0.15, -1.1, -0.75, 0.15, -0.12, 0.15, -0.35, 1.1, 0.75, -0.3, 0.1, -0.3, 0.55, -1.1),
        "gear": polar_points(ring(40) - math.pi / 40, np.tile([1.0, 1.0, 0.74, 0.74], 10)),
        "leaf": 1.1 * np.concatenate([np.stack([leaf_x, -leaf_y], 1), np.stack([leaf_x, leaf_y], 1)[-2:0:-1]]),
        "house": points(0, -1.05, 1, -0.2, 0.75, -0.2, 0.75, 0.9, -0.75, 0.9, -0.75, -0.2, -1, -0.2),
        "fish": np.concatenate([points(-1.1, -0.55), points(0.25, 0) + points(0.85, 0.58) * polar_points(
            np.linspace(math.pi + 0.45, 3 * math.pi - 0.45, 26), 1.0), points(-1.1, 0.55)]),
        "bottle": points(-0.2, -1.15, 0.2, -1.15, 0.2, -0.6, 0.48, -0.3, 0.48, 1.05, -0.48, 1.05, -0.48, -0.3,
                         -0.2, -0.6),
    }  # fmt: skip


OUTLINES = _outlines()
