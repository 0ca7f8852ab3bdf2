"""The names of the classes, in the order of their labels: what text encoders are given.

Everywhere: clean text, that is lower case with blanks for '_' and '-'. Where a data set lists synonyms
(ImageNet, Tiny-ImageNet) the first one is taken.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from dfkd_bench.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def clean(name: str) -> str:
    """The clean text of a class name or a folder's name.

    >>> clean("Aquarium_fish")
    'aquarium fish'
    """
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def _listed(names: str) -> tuple[str, ...]:
    return tuple(clean(name) for name in names.split())


FASHION_MNIST = _listed("T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot")

AS_WRITTEN = {"t shirt/top": "T-shirt/top"}
"""Clean names that are hard to read, as their data set writes them: for figures."""

CIFAR10 = _listed("airplane automobile bird cat deer dog frog horse ship truck")

CIFAR100 = _listed(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
    bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket
    rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
)

CARDIGAN_DOG = 264  # torchvision tells it from the garment (474) by a capital letter only


def imagenet() -> tuple[str, ...]:
    """The 1,000 names in the order of the sorted WordNet ids, as torchvision lists them; imports torchvision.

    One is completed from its synset, since lower case would make two classes one: "cardigan welsh corgi".
    """
    from torchvision.models import ResNet50_Weights

    names = [clean(name) for name in ResNet50_Weights.IMAGENET1K_V1.meta["categories"]]
    names[CARDIGAN_DOG] = "cardigan welsh corgi"
    return tuple(names)


def tiny_imagenet(folder: Path) -> tuple[str, ...]:
    """The names of the 200 classes in the order of their sorted WordNet ids, from ``wnids.txt`` and ``words.txt``.

    ``UserError``: a file can't be read, or a class has no line in ``words.txt``.
    """
    words, listed = folder / "words.txt", folder / "wnids.txt"
    lines = _text_of(words).splitlines()
    synonyms = dict(line.split("\t", 1) for line in lines if "\t" in line)
    wnids = sorted(_text_of(listed).split())
    for wnid in wnids:
        if wnid not in synonyms:
            raise UserError(f"{words} has no line for the class {wnid}: expected '{wnid}<tab>name, synonyms'")
    return tuple(clean(synonyms[wnid].split(",")[0]) for wnid in wnids)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} can't be read ({error}): get it again") from None


def shipped_tiny_imagenet() -> tuple[str, ...]:
    """The same names from the list that is shipped with the embeddings, for machines without the data set."""
    text = importlib.resources.files("dfkd_bench.embeddings").joinpath("tiny_imagenet.txt").read_text(encoding="utf-8")
    return tuple(line.split("\t")[1] for line in text.splitlines())
