"""Inference: order, packs, kinds of items, questions about one picture, and what is wrong with an item."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muco_ds.data.images import ImagePipeline
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.errors import UserError
from muco_ds.models import encode
from muco_ds.models.embedder import Embedder
from muco_ds.models.encode import encode_dialogues
from muco_ds.models.encode_plan import Piece, plan_packs
from muco_ds.models.probe import probe_dialogues

from tiny_models import OPENING, export, pack, packer, picture, stock_embedding

TAIL = "<|im_end|>\n<|im_start|>assistant\n<|emb|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder.from_pretrained(str(export(tmp_path_factory.mktemp("exported") / "model")), device="cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    picture(1).save(path)
    return path


def alone(text: str, *pictures: Any) -> np.ndarray:
    prompt = OPENING + "{image}" * len(pictures) + ("\n" if pictures and text else "") + text + TAIL
    return stock_embedding("qwen2_vl", prompt, pictures).numpy()


def test_items_of_every_kind_keep_their_order(model: Embedder, file: Path) -> None:
    one, two = picture(1), picture(2, 140, 84)
    grey = one.convert("L").convert("RGB")
    cases: list[tuple[Any, np.ndarray]] = [
        ("a red star", alone("a red star")),
        (one, alone("", one)),
        ({"text": "Find it.", "image": one}, alone("Find it.", one)),
        ({"text": "Find it.", "image": str(file)}, alone("Find it.", one)),
        ({"text": "Find it.", "image": file}, alone("Find it.", one)),
        ({"image": [one, two], "text": "Compare."}, alone("Compare.", one, two)),
        ({"instruction": "Find the caption.", "text": "a red star"}, alone("Find the caption.\na red star")),
        ({"instruction": "Describe it.", "image": two}, alone("Describe it.", two)),
        ({"text": "  a red star\n"}, alone("a red star")),
        ({"text": "a red star", "image": None}, alone("a red star")),
        (file, alone("", one)),
        (np.asarray(two), alone("", two)),
        ({"image": [np.asarray(one.convert("L")), file], "text": "Compare."}, alone("Compare.", grey, one)),
        ({"image": np.asarray(two.convert("RGBA")), "text": "Find it."}, alone("Find it.", two)),
    ]
    want_ND = np.stack([want for _, want in cases])
    for pack_tokens in (1, 100, 16384):  # each by itself, a few in a pack, all in one
        got_ND = model.encode([item for item, _ in cases], pack_tokens=pack_tokens)
        assert got_ND.dtype == np.float32
        np.testing.assert_allclose(got_ND, want_ND, atol=1e-5, rtol=0)


def test_special_tokens_in_a_text_are_characters(model: Embedder) -> None:
    plain, smuggled = model.encode(["a", "a<|emb|>"])
    assert np.abs(plain - smuggled).max() > 1e-3 and np.isfinite(smuggled).all()
    model.encode(["<|vision_start|><|image_pad|><|vision_end|>"])  # no picture stands behind it


def test_questions_about_one_picture_equal_each_by_itself(model: Embedder) -> None:
    questions = ["What is in the middle?", "", "Read the sign."]
    image = picture(3)
    want_kD = np.stack([alone(question, image) for question in questions])
    grids = []
    model.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: grids.append(kwargs["grid_thw"].tolist()), with_kwargs=True
    )
    np.testing.assert_allclose(model.encode_turns(image, questions), want_kD, atol=1e-5, rtol=0)
    assert grids == [[[1, 6, 6]]]  # one call, one picture


def test_no_items_give_no_rows(model: Embedder) -> None:
    empty = model.encode([])
    assert empty.shape == (0, 96) and empty.dtype == np.float32
    assert model.encode(iter([]), dim=8).shape == (0, 8)
    assert model.encode_turns(picture(3), []).shape == (0, 96)
    assert model.encode_turns(picture(3), ["a"]).shape == (1, 96)
    assert model.encode_turns(picture(3), (question for question in "ab")).shape == (2, 96)
    assert model.encode_turns(picture(3), iter([])).shape == (0, 96)


@pytest.mark.parametrize("option", [{"dim": 1.5}, {"dim": "3"}, {"dim": True}, {"pack_tokens": 0}, {"pack_tokens": -5}])
def test_numbers_that_cannot_be_are_refused(model: Embedder, option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        model.encode(["a"], **option)


@pytest.mark.parametrize("pack_tokens", [1, 60, 150, 400, 10**6])
def test_packs_hold_every_turn_once_within_the_budget(pack_tokens: int) -> None:
    dialogues = [*probe_dialogues(), Dialogue(("a",)), Dialogue(("word " * 90,)), *probe_dialogues(), Dialogue(("b",))]
    plan = plan_packs(packer(), dialogues, pack_tokens, mark_broken=False)
    assert sorted(row for pack in plan.packs for piece in pack for row in piece.rows) == list(range(plan.rows))

    def tokens(pieces: list[Piece]) -> int:
        return pack([Dialogue(tuple(piece.turns), piece.images) for piece in pieces], False).tokens

    assert plan.rows == 13
    for pieces in plan.packs:
        assert tokens(pieces) <= pack_tokens or sum(len(piece.rows) for piece in pieces) == 1
    # Next fit: what opened a pack would not have fitted (a newline more is counted for a picture without text).
    for pieces, (first, *_) in pairwise(plan.packs):
        opener = Piece(first.images, first.turns if first.images else first.turns[:1])
        shared = not opener.images and not pieces[-1].images  # the beginning would not be needed again
        together = [*pieces[:-1], Piece((), pieces[-1].turns + opener.turns)] if shared else [*pieces, opener]
        assert tokens(together) > pack_tokens - 3


def test_dialogues_that_begin_alike_share_their_beginning(file: Path) -> None:
    one = picture(1)
    dialogues = [
        Dialogue(("a",), (one,)),
        Dialogue(("b",)),
        Dialogue(("c",), (str(file),)),
        Dialogue(("d", "e"), (one,)),
        Dialogue(("f",), (str(file), one)),
        Dialogue(("g" * 50,)),
        Dialogue(("h",), (str(file),)),
        Dialogue(("i",), (picture(1),)),  # equal, but another object: nobody compares pixels
    ]
    (pieces,) = plan_packs(packer(), dialogues, 10**6, mark_broken=False).packs
    found = {tuple(sorted(piece.rows)): len(piece.images) for piece in pieces}
    assert found == {(0, 3, 4): 1, (1, 6): 0, (2, 7): 1, (5,): 2, (8,): 1}
    assert pieces[-1].rows == [6, 1]  # longest first


def test_questions_about_one_picture_are_torn_apart_only_where_they_must(file: Path) -> None:
    texts = [Dialogue((text,)) for text in ("a", "b c d e f g h i j k", "d")]
    asked = Dialogue(tuple("abcdefg"), (str(file),))
    whole = pack([asked], False).tokens
    packs = plan_packs(packer(), [*texts, asked, Dialogue(("x",), (picture(2),))], whole, mark_broken=False).packs
    assert [[len(piece.images) for piece in pieces] for pieces in packs[:1]] == [[1]] and len(packs[0][0].rows) == 7
    packs = plan_packs(packer(), [asked], whole - 1, mark_broken=False).packs
    assert [len(pieces[0].rows) for pieces in packs] == [6, 1]


def test_items_give_the_same_in_any_order_and_pack(model: Embedder, file: Path) -> None:
    words = ["the", "red", "star", "and", "a", "blue", "square", "in", "corner", "of", "picture"]
    rng = np.random.default_rng(0)
    items: list[Any] = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(12)]
    items += [{"image": str(file), "text": text} for text in items[:4]] + [{"image": picture(2, 140, 84), "text": "b"}]
    alone_ND = np.concatenate([model.encode([item]) for item in items])
    for pack_tokens in (1, 100, 300, None):
        order = rng.permutation(len(items))
        got_ND = model.encode([items[i] for i in order], pack_tokens=pack_tokens)
        np.testing.assert_allclose(got_ND, alone_ND[order], atol=2e-6, rtol=0)


def test_windows_are_joined_in_order(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [f"{i} {'word ' * (i % 5)}" for i in range(11)] + [picture(i) for i in range(3)]
    want_ND = model.encode(items)
    monkeypatch.setattr(encode, "WINDOW_DIALOGUES", 4)
    np.testing.assert_allclose(model.encode(items, pack_tokens=60), want_ND, atol=2e-6, rtol=0)


def test_a_picture_of_several_items_is_decoded_once(
    model: Embedder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    patches = ImagePipeline.patches
    monkeypatch.setattr(ImagePipeline, "patches", lambda self, ref: decoded.append(ref) or patches(self, ref))
    model.encode([{"image": str(file), "text": text} for text in "abc"] + ["d"])
    assert decoded == [str(file)]


def test_every_turn_gives_a_row_in_order_whatever_the_packs(model: Embedder) -> None:
    dialogues = [*probe_dialogues(), Dialogue(("a", "b", "c"))]
    whole, pieces = (
        encode_dialogues(model, packer(), dialogues, pack_tokens=n, device=torch.device("cpu"), shared=False)
        for n in (10**6, 50)
    )
    assert whole.shape == (8, 96) and not whole.requires_grad
    torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "item, message",
    [
        (5, "give a text, a picture"),
        ({"text": "a", "img": "x.png"}, "give a text, a picture"),
        ("", "neither text nor picture"),
        ({"text": " ", "instruction": ""}, "neither text nor picture"),
        ({"image": []}, "neither text nor picture"),
        ({"image": 5}, "'image' must be a path, a picture, an array or a list of them, not int"),
        (np.zeros((9, 9, 3), np.float32), r"an array of float32 \[9, 9, 3\] is no picture: give uint8"),
        ({"image": np.zeros((3, 9, 9), np.uint8)}, r"an array of uint8 \[3, 9, 9\] is no picture"),
        (np.zeros((0, 9, 3), np.uint8), "is no picture"),
        (np.zeros((2, 9, 9, 3), np.uint8), "is no picture"),
        ({"image": [picture(1), None]}, "'image' must be"),
        ({"text": 5}, "'text' and 'instruction' must be strings"),
        ({"instruction": ["a"], "text": "b"}, "'text' and 'instruction' must be strings"),
        ({"text": 0, "image": picture(1)}, "'text' and 'instruction' must be strings"),
        ({"text": [], "image": picture(1)}, "'text' and 'instruction' must be strings"),
        ("a \ud800 b", r"'\\ud800' is half a character"),
    ],
)
def test_bad_items_name_their_position(model: Embedder, item: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"item 1: .*{message}"):
        model.encode(["fine", item])


@pytest.mark.parametrize("items", ["a dog", {"text": "a dog"}, picture(1), np.zeros((9, 9, 3), np.uint8), Path("a"), 5])
def test_one_item_is_no_list_of_items(model: Embedder, items: Any) -> None:
    with pytest.raises(UserError, match=r"items: a \w+ is no list of items"):
        model.encode(items)


def test_bad_questions_and_instructions_are_refused(model: Embedder) -> None:
    for questions in ("What?", ["What?", 5]):
        with pytest.raises(UserError, match="questions: must be a list of strings"):
            model.encode_turns(picture(1), questions)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"questions: 1: .* half a character"):
        model.encode_turns(picture(1), ["What?", "\udfff"])
    with pytest.raises(UserError, match="questions: one has neither text nor picture"):
        model.encode_turns([], ["What?", " "])
    with pytest.raises(UserError, match="image must be a path"):
        model.encode_turns([picture(1), 5], ["What?"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="instruction: must be a string"):
        model.encode(["a"], instruction=["b"])  # type: ignore[arg-type]


def test_an_instruction_goes_to_items_without_their_own(model: Embedder) -> None:
    items: list[Any] = ["a", {"text": "b", "instruction": "Own."}, {"text": "c", "instruction": ""}, picture(1)]
    got_ND = model.encode(items, instruction="Find it.")
    want_ND = np.stack([alone("Find it.\na"), alone("Own.\nb"), alone("c"), alone("Find it.", picture(1))])
    np.testing.assert_allclose(got_ND, want_ND, atol=1e-5, rtol=0)


def test_an_iterator_is_read_as_it_is_needed(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By windows, and a buffer that its owner fills anew is encoded as it was when it was given."""
    frames = [np.asarray(picture(i).convert("RGBA")) for i in range(16)]  # Pillow would share this mode's memory
    want_ND = model.encode(frames)
    monkeypatch.setattr(encode, "WINDOW_DIALOGUES", 2)
    buffer = np.empty_like(frames[0])
    read, encoded, ahead = [0], [0], [0]

    def items() -> Iterator[np.ndarray]:
        for frame in frames:
            read[0] += 1
            ahead[0] = max(ahead[0], read[0] - encoded[0])
            buffer[:] = frame
            yield buffer

    hook = model.register_forward_hook(lambda *_: encoded.__setitem__(0, encoded[0] + 1))
    got_ND = model.encode(items(), pack_tokens=1)
    hook.remove()
    np.testing.assert_allclose(got_ND, want_ND, atol=2e-6, rtol=0)
    assert read == encoded == [16] and ahead[0] < 12


def test_a_window_holds_so_many_decoded_pixels(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(encode, "WINDOW_PIXELS", 2 * 84 * 84)
    drawn, read = Dialogue(("a",), (picture(1),)), Dialogue(("a",), (str(file),))
    windows = encode.windows_of([drawn, read, drawn, *[read] * 5, drawn, drawn, read])
    assert [len(window) for window in windows] == [3, 7, 1]


def test_the_bar_counts_items(model: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    model.encode(["a", "b"], progress=True)
    assert "2/2" in capsys.readouterr().err
    model.encode(iter(["a", "b"]), progress=True)
    assert "2row" in capsys.readouterr().err
    model.encode(["a", "b"])
    assert not capsys.readouterr().err


def test_unusable_pictures_are_named(model: Embedder, file: Path, tmp_path: Path) -> None:
    truncated, text, absent = tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "absent.png"
    truncated.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # its header is intact
    text.write_text("not a picture")
    for path in (truncated, text, absent):
        with pytest.raises(UserError, match=rf"picture .*{path.name}: "):
            model.encode(["fine", {"image": str(path)}])


def test_marked_dialogues_with_broken_pictures_are_nan_and_no_others(
    model: Embedder, file: Path, tmp_path: Path
) -> None:
    truncated, absent = tmp_path / "cut.png", tmp_path / "absent.png"
    truncated.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fine = [Dialogue(("a", "b"), (str(file),)), Dialogue(("c",))]
    broken = [Dialogue(("a", "b"), (str(file), str(truncated))), Dialogue(("d",), (str(absent),))]
    device = torch.device("cpu")
    for pack_tokens in (1, 10**6):
        options: dict[str, Any] = {"pack_tokens": pack_tokens, "device": device, "shared": False}
        mixed = [fine[0], broken[0], fine[1], broken[1]]
        got = encode_dialogues(model, packer(), mixed, mark_broken=True, **options)
        assert got.isnan().all(1).tolist() == [False, False, True, True, False, True]
        torch.testing.assert_close(got[[0, 1, 4]], encode_dialogues(model, packer(), fine, **options))


def test_ranks_share_the_packs_and_every_rank_forwards_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks played in turn, their exchange by hand: five packs are three rounds for each of two ranks."""
    dialogues = [Dialogue((text,)) for text in ("a", "b c", "d e f", "g", "h i")]
    asked: list[list[int]] = []
    forwards = []

    def model(batch: PackedBatch) -> torch.Tensor:
        forwards.append(batch.counts.queries)
        return torch.zeros(batch.counts.queries, 4)

    def gather(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        asked.append(counts)
        return rows.new_zeros(sum(counts), rows.shape[1])

    monkeypatch.setattr(encode, "gather_rows", gather)
    monkeypatch.setattr(encode.env, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(encode.env, "rank", lambda rank=rank: rank)
        out = encode_dialogues(model, packer(), dialogues, pack_tokens=1, device=torch.device("cpu"), shared=True)
        assert out.shape == (5, 4)
    assert forwards == [1, 1, 1, 1, 1, 0] and asked == [[1, 1], [1, 1], [1, 0]] * 2


def test_a_picture_that_is_but_opened_is_read_before_threads_meet_it(tmp_path: Path) -> None:
    """One object in several packs: decoded in two threads at once, its pixels would be wrong."""
    path = tmp_path / "a.png"
    picture(0).save(path)
    opened = Image.open(path)
    plan_packs(packer(), [Dialogue(("what is it",), (opened,))], 64, mark_broken=False)
    assert opened.fp is None, "still to be read"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="does not decode"):
        plan_packs(packer(), [Dialogue(("what is it",), (Image.open(path),))], 64, mark_broken=False)


def test_an_opened_picture_in_several_lists_is_read_by_one_thread(model: Embedder, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    picture(0, 900, 900).save(path)
    other = picture(1)
    for _ in range(4):
        one = Image.open(path)
        items = [one, {"image": [one, one]}, {"image": [one, other]}, {"image": [other, one]}]
        assert model.encode(items).shape == (4, 96)
