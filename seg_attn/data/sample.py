"""The sample devkit: drawn scenes in the layout of Pascal VOC, a small segmentation task that needs no download.

Every picture is a scene of its own: a background of one of six kinds, plain clutter, and objects of eight classes that
overlap, cast shadows and are crossed by twigs. What tells the classes apart is outline and texture at the scale of the
object. Colour does not: each scene has one small palette, from which everything in it draws by one rule.

Layout, palette and the 255 border follow the VOC 2012 development kit
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html).
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from seg_attn.data.images import voc_palette, write_mask
from seg_attn.data.voc import CLASS_NAMES_FILE
from seg_attn.errors import InputError

Field = NDArray[Any]
"""(H, W) float32: one value per pixel."""

_LIGHT = np.array([-0.55, -0.83], dtype=np.float32)  # towards the light, in image axes: upper left


# ---------------------------------------------------------------------------------------------------------------------
# Fields: signed distances in an object's own coordinates, positive inside
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """An object's own coordinates at every pixel of its box.

    Attributes:
        u: (H, W) float32, to the right; the object lies in about [-1, 1].
        v: (H, W) float32, downwards; likewise.
        pixel: Width of one pixel in these units.
    """

    u: Field
    v: Field
    pixel: float

    def cover(self, distance: Field) -> Field:
        """Share of each pixel that lies where `distance` is positive: antialiased, in [0, 1]."""
        return np.clip(distance / self.pixel + 0.5, 0.0, 1.0)

    def stripes(self, phase: Field, period: float, duty: float = 0.5) -> Field:
        """Cover of bands at every integer of `phase`, whose period measures `period` units and is `duty` filled."""
        return self.cover((0.5 * duty - np.abs(phase - np.round(phase))) * period)


@dataclass(frozen=True)
class Layer:
    """One coat of paint.

    Attributes:
        cover: (H, W) float32 in [0, 1].
        tone: Index into the object's colours: 0 base, 1 mark, 2 second part.
        solid: Whether it adds to the silhouette; a mark (False) is only seen on what is solid below it.
    """

    cover: Field
    tone: int
    solid: bool = True


def _ellipse(grid: Grid, cu: float, cv: float, ru: float, rv: float, angle: float = 0.0) -> Field:
    """Signed distance (first order) to an ellipse about (cu, cv), turned by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    x = (c * (grid.u - cu) + s * (grid.v - cv)) / ru
    y = (c * (grid.v - cv) - s * (grid.u - cu)) / rv
    result: Field = ((1.0 - np.sqrt(x * x + y * y)) * min(ru, rv)).astype(np.float32)
    return result


def _capsule(grid: Grid, start: tuple[float, float], end: tuple[float, float], r0: float, r1: float) -> Field:
    """Signed distance to a stroke from `start` to `end` whose radius goes from `r0` to `r1`."""
    du, dv = end[0] - start[0], end[1] - start[1]
    t = np.clip(((grid.u - start[0]) * du + (grid.v - start[1]) * dv) / (du * du + dv * dv), 0.0, 1.0)
    return (r0 + (r1 - r0) * t - np.hypot(grid.u - start[0] - t * du, grid.v - start[1] - t * dv)).astype(np.float32)


def _convex(grid: Grid, *points: tuple[float, float]) -> Field:
    """Signed distance (inside) to a convex polygon whose corners run clockwise on the screen."""
    sides = []
    for (u0, v0), (u1, v1) in zip(points, (*points[1:], points[0]), strict=True):
        du, dv = u1 - u0, v1 - v0
        sides.append((du * (grid.v - v0) - dv * (grid.u - u0)) / np.hypot(du, dv))
    result: Field = np.minimum.reduce(sides).astype(np.float32)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Objects: each returns its layers from back to front
# ---------------------------------------------------------------------------------------------------------------------


def _fish(grid: Grid, rng: Generator) -> list[Layer]:
    """A body with rows of scales, a forked tail, a fin."""
    depth = rng.uniform(0.42, 0.56)
    body = grid.cover(_ellipse(grid, 0.18, 0.0, 0.8, depth))
    upper = grid.cover(_convex(grid, (-0.4, 0.12), (-0.78, 0.06), (-1.0, -0.55)))
    lower = grid.cover(_convex(grid, (-0.4, -0.12), (-1.0, 0.55), (-0.78, -0.06)))
    fin = grid.cover(_convex(grid, (-0.3, -0.5 * depth), (-0.2, -depth - 0.28), (0.4, -0.85 * depth)))
    tail = np.maximum(np.maximum(upper, lower), fin)
    size = rng.uniform(0.2, 0.27)
    row = np.round(grid.v / size)
    along = grid.u / size + 0.5 * np.mod(row, 2.0)
    arc = np.hypot(np.mod(along, 1.0), grid.v / size - row)
    scales = grid.cover((0.17 - np.abs(arc - 0.62)) * size) * grid.cover(0.52 - grid.u)
    gill = grid.cover(0.035 - np.abs(np.hypot(grid.u - 0.95, grid.v) - 0.4)) * grid.cover(0.75 - grid.u)
    eye = grid.cover(_ellipse(grid, 0.7, -0.12, 0.085, 0.085))
    return [
        Layer(tail, 2),
        Layer(body, 0),
        Layer(scales * body, 1, solid=False),
        Layer(gill * body, 1, solid=False),
        Layer(eye, 1, solid=False),
    ]


def _butterfly(grid: Grid, rng: Generator) -> list[Layer]:
    """Four wings with concentric rings on either side of a thin body."""
    lean, rings = rng.uniform(0.35, 0.6), rng.uniform(2.2, 2.9)
    mirrored = Grid(np.abs(grid.u), grid.v, grid.pixel)
    upper = _ellipse(mirrored, 0.52, -0.32, 0.54, 0.4, -lean)
    lower = _ellipse(mirrored, 0.4, 0.42, 0.42, 0.36, lean)
    wings = grid.cover(np.maximum(upper, lower))
    depth = np.where(upper > lower, 1.0 - upper / 0.4, 1.0 - lower / 0.36)
    marks = grid.stripes(depth * rings, 0.4 / rings)
    body = grid.cover(_capsule(grid, (0.0, -0.45), (0.0, 0.6), 0.09, 0.05))
    feelers = grid.cover(_capsule(mirrored, (0.02, -0.45), (0.26, -0.92), 0.025, 0.03))
    return [Layer(wings, 0), Layer(marks * wings, 1, solid=False), Layer(np.maximum(body, feelers), 2)]


def _leaf(grid: Grid, rng: Generator) -> list[Layer]:
    """A pointed blade with a midrib and slanting side veins."""
    width, veins, slant = rng.uniform(0.5, 0.66), rng.uniform(2.6, 3.6), rng.uniform(0.7, 1.0)
    radius = (1.0 + width * width) / (2.0 * width)  # of the two circles that meet in the tips
    blade = grid.cover(radius - np.hypot(np.abs(grid.u) + radius - width, grid.v + 0.06))
    side = grid.stripes((grid.v + slant * np.abs(grid.u)) * veins, 1.0 / (veins * np.hypot(1.0, slant)), 0.42)
    rib = grid.cover(0.04 - np.abs(grid.u))
    stem = grid.cover(_capsule(grid, (0.0, 0.8), (0.1, 1.15), 0.04, 0.05))
    return [Layer(stem, 2), Layer(blade, 0), Layer(np.maximum(side, rib) * blade, 1, solid=False)]


def _mushroom(grid: Grid, rng: Generator) -> list[Layer]:
    """A domed cap with round spots on a plain stem."""
    brim, thick, pitch = rng.uniform(0.15, 0.3), rng.uniform(0.16, 0.22), rng.uniform(0.44, 0.56)
    dome = _ellipse(grid, 0.0, brim, 0.98, 0.95)
    under = _ellipse(grid, 0.0, brim, 0.98, 0.16)
    cap = grid.cover(np.maximum(np.minimum(dome, brim - grid.v), under))
    foot = grid.cover(_capsule(grid, (0.0, 0.3), (0.0, 0.9 - thick * 0.3), thick, thick * 1.25))
    row = np.round((grid.v - 0.1) / (0.8 * pitch))
    along = grid.u / pitch + 0.5 * np.mod(row, 2.0)
    spot = np.hypot((along - np.round(along)) * pitch, grid.v - 0.1 - row * 0.8 * pitch)
    spots = grid.cover(rng.uniform(0.29, 0.35) * pitch - spot)
    return [Layer(foot, 2), Layer(cap, 0), Layer(spots * cap, 1, solid=False)]


def _snail(grid: Grid, rng: Generator) -> list[Layer]:
    """A spiral shell on a crawling foot."""
    turns, start = rng.uniform(2.3, 3.0), rng.uniform(0.0, 1.0)
    foot = _capsule(grid, (-0.95, 0.8), (0.72, 0.76), 0.05, 0.17)
    neck = _capsule(grid, (0.72, 0.72), (0.86, 0.16), 0.15, 0.12)
    horn = np.maximum(
        _capsule(grid, (0.84, 0.1), (0.76, -0.22), 0.035, 0.035), _capsule(grid, (0.9, 0.1), (1.02, -0.2), 0.035, 0.035)
    )
    shell = grid.cover(_ellipse(grid, -0.14, -0.06, 0.78, 0.76))
    du, dv = grid.u + 0.14, grid.v + 0.06
    coil = np.hypot(du, dv) * turns / 0.78 - np.arctan2(dv, du) / (2.0 * np.pi) + start
    marks = grid.stripes(coil, 0.78 / turns, 0.45)
    return [
        Layer(grid.cover(np.maximum(np.maximum(foot, neck), horn)), 2),
        Layer(shell, 0),
        Layer(marks * shell, 1, solid=False),
    ]


def _pineapple(grid: Grid, rng: Generator) -> list[Layer]:
    """A round body with a diamond lattice under a crown of blades."""
    width, cells = rng.uniform(0.52, 0.66), rng.uniform(2.3, 3.0)
    body = grid.cover(_ellipse(grid, 0.0, 0.3, width, 0.7))
    blades = [
        _convex(
            grid,
            (0.1 * np.sin(a) - 0.13 * np.cos(a), -0.28 - 0.1 * np.cos(a) - 0.13 * np.sin(a)),
            (0.72 * np.sin(a), -0.28 - 0.72 * np.cos(a)),
            (0.1 * np.sin(a) + 0.13 * np.cos(a), -0.28 - 0.1 * np.cos(a) + 0.13 * np.sin(a)),
        )
        for a in np.linspace(-1.1, 1.1, 5)
    ]
    crown = grid.cover(np.maximum.reduce(blades) + 0.02)
    period = 1.0 / (cells * np.sqrt(2.0))
    one = grid.stripes((grid.u + grid.v - 0.3) * cells, period, 0.34)
    two = grid.stripes((grid.u - grid.v + 0.3) * cells, period, 0.34)
    return [Layer(crown, 2), Layer(body, 0), Layer(np.maximum(one, two) * body, 1, solid=False)]


def _umbrella(grid: Grid, rng: Generator) -> list[Layer]:
    """A dome of alternating gores with a scalloped hem, on a hooked stick."""
    gores, brim = int(rng.integers(3, 5)), 0.18
    dome = _ellipse(grid, 0.0, brim, 1.0, 0.98)
    half = np.sqrt(np.clip(1.0 - ((grid.v - brim) / 0.98) ** 2, 0.02, 1.0))
    across = np.arcsin(np.clip(grid.u / half, -1.0, 1.0)) / np.pi  # -0.5 at the left rim, 0.5 at the right
    hem = brim - 0.14 * np.abs(np.cos(across * np.pi * (2 * gores - 1)))
    canopy = grid.cover(np.minimum(dome, hem - grid.v + 0.06))
    segments = grid.stripes(across * (gores - 0.5), 2.0 / (gores - 0.5), 0.5)
    stick = np.maximum(
        _capsule(grid, (0.0, -0.9), (0.0, 0.82), 0.045, 0.045),
        np.minimum(0.045 - np.abs(np.hypot(grid.u + 0.13, grid.v - 0.82) - 0.13), grid.v - 0.82),
    )
    return [Layer(grid.cover(stick), 2), Layer(canopy, 0), Layer(segments * canopy, 1, solid=False)]


def _house(grid: Grid, rng: Generator) -> list[Layer]:
    """Brick walls with a door and a window under a gable roof."""
    wall_half, eaves, course = rng.uniform(0.62, 0.78), rng.uniform(-0.2, 0.05), rng.uniform(0.2, 0.27)
    wall = grid.cover(_convex(grid, (-wall_half, eaves), (wall_half, eaves), (wall_half, 0.95), (-wall_half, 0.95)))
    roof = grid.cover(_convex(grid, (0.0, -0.98), (0.98, eaves + 0.04), (-0.98, eaves + 0.04)))
    row = np.floor((grid.v - eaves) / course)
    bed = np.abs((grid.v - eaves) / course - np.round((grid.v - eaves) / course)) * course
    along = grid.u / (2.0 * course) + 0.5 * np.mod(row, 2.0)
    head = np.abs(along - np.round(along)) * 2.0 * course
    mortar = grid.cover(0.04 - np.minimum(bed, head))
    side = float(rng.choice([-1.0, 1.0])) * wall_half * 0.45
    door = grid.cover(_convex(grid, (side - 0.15, 0.42), (side + 0.15, 0.42), (side + 0.15, 0.95), (side - 0.15, 0.95)))
    window = grid.cover(_ellipse(grid, -side, 0.42, 0.16, 0.16))
    return [
        Layer(wall, 0),
        Layer(mortar * wall, 1, solid=False),
        Layer(np.maximum(door, window), 2),
        Layer(roof, 2),
    ]


_PAINTERS: dict[str, Callable[[Grid, Generator], list[Layer]]] = {
    "fish": _fish,
    "butterfly": _butterfly,
    "leaf": _leaf,
    "mushroom": _mushroom,
    "snail": _snail,
    "pineapple": _pineapple,
    "umbrella": _umbrella,
    "house": _house,
}

SAMPLE_CLASSES: tuple[str, ...] = ("background", *_PAINTERS)
"""Class names by index; 255 in a mask is the border between segments, as in VOC."""


# ---------------------------------------------------------------------------------------------------------------------
# Colours: one palette per scene, one rule for everything in it
# ---------------------------------------------------------------------------------------------------------------------


def _scene_palette(rng: Generator) -> Field:
    """Nine colours that go together, (9, 3) float32 in [0, 1], from dark to light.

    Lightness climbs in even steps; hue wanders about two opposite ones, the habit of printed picture books.
    """
    lightness = np.linspace(22.0, 94.0, 9) + rng.normal(0.0, 2.5, 9)
    hue = rng.uniform(0.0, 2.0 * np.pi) + rng.choice([0.0, 2.1, np.pi], 9) + rng.normal(0.0, 0.35, 9)
    chroma = rng.uniform(8.0, 44.0, 9)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1).astype(np.float32)
    result: Field = np.clip(cv2.cvtColor(lab[None], cv2.COLOR_LAB2RGB)[0], 0.0, 1.0)
    return result


def _pick(palette: Field, rng: Generator) -> Field:
    """Base, mark and second-part colour of one thing: (3, 3) float32; base and mark differ by 3 or 4 steps."""
    base = int(rng.integers(len(palette)))
    step = int(rng.integers(3, 5)) * int(rng.choice([-1, 1]))
    mark = base + step if 0 <= base + step < len(palette) else base - step
    return palette[[base, mark, int(rng.integers(len(palette)))]]


# ---------------------------------------------------------------------------------------------------------------------
# Backgrounds: each returns a tone in [0, 1] between two colours
# ---------------------------------------------------------------------------------------------------------------------


def _noise(shape: tuple[int, int], cell: tuple[float, float], rng: Generator, octaves: int = 1) -> Field:
    """Smooth noise in [0, 1] whose cells measure `cell` (height, width) pixels, halved at each further octave."""
    total = np.zeros(shape, np.float32)
    weight = 1.0
    for _ in range(octaves):
        rows, columns = (max(2, int(np.ceil(n / c)) + 1) for n, c in zip(shape, cell, strict=True))
        coarse = rng.random((rows, columns), dtype=np.float32)
        total += weight * cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
        weight *= 0.5
        cell = (cell[0] / 2.0, cell[1] / 2.0)
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _sky(x: Field, y: Field, rng: Generator) -> Field:
    """Banks of cloud."""
    cloud = _noise(x.shape, (40.0, 90.0), rng, octaves=4)
    result: Field = np.clip((cloud - 0.45) * 3.0, 0.0, 1.0) * 0.75 + 0.25 * y / y.max()
    return result


def _hills(x: Field, y: Field, rng: Generator) -> Field:
    """Ranges of hills, each nearer one darker."""
    tone = np.zeros_like(x)
    height, width = x.shape
    for index, level in enumerate(np.linspace(0.2, 0.85, 4)):
        ridge = _noise((1, width), (1.0, width / rng.uniform(1.5, 4.0)), rng, octaves=3)[0] - 0.5
        top = (level + 0.28 * ridge + rng.uniform(-0.05, 0.05)) * height
        tone = np.where(y > top[None], 0.25 * (index + 1), tone)
    return tone.astype(np.float32)


def _meadow(x: Field, y: Field, rng: Generator) -> Field:
    """Tufts of grass."""
    blades = _noise(x.shape, (22.0, 4.0), rng, octaves=2)
    return np.clip(0.6 * blades + 0.4 * _noise(x.shape, (60.0, 80.0), rng, octaves=2), 0.0, 1.0)


def _water(x: Field, y: Field, rng: Generator) -> Field:
    """Ripples, closer together further away."""
    swell = _noise(x.shape, (40.0, 70.0), rng, octaves=2) * rng.uniform(14.0, 22.0)
    depth = y / y.max()
    phase = 2.0 * np.pi * rng.uniform(9.0, 15.0) * np.sqrt(depth + 0.15) + swell
    result: Field = (0.5 + 0.5 * np.sin(phase) * (0.3 + 0.7 * depth)).astype(np.float32)
    return result


def _planks(x: Field, y: Field, rng: Generator) -> Field:
    """Boards with grain and dark joints, along either axis."""
    upright = bool(rng.integers(2))
    across, along = (x, y) if upright else (y, x)
    board = across / rng.uniform(34.0, 60.0) + rng.random()
    cell = (120.0, 6.0) if upright else (6.0, 120.0)
    grain = _noise(x.shape, cell, rng, octaves=2)
    tones = rng.random(64).astype(np.float32)[np.floor(board).astype(np.int64) % 64]
    tone = 0.5 * tones + 0.5 * grain + 0.05 * np.sin(along / 40.0)
    return np.where(np.abs(board - np.round(board)) < 0.025, 1.0, tone * 0.8).astype(np.float32)


def _pebbles(x: Field, y: Field, rng: Generator) -> Field:
    """Stones side by side: the cells of a jittered grid, shaded to their joints."""
    pitch = rng.uniform(22.0, 36.0)
    rows, columns = int(y.max() / pitch) + 3, int(x.max() / pitch) + 3
    row, column = np.mgrid[0:rows, 0:columns]
    jitter = rng.uniform(-0.36, 0.36, (2, rows, columns))
    centre_y, centre_x = (row - 0.5 + jitter[0]) * pitch, (column - 0.5 + jitter[1]) * pitch
    seeds = np.full(x.shape, 255, np.uint8)
    inside = (centre_y >= 0) & (centre_y < x.shape[0]) & (centre_x >= 0) & (centre_x < x.shape[1])
    seeds[centre_y[inside].astype(np.int64), centre_x[inside].astype(np.int64)] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    tones = rng.random(int(labels.max()) + 1).astype(np.float32)[labels]
    result: Field = np.clip(0.7 * tones + 0.55 * (distance / pitch) ** 2, 0.0, 1.0).astype(np.float32)
    return result


_BACKGROUNDS: tuple[Callable[[Field, Field, Generator], Field], ...] = (
    _sky,
    _hills,
    _meadow,
    _water,
    _planks,
    _pebbles,
)


# ---------------------------------------------------------------------------------------------------------------------
# Clutter: unlabelled things without a texture
# ---------------------------------------------------------------------------------------------------------------------


def _stone(grid: Grid, rng: Generator) -> list[Layer]:
    """A smooth stone."""
    return [Layer(grid.cover(_ellipse(grid, 0.0, 0.0, 0.95, rng.uniform(0.45, 0.9))), 0)]


def _scrap(grid: Grid, rng: Generator) -> list[Layer]:
    """A scrap of paper with three to five corners, folded once."""
    corners = np.sort(rng.uniform(0.0, 0.6, int(rng.integers(3, 6)))) + np.linspace(0.0, 2.0 * np.pi, 1)
    turns = np.linspace(0.0, 2.0 * np.pi, len(corners), endpoint=False) + corners
    scrap = grid.cover(_convex(grid, *((float(np.cos(t)), float(np.sin(t))) for t in turns)))
    return [Layer(scrap, 0), Layer(scrap * grid.cover(grid.u - rng.uniform(-0.2, 0.2)), 2, solid=False)]


def _twig(grid: Grid, rng: Generator) -> list[Layer]:
    """A thin twig with a fork."""
    thick, fork, lean = rng.uniform(0.025, 0.05), rng.uniform(-0.4, 0.3), rng.uniform(0.25, 0.5)
    main = _capsule(grid, (-1.0, 0.0), (1.0, 0.0), thick, 0.6 * thick)
    side = _capsule(grid, (fork, 0.0), (fork + 0.5, -lean), 0.7 * thick, 0.5 * thick)
    return [Layer(grid.cover(np.maximum(main, side)), 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------

_OVERSAMPLING = 2
# Extents as shares of the picture's short side: tiny, small, medium, large.
_EXTENTS = ((0.11, 0.18), (0.18, 0.34), (0.34, 0.62), (0.62, 1.15))
_COUNTS = (1, 1, 2, 1)  # objects of each extent in a scene


@dataclass(frozen=True)
class ScenePlan:
    """What a scene shows.

    Attributes:
        background: Index of the kind of background.
        objects: (class index, index of the extent's range) of each object.
    """

    background: int
    objects: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Sprite:
    """A drawn thing: `colour` (h, w, 3) and `alpha` (h, w), float32 in [0, 1]."""

    colour: Field
    alpha: Field


def _sprite(
    painter: Callable[[Grid, Generator], list[Layer]], extent: float, turn: float, palette: Field, rng: Generator
) -> _Sprite:
    """Draw one thing whose longer side measures about `extent` (oversampled) pixels, turned by `turn` radians."""
    half = int(np.ceil(0.62 * extent)) + 2
    axis = np.arange(-half, half + 1, dtype=np.float32) * (2.0 / extent)
    x, y = axis[None, :], axis[:, None]
    stretch = rng.uniform(0.88, 1.12)
    flip = float(rng.choice([-1.0, 1.0]))
    c, s = float(np.cos(turn)), float(np.sin(turn))
    u, v = (c * x + s * y) * (flip / stretch), (c * y - s * x) * stretch
    colours = _pick(palette, rng)
    alpha = np.zeros(u.shape, np.float32)
    colour = np.broadcast_to(colours[0], (*u.shape, 3)).copy()
    for layer in painter(Grid(u.astype(np.float32), v.astype(np.float32), 2.0 / extent), rng):
        colour += layer.cover[..., None] * (colours[layer.tone] - colour)
        if layer.solid:
            alpha = np.maximum(alpha, layer.cover)
    # A rounded body under the scene's light: the slope of the blurred silhouette stands in for the surface's.
    soft = cv2.GaussianBlur(alpha, (0, 0), max(0.09 * extent, 1.0))
    lit = np.gradient(soft, axis=1) * _LIGHT[0] + np.gradient(soft, axis=0) * _LIGHT[1]
    shade = 1.0 - 0.14 * extent * lit
    contour = alpha - cv2.erode(alpha, np.ones((3, 3), np.uint8))
    colour *= (shade * (1.0 - 0.5 * np.clip(contour, 0.0, 1.0)))[..., None]
    return _Sprite(np.clip(colour, 0.0, 1.0), alpha)


class _Canvas:
    """A scene while it is painted, at `_OVERSAMPLING` times its final size."""

    def __init__(self, colour: Field) -> None:
        self.colour = colour
        height, width = (n // _OVERSAMPLING for n in colour.shape[:2])
        self.owner = np.zeros((height, width), np.int32)  # 0 = background, k = the k-th object
        self.areas: list[int] = [0]

    def _window(self, sprite: _Sprite, left: int, top: int) -> tuple[slice, slice, slice, slice]:
        """Rows and columns of the canvas, then of the sprite, where the two overlap."""
        height, width = self.colour.shape[:2]
        rows, columns = sprite.alpha.shape
        y0, y1, x0, x1 = max(top, 0), min(top + rows, height), max(left, 0), min(left + columns, width)
        return slice(y0, y1), slice(x0, x1), slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)

    def cover(self, sprite: _Sprite, left: int, top: int) -> NDArray[np.bool_]:
        """Pixels of the final picture that the sprite would take, (H, W) bool."""
        rows, columns, inner_rows, inner_columns = self._window(sprite, left, top)
        full = np.zeros(self.colour.shape[:2], np.float32)
        full[rows, columns] = sprite.alpha[inner_rows, inner_columns]
        height, width = self.owner.shape
        shares: Field = cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA)
        return shares >= 0.5

    def paste(self, sprite: _Sprite, left: int, top: int, *, labelled: bool) -> None:
        """Paint the sprite and its shadow; its pixels become those of a new object, or background."""
        taken = self.cover(sprite, left, top)
        extent = sprite.alpha.shape[0]
        drop = 1 + round(0.025 * extent)
        shadow = cv2.GaussianBlur(sprite.alpha, (0, 0), 0.8 + 0.02 * extent)
        rows, columns, inner_rows, inner_columns = self._window(_Sprite(sprite.colour, shadow), left + drop, top + drop)
        self.colour[rows, columns] *= 1.0 - 0.4 * shadow[inner_rows, inner_columns, None]
        rows, columns, inner_rows, inner_columns = self._window(sprite, left, top)
        alpha = sprite.alpha[inner_rows, inner_columns, None]
        self.colour[rows, columns] += alpha * (sprite.colour[inner_rows, inner_columns] - self.colour[rows, columns])
        if labelled:
            self.owner[taken] = len(self.areas)
            self.areas.append(int(taken.sum()))
        else:
            self.owner[taken] = 0

    def visible(self, taken: NDArray[np.bool_]) -> float:
        """Least share that any object keeps once the pixels `taken` are covered."""
        if len(self.areas) == 1:
            return 1.0
        kept = np.bincount(self.owner[~taken], minlength=len(self.areas))[1:]
        return float(np.min(kept / np.maximum(self.areas[1:], 1)))


def _place(canvas: _Canvas, sprite: _Sprite, rng: Generator) -> tuple[int, int]:
    """A place where the sprite is well inside the picture and leaves every earlier object half visible, if there is."""
    height, width = canvas.colour.shape[:2]
    own = float(sprite.alpha.sum()) / _OVERSAMPLING**2
    best, place = -1.0, (0, 0)
    for _ in range(12):
        left = int(rng.integers(0, width)) - sprite.alpha.shape[1] // 2
        top = int(rng.integers(0, height)) - sprite.alpha.shape[0] // 2
        taken = canvas.cover(sprite, left, top)
        score = min(canvas.visible(taken), 0.6 * float(taken.sum()) / own)
        if score > best:
            best, place = score, (left, top)
        if score >= 0.5:
            break
    return place


def draw_scene(plan: ScenePlan, size: tuple[int, int], rng: Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene.

    Args:
        plan: What it shows.
        size: (width, height) in pixels.
        rng: Source of everything the plan leaves open.

    Returns:
        The picture, (height, width, 3) uint8 RGB, and its mask, (height, width) uint8 class indices, 255 on borders.
    """
    width, height = (n * _OVERSAMPLING for n in size)
    short = min(width, height)
    palette = _scene_palette(rng)
    y, x = (np.broadcast_to(axis, (height, width)) for axis in np.ogrid[0:height, 0:width])
    x, y = x.astype(np.float32), y.astype(np.float32)
    tone = _BACKGROUNDS[plan.background](x, y, rng)
    colours = _pick(palette, rng)
    canvas = _Canvas((colours[0] + tone[..., None] * (colours[1] - colours[0])).astype(np.float32))

    for _ in range(int(rng.integers(2, 7))):
        clutter = (_stone, _scrap, _twig)[int(rng.integers(3))]
        extent = short * float(rng.uniform(0.05, 0.22))
        sprite = _sprite(clutter, extent, rng.uniform(0.0, 2.0 * np.pi), palette, rng)
        left, top = (
            int(rng.integers(0, width)) - len(sprite.alpha) // 2,
            int(rng.integers(0, height)) - len(sprite.alpha) // 2,
        )
        canvas.paste(sprite, left, top, labelled=False)

    extents = [short * float(rng.uniform(*_EXTENTS[scale])) for _, scale in plan.objects]
    # Mostly from large to small, so that little is hidden altogether.
    order = np.argsort([-extent * rng.lognormal(0.0, 0.5) for extent in extents])
    names = list(_PAINTERS)
    for index in order:
        painter = _PAINTERS[names[plan.objects[index][0] - 1]]
        sprite = _sprite(painter, extents[index], rng.uniform(-0.4, 0.4), palette, rng)
        canvas.paste(sprite, *_place(canvas, sprite, rng), labelled=True)

    for _ in range(int(rng.integers(0, 2))):
        sprite = _sprite(_twig, short * float(rng.uniform(0.5, 1.0)), rng.uniform(0.0, 2.0 * np.pi), palette, rng)
        left, top = (
            int(rng.integers(0, width)) - len(sprite.alpha) // 2,
            int(rng.integers(0, height)) - len(sprite.alpha) // 2,
        )
        canvas.paste(sprite, left, top, labelled=False)

    turn = rng.uniform(0.0, 2.0 * np.pi)
    slope = (x / width - 0.5) * np.cos(turn) + (y / height - 0.5) * np.sin(turn)
    light = rng.uniform(0.9, 1.05) + rng.uniform(0.1, 0.45) * slope
    picture = cv2.resize(canvas.colour * light[..., None].astype(np.float32), size, interpolation=cv2.INTER_AREA)
    picture += rng.normal(0.0, rng.uniform(0.008, 0.03), picture.shape)
    labels = np.array([0, *(plan.objects[index][0] for index in order)], np.uint8)
    return np.clip(picture * 255.0 + 0.5, 0, 255).astype(np.uint8), _with_borders(canvas.owner, labels)


def _with_borders(owner: NDArray[np.int32], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class of each pixel's owner, and 255 on both sides of every boundary between owners."""
    window = np.ones((3, 3), np.uint8)
    values = owner.astype(np.uint8)
    mask = labels[owner]
    mask[cv2.dilate(values, window) != cv2.erode(values, window)] = 255
    return mask


def plan_scenes(count: int, rng: Generator) -> list[ScenePlan]:
    """Deal classes, extents and backgrounds so that each class meets each background and each range of extents.

    Every background has a deck of its own for every range of extents; a deck holds each class once and is shuffled
    anew when it is used up. The first scenes of a longer list are those of a shorter one.
    """
    decks: dict[tuple[int, int], list[int]] = {}
    plans = []
    for index in range(count):
        background = index % len(_BACKGROUNDS)
        objects = []
        for scale, number in enumerate(_COUNTS):
            for _ in range(number):
                deck = decks.setdefault((background, scale), [])
                if not deck:
                    deck.extend(int(k) for k in rng.permutation(len(_PAINTERS)) + 1)
                objects.append((deck.pop(), scale))
        plans.append(ScenePlan(background, tuple(objects)))
    return plans


# ---------------------------------------------------------------------------------------------------------------------
# The devkit
# ---------------------------------------------------------------------------------------------------------------------

_MANIFEST = "sample.json"  # written last: a devkit without it is not ours or not complete
_DRAWING = 1  # goes up when the same seed draws other pictures


def write_sample(
    root: str | Path, *, seed: int = 0, train: int = 200, val: int = 60, size: tuple[int, int] = (160, 120)
) -> Path:
    """Draw the sample scenes and write them in the layout of the VOC 2012 development kit.

    `root/VOCdevkit/VOC2012` appears complete or not at all; where it stands already, drawn from the same arguments,
    nothing is done. Every scene is drawn from a stream of its own, so training and validation share none, and the first
    scenes of a larger set are those of a smaller one.

    Args:
        root: Folder that gets `VOCdevkit`; made where it is missing.
        seed: What the scenes are drawn from, at least 0.
        train: Number of training scenes.
        val: Number of validation scenes.
        size: (width, height) of the pictures in pixels.

    Returns:
        The folder `root/VOCdevkit/VOC2012`.

    Raises:
        ValueError: If a number is out of its range.
        InputError: If `root` is a file, or holds a `VOCdevkit` that was not drawn from these arguments.
    """
    if seed < 0 or train < 1 or val < 1 or min(size) < 32:
        raise ValueError(
            f"seed must be at least 0, train and val at least 1, size at least 32, got {seed}, {train}, {val}, {size}"
        )
    root = Path(root)
    devkit = root / "VOCdevkit"
    folder = devkit / "VOC2012"
    wanted = {"drawing": _DRAWING, "seed": seed, "train": train, "val": val, "size": list(size)}
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file: name a folder for the sample data")
    if devkit.exists():
        if _read_manifest(folder) == wanted:
            return folder
        raise InputError(f"{devkit} holds other data: name another folder for the sample data, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".VOCdevkit."))
    try:
        _write_devkit(temporary / "VOC2012", seed, {"train": train, "val": val}, size)
        (temporary / "VOC2012" / _MANIFEST).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's folders are private
        os.rename(temporary, devkit)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_manifest(folder: Path) -> object:
    try:
        manifest: object = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest


def _write_devkit(folder: Path, seed: int, counts: dict[str, int], size: tuple[int, int]) -> None:
    images, masks, lists = folder / "JPEGImages", folder / "SegmentationClass", folder / "ImageSets" / "Segmentation"
    for path in (images, masks, lists):
        path.mkdir(parents=True)
    palette = voc_palette(len(SAMPLE_CLASSES))
    everything: list[str] = []
    for split_index, (split, count) in enumerate(counts.items()):
        names = [f"sample_{split}_{index:04d}" for index in range(count)]
        for index, plan in enumerate(plan_scenes(count, np.random.default_rng([seed, split_index]))):
            picture, mask = draw_scene(plan, size, np.random.default_rng([seed, split_index, index]))
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=92)
            (images / f"{names[index]}.jpg").write_bytes(buffer.getvalue())
            write_mask(masks / f"{names[index]}.png", mask, palette)
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        everything += names
    (lists / "trainval.txt").write_text("\n".join(everything) + "\n", encoding="utf-8")
    (folder / CLASS_NAMES_FILE).write_text("\n".join(SAMPLE_CLASSES) + "\n", encoding="utf-8")
