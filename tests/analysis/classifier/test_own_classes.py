"""Labels find the classes of a checkpoint by WordNet id, by word, or by number; what is unclear is no match."""

import pytest
from timm.data import ImageNetInfo

from analysis.classifier.own_judge import match_classes


@pytest.fixture(scope="module")
def imagenet() -> list[tuple[str, ...]]:
    """Of each of ImageNet's 1,000 classes the WordNet id and the words."""
    info = ImageNetInfo()
    return [(name, *info.label_name_to_description(name).split(", ")) for name in info.label_names()]


@pytest.mark.parametrize(
    ("label", "text", "number"),
    [
        ("n01440764", "n01440764", 0),
        ("n01440764_tench", "tench", 0),
        ("tench", "tench", 0),
        ("Great_White_Shark", "Great White Shark", 2),
        ("dogs", "281", 281),
        ("my cats", "tiger cat", 282),
        ("n02012849_crane", "crane", 134),
        ("crane", "crane", None),  # a bird and a machine
        ("automobile", "automobile", None),
        ("far", "1000", None),
    ],
)
def test_a_label_is_matched(imagenet: list[tuple[str, ...]], label: str, text: str, number: int | None) -> None:
    assert match_classes(imagenet, [label], [text], [label]) == {label: number}


def test_the_numbers_are_imagenets_own(imagenet: list[tuple[str, ...]]) -> None:
    names = [names[0] for names in imagenet]
    assert list(match_classes(imagenet, names, names, sorted(names)).values()) == list(range(1000))


def test_classes_without_names_are_the_labels_in_order_if_there_are_as_many() -> None:
    unnamed: list[tuple[str, ...]] = [(), (), ()]
    labels = ["ape", "bear", "cat"]
    assert match_classes(unnamed, ["bear", "cat"], ["bear", "cat"], labels) == {"bear": 1, "cat": 2}
    assert match_classes(unnamed, ["bear", "cat"], ["bear", "cat"], labels[1:]) == {"bear": None, "cat": None}
