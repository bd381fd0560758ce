"""Searching items: exact in blocks, the model is the right one, pictures by number alone, uploads within the limit."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muco_ds.data.decode import ImageError
from muco_ds.errors import UserError
from muco_ds.models.embedder import Embedder
from muco_ds.models.item_files import ItemFiles
from muco_ds.models.shards import Layout, Shards
from muco_ds.pages import collection as module
from muco_ds.pages import searcher as searcher_module
from muco_ds.pages.collection import Collection, open_collection
from muco_ds.pages.searcher import Dropped, Query, Searcher

from demo import run_here
from tiny_models import export, picture

TOOL = Path(__file__).parents[2] / "tools" / "search.py"

TEXTS = ["a red circle", "<img src=x onerror=alert(1)>", "a blue square"]


def write_items(folder: Path, items: list[dict[str, Any]]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of every kind, a model, and what the model makes of them."""
    folder = tmp_path_factory.mktemp("search")
    for seed in range(3):
        picture(seed, 900, 600).save(folder / f"{seed}.png")
    items: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    items += [{"image": "0.png"}, {"image": ["1.png", "2.png"], "text": "both"}]
    items += [{"image": "2.png", "questions": ["Where is it?", "How many?"]}]
    write_items(folder, items)
    embedder = Embedder.from_pretrained(str(export(folder / "model")))
    source = ItemFiles(str(folder / "items.jsonl"), None)
    source.check(headers=True, progress=False)
    dialogues = source.dialogues(0, len(source))
    rows = np.concatenate([embedder.encode_turns(d.images, [str(turn) for turn in d.turns]) for d in dialogues])
    np.save(folder / "emb.npy", rows)
    return folder


@pytest.fixture(scope="module")
def embedder(made: Path) -> Embedder:
    return Embedder.from_pretrained(str(made / "model"))


@pytest.fixture(scope="module")
def searcher(made: Path, embedder: Embedder) -> Searcher:
    return Searcher(embedder, open_collection(str(made / "items.jsonl"), made / "emb.npy", None))


def random_collection(folder: Path) -> tuple[np.ndarray, np.ndarray, Collection]:
    """Rows, of which some are zero, whether each has a picture, and the collection."""
    rng = np.random.default_rng(0)
    pictured_N = rng.random(400) < 0.4
    items = [{"image": f"{i}.png"} if pictured else {"text": f"text {i}"} for i, pictured in enumerate(pictured_N)]
    rows_ND = rng.standard_normal((400, 24)).astype(np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    rows_ND[rng.random(400) < 0.1] = 0
    np.save(folder / "emb.npy", rows_ND)
    return rows_ND, pictured_N, open_collection(str(write_items(folder, items)), folder / "emb.npy", None)


@pytest.mark.parametrize("pictured", [None, True, False])
def test_search_in_blocks_equals_brute_force(
    pictured: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_ND, pictured_N, collection = random_collection(tmp_path)
    monkeypatch.setattr(module, "BLOCK_BYTES", 37 * 24 * 4)
    allowed_N = rows_ND.any(axis=1) & ((pictured_N == pictured) if pictured is not None else True)
    for row in np.flatnonzero(allowed_N)[:5]:
        scores_N = np.where(allowed_N, rows_ND @ rows_ND[row], -np.inf)
        scores_N[row] = -np.inf
        best = np.argsort(-scores_N)[:50]
        hits = collection.search(collection.embedding(int(row)), 50, pictured=pictured, without=int(row))
        assert [hit.row for hit in hits] == best.tolist()
        np.testing.assert_allclose([hit.score for hit in hits], scores_N[best], atol=1e-6)


def test_no_more_results_than_items(tmp_path: Path) -> None:
    rows_ND, _, collection = random_collection(tmp_path)
    usable = rows_ND.any(axis=1).sum()
    assert len(collection.search(rows_ND[rows_ND.any(axis=1)][0], 1000)) == usable < 400


def test_a_hit_says_where_it_stands(searcher: Searcher) -> None:
    hits = {hit.row: hit for hit in searcher.search(Query("a red circle"), 20).hits}
    assert len(hits) == 7
    assert [hits[row].text for row in range(3)] == TEXTS
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[4].pictures == 2 and hits[4].place.endswith("items.jsonl: line 5") and hits[4].question is None
    assert (hits[6].text, hits[6].question) == ("How many?", 2) and hits[6].place.endswith("line 6")


def test_words_and_a_picture_are_one_query(searcher: Searcher, made: Path) -> None:
    content = Image.open(made / "2.png")
    answer = searcher.search(Query("How many?", content), 3)
    assert answer.hits[0].row == 6 and answer.hits[0].score == pytest.approx(1, abs=1e-4)
    assert searcher.search(Query("", content, "Where is it?"), 1).hits[0].row == 5
    assert answer.encode_s is not None
    alike = searcher.like(6, 3)
    assert 6 not in [hit.row for hit in alike.hits] and alike.encode_s is None


def test_a_query_needs_content(searcher: Searcher) -> None:
    with pytest.raises(UserError, match="Type a question"):
        searcher.search(Query(" \n", None, "an instruction alone"), 3)


def test_a_query_is_no_book(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedder, "encode", None)  # nothing is encoded
    for query in (Query("word " * 1000), Query("a", None, "word " * 1000)):
        with pytest.raises(UserError, match=r"may have 4,000 characters: shorten it"):
            searcher.search(query, 3)


def test_what_is_dropped_is_shrunk_and_within_the_limit(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(width: int, height: int) -> Dropped:
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        return searcher.dropped("a.png", buffer.getvalue())

    assert dropped(900, 300).picture.size == (900, 300) and dropped(900, 300).preview.size == (192, 64)
    large = dropped(6000, 1500).picture
    assert large.mode == "RGB" and large.size == (4096, 1024)
    monkeypatch.setattr(searcher_module, "decode", None)  # refused unread
    with pytest.raises(ImageError, match="has 13370 x 13370 pixels, more than 50 million"):
        dropped(13370, 13370)
    with pytest.raises(ImageError, match="is not a picture"):
        searcher.dropped("a.png", b"no picture")


def test_folder_of_shards_as_one_file(searcher: Searcher, made: Path, tmp_path: Path) -> None:
    rows_ND = np.load(made / "emb.npy")
    layout = Layout("key", 6, rows_ND.shape[1], "float32", shard_lines=4)
    (tmp_path / "shards.json").write_text(json.dumps(layout.__dict__))
    np.save(tmp_path / "00000.npy", rows_ND[:4])
    np.save(tmp_path / "00001.npy", rows_ND[4:])
    np.save(tmp_path / "00001.lines.npy", np.array([0, 1, 3]))
    assert len(Shards.open(tmp_path)) == 7
    sharded = open_collection(str(made / "items.jsonl"), tmp_path, None)
    assert sharded.search(rows_ND[2], 7) == searcher.collection.search(rows_ND[2], 7)


def test_another_model_or_other_items_are_refused(embedder: Embedder, made: Path, tmp_path: Path) -> None:
    rows_ND = np.load(made / "emb.npy")
    items = str(made / "items.jsonl")
    np.save(tmp_path / "fewer.npy", rows_ND[:5])
    with pytest.raises(UserError, match="there are 5 rows but --input has items for 7"):
        open_collection(items, tmp_path / "fewer.npy", None)
    np.save(tmp_path / "wide.npy", np.pad(rows_ND, ((0, 0), (0, 1))))
    with pytest.raises(UserError, match="give the --model that wrote them"):
        Searcher(embedder, open_collection(items, tmp_path / "wide.npy", None))
    np.save(tmp_path / "other.npy", np.roll(rows_ND, 7, axis=1))
    with pytest.raises(UserError, match=r"items.jsonl: line 1 has another embedding by this model"):
        Searcher(embedder, open_collection(items, tmp_path / "other.npy", None))
    np.save(tmp_path / "zero.npy", np.zeros_like(rows_ND))
    with pytest.raises(UserError, match="every row is zero"):
        Searcher(embedder, open_collection(items, tmp_path / "zero.npy", None))


def test_files_that_are_no_embeddings_are_named(made: Path, tmp_path: Path) -> None:
    items = str(made / "items.jsonl")
    (tmp_path / "text.npy").write_text("no numbers")
    np.save(tmp_path / "flat.npy", np.zeros(7, np.float32))
    for name, message in {"none.npy": "No such file", "text.npy": "is no .npy file", "flat.npy": "holds 7"}.items():
        with pytest.raises(UserError, match=message):
            open_collection(items, tmp_path / name, None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no embeddings"):
        open_collection(items, tmp_path / "folder", None)
    (tmp_path / "folder" / "00000.parquet").touch()
    with pytest.raises(UserError, match="--format npy"):
        open_collection(items, tmp_path / "folder", None)


def test_thumbnails_are_small_and_of_items_alone(searcher: Searcher, made: Path, tmp_path: Path) -> None:
    shown = Image.open(io.BytesIO(searcher.collection.thumbnail(4, 1)))
    assert shown.format == "JPEG" and max(shown.size) == module.THUMBNAIL
    for row, number in ((0, 0), (4, 2), (4, -1), (-1, 0), (7, 0), (10**12, 0)):
        with pytest.raises(LookupError):
            searcher.collection.thumbnail(row, number)
    (tmp_path / "broken.png").write_text("no picture")
    np.save(tmp_path / "emb.npy", np.ones((1, 4), np.float32))
    broken = open_collection(str(write_items(tmp_path, [{"image": "broken.png"}])), tmp_path / "emb.npy", None)
    with pytest.raises(ImageError):
        broken.thumbnail(0, 0)


def test_what_is_missing_and_how_to_get_it(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", made / "model", "--input", made / "items.jsonl", "--embeddings", made / "emb.npy"]
    for device in ("cpu:x", "cuda:99", "tpu"):
        assert run_here(monkeypatch, TOOL, *arguments, "--port", "0", "--device", device) == 2
        assert f"error: device {device}: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert run_here(monkeypatch, TOOL, *arguments) == 2
    assert "the page needs NiceGUI" in (said := capsys.readouterr().err) and "pip install nicegui" in said
    assert run_here(monkeypatch, TOOL, *arguments[:-1], made / "none.npy") == 2
    assert "none.npy': write it with tools/encode.py" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        open_collection(str(made / "items.jsonl"), made / "emb.npy", None)


def answer_of(headers: list[tuple[bytes, bytes]], guard: Callable[..., Any] | None = None) -> int | None:
    """Status with which a POST is refused; None where it is passed on."""
    pytest.importorskip("nicegui")
    from muco_ds.pages.search_page import UploadLimit

    statuses: list[int | None] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(None)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("the body is read")

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run((guard or UploadLimit)(application)(scope, receive, send))
    return statuses[0]


def test_a_body_over_the_limit_is_refused_unread() -> None:
    assert answer_of([(b"content-length", b"1000000")]) is None
    assert answer_of([(b"content-length", str(21 * 2**20).encode())]) == 413
    assert answer_of([]) == 413, "of unknown length"


def test_this_machine_is_served_under_its_own_names_alone() -> None:
    pytest.importorskip("nicegui")
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from muco_ds.pages.search_page import LOCAL

    guard = partial(TrustedHostMiddleware, allowed_hosts=[*LOCAL.values()])
    for host in ("127.0.0.1:8080", "localhost:8080", "[::1]:8080"):
        assert answer_of([(b"host", host.encode())], guard) is None, host
    assert answer_of([(b"host", b"elsewhere.org:8080")], guard) == 400
