"""glyphs16 and glyphs32: letters and digits in colour, which ``dfkd_bench.glyphs`` draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dfkd_bench import glyphs
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """Drawn here: there are no raw files."""
    return RawData.of_arrays(*glyphs.draw(data.image_shape[1], part))


GLYPHS16 = DataSet(
    name="glyphs16",
    title="letters and digits drawn in colour, 16x16 RGB, 47 classes, 45,120 images; needs no download",
    num_classes=len(glyphs.CLASSES),
    names=tuple(glyphs.CLASSES),
    image_shape=(3, 16, 16),
    mean=(0.4968, 0.4969, 0.4961),  # of the training split, measured
    std=(0.2767, 0.2758, 0.2776),
    flip_keeps_class=False,
    validation_size=60 * len(glyphs.CLASSES),
    sizes=(glyphs.PER_CLASS["train"] * len(glyphs.CLASSES), glyphs.PER_CLASS["test"] * len(glyphs.CLASSES)),
    source="drawn from the DejaVu and Computer Modern fonts that come with matplotlib, see docs/glyphs.md",
    read=_read,
    shares_images_with=("glyphs32",),  # the same scenes
)

GLYPHS32 = replace(
    GLYPHS16,
    name="glyphs32",
    title=GLYPHS16.title.replace("16x16", "32x32"),
    image_shape=(3, 32, 32),
    mean=(0.4969, 0.4970, 0.4961),
    std=(0.2836, 0.2865, 0.2838),
    shares_images_with=("glyphs16",),
)

DATASETS = {data.name: data for data in (GLYPHS16, GLYPHS32)}
