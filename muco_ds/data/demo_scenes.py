"""Rendered scenes with seven kinds of questions and answers, in the columns of naver-ai/M3T.

A scene is a 3 x 3 grid of 28-pixel cells (one visual token each for a ViT with 14-pixel patches merged two by two). Its
corners and centre hold two to four coloured shapes, exactly one of them big and no two of one colour, and sometimes a
tile with a letter or a digit. Every answer is a function of (picture, question) and names what it answers, so that no
two question kinds share an answer text.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from muco_ds.data.conversations import conversation
from muco_ds.data.demo_pairs import IMAGE_MARK, write_pairs
from muco_ds.data.readers import M3T_SCHEMA
from muco_ds.data.schema import RecordTurn

CELL = 28
GRID = 3
SIDE = CELL * GRID
# Drawn at four times the size and averaged down: smooth edges, and fonts differ less between Pillow builds.
SUPERSAMPLE = 4

# Cells in reading order; the middles of the edges stay empty, which leaves a small model five places to tell apart.
PLACES = {
    0: "at the top left",
    2: "at the top right",
    4: "in the centre",
    6: "at the bottom left",
    8: "at the bottom right",
}
# Shapes that differ in more than a corner's outline: a 14-pixel patch sees a quarter of a shape.
SHAPES = ("square", "ring", "cross", "triangle")
COLOURS = {
    "red": (230, 20, 20),
    "green": (20, 180, 20),
    "blue": (30, 60, 255),
    "yellow": (255, 225, 0),
    "purple": (190, 40, 220),
    "cyan": (0, 220, 220),
}
BACKGROUNDS = {"night": (15, 15, 25), "fog": (135, 135, 135), "snow": (250, 250, 250), "sea": (0, 95, 110)}
FRAME = (255, 128, 0)
SIGNS = {**{c: f"the letter {c}" for c in "AHKX"}, **{c: f"the digit {c}" for c in "2479"}}


@dataclass(frozen=True)
class Shape:
    """One coloured shape in cell `cell` (a key of PLACES)."""

    cell: int
    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; equal scenes give equal pictures and unequal scenes unequal ones."""

    background: str
    shapes: tuple[Shape, ...]
    sign: str
    sign_cell: int

    @property
    def big(self) -> Shape:
        return next(shape for shape in self.shapes if shape.size == "big")


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes, no two alike, a pure function of the arguments."""
    rng = random.Random(f"scenes {seed}")
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes.setdefault(_sample_scene(rng))
    return list(scenes)


def _sample_scene(rng: random.Random) -> Scene:
    n_shapes = rng.randint(2, 4)
    has_sign = rng.random() < 0.5
    cells = rng.sample(list(PLACES), n_shapes + has_sign)
    colours = rng.sample(list(COLOURS), n_shapes)
    big = rng.randrange(n_shapes)
    shapes = [Shape(cells[i], "big" if i == big else "small", colours[i], rng.choice(SHAPES)) for i in range(n_shapes)]
    return Scene(
        background=rng.choice(list(BACKGROUNDS)),
        shapes=tuple(sorted(shapes, key=lambda shape: shape.cell)),
        sign=rng.choice(list(SIGNS)) if has_sign else "",
        sign_cell=cells[-1] if has_sign else -1,
    )


def render(scene: Scene) -> Image.Image:
    """The scene as an 84 x 84 RGB picture."""
    image = Image.new("RGB", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    # Rotary positions are relative only: the frame makes each cell tell its place by its own edges.
    draw.rectangle((0, 0, SIDE * SUPERSAMPLE - 1, SIDE * SUPERSAMPLE - 1), outline=FRAME, width=2 * SUPERSAMPLE)
    for shape in scene.shapes:
        _draw_shape(draw, shape)
    if scene.sign:
        _draw_sign(draw, scene.sign, scene.sign_cell)
    return image.reduce(SUPERSAMPLE)


def _centre(cell: int) -> tuple[float, float]:
    row, column = divmod(cell, GRID)
    return (column + 0.5) * CELL * SUPERSAMPLE, (row + 0.5) * CELL * SUPERSAMPLE


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    x, y = _centre(shape.cell)
    radius = (12 if shape.size == "big" else 9) * SUPERSAMPLE
    colour = COLOURS[shape.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape.shape == "ring":
        draw.ellipse(box, outline=colour, width=round(0.45 * radius))
    elif shape.shape == "cross":
        arm = 0.35 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)


def _draw_sign(draw: ImageDraw.ImageDraw, sign: str, cell: int) -> None:
    x, y = _centre(cell)
    half = 11 * SUPERSAMPLE
    draw.rectangle((x - half, y - half, x + half, y + half), fill=(255, 255, 255), outline=(0, 0, 0), width=SUPERSAMPLE)
    draw.text((x, y), sign, fill=(0, 0, 0), font=ImageFont.load_default(size=20 * SUPERSAMPLE), anchor="mm")


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _setting(scene: Scene) -> tuple[list[str], str]:
    questions = ["What kind of scene is this?", "Name the scene.", "Classify the picture by its setting."]
    return questions, f"a {scene.background} scene"


def _colours(scene: Scene) -> tuple[list[str], str]:
    questions = ["Which colours are the shapes?", "List the colours of the shapes.", "What colours are there?"]
    present = {shape.colour for shape in scene.shapes}
    return questions, f"the colours are {_join([colour for colour in COLOURS if colour in present])}"


def _kinds(scene: Scene) -> tuple[list[str], str]:
    questions = ["Which kinds of shapes are there?", "List the kinds of shapes.", "What shapes do you see?"]
    present = {shape.shape for shape in scene.shapes}
    return questions, f"the kinds are {_join([shape for shape in SHAPES if shape in present])}"


def _which_shape(shape: Shape) -> tuple[list[str], str]:
    colour = shape.colour
    questions = [f"Which shape is {colour}?", f"What is the {colour} thing?", f"Describe the {colour} shape."]
    return questions, f"the {colour} one is a {shape.size} {shape.shape}"


def _where_is(shape: Shape) -> tuple[list[str], str]:
    name = shape.name
    questions = [f"Where is the {name}?", f"Find the {name}.", f"In which part of the picture is the {name}?"]
    return questions, f"the {name} is {PLACES[shape.cell]}"


def _what_is_written(scene: Scene) -> tuple[list[str], str]:
    questions = ["What is written in the picture?", "Read the sign.", "What does the sign say?"]
    return questions, f"the sign says {SIGNS[scene.sign]}"


def _title(scene: Scene) -> tuple[list[str], str]:
    questions = ["Make up a title for a story about the big shape.", "Invent a title.", "Give the picture a title."]
    return questions, f"the tale of the {scene.big.name} in the {scene.background}"


def caption(scene: Scene) -> str:
    """All things in reading order, then the setting."""
    things = [(shape.cell, f"a {shape.size} {shape.name}") for shape in scene.shapes]
    if scene.sign:
        things.append((scene.sign_cell, SIGNS[scene.sign]))
    return f"{_join([text for _, text in sorted(things)])} in a {scene.background} scene"


def _caption(scene: Scene) -> tuple[list[str], str]:
    return ["Describe the picture.", "Find the caption of this picture.", "What does the picture show?"], caption(scene)


def scene_row(scene: Scene, image_path: str, rng: random.Random) -> dict[str, Any]:
    """One M3T row: 0 classification; 1, 2 global VQA; 3, 4 local VQA; 5 creative VQA; 6 retrieval.

    `rng` picks the shapes that the two local questions are about; `image_path` is relative to the image folder.
    """
    first, second = rng.sample(scene.shapes, 2)
    ask_sign = bool(scene.sign) and rng.random() < 0.5
    slots = [
        _setting(scene),
        _colours(scene),
        _kinds(scene),
        _which_shape(first),
        _what_is_written(scene) if ask_sign else _where_is(second),
        _title(scene),
        _caption(scene),
    ]
    answers = [answer for _, answer in slots]
    return {
        "qry": [[IMAGE_MARK + question for question in questions] for questions, _ in slots],
        "qry_sentence": caption(scene),
        "qry_image_path": image_path,
        "pos_text": answers,
        "pos_sentence": answers,
        "pos_image_path": "",
        "neg_text": [""] * len(slots),
    }


def write_data(data_dir: Path, train_scenes: int, test_scenes: int, seed: int) -> list[dict[str, Any]]:
    """Write `train.parquet`, `test.parquet` and `images/{train,test}/*.png` under `data_dir`; return the training rows.

    `pairs_train.parquet` and `pairs_test.parquet` hold single pairs of the same scenes (`demo_pairs`),
    `conversations_train.jsonl` and `conversations_test.jsonl` each scene's turns as one conversation, of all seven
    kinds: titles and captions too are functions of the picture. No test scene equals a training scene. The same
    arguments give the same files.
    """
    scenes = sample_scenes(train_scenes + test_scenes, seed)
    # The test scenes come first, so that they stay the same when only the number of training scenes changes.
    splits = {"test": scenes[:test_scenes], "train": scenes[test_scenes:]}
    assert not set(splits["test"]) & set(splits["train"])
    rows = {split: _write_split(data_dir, split, part, seed) for split, part in splits.items()}
    write_pairs(data_dir / "pairs_train.parquet", rows["train"], seed, all_kinds=False)
    write_pairs(data_dir / "pairs_test.parquet", rows["test"], seed, all_kinds=True)
    for split in splits:
        _write_conversations(data_dir / f"conversations_{split}.jsonl", rows[split])
    return rows["train"]


def _write_split(data_dir: Path, split: str, scenes: list[Scene], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"questions {split} {seed}")
    folder = data_dir / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(tqdm(scenes, desc=f"{split} scenes", unit="scene")):
        render(scene).save(folder / f"{index:05d}.png", compress_level=1)
        rows.append(scene_row(scene, f"{split}/{index:05d}.png", rng))
    table = pa.Table.from_pylist(rows, schema=M3T_SCHEMA)
    pq.write_table(table, data_dir / f"{split}.parquet", write_page_checksum=True)
    return rows


def _write_conversations(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows):
            questions = [tuple(text.removeprefix(IMAGE_MARK) for text in texts) for texts in row["qry"]]
            turns = [RecordTurn(asked, row["pos_text"][kind], kind) for kind, asked in enumerate(questions)]
            made = conversation(number, turns, [row["qry_image_path"]])
            file.write(json.dumps(made, ensure_ascii=False) + "\n")


def row_texts(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Every question (without its image mark) and answer of the rows, as a tokenizer's training text."""
    texts: list[str] = []
    for row in rows:
        texts += [question.removeprefix(IMAGE_MARK) for questions in row["qry"] for question in questions]
        texts += row["pos_text"]
    return texts
