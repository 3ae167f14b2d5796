"""The built-in data set: drawn scenes of two objects and their captions. Needs no files.

A scene has two objects, each with a shape, a colour and a size, side by side or one above the other. Scenes are unique
over all splits, and many share an object or a word, so retrieval needs both objects. Images and captions are a pure
function of the seed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from clip_retrieval.arrays import read_npy
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.errors import UserError
from clip_retrieval.files import write_atomic
from clip_retrieval.options import DatasetOptions

SIZES = {"train": 4000, "val": 500, "test": 500}
CAPTIONS_PER_IMAGE = 5
SIDE = 64  # pixels
SEED = 2022
OVERSAMPLING = 4  # images are drawn larger and reduced, for smooth edges

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (240, 225, 60),
    "green": (50, 165, 70),
    "cyan": (70, 210, 220),
    "blue": (45, 75, 210),
    "purple": (145, 60, 175),
    "white": (250, 250, 250),
}
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring",),
    "star": ("star",),
}
RADII = {"large": (13, 14.5), "small": (8, 9)}  # pixels
SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
AXES = {"beside": ("to the left of", "to the right of"), "stacked": ("above", "below")}


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str


class Scene(NamedTuple):
    """The first thing is to the left of the second, or above it."""

    first: Thing
    second: Thing
    axis: str


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read a split. Images are cached in {dataset_root}/shapes/ if that folder is writable."""
    names = list(SIZES)
    begin, size = sum(SIZES[name] for name in names[: names.index(split)]), SIZES[split]
    scenes = _make_scenes()[begin : begin + size]
    pixels = _load_pixels(Path(options.dataset_root) / "shapes", split, scenes, begin)
    captions = [
        caption
        for index, scene in enumerate(scenes, begin)
        for caption in make_captions(scene, _make_generator("words", index))
    ]
    images = np.repeat(np.arange(size), CAPTIONS_PER_IMAGE)
    pairs = np.stack([images, np.arange(len(captions))], axis=1)
    return RetrievalDataset("shapes", split, ImageArray(pixels, f"shapes {split}"), captions, pairs)


def _make_generator(purpose: str, index: int = 0) -> np.random.Generator:
    return np.random.default_rng((SEED, ("scenes", "words", "pixels").index(purpose), index))


def _make_scenes() -> list[Scene]:
    """Make the scenes of all splits, without duplicates."""
    things = [Thing(s, c, z) for s in SHAPES for c in COLOURS for z in RADII]
    number = len(things) ** 2 * len(AXES)
    chosen = _make_generator("scenes").choice(number, size=sum(SIZES.values()), replace=False)
    axes = list(AXES)
    scenes = []
    for code in chosen:
        rest, axis = divmod(int(code), len(axes))
        first, second = divmod(rest, len(things))
        scenes.append(Scene(things[first], things[second], axes[axis]))
    return scenes


def make_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Make five different captions of a scene."""
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS_PER_IMAGE:
        captions[_make_sentence(scene, rng)] = None
    return list(captions)


def _make_sentence(scene: Scene, rng: np.random.Generator) -> str:
    forward, backward = AXES[scene.axis]
    one, other, relation = scene.first, scene.second, forward
    if rng.random() < 0.5:
        one, other, relation = scene.second, scene.first, backward
    a, b = _make_phrase(one, rng), _make_phrase(other, rng)
    forms = (
        f"{a} {relation} {b}",
        f"there is {a} {relation} {b}",
        f"{a} is {relation} {b}",
        f"a picture of {a} {relation} {b}",
    )
    return str(rng.choice(forms))


def _make_phrase(thing: Thing, rng: np.random.Generator) -> str:
    words = [thing.colour, str(rng.choice(SHAPES[thing.shape]))]
    if rng.random() < 0.75:
        words.insert(0, str(rng.choice(SIZE_WORDS[thing.size])))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, uint8 (SIDE, SIDE, 3)."""
    side = SIDE * OVERSAMPLING
    grey = int(rng.integers(20, 110))
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    for position, thing in ((0.25, scene.first), (0.75, scene.second)):
        low, high = RADII[thing.size]
        radius = rng.uniform(low, high)
        along = position * SIDE + rng.uniform(-1.5, 1.5)
        across = rng.uniform(radius + 2, SIDE - radius - 2)
        x, y = (along, across) if scene.axis == "beside" else (across, along)
        _draw_thing(canvas, thing, x * OVERSAMPLING, y * OVERSAMPLING, radius * OVERSAMPLING, grey)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float, grey: int) -> None:
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.circle((x, y), radius, fill=colour)
    elif thing.shape == "ring":
        canvas.circle((x, y), radius, fill=colour)
        canvas.circle((x, y), radius * 0.55, fill=(grey, grey, grey))
    elif thing.shape == "cross":
        thickness = radius * 0.34
        canvas.rectangle((x - radius, y - thickness, x + radius, y + thickness), fill=colour)
        canvas.rectangle((x - thickness, y - radius, x + thickness, y + radius), fill=colour)
    elif thing.shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, radius, radius * 0.42)
        canvas.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(reach, angles)], fill=colour)
    elif thing.shape == "square":
        half = radius * 0.88
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    else:
        canvas.regular_polygon((x, y, radius), 3, fill=colour)


def _load_pixels(folder: Path, split: str, scenes: list[Scene], begin: int) -> np.ndarray:
    """Load the images of a split from the cache, or draw and cache them, uint8 (scenes, SIDE, SIDE, 3)."""
    path = folder / f"{split}_{SIDE}_{SEED}.npy"
    shape = (len(scenes), SIDE, SIDE, 3)
    try:
        cached = read_npy(path, memory_map=True)
        if cached.shape == shape and cached.dtype == np.uint8:
            return cached
    except UserError:
        pass  # missing or incomplete
    pixels = np.stack([draw(scene, _make_generator("pixels", index)) for index, scene in enumerate(scenes, begin)])
    with contextlib.suppress(OSError):  # in an unwritable folder, the images stay in memory
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomic(path) as file:
            np.save(file, pixels)
    return pixels
