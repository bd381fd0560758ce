"""MMEB's texts: to the character as VLM2Vec composes them, and as MuCo's evaluation feeds them."""

from __future__ import annotations

import pytest

from muco_ds.data.schema import Dialogue
from muco_ds.eval.mmeb_datasets import DATASETS, META_TASKS, chosen
from muco_ds.eval.mmeb_files import INSTRUCT, READY, MMEBRow
from muco_ds.eval.mmeb_text import CONVENTIONS, Composed, Wording, candidates_of, query_of

from tiny_models import packer

I = "<|image_pad|>"  # noqa: E741


def composed(dataset: str, row: MMEBRow, publication: str = INSTRUCT) -> tuple[str, list[str], list[object]]:
    """Query text, candidate texts, candidate names."""
    candidates = list(candidates_of(row, DATASETS[dataset], publication))
    query = query_of(row, DATASETS[dataset], publication)
    return query.text, [one.text for one in candidates], [one.name for one in candidates]


# What the code of VLM2Vec makes of these rows, by hand: a blank before a newline goes, one newline ends most texts.
IDENTIFY = "<|image_1|>\nIdentify the class.\n"
SEARCH = "<|image_1|>\nFind the picture that fits: "
SHOW = "<|image_1|>\nRepresent the given image.\n"
BLANK = "<|image_1|> Represent the given image."
CASES = {
    "ImageNet-1K": (
        MMEBRow(IDENTIFY, "", "q.png", "", ["plane", "tram "], ["", ""]),
        (f"{I}\nIdentify the class.\n\n", ["plane", "tram "], ["plane", "tram "]),
    ),
    "Country211": (
        MMEBRow("<|image_1|> Where? \n", "Say", "q.png", "", ["Chad", "Mali"], ["", ""]),
        (f"{I}  Where?\n Say\n", ["Chad", "Mali"], ["Chad", "Mali"]),
    ),
    "OK-VQA": (
        MMEBRow("<|image_1|>\nAnswer this:\n", "what colour?", "q.png", "", ["red", "red"], ["", ""]),
        (f"{I}\nAnswer this: what colour?\n", ["red", "red"], ["red", "red"]),
    ),
    "MSCOCO_i2t": (
        MMEBRow("<|image_1|>\nFind a caption.\n", "", "q.png", "", ["A dog."], [""]),
        (f"{I}\nFind a caption.\n\n", ["A dog."], ["A dog."]),
    ),
    "MSCOCO_t2i": (
        MMEBRow("Find the picture:", "a dog", "", SHOW, ["", ""], ["a.png", "b.png"]),
        ("Find the picture: a dog\n", [f"{I}\nRepresent the given image.\n\n"] * 2, ["a.png", "b.png"]),
    ),
    "VisDial": (
        MMEBRow("Dialogue:", "Q? A.", "", BLANK, ["", ""], ["a.png", "b.png"]),
        ("Dialogue: Q? A.\n\n", [f"{I}  Represent the given image.\n"] * 2, ["a.png", "b.png"]),
    ),
    "WebQA": (
        MMEBRow(SEARCH, "who?", "", SHOW, ["Ada", "", "Bob \n"], ["a.png", "b.png", "a.png"]),
        (
            f"{I}\nFind the picture that fits:  who?\n",
            [f"{I}\nRepresent the given image.\n{end}" for end in (" Ada\n", " \n", " Bob\n\n")],
            ["a.png", "b.png", "a.png"],
        ),
    ),
    "CIRR": (
        MMEBRow("<|image_1|>\nChange it: ", "make it red", "q.png", SHOW, ["", ""], ["a.png", "b.png"]),
        (f"{I}\nChange it: make it red\n", [f"{I}\nRepresent the given image.\n"] * 2, ["a.png:", "b.png:"]),
    ),
    "RefCOCO-Matching": (
        MMEBRow("<|image_1|>\nFind:", '"cup"', "q.png", "<|image_1|>\nMatch:", ['"cup"', '"jug"'], ["a.png"] * 2),
        (f'{I}\nFind: "cup"\n', [f'{I}\nMatch: "cup"\n', f'{I}\nMatch: "jug"\n'], ["a.png:cup", "a.png:jug"]),
    ),
}


@pytest.mark.parametrize("dataset", CASES)
def test_texts_are_vlm2vecs_to_the_character(dataset: str) -> None:
    row, expected = CASES[dataset]
    assert composed(dataset, row) == expected


def test_pictures_are_on_the_sides_that_the_data_set_has_them_on() -> None:
    row = MMEBRow("i", "t", "q.png", "i", ["c"], ["a.png"])
    sides = {
        name: (bool(query_of(row, DATASETS[name], INSTRUCT).image), bool(next(candidates_of(row, one, INSTRUCT)).image))
        for name, one in DATASETS.items()
    }
    text_queries = ["EDIS", "MSCOCO_t2i", "VisDial", "VisualNews_t2i", "WebQA", "Wiki-SS-NQ"]
    both = ["CIRR", "FashionIQ", "MSCOCO", "NIGHTS", "OVEN", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"]
    assert sorted(name for name, side in sides.items() if side == (False, True)) == text_queries
    assert sorted(name for name, side in sides.items() if side == (True, True)) == both
    assert sum(side == (True, False) for side in sides.values()) == 22 and len(sides) == 36


def test_ready_texts_are_left_as_they_are() -> None:
    row = MMEBRow("", "<|image_1|>\nWhich? \n", "", "", [SHOW, ""], ["a.png", "b.png"])
    names = [(SHOW, "a.png"), ("", "b.png")]
    assert composed("WebQA", row, READY) == ("<|image_1|>\nWhich? \n", [SHOW, ""], names)


def turns(text: str, image: str) -> list[str]:
    """As each convention gives it to the template, ids decoded."""
    template = packer().template
    return [template.shown(Wording(name, template).turn(Composed(text, image))) for name in CONVENTIONS]


@pytest.mark.parametrize(
    ("text", "image", "expected"),
    [
        (f"{I}\nIdentify the class.\n\n", "q.png", ["Identify the class.", "Identify the class.\n\n"]),
        (f"{I}\nFirst.\n\n\nThen. \n", "q.png", ["First.\nThen.", "First.\n\n\nThen. \n"]),
        (f"{I}  Represent it.\n", "q.png", ["Represent it.", "  Represent it.\n"]),
        (f"{I}\nFind it: who?\n\n", "", ["Find it: who?", "\nFind it: who?\n\n"]),
        ("<|image_1|>\nFind it.\n", "", ["Find it.", "\nFind it.\n"]),
        ("<|vision_start|><|image_pad|><|vision_end|>\nIt.", "q.png", ["It.", "It."]),
        ("tram ", "", ["tram", "tram "]),
        (f"{I}\n", "q.png", ["", ""]),
    ],
)
def test_placeholders_and_white_space(text: str, image: str, expected: list[str]) -> None:
    assert turns(text, image) == expected


def test_a_text_of_vlm2vec_is_tokenised_as_a_whole() -> None:
    template = packer().template
    turn = Wording("vlm2vec", template).turn(Composed("a tram \n"))
    assert turn == tuple(template.encode_exactly("a tram \n")) and isinstance(turn, tuple)


def test_which_candidates_are_one() -> None:
    same_picture = [Composed("Ada", "a.png", "a.png"), Composed("Bob", "a.png", "a.png")]
    spaced = [Composed("10.5", "", "10.5"), Composed("10.5 ", "", "10.5 ")]
    for convention, pictures, texts in (("muco", 2, 1), ("vlm2vec", 1, 2)):
        wording = Wording(convention, packer().template)  # type: ignore[arg-type]
        keys = [
            len({wording.key(one, Dialogue((wording.turn(one),), (one.image,))) for one in pair})
            for pair in (same_picture, spaced)
        ]
        assert keys == [pictures, texts]


def test_the_table_of_data_sets() -> None:
    by_task = {task: [d for d in DATASETS.values() if d.meta_task == task] for task in META_TASKS}
    assert [len(members) for members in by_task.values()] == [10, 10, 12, 4]
    assert [sum(d.in_distribution for d in members) for members in by_task.values()] == [5, 6, 8, 1]
    assert chosen(["WebQA", "imagenet_1k", "ImageNet-1K"]) == ["ImageNet-1K", "WebQA"]
