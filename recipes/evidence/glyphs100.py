"""Draw the set of 100 characters from Debian's free fonts: tensors:glyphs100.safetensors.

    python recipes/evidence/glyphs100.py FONTS glyphs100.safetensors

On a Debian machine; the font packages of main are downloaded into FONTS and unpacked there, nothing is installed. Needs
numpy, scipy and Pillow. 50,000 training and 10,000 test images, 32 x 32, grey, of Latin, Greek and Cyrillic letters,
digits and signs. No family of fonts has images in both parts, nor has a copy of a family under another name:
glyphs100_faces.tsv says of each face its part, its group (families that are one design), its usual size, and its
characters (after a minus sign: those that it lacks). Each image is a function of its part, class and number; the same
versions of the fonts and of FreeType give the same pixels.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import save_file
from scipy import ndimage

CHARACTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijklmnpqrstuy0123456789"  # without c, o, v, ...: capitals but for their size
    "\u0393\u0394\u0398\u039b\u039e\u03a3\u03a9\u03b1\u03b2\u03b3\u03b5\u03b7\u03bb\u03be\u03c1\u03c3\u03c6\u03c9"
    "\u0411\u0414\u0416\u0417\u0418\u041b\u0424\u0426\u0427\u0428\u042c\u042d\u042e\u042f"
    "!?&@#$\u00a7\u20ac\u00a3\u00a5+\u00df"
)
SEED = 20240607
# Of the set, beside the seed: another set of the same generator had another number.
SET = 1
COUNTS = {"train": 500, "test": 100}
SIZE, LEVELS = 32, 64
# Pixels an em in which glyphs are rendered, and of a canvas that holds one and its neighbours.
EM = 96
CANVAS = 4 * EM
# Samples of the canvas for each pixel of an image, in either direction.
SAMPLES = 3
# Pixels of a usual glyph in an image, before it is made larger or smaller.
GLYPH = 23.0

Random = np.random.Generator
Array = np.ndarray[Any, np.dtype[Any]]

# Offset of each pixel's middle from the middle of the image: x, then y.
OFFSETS = (np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE))) + 0.5 - SIZE / 2).astype(np.float32)


@dataclass
class Face:
    """A face of a font.

    Attributes:
        path: Its file.
        index: Its number in the file.
        characters: Those of the set that it has, in the set's order.
        extent: Its usual height and width of a glyph, in pixels at EM.
    """

    path: Path
    index: int
    characters: str
    extent: float

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont:
        """Pillow's."""
        return ImageFont.truetype(self.path, EM, index=self.index, layout_engine=ImageFont.Layout.BASIC)

    def ink(self, character: str) -> tuple[Array, int, int] | None:
        """Ink of a glyph in [0, 1], and where it begins right of and below the origin; none if it is blank."""
        left, top, right, bottom = (round(edge) for edge in self.font.getbbox(character, anchor="ls"))
        width, height = right - left, bottom - top
        if min(width, height) < 1 or max(width, height) > 6 * EM:
            return None
        picture = Image.new("L", (width, height))
        ImageDraw.Draw(picture).text((-left, -top), character, fill=255, font=self.font, anchor="ls")
        grey = np.asarray(picture)
        rows, columns = (np.flatnonzero(grey.max(axis) > 24) for axis in (1, 0))
        if min(len(rows), len(columns)) < 2:
            return None
        ink = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / 255
        return ink, left + columns[0], top + rows[0]


def read_faces(fonts: Path) -> dict[str, list[tuple[int, str, Face]]]:
    """Read which faces there are: by part, each with its group and its family."""
    faces: dict[str, list[tuple[int, str, Face]]] = {part: [] for part in COUNTS}
    table = Path(__file__).with_name("glyphs100_faces.tsv")
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            stated = row["characters"]
            lacking = stated[1:] if stated.startswith("-") else "".join(c for c in CHARACTERS if c not in stated)
            characters = "".join(character for character in CHARACTERS if character not in lacking)
            face = Face(fonts / row["path"], int(row["index"]), characters, float(row["extent"]))
            faces[row["split"]].append((int(row["group"]), row["family"], face))
    return faces


def fetch(fonts: Path, paths: list[Path]) -> None:
    """Download the packages of the faces that are missing, and unpack their fonts."""
    missing = sorted({path.relative_to(fonts).parts[0] for path in paths if not path.is_file()})
    if not missing:
        return
    packages = fonts / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", *missing], cwd=packages, check=True)
    for package in packages.glob("*.deb"):
        name = subprocess.run(["dpkg-deb", "-f", package, "Package"], check=True, capture_output=True, text=True).stdout
        subprocess.run(["dpkg-deb", "-x", package, fonts / name.strip()], check=True)
        package.unlink()


def noise(random: Random, exponent: float) -> Array:
    """Noise whose spectrum falls with the frequency to this power, in [-1, 1]."""
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    frequency[0, 0] = 1
    spectrum = frequency**-exponent * np.exp(2j * np.pi * random.random(frequency.shape))
    spectrum[0, 0] = 0
    values = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return values / (np.abs(values).max() + 1e-9)


def gradient(random: Random) -> Array:
    """A plane that rises in some direction."""
    angle = random.uniform(0, 2 * np.pi)
    return (np.cos(angle) * OFFSETS[0] + np.sin(angle) * OFFSETS[1]) / (SIZE / 2 * 1.3)


def stripes(random: Random) -> Array:
    """Waves in some direction, or across each other; with soft or hard edges."""
    angle, period, phase = random.uniform(0, np.pi), random.uniform(3, 14), random.uniform(0, 2 * np.pi)

    def wave(cosine: float, sine: float) -> Array:
        return np.sin((cosine * OFFSETS[0] + sine * OFFSETS[1]) * 2 * np.pi / period + phase)

    values = wave(np.cos(angle), np.sin(angle))
    if random.random() < 0.3:
        values = values * wave(-np.sin(angle), np.cos(angle))
    return np.clip(values * random.choice([1, 4]), -1, 1)


def shapes(random: Random) -> Array:
    """Some ellipses, quadrangles and lines."""
    size = SIZE * 2
    picture = Image.new("L", (size, size), 128)
    draw = ImageDraw.Draw(picture)
    for _ in range(random.integers(2, 6)):
        grey = int(random.integers(0, 256))
        x, y = random.uniform(0, size, 2)
        kind = random.random()
        if kind < 0.35:
            width, height = random.uniform(6, 30, 2)
            draw.ellipse([x - width, y - height, x + width, y + height], fill=grey)
        elif kind < 0.75:
            angles, radii = np.sort(random.uniform(0, 2 * np.pi, 4)), random.uniform(8, 36, 4)
            corners = zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)
            draw.polygon([(float(a), float(b)) for a, b in corners], fill=grey)
        else:
            end_x, end_y = random.uniform(0, size, 2)
            draw.line([x, y, end_x, end_y], fill=grey, width=int(random.integers(2, 7)))
    return np.asarray(picture.resize((SIZE, SIZE)), np.float32) / 127.5 - 1


def texture(random: Random) -> Array:
    """A pattern, about in [-1, 1]."""
    kind = random.random()
    if kind < 0.30:
        return noise(random, random.uniform(0.8, 2.2))
    if kind < 0.50:
        return gradient(random)
    if kind < 0.65:
        return stripes(random)
    if kind < 0.85:
        return shapes(random)
    first = noise(random, random.uniform(0.8, 2.0))
    return 0.5 * (first + (stripes(random) if random.random() < 0.4 else shapes(random)))


def put(canvas: Array, ink: Array, x: int, y: int) -> None:
    """Add ink to a canvas with its left upper corner at (x, y), as far as it lies on it."""
    height, width = ink.shape
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, CANVAS), min(y + height, CANVAS)
    if right > left and bottom > top:
        part = canvas[top:bottom, left:right]
        np.maximum(part, ink[top - y : bottom - y, left - x : right - x], out=part)


def draw_canvas(random: Random, face: Face, character: str, half: float) -> tuple[Array, Array]:
    """Ink of a glyph in the middle of a canvas: alone, and with neighbours that begin ``half`` pixels away or more."""

    def neighbour() -> tuple[Array, int, int] | None:
        return face.ink(face.characters[random.integers(len(face.characters))])

    drawn = face.ink(character)
    assert drawn is not None
    ink, _, top = drawn
    height, width = ink.shape
    canvas, middle = np.zeros((CANVAS, CANVAS), np.float32), CANVAS // 2
    put(canvas, ink, middle - width // 2, middle - height // 2)
    alone = canvas.copy()
    baseline = middle - height // 2 - top
    for side in (-1, 1):
        if random.random() < 0.3:
            beside = neighbour()
            if beside is None:
                continue
            gap = max(width / 2 + random.uniform(0.05, 0.2) * EM, half)
            x = middle + gap if side > 0 else middle - gap - beside[0].shape[1]
            put(canvas, beside[0], int(x), int(baseline + beside[2]))
    if random.random() < 0.08:  # the line above or below
        other = neighbour()
        if other is not None:
            gap = max(height / 2 + 0.1 * EM, half)
            y = middle + gap if random.random() < 0.5 else middle - gap - other[0].shape[0]
            put(canvas, other[0], int(middle - other[0].shape[1] / 2 + random.uniform(-0.5, 0.5) * EM), int(y))
    return alone, canvas


def warp(random: Random, scale: float) -> tuple[Array, Array]:
    """Where on the canvas, as an offset from its middle, each sample of an image lies: x and y."""
    count = SIZE * SAMPLES
    line = (np.arange(count, dtype=np.float32) + 0.5) / SAMPLES - SIZE / 2
    x, y = np.meshgrid(line, line)
    shift = random.uniform(-1, 1, 2) * 3.0
    x, y = x - shift[0], y - shift[1]
    if random.random() < 0.5:  # perspective
        tilt = random.uniform(-1, 1, 2) * 0.012
        depth = np.maximum(1 + tilt[0] * x + tilt[1] * y, 0.5)
        x, y = x / depth, y / depth
    if random.random() < 0.5:  # as rubber
        moves = random.uniform(-1, 1, (2, 5, 5)) * random.uniform(0.4, 1.7)
        zoom = count / 5
        smooth = [ndimage.zoom(m.astype(np.float32), zoom, order=3, mode="nearest", grid_mode=True) for m in moves]
        x, y = x + smooth[0], y + smooth[1]
    angle, shear = np.deg2rad(random.uniform(-20, 20)), random.uniform(-0.3, 0.3)
    stretch = np.exp(random.uniform(-0.16, 0.16))
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turned @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch]) * scale
    back = np.linalg.inv(matrix).astype(np.float32)
    return back[0, 0] * x + back[0, 1] * y, back[1, 0] * x + back[1, 1] * y


def sampled(canvas: Array, places: tuple[Array, Array]) -> Array:
    """Bilinear samples of a canvas, averaged to an image."""
    x, y = (np.clip(place + (CANVAS / 2 - 0.5), 0, CANVAS - 1.001) for place in places)
    column, row = x.astype(np.int32), y.astype(np.int32)
    x, y = x - column, y - row
    flat, first = canvas.ravel(), row * CANVAS + column
    above = flat[first] * (1 - x) + flat[first + 1] * x
    below = flat[first + CANVAS] * (1 - x) + flat[first + CANVAS + 1] * x
    values = above * (1 - y) + below * y
    return values.reshape(SIZE, SAMPLES, SIZE, SAMPLES).mean((1, 3))


def outlined(canvas: Array, width: int) -> tuple[Array, Array]:
    """The outline of the ink, and the ink made fatter by it."""
    grey = (canvas * 255).astype(np.uint8)
    fat, slim = (
        change(grey, width).astype(np.float32) / 255 for change in (ndimage.maximum_filter, ndimage.minimum_filter)
    )
    return fat - slim, fat


def strengthened(ink: Array, body: Array) -> Array:
    """Make hairlines, which fade when they get small, as dark again as ink is."""
    peak = np.partition(body.ravel(), -24)[-24]
    return np.minimum(ink * np.clip(0.8 / (peak + 1e-6), 1, 3), 1)


def lit(random: Random) -> tuple[float, float, float]:
    """Tone of the paper, tone of the ink, and how far they are apart, in [0, 1]."""
    contrast = max(random.uniform(0.22, 0.95) ** 1.2, 0.2)
    low = random.uniform(0, 1 - contrast)
    paper, tone = (low, low + contrast) if random.random() < 0.5 else (low + contrast, low)
    return paper, tone, contrast


def inked(random: Random, face: Face, character: str) -> tuple[Array, Array, tuple[float, float, float]]:
    """An image of a glyph on its paper, the ink of the glyph alone in it, and the tones."""
    drawn = face.ink(character)
    assert drawn is not None
    own = max(drawn[0].shape)
    # Between the glyph's own size and a common one.
    scale = min(GLYPH / np.sqrt(own * face.extent) * random.uniform(0.6, 1.1), 28.0 / own)
    alone, canvas = draw_canvas(random, face, character, half=9.5 / scale)
    places = warp(random, scale)
    paper, tone, contrast = tones = lit(random)
    image = np.full((SIZE, SIZE), paper, np.float32)
    if random.random() < 0.85:
        image = image + texture(random) * contrast * random.uniform(0.1, 0.6)
    front = np.full((SIZE, SIZE), tone, np.float32)
    if random.random() < 0.5:
        front = front + texture(random) * contrast * random.uniform(0.1, 0.45)
    style = random.random()
    if style < 0.10:  # an outline
        ring, _ = outlined(canvas, int(random.choice([5, 7, 9])))
        ink, body = sampled(ring, places), sampled(alone, places)
        ink = strengthened(ink, ink)
    else:
        if style < 0.22:
            shade = shadow(random, canvas, places)
            other = np.clip(paper + (paper - tone) * random.uniform(0.3, 0.8), 0, 1)
            image = image * (1 - shade) + other * shade
        ink, body = sampled(canvas, places), sampled(alone, places)
        ink = strengthened(ink, body)
    return image * (1 - ink) + front * ink, body, tones


def shadow(random: Random, canvas: Array, places: tuple[Array, Array]) -> Array:
    """A shadow of the ink, or a halo around it."""
    if random.random() < 0.5:
        shift = random.choice([-1, 1], 2) * random.uniform(3, 7, 2)
        return sampled(canvas, (places[0] + np.float32(shift[0]), places[1] + np.float32(shift[1])))
    return sampled(outlined(canvas, 9)[1], places)


def cover(random: Random, body: Array) -> Array | int:
    """What lies over a glyph: a bar or a spot that hides less than 22 % of it; 0 if eight tries hide more."""
    for _ in range(8):
        angle, middle = random.uniform(0, np.pi), random.uniform(-9, 9, 2)
        x, y = OFFSETS[0] - middle[0], OFFSETS[1] - middle[1]
        across, along = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
        half_width, half_length = random.uniform(1.0, 3.0), random.uniform(2.0, 24.0)
        if random.random() < 0.6:
            edges = np.clip(half_length - np.abs(along) + 0.5, 0, 1)
            over = np.clip(half_width - np.abs(across) + 0.5, 0, 1) * edges
        else:
            radius = half_width * 2
            over = np.clip((1 - np.hypot(across / radius, along / radius)) * 4, 0, 1)
        if (over * body).sum() < 0.22 * body.sum():
            return over
    return 0


def draw(random: Random, face: Face, character: str) -> Array:
    """One image, uint8 (SIZE, SIZE)."""
    image, body, (paper, tone, contrast) = inked(random, face, character)
    if random.random() < 0.22:
        over = cover(random, body)
        image = image * (1 - over) + random.choice([paper, tone, random.random()], p=[0.5, 0.2, 0.3]) * over
    if random.random() < 0.6:
        image = ndimage.gaussian_filter(image, random.uniform(0.3, 0.95))
    if random.random() < 0.75:
        image = image + random.standard_normal((SIZE, SIZE)) * random.uniform(0.0, min(0.09, 0.3 * contrast))
    if random.random() < 0.05:
        spots = random.random((SIZE, SIZE)) < random.uniform(0.01, 0.05)
        image = np.where(spots, random.integers(0, 2, (SIZE, SIZE)), image)
    levels = np.clip(image * (LEVELS - 1), 0, LEVELS - 1).round()
    return (levels * 255 / (LEVELS - 1)).round().astype(np.uint8)


def draw_class(
    part: int, number: int, count: int, faces: list[tuple[int, str, Face]], seeded: Callable[..., Random]
) -> Array:
    """All images of a class: each group of families as often as the others, in a random order."""
    character = CHARACTERS[number]
    groups: dict[int, dict[str, list[Face]]] = {}
    for group, family, face in faces:
        if character in face.characters:
            groups.setdefault(group, {}).setdefault(family, []).append(face)
    ordered = sorted(groups)
    images = np.zeros((count, 1, SIZE, SIZE), np.uint8)
    for i in range(count):
        random, turn = seeded(part, number, i), seeded(part, number, 10**6 + i // len(ordered))
        families = groups[ordered[turn.permutation(len(ordered))[i % len(ordered)]]]
        family = families[sorted(families)[random.integers(len(families))]]
        images[i, 0] = draw(random, family[random.integers(len(family))], character)
    return images


def main(fonts: Path, out: Path) -> None:
    """Write the file."""
    faces = read_faces(fonts)
    fetch(fonts, [face.path for entries in faces.values() for _, _, face in entries])

    def seeded(*numbers: int) -> Random:
        return np.random.default_rng([SEED, SET, *numbers])

    tensors = {}
    for part, (name, count) in enumerate(COUNTS.items()):
        images = []
        for number, character in enumerate(CHARACTERS):
            images.append(draw_class(part, number, count, faces[name], seeded))
            print(f"{name} {number + 1}/{len(CHARACTERS)} {character}", file=sys.stderr)  # noqa: T201 - a script
        order = seeded(part).permutation(count * len(CHARACTERS))
        tensors[f"{name}_images"] = np.concatenate(images)[order]
        tensors[f"{name}_labels"] = np.repeat(np.arange(len(CHARACTERS)), count).astype(np.int64)[order]
    save_file(tensors, out, metadata={"class_names": json.dumps(list(CHARACTERS), ensure_ascii=False)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
