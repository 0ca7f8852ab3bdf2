"""The data sets glyphs16 and glyphs32: letters and digits in colour, drawn from the fonts that matplotlib ships.

For work without a connection: images with colour, background and clutter in 47 classes, made in seconds. No
substitute for photographs; the data card is docs/glyphs.md.

An image depends on numbers of its own only: round k of a part is one image of each class, drawn with the seed
(part, k), so that a small draw is the beginning of a large one. Both sides take the same numbers and show the same
scenes at two resolutions.

The same bits on every machine, given the versions of numpy, matplotlib and Pillow (with its FreeType): random numbers
are the raw 64 bits of PCG64, whose stream numpy keeps fixed; sines and cosines, which differ in their last bit between
machines, are avoided; the coefficients of the affine maps are multiples of 1/1024, with which Pillow's bilinear
interpolation is exact in double precision; colours are mixed in whole numbers.

Importing this imports neither numpy nor Pillow nor matplotlib.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dfkd_bench.class_names import DIGITS
from dfkd_bench.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageFont

    Bytes = NDArray[np.uint8]
    Integers = NDArray[np.int64]
    Uniforms = NDArray[np.float64]  # in [0, 1)

Part = Literal["train", "test", "hard_test"]
"""``train`` is cut into training and validation by ``dfkd_bench.data``; ``hard_test`` has fonts of its own."""

# Left out although their tables claim all letters: LastResortHE-Regular, cmex10 and cmsy10, which draw other shapes,
# and cmmi10, whose old-style 0 and 1 are shaped as its o and a small capital I. cmti10 is in new versions only.
FONTS: dict[str, tuple[str, ...]] = {
    "DejaVu": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
        "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    ),
    "Computer Modern": ("cmr10", "cmb10", "cmss10", "cmtt10"),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}  # fmt: skip

HELD_OUT = "STIX"
"""The family that no image of training, validation and test is drawn from: ``hard_test`` is, wholly."""

_MERGED = "CIJKMOPSUVWXYZ"
_SMALL = "abdefghnqrt"


def _classes() -> dict[str, str]:
    classes = {f"digit {word}": str(digit) for digit, word in enumerate(DIGITS)}
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        if letter in _MERGED:
            classes[f"letter {letter.lower()}"] = letter + letter.lower()
        else:
            classes[f"capital letter {letter.lower()}"] = letter
    return classes | {f"small letter {letter}": letter for letter in _SMALL}


CLASSES: dict[str, str] = _classes()
"""Class name -> the characters that are drawn, in the order of the labels: 47, divided as EMNIST's "balanced".

The small l is drawn nowhere: without serifs it is the capital I.
"""

PER_CLASS: dict[Part, int] = {"train": 860, "test": 100, "hard_test": 100}
"""Images a class. Validation is cut from ``train``: 60 a class."""

SIDES = (16, 32)

_SEEDS: dict[Part, int] = {"train": 1, "test": 2, "hard_test": 3}
_FONT_SIZE = 64
_CANVAS = 128  # of a glyph's mask
_SCENE = 64  # masks are mapped at this side and then averaged down to the image's
_GRID = 8  # side of the coarse grid of a clouded background

# How hard the images are. Lengths in scene pixels, colours in levels of 0 to 255.
_SPAN = (34.0, 52.0)  # the longer side of a glyph
_STRETCH = 0.12  # width against height: up to 1.12 and 1 / 1.12
_HALF_TANGENT = 0.13  # of half the angle: rotations up to 15 degrees
_SHEAR = 0.2
_SHIFT = 5.0
_CONTRAST = 64  # least difference in brightness to the background
_CANDIDATES = 16  # colours tried for it
_SHADE = 40  # how far a gradient or clouds go from the background's colour
_GRAIN = 24  # noise of single pixels goes up to this, in either direction
_CLUTTER = 2  # at most; each with probability one half
_CLUTTER_DISTANCE = (38.0, 50.0)  # from the centre, along one axis


def draw(side: int, part: Part, per_class: int | None = None) -> tuple[Bytes, Integers]:
    """Images uint8 [47 * per_class, 3, side, side] and labels int64 [47 * per_class], which run from 0 to 46 again and
    again. ``per_class``: the first ones of each class; default: all (``PER_CLASS``).

    ``UserError``: matplotlib's fonts aren't there. ``ValueError``: another side than 16 or 32, or no image asked for.
    """
    import numpy as np

    rounds = PER_CLASS[part] if per_class is None else per_class
    if side not in SIDES or part not in get_args(Part) or rounds < 1:
        raise ValueError(f"can't draw {rounds} images a class of side {side} for '{part}'")
    families = [family for family in FONTS if (family == HELD_OUT) == (part == "hard_test")]
    fonts = tuple(font for family in families for font in FONTS[family])
    images = np.concatenate([_round(side, _SEEDS[part], number, fonts) for number in range(rounds)])
    return images, np.tile(np.arange(len(CLASSES)), rounds)


def hard_test(side: int) -> tuple[Bytes, Integers]:
    """The harder test set: 100 images a class, all in the fonts of the held-out family. Drawn anew on every call.

    Returns images uint8 [4700, 3, side, side] and labels int64 [4700].
    """
    return draw(side, "hard_test")


def _round(side: int, seed: int, number: int, fonts: tuple[str, ...]) -> Bytes:
    """One image of each class: uint8 [47, 3, side, side]."""
    import numpy as np

    random = _Random(seed, number)
    count = len(CLASSES)
    background = _background(random, count, side)
    brightness = _brightness(background).reshape(count, -1)
    scene = background
    clutter_used = random.uniforms(count, _CLUTTER) < 0.5
    for index in range(_CLUTTER):
        labels = (random.uniforms(count) * count).astype(np.int64)
        masks = _masks(random, labels, fonts, side, beside=True) * clutter_used[:, index, None, None]
        scene = _mix(scene, random.bytes(count, 3)[:, :, None, None], masks)
    masks = _masks(random, np.arange(count), fonts, side, beside=False)
    scene = _mix(scene, _foreground(random, brightness)[:, :, None, None], _blurred(random, masks))
    grain = random.bytes(count, 3, side, side) * 2 - 255  # odd numbers of -255 to 255
    strength = (random.uniforms(count) * _GRAIN).astype(np.int64)[:, None, None, None]
    return np.clip(scene + grain * strength // 255, 0, 255).astype(np.uint8)


class _Random:
    """Numbers from the raw stream of PCG64, unlike those of numpy's samplers the same in all its versions."""

    def __init__(self, *seed: int) -> None:
        import numpy as np

        self._bits = np.random.PCG64(seed)

    def uniforms(self, *shape: int) -> Uniforms:
        """In [0, 1), multiples of 2**-53."""
        import numpy as np

        raw: NDArray[np.uint64] = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def between(self, low: float, high: float, *shape: int) -> Uniforms:
        """In [low, high)."""
        return low + (high - low) * self.uniforms(*shape)

    def bytes(self, *shape: int) -> Integers:
        """Whole numbers from 0 to 255."""
        import numpy as np

        count = int(np.prod(shape))
        raw: NDArray[np.uint64] = self._bits.random_raw(-(-count // 8))
        return raw.astype("<u8").view(np.uint8)[:count].reshape(shape).astype(np.int64)


def _background(random: _Random, count: int, side: int) -> Integers:
    """Flat, a gradient or clouds, a third each: [count, 3, side, side] of 0 to 255."""
    import numpy as np

    colour = random.bytes(count, 3)[:, :, None, None]
    kind = (random.uniforms(count) * 3).astype(np.int64)[:, None, None, None]
    shade = (random.bytes(count, 3) * (2 * _SHADE) // 255 - _SHADE)[:, :, None, None]
    # a ramp from -64 to 64 along a random direction, and a smooth random field of about that range
    along = random.between(-1, 1, count, 2)
    along = np.rint(64 * along / np.abs(along).sum(1, keepdims=True)).astype(np.int64)
    steps = 2 * np.arange(side) + 1 - side
    ramp = (along[:, :1, None] * steps[:, None] + along[:, 1:, None] * steps) // side
    clouds = random.bytes(count, _GRID, _GRID) // 2 - 64
    clouds = clouds.repeat(side // _GRID, 1).repeat(side // _GRID, 2)
    for _ in range(side // _GRID):
        clouds = _smooth(clouds)
    amount = np.where(kind == 1, ramp[:, None], np.where(kind == 2, clouds[:, None], 0))
    return np.clip(colour + shade * amount // 64, 0, 255)


def _foreground(random: _Random, background: Integers) -> Integers:
    """Colours [count, 3]: the first of a few candidates that differs enough from all of the background's brightness
    [count, pixels]; if none does, the one that differs most."""
    import numpy as np

    colours = random.bytes(len(background), _CANDIDATES, 3)
    brightness = _brightness(colours.transpose(0, 2, 1))
    low, high = background.min(1, keepdims=True), background.max(1, keepdims=True)
    contrast = np.maximum(low - brightness, brightness - high)
    chosen = np.minimum(contrast, _CONTRAST).argmax(1)  # the first of the largest
    return colours[np.arange(len(colours)), chosen]


def _brightness(colours: Integers) -> Integers:
    """Of colours [n, 3, ...]: [n, ...], 0 to 255, with the weights of ITU-R BT.601."""
    return (77 * colours[:, 0] + 150 * colours[:, 1] + 29 * colours[:, 2]) // 256


def _masks(random: _Random, labels: Integers, fonts: tuple[str, ...], side: int, beside: bool) -> Integers:
    """One glyph a label as coverage [n, side, side] of 0 to 255: near the centre, or over the border (``beside``)."""
    import numpy as np
    from PIL import Image

    count = len(labels)
    font_of = (random.uniforms(count) * len(fonts)).astype(np.int64)
    which = random.uniforms(count)
    shapes = list(CLASSES.values())
    glyphs = [
        _glyph(fonts[font], shapes[label][int(pick * len(shapes[label]))])
        for font, label, pick in zip(font_of, labels, which, strict=True)
    ]
    maps = _affine_maps(random, np.array([size for _, size in glyphs]), beside)
    masks = np.empty((count, side, side), np.int64)
    for mask, (glyph, _), coefficients in zip(masks, glyphs, maps.tolist(), strict=True):
        mapped = glyph.transform(
            (_SCENE, _SCENE), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR
        )
        mask[:] = np.asarray(mapped.reduce(_SCENE // side))
    return masks


def _affine_maps(random: _Random, sizes: Integers, beside: bool) -> Uniforms:
    """For glyphs of the given longer sides, Pillow's coefficients [n, 6]: from a scene's pixels to the mask's."""
    import numpy as np

    count = len(sizes)
    stretch = 1 + _STRETCH * random.uniforms(count)
    stretch = np.where(random.uniforms(count) < 0.5, stretch, 1 / stretch)
    scale = sizes / random.between(*_SPAN, count)
    half = random.between(-_HALF_TANGENT, _HALF_TANGENT, count)
    cosine, sine = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)
    shear = random.between(-_SHEAR, _SHEAR, count)
    matrix = np.array([[cosine + shear * sine, shear * cosine - sine], [sine, cosine]]).transpose(2, 0, 1)
    matrix *= np.stack([scale * stretch, scale / stretch], 1)[:, :, None]
    shift = random.between(-_SHIFT, _SHIFT, count, 2)
    if beside:
        away = random.between(*_CLUTTER_DISTANCE, count) * np.where(random.uniforms(count) < 0.5, 1, -1)
        along = random.between(-_SCENE / 2, _SCENE / 2, count)
        swap = random.uniforms(count) < 0.5
        shift = np.where(swap[:, None], np.stack([away, along], 1), np.stack([along, away], 1))
    offset = _CANVAS / 2 - (matrix * (shift + _SCENE / 2)[:, None, :]).sum(2, keepdims=True)
    return np.rint(np.concatenate([matrix, offset], 2).reshape(count, 6) * 1024) / 1024


def _blurred(random: _Random, masks: Integers) -> Integers:
    """Half of the masks as they are, half mixed with their smoothed form."""
    import numpy as np

    weight = np.maximum(0, random.between(-64, 64, len(masks))).astype(np.int64)[:, None, None]
    return (masks * (64 - weight) + _smooth(masks) * weight) // 64


def _smooth(images: Integers) -> Integers:
    """[n, H, W] with 1/4, 1/2, 1/4 along both axes; the border is repeated."""
    import numpy as np

    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) // 16


def _mix(under: Integers, colour: Integers, masks: Integers) -> Integers:
    """``colour`` [n, 3, 1, 1] painted over ``under`` [n, 3, H, W] where ``masks`` [n, H, W] cover it."""
    cover = masks[:, None]
    return (under * (255 - cover) + colour * cover + 127) // 255


@cache
def _glyph(font: str, character: str) -> tuple[Image.Image, int]:
    """The character as a centred mask (Pillow's mode L, ``_CANVAS`` square) and the longer side of its box, which is as
    high as the ink and as wide as the font sets it, with the gaps to its neighbours."""
    from PIL import Image, ImageDraw

    face = _face(font)
    left, top, right, bottom = (int(edge) for edge in face.getbbox(character))
    mask = Image.new("L", (_CANVAS, _CANVAS))
    start = ((_CANVAS - left - right) // 2, (_CANVAS - top - bottom) // 2)
    ImageDraw.Draw(mask).text(start, character, fill=255, font=face)
    return mask, max(right - left, bottom - top)


@cache
def _face(font: str) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    try:  # the basic layout: the other one is not in every build of Pillow
        return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(
            f"the font {path} can't be read ({error}): glyphs are drawn from the fonts that matplotlib ships, "
            "reinstall matplotlib from PyPI"
        ) from None
