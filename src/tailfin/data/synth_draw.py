"""Drawing one synthetic scene: a lit, textured ground with clutter, and objects that are shape x texture x colour.

`draw_scene` is a pure function of its random generator and the looks of the objects. Geometry comes first (outlines,
places, which object hides which), then paint: ground, clutter, and for each object from back to front its shadow, its
surface in object coordinates (so a texture turns with its object), its shading, and the camera's blur and noise last.

Units: unit coordinates have the object in about [-1, 1]^2; pixels are continuous with (0, 0) at the corner of the
first pixel. Colours are float32 in 0..1.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from tailfin.data.synth_shapes import (
    COLOURS,
    OUTLINES,
    SUPERSAMPLE,
    Array,
    Body,
    Look,
    polar_points,
    rasterise,
    rotation_matrix,
    unit_vector,
)

Mask = NDArray[np.bool_]

# hue, saturation, value
MIN_VISIBLE = 0.4  # objects with a smaller visible part are not annotated
_TRIES = 16


@dataclass(frozen=True)
class Drawn:
    """An object that can be seen in the finished scene.

    `outline` is its polygon in pixels, float64 [P, 2], when nothing hides any of it; `mask` is the visible region,
    bool [H, W].
    """

    index: int  # position in the looks that were asked for
    outline: NDArray[np.floating] | None
    mask: Mask


def draw_scene(rng: np.random.Generator, looks: Sequence[Look], size: int) -> tuple[NDArray[np.uint8], list[Drawn]]:
    """Draw a scene of `size` x `size` pixels with one object per look, the first at the back.

    Returns the picture, uint8 [size, size, 3], and the objects whose visible part is large enough, in order.
    """
    light = unit_vector(rng.uniform(0, 2 * math.pi))
    bodies = _place(rng, looks, size)
    canvas = _ground(rng, size)
    for _ in range(rng.integers(2, 7)):
        _paint(canvas, rng, _scrap(rng, size), light)
    for body in bodies:
        _paint(canvas, rng, body, light)
    strand = _strand(rng, size) if rng.random() < 0.3 else None
    if strand is not None:
        canvas += strand[0][..., None] * (strand[1] - canvas)
    picture = _camera(rng, canvas, light)

    owner = np.full((size, size), -1, np.int32)
    for k, body in enumerate(bodies):
        owner[body.window][body.alpha[body.inside] >= 0.5] = k
    if strand is not None:
        owner[strand[0] >= 0.5] = -1
    drawn = []
    for k, body in enumerate(bodies):
        mask = owner == k
        visible = np.count_nonzero(mask)
        if visible < MIN_VISIBLE * body.pixels or visible < 16:
            continue
        drawn.append(Drawn(k, body.outline if visible == body.pixels else None, mask))
    return picture, drawn


# geometry


def _place(rng: np.random.Generator, looks: Sequence[Look], size: int) -> list[Body]:
    """Put the objects one on another so that, where possible, each keeps enough of itself in view."""
    bodies: list[Body] = []
    owner = np.full((size, size), -1, np.int32)
    for look in looks:
        best, best_visible = None, -1.0
        for attempt in range(_TRIES):
            body = _body(rng, look, size, shrink=1 - 0.5 * attempt / _TRIES)
            trial = owner.copy()
            trial[body.window][body.alpha[body.inside] >= 0.5] = len(bodies)
            seen = np.bincount(trial[trial >= 0], minlength=len(bodies) + 1)
            visible = min(seen[k] / max(b.pixels, 1) for k, b in enumerate([*bodies, body]))
            if visible > best_visible:
                best, best_visible, best_owner = body, visible, trial
            if visible >= MIN_VISIBLE + 0.1:
                break
        assert best is not None
        bodies.append(best)
        owner = best_owner
    return bodies


def _body(rng: np.random.Generator, look: Look, size: int, shrink: float) -> Body:
    radius = shrink * size * math.exp(rng.uniform(math.log(0.09), math.log(0.24)))
    centre = rng.uniform(0.55 * radius, size - 0.55 * radius, 2)
    turn, tilt = rng.normal(0, 0.5), rng.uniform(0, math.pi)
    squash = rng.uniform(0.72, 1.0)
    matrix = radius * rotation_matrix(tilt) @ np.diag([1.0, squash]) @ rotation_matrix(turn - tilt)
    return rasterise(OUTLINES[look.shape], matrix, centre, radius, look, size)


def _scrap(rng: np.random.Generator, size: int) -> Body:
    """Clutter on the ground: a pebble, a shard or a stick, in no class's shape."""
    kind = rng.integers(3)
    if kind == 0:
        angle = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        outline = polar_points(angle, rng.uniform(0.75, 1.0, 14))
    elif kind == 1:
        outline = polar_points(np.sort(rng.uniform(0, 2 * math.pi, 5)), rng.uniform(0.6, 1.1, 5))
    else:
        outline = np.array([[-1, -0.07], [1, -0.04], [1, 0.04], [-1, 0.07]]) * rng.uniform(1, 2)
    radius = size * rng.uniform(0.03, 0.09)
    matrix = radius * rotation_matrix(rng.uniform(0, 2 * math.pi)) @ np.diag([1.0, rng.uniform(0.6, 1.0)])
    return rasterise(outline, matrix, rng.uniform(0, size, 2), radius, None, size)


def _strand(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A thin blade or cable in front of everything: its coverage [size, size] and colour [3]."""
    t = np.linspace(0, 1, 24)
    start, end = rng.uniform(0, size, 2), rng.uniform(0, size, 2)
    start[rng.integers(2)], end[rng.integers(2)] = -4, size + 4
    bow = rng.normal(0, 0.12 * size) * np.sin(math.pi * t)
    across = unit_vector(math.atan2(end[1] - start[1], end[0] - start[0]) + math.pi / 2)
    path = (start + t[:, None] * (end - start) + bow[:, None] * across) * SUPERSAMPLE
    patch = Image.new("L", (size * SUPERSAMPLE, size * SUPERSAMPLE))
    width = max(1, round(size / 160 * rng.uniform(1.2, 2.6) * SUPERSAMPLE))
    ImageDraw.Draw(patch).line([tuple(p) for p in path.tolist()], fill=255, width=width, joint="curve")
    colour = _hsv(rng.uniform(0.08, 0.35), rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.5))
    return np.asarray(patch.reduce(SUPERSAMPLE), np.float32) / np.float32(255), colour


# ground


def _ground(rng: np.random.Generator, size: int) -> Array:
    kind = rng.integers(6)
    dark, bright = _earth(rng)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if kind == 0:  # soil, grass, sand, stone
        canvas = _blend(dark, bright, _noise(rng, size, (3, 8, 20, 48)))
    elif kind == 1:  # planks
        boards = rng.integers(3, 8)
        across = y * boards + rng.random()
        shade = rng.uniform(-0.12, 0.12, boards + 2).astype(np.float32)[across.astype(int)]
        grain = _noise(rng, size, (4, 10), stretch=10)
        canvas = _blend(dark, bright, 0.25 + 0.5 * grain + shade)
        canvas *= (1 - 0.55 * (np.abs(across % 1 - 0.5) > 0.5 - 0.02 * boards / 5))[..., None]
    elif kind == 2:  # tiles seen at a slant
        turn, number = rng.uniform(-0.6, 0.6), rng.uniform(3, 7)
        depth = 1 + rng.uniform(0, 0.6) * y
        u = (x * math.cos(turn) - y * math.sin(turn)) * number / depth + 40.5
        v = (x * math.sin(turn) + y * math.cos(turn)) * number / depth + 40.5
        shade = rng.uniform(-0.18, 0.18, (97, 97)).astype(np.float32)[u.astype(int) % 97, v.astype(int) % 97]
        canvas = _blend(dark, bright, 0.5 + shade + 0.35 * (_noise(rng, size, (6, 30)) - 0.5))
        joint = np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5))
        canvas *= (1 - 0.45 * np.clip((joint - 0.46) * 60, 0, 1))[..., None]
    elif kind == 3:  # open land under a sky
        horizon = rng.uniform(0.15, 0.4)
        ridge = horizon + 0.1 * (_noise(rng, size, (3, 7, 16))[:1] - 0.5)
        sky = _blend(_hsv(0.58, rng.uniform(0.1, 0.5), 0.75), _hsv(0.6, 0.08, 0.95), y / horizon)
        sky += 0.12 * (_noise(rng, size, (3, 6), stretch=2) - 0.5)[..., None]
        land = _blend(dark, bright, _noise(rng, size, (6, 24, 60), stretch=2) * (0.5 + 0.5 * y))
        below = np.clip((y - ridge) * size / 2, 0, 1)[..., None]
        canvas = sky + below * (land - sky)
    elif kind == 4:  # out of focus, with lights
        canvas = _blend(dark, bright, _noise(rng, size, (2, 4)))
        for _ in range(rng.integers(4, 12)):
            centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.14)
            spot = np.clip((radius - np.hypot(x - centre[0], y - centre[1])) * 30, 0, 1)
            glow = _hsv(rng.random(), rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.95))
            canvas += (rng.uniform(0.1, 0.4) * spot)[..., None] * (glow - canvas)
    else:  # cloth
        threads = rng.uniform(30, 50)
        weave = np.sin(2 * math.pi * threads * x) * np.sin(2 * math.pi * threads * y)
        folds = _noise(rng, size, (2, 4), stretch=3)
        canvas = _blend(dark, bright, 0.2 + 0.7 * folds + 0.06 * weave + 0.1 * _noise(rng, size, (40,)))
    return np.clip(canvas, 0, 1).astype(np.float32)


def _earth(rng: np.random.Generator) -> tuple[Array, Array]:
    """Two muted colours of one material, the darker first."""
    hue, saturation = rng.choice([0.08, 0.11, 0.22, 0.3, 0.55, 0.6, 0.0]), rng.uniform(0.04, 0.38)
    value = rng.uniform(0.22, 0.5)
    return (
        _hsv(hue + rng.normal(0, 0.02), saturation, value),
        _hsv(hue + rng.normal(0, 0.03), saturation * rng.uniform(0.5, 1), min(0.92, value + rng.uniform(0.15, 0.4))),
    )


def _noise(rng: np.random.Generator, size: int, grids: Sequence[int], stretch: float = 1) -> Array:
    """Smooth noise in 0..1, [size, size]: a sum of random grids, each finer one weaker; `stretch` draws it out in x."""
    total = np.zeros((size, size), np.float32)
    for level, cells in enumerate(grids):
        grid = rng.random((cells + 1, max(2, round(cells / stretch) + 1)), np.float32)
        layer = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(layer) * 0.62**level
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


# paint


def _paint(canvas: Array, rng: np.random.Generator, body: Body, light: NDArray[np.float64]) -> None:
    """Cast the body's shadow on the canvas, then lay its shaded surface over it (in place)."""
    _shadow(canvas, rng, body, light)
    height, width = body.alpha.shape
    alpha, surface = body.alpha, _surface(rng, body)
    relief = gaussian_filter(alpha, max(1.0, 0.16 * body.radius), truncate=2.5)
    slope_y, slope_x = np.gradient(relief)
    facing = -(slope_x * light[0] + slope_y * light[1]) * body.radius
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x += body.corner[0] + 0.5 - body.centre[0]
    y += body.corner[1] + 0.5 - body.centre[1]
    along = (x * light[0] + y * light[1]) / body.radius
    shade = 1 + rng.uniform(0.25, 0.5) * facing + rng.uniform(0.05, 0.22) * along
    grain = rng.standard_normal((height, width), np.float32) * rng.uniform(0.01, 0.04)
    surface *= np.clip(shade + grain, 0.25, 1.7)[..., None]
    if body.look is not None and rng.random() < 0.5:  # a highlight
        spot = 0.45 * body.radius * light
        distance = (x - spot[0]) ** 2 + (y - spot[1]) ** 2
        surface += (rng.uniform(0.1, 0.35) * np.exp(-distance / (0.12 * body.radius**2)))[..., None]
    if rng.random() < 0.25:  # out of the plane of focus
        alpha = gaussian_filter(alpha, rng.uniform(0.4, 0.9), truncate=3)
    region = canvas[body.window]
    region += alpha[body.inside][..., None] * (surface[body.inside] - region)


def _shadow(canvas: Array, rng: np.random.Generator, body: Body, light: NDArray[np.float64]) -> None:
    reach = math.ceil(0.35 * body.radius) + 3
    padded = np.pad(body.alpha, reach)
    soft = gaussian_filter(padded, 0.5 + 0.1 * body.radius * rng.uniform(0.5, 1.2), truncate=2)
    shift = np.rint(-light * body.radius * rng.uniform(0.08, 0.22)).astype(int)
    cast = Body(body.outline, (body.corner[0] - reach + int(shift[0]), body.corner[1] - reach + int(shift[1])),
                 soft, body.inverse, body.centre, body.radius, None, body.size)  # fmt: skip
    rows, columns = cast.window
    if rows.start < rows.stop and columns.start < columns.stop:
        canvas[rows, columns] *= (1 - rng.uniform(0.3, 0.55) * soft[cast.inside])[..., None]


def _surface(rng: np.random.Generator, body: Body) -> Array:
    """Unshaded colours of the body, float32 [h, w, 3]."""
    if body.look is None:
        dark, bright = _earth(rng)
        return np.broadcast_to(dark + rng.random() * (bright - dark), (*body.alpha.shape, 3)).copy()
    hue, saturation, value = COLOURS[body.look.colour]
    jitter = rng.normal(0, 1, 3)
    base = _hsv(hue + 0.008 * jitter[0], saturation * (1 + 0.08 * jitter[1]), value * (1 + 0.07 * jitter[2]))
    luma = float(base @ np.array([0.3, 0.59, 0.11], np.float32))
    other = 0.28 * base if luma > 0.55 else 0.12 * base + 0.82
    return _blend(base, other.astype(np.float32), _texture(rng, body))


def _texture(rng: np.random.Generator, body: Body) -> Array:
    """Share of the second colour, 0..1, [h, w]; edges are about one pixel wide."""
    assert body.look is not None
    height, width = body.alpha.shape
    x = np.arange(width) + (body.corner[0] + 0.5 - body.centre[0])
    y = np.arange(height) + (body.corner[1] + 0.5 - body.centre[1])
    u = body.inverse[0, 0] * x + (body.inverse[0, 1] * y)[:, None]
    v = body.inverse[1, 0] * x + (body.inverse[1, 1] * y)[:, None]
    p, q = rng.uniform(-0.12, 0.12, 2)
    two_pi, sharp = 2 * math.pi, body.radius
    match body.look.texture:
        case "striped":
            wave, rate = np.sin(two_pi * 1.5 * (u + p)), two_pi * 1.5
        case "dotted":
            wave, rate = np.cos(two_pi * 1.55 * (u + p)) + np.cos(two_pi * 1.55 * (v + q)) - 0.75, two_pi * 1.55
        case "checked":
            wave, rate = np.sin(two_pi * 1.0 * (u + p)) * np.sin(two_pi * 1.0 * (v + q)), two_pi * 0.8
        case "ringed":
            wave, rate = np.sin(two_pi * 1.7 * np.hypot(u + p, v + q)), two_pi * 1.7
        case "rimmed":
            inner = rasterise(0.66 * OUTLINES[body.look.shape], np.linalg.inv(body.inverse), body.centre,
                               body.radius, None, body.size)  # fmt: skip
            rim = np.ones((height, width), np.float32)
            dx, dy = inner.corner[0] - body.corner[0], inner.corner[1] - body.corner[1]
            rim[dy : dy + inner.alpha.shape[0], dx : dx + inner.alpha.shape[1]] -= inner.alpha
            return rim
        case "halved":
            wave, rate = u + 0.5 * v + 0.6 * p, 1.1
        case "wavy":
            wave, rate = np.sin(two_pi * 1.45 * (v + q + 0.16 * np.sin(two_pi * 1.2 * (u + p)))), two_pi * 2.2
        case _:
            return np.zeros((height, width), np.float32)
    return np.clip(0.5 + wave * sharp / rate, 0, 1).astype(np.float32)


def _camera(rng: np.random.Generator, canvas: Array, light: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Uneven light, white balance, exposure, blur and sensor noise."""
    size = len(canvas)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    field = 1 + rng.uniform(0, 0.35) * (x * light[0] + y * light[1]) - rng.uniform(0, 0.5) * (x * x + y * y)
    if rng.random() < 0.3:  # dappled shade
        field *= 1 - 0.35 * np.clip((_noise(rng, size, (3, 6)) - 0.55) * 5, 0, 1)
    balance = rng.normal(1, 0.03, 3) * rng.uniform(0.85, 1.12)
    canvas = np.clip(canvas * (field[..., None] * balance.astype(np.float32)), 0, 1)
    tones = np.rint(255 * (np.arange(256) / 255) ** rng.uniform(0.85, 1.2)).astype(int).tolist()
    picture = Image.fromarray((canvas * 255 + 0.5).astype(np.uint8)).point(tones * 3)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 0.65) * max(1, size / 200)))
    noisy = np.asarray(picture, np.float32) + rng.standard_normal((size, size, 3), np.float32) * rng.uniform(1, 6)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)


# small pieces


def _blend(first: Array, second: Array, share: Array) -> Array:
    return first + np.asarray(share, np.float32)[..., None] * (second - first)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1)), np.float32)
