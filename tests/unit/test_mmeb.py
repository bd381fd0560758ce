"""MMEB: scores equal those by hand on miniature data sets of both publications with all their quirks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.evaluation import evaluate
from muco_ds.eval.mmeb import MMEBSuite
from muco_ds.eval.suites import SuiteOptions, open_suite
from muco_ds.models.embedder import Embedder

from tiny_mmeb import ChosenEncoder, chosen_encoder, instructed, ready, write_pictures, write_rows
from tiny_models import embedder, export, packer

QUESTION = "<|image_1|>\nWhat is it?\n"
SHOW = "<|image_1|>\nRepresent the given image.\n"
ASK = "<|image_1|>\nFind the picture: "


def ready_vqa(root: Path) -> None:
    """OK-VQA of TIGER-Lab/MMEB-eval: rows 0, 3 and 4 right, 1 (a tie) and 2 wrong, the others can't be used."""
    rows = [
        ready(QUESTION, "OK-VQA/0.png", ["red", "blue", "red"], ["", "", ""]),  # the right one once more
        ready(QUESTION, "OK-VQA/0.png", ["red", "same"], ["", ""]),
        ready(QUESTION, "OK-VQA/0.png", ["blue", "red", "green"], ["", "", ""]),
        ready("<|image_1|>\nNo picture.\n", "", ["blue", "red"], []),  # a placeholder without a picture
        ready(QUESTION, "OK-VQA/1.png", ["green", "blue", " "], ["", "", ""]),  # a blank caption
        ready(QUESTION, "OK-VQA/absent.png", ["red", "blue"], ["", ""]),
        ready(QUESTION, "../0.png", ["red", "blue"], ["", ""]),
        ready(QUESTION, "OK-VQA/0.png", [], []),
    ]
    write_rows(root / "OK-VQA", rows)
    write_pictures(root / "eval_images", "OK-VQA/0.png", "OK-VQA/1.png")


VQA_VECTORS = {
    **{"What is it?|0.png": (1, 0, 0), "What is it?|1.png": (0, 0, 1), "No picture.": (0, 1, 0)},
    **{"red": (1, 0.1, 0), "same": (1, 0.1, 0), "blue": (0, 1, 0.1), "green": (0.1, 0, 1), "": (0, -1, 0)},
    "What is it?|absent.png": (0, 0, 0),
}


def instructed_retrieval(root: Path) -> None:
    """WebQA of ziyjiang/MMEB_Test_Instruct: text queries with a placeholder, candidates of a picture and a caption."""
    names = ["WebQA/a.png", "WebQA/b.png", "WebQA/c.png"]
    rows = [
        instructed(ASK, "Ada", "", SHOW, ["Ada", "Bob"], names[:2]),
        instructed(ASK, "Eve", "", SHOW, ["Eve", "Ada"], [names[0], names[0]]),  # one picture with two captions
        instructed(ASK, "Bob", "", SHOW, ["Bob", "Eve"], ["WebQA/b.png", "WebQA/absent.png"]),
        instructed(ASK, "Bob", "", SHOW, ["", "ignored"], ["WebQA/c.png", "WebQA/b.png"]),  # the first decides
    ]
    write_rows(root / "WebQA", rows)
    write_pictures(root / "image-tasks", *names)


RETRIEVAL_VECTORS = {
    **{"Find the picture:  Ada": (1, 0, 0), "Find the picture:  Eve": (0, 1, 0), "Find the picture:  Bob": (0, 0, 1)},
    "Represent the given image.\n Ada|a.png": (1, 0.2, 0),
    "Represent the given image.\n Bob|b.png": (0, 0.1, 1),
    "Represent the given image.\n Eve|a.png": (0.9, 0, 0),
    "Represent the given image.\n Eve|absent.png": (0, 0, 0),
    "Represent the given image.|c.png": (0, 0, 1),
    "Represent the given image.|b.png": (0, 1, 0),
}


def score(root: Path, encoder: Encoder, **options: Any) -> dict[str, Any]:
    suite = open_suite(SuiteOptions("mmeb", str(root), **options))
    entries: dict[str, Any] = {}
    for dataset in suite.datasets:
        entries |= suite.score(dataset, encoder)
    return suite.results(entries)


def test_ready_texts_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready_vqa(tmp_path)
    encoder = chosen_encoder(VQA_VECTORS, sizes=(2,))
    entry = score(tmp_path, encoder)["OK-VQA"]
    version = entry.pop("version")
    assert entry == {
        "precision@1": 3 / 5,
        "precision@1@2": 2 / 5,  # of 1.png's question nothing is left, and all candidates tie
        **{"queries": 5, "candidates": 5, "list_length": (2 + 2 + 3 + 2 + 3) / 5, "left_out": 3},
        "chance": pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 3) / 5),
    }
    assert version.startswith("MMEB V1, TIGER-Lab/MMEB-eval, texts as muco, data ") and len(version) == 58
    # Everything once: the question about 0.png is asked four times, red offered five times.
    assert encoder.asked == [
        ["What is it?|0.png", "No picture.", "What is it?|1.png", "What is it?|absent.png"],
        ["red", "blue", "same", "green", ""],
    ]
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert warning.startswith("OK-VQA: 3 rows are left out; ") and "row 6: picture path leaves --images" in warning


def test_sizes_of_the_embedding_by_hand(tmp_path: Path) -> None:
    rows = [ready("one", "", ["a", "b"], []), ready("two", "", ["b", "a"], [])]
    write_rows(tmp_path / "GQA", rows)
    # By the first two components `two` is nearest to a, by all to b.
    vectors = {"one": (1, 0, 0), "two": (1, 0, 2), "a": (1, 0.1, 0), "b": (0.5, 0.5, 1)}
    entry = score(tmp_path, chosen_encoder(vectors, sizes=(2,)))["GQA"]
    assert (entry["precision@1"], entry["precision@1@2"]) == (1.0, 0.5)


def test_a_collapsed_embedding_scores_nothing(tmp_path: Path) -> None:
    # Every place in lists of many lengths: a matrix product rounds the rows at its edges in another way.
    lists = {k: [f"c{k},{j}" for j in range(k)] for k in (3, 5, 9, 17, 33)}
    rows = [ready(f"q{k}", "", lists[k][j:] + lists[k][:j], []) for k in lists for j in range(k)]
    write_rows(tmp_path / "GQA", rows)
    for seed in range(4):
        vector = torch.randn(97, generator=torch.manual_seed(seed)).tolist()
        names = [*(f"q{k}" for k in lists), *(name for names in lists.values() for name in names)]
        entry = score(tmp_path, chosen_encoder(dict.fromkeys(names, vector)))["GQA"]
        assert (entry["precision@1"], entry["queries"]) == (0.0, 67)


def test_what_the_model_makes_nan_of_is_wrong_and_not_left_out(tmp_path: Path) -> None:
    rows = [ready("q", image, candidates, []) for image in ("", "a.png") for candidates in (["a"], ["a", "b"])]
    write_rows(tmp_path / "GQA", rows)
    write_pictures(tmp_path, "a.png")
    for name in ("q", "a", "b"):
        vectors = {"q": (1.0, 0.0), "q|a.png": (1.0, 0.0), "a": (1.0, 0.0), "b": (0.0, 1.0)}
        vectors |= {key: (torch.nan, torch.nan) for key in vectors if key.startswith(name)}
        entry = score(tmp_path, chosen_encoder(vectors))["GQA"]
        right = 0.5 if name == "b" else 0.0
        assert (entry["precision@1"], entry["left_out"], entry["queries"]) == (right, 0, 4)


def test_composed_texts_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instructed_retrieval(tmp_path)
    encoder = chosen_encoder(RETRIEVAL_VECTORS)
    entry = score(tmp_path, encoder)["WebQA"]
    # Row 1 is wrong: Ada beside the same picture beats Eve. Row 2 has a candidate whose picture is missing.
    assert (entry["precision@1"], entry["queries"], entry["left_out"]) == (pytest.approx(2 / 3), 3, 1)
    assert entry["candidates"] == 6 and entry["chance"] == 0.5
    assert "row 2: picture " in caplog.text and "absent.png: no such file" in caplog.text


def test_vlm2vec_names_candidates_by_their_picture(tmp_path: Path) -> None:
    instructed_retrieval(tmp_path)
    exact = {f"\n{name}\n": vector for name, vector in RETRIEVAL_VECTORS.items() if name.startswith("Find")}
    for name, vector in RETRIEVAL_VECTORS.items():
        text, _, picture = name.partition("|")
        exact[f"{text}\n|{picture}" if "\n" in text else f"{text}\n\n|{picture}"] = vector
    encoder = chosen_encoder(exact)
    entry = score(tmp_path, encoder, convention="vlm2vec")["WebQA"]
    # Of two captions of a.png the first stands for both, so row 1 has one candidate only; c.png is left to row 3, which
    # finds b.png by the caption that it was first met with.
    assert encoder.asked[1] == [
        "Represent the given image.\n Ada\n|a.png",
        "Represent the given image.\n Bob\n|b.png",
        "Represent the given image.\n Eve\n|absent.png",
        "Represent the given image.\n\n|c.png",
    ]
    assert (entry["precision@1"], entry["left_out"]) == (1.0, 1)
    assert entry["chance"] == pytest.approx((0.5 + 1 + 0.5) / 3) and "texts as vlm2vec" in entry["version"]


def test_means_are_over_data_sets_and_say_over_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready_vqa(tmp_path)
    instructed_retrieval(tmp_path)
    for name in ("GQA", "CIFAR-100"):
        write_rows(tmp_path / name, [ready("No picture.", "", ["blue", "red"], [])])
    results = score(tmp_path, chosen_encoder(VQA_VECTORS | RETRIEVAL_VECTORS))
    assert list(results) == ["overall", "IND", "OOD", "VQA", "Retrieval", "OK-VQA", "GQA", "WebQA"]
    assert "33 of MMEB's 36 data sets are not in" in caplog.text and "ImageNet-1K, N24News" in caplog.text
    overall = results["overall"]
    assert overall["precision@1"] == pytest.approx((3 / 5 + 1 + 2 / 3) / 3)
    assert results["IND"]["precision@1"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert (results["OOD"]["precision@1"], results["Retrieval"]["precision@1"]) == (1.0, pytest.approx(2 / 3))
    assert [(results[name]["datasets"], results[name]["of"]) for name in ("overall", "IND", "OOD", "VQA")] == [
        *((3, 36), (2, 20), (1, 16), (2, 10)),
    ]
    assert len(overall["missing"]) == 33 and overall["queries"] == 5 + 1 + 3
    assert overall["version"].startswith(
        "MMEB V1, TIGER-Lab/MMEB-eval and ziyjiang/MMEB_Test_Instruct, texts as muco, data "
    )
    part = score(tmp_path, chosen_encoder(VQA_VECTORS), datasets=["OK-VQA"], rows=2)
    assert part["overall"]["datasets"] == 1 and "first 2 rows" in part["OK-VQA"]["version"]
    assert part["OK-VQA"]["queries"] == 2


def test_what_is_asked_for_and_is_not_there_is_refused(tmp_path: Path) -> None:
    ready_vqa(tmp_path)
    with pytest.raises(UserError, match=r"holds no folder WebQA; it holds OK-VQA"):
        MMEBSuite(str(tmp_path), None, ["WebQA"], None, "muco")
    with pytest.raises(UserError, match="no data set 'CIFAR-100'"):
        MMEBSuite(str(tmp_path), None, ["CIFAR-100"], None, "muco")
    with pytest.raises(UserError, match="--convention: is for mmeb, m3t has none"):
        open_suite(SuiteOptions("m3t", str(tmp_path), convention="muco"))
    for rows in ([ready(QUESTION, "absent.png", ["a", "b"], [])], [ready(QUESTION, "", [], [])]):
        write_rows(tmp_path / "OK-VQA", rows)
        vectors = {"What is it?|absent.png": (0, 0), "a": (0, 1), "b": (1, 0)}
        with pytest.raises(UserError, match=r"no usable row; .*OK-VQA/test-00000-of-00001.parquet: row 0: "):
            score(tmp_path, chosen_encoder(vectors))
    for rows in (0, -3):
        with pytest.raises(UserError, match=f"--rows {rows}: give at least 1"):
            open_suite(SuiteOptions("mmeb", str(tmp_path), rows=rows))


class Interrupted(Exception):
    """The second data set was begun."""


def test_an_interrupted_evaluation_goes_on_with_equal_results(tmp_path: Path, monkeypatch: Any) -> None:
    ready_vqa(tmp_path)
    instructed_retrieval(tmp_path)
    vectors = VQA_VECTORS | RETRIEVAL_VECTORS
    monkeypatch.setattr("muco_ds.eval.mmeb.write_report", lambda *args, **options: None)

    def run(output: str, encoder: Encoder, **options: Any) -> dict[str, Any]:
        suite = open_suite(SuiteOptions("mmeb", str(tmp_path), **options))
        results, problems = evaluate(suite, encoder, tmp_path / output, "model")
        assert not problems
        return results

    whole = run("whole", chosen_encoder(vectors))
    stopped = chosen_encoder(vectors)
    plain = ChosenEncoder.encode

    def stop(self: ChosenEncoder, dialogues: Any, name: str, *, mark_broken: bool = False) -> torch.Tensor:
        if name.startswith("WebQA"):
            raise Interrupted
        return plain(self, dialogues, name, mark_broken=mark_broken)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(ChosenEncoder, "encode", stop)
        run("parts", stopped)
    kept = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert kept["overall"]["datasets"] == 1 and kept["OK-VQA"] == whole["OK-VQA"]
    again = chosen_encoder(vectors)
    assert run("parts", again) == whole == json.loads((tmp_path / "parts" / "results.json").read_text())
    other = chosen_encoder(vectors)
    run("parts", other, rows=2)
    assert len(other.asked) == 4  # other rows are another evaluation


def test_a_real_model_equals_encoding_one_by_one(tmp_path: Path) -> None:
    names = [f"GQA/{i}.png" for i in range(4)]
    write_pictures(tmp_path, *names)
    captions = ["a red star", "", "two cars", "a blue dot"]
    rows = [
        ready(f"<|image_1|>\nWhich of them, {i}?\n", names[i], captions[i % 3 :], names[i % 3 : i % 3 + 4 - i % 3])
        for i in range(4)
    ]
    write_rows(tmp_path / "GQA", rows)
    encoder = Encoder(embedder(), packer(), torch.device("cpu"), 500)
    suite = open_suite(SuiteOptions("mmeb", str(tmp_path)))
    entry = suite.score("GQA", encoder)["GQA"]

    model = Embedder.from_pretrained(str(export(tmp_path / "model")), device="cpu")

    def one(text: str, name: str) -> np.ndarray:
        item: Mapping[str, Any] = {"text": text, "image": Image.open(tmp_path / name)}
        return model.encode([item])[0]

    right = 0
    for i, row in enumerate(rows):
        pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        scores = np.array([one(*pair) @ one(f"Which of them, {i}?", names[i]) for pair in pairs])
        right += bool(scores[0] > scores[1:].max())
    assert (entry["precision@1"], entry["queries"], entry["candidates"]) == (right / 4, 4, 4)


def test_the_report_stands_beside_published_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready_vqa(tmp_path)
    instructed_retrieval(tmp_path)
    suite = open_suite(SuiteOptions("mmeb", str(tmp_path)))
    results, _ = evaluate(suite, chosen_encoder(VQA_VECTORS | RETRIEVAL_VECTORS), tmp_path / "out", "model")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| **this model, precision@1** | 63.3 | 63.3 | 60.0 | 66.7 |" in text
    assert "| overall (2 of 36) | IND (2 of 20) | VQA (1 of 10) | Retrieval (1 of 12) |" in text
    assert "| MuCo 2B, fine-tuned (arXiv 2602.06393) | 69.5 | 72.9 | 65.6 | 70.1 |" in text
    assert "| MuCo 7B, zero-shot (arXiv 2602.06393) | 61.6 | - | 64.7 | 58.9 |" in text
    assert "| OK-VQA | VQA, IND | 60.0 | 43.3 | 5 | 5 | 2 | 3 |" in text
    assert results["overall"]["version"] in text and "Not scored: ImageNet-1K, " in text
    with Image.open(tmp_path / "out" / "results.png") as plot:
        assert plot.format == "PNG" and plot.width > 800

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    suite.report(results, tmp_path / "out")
    assert "no plot: matplotlib is not installed" in caplog.text and not (tmp_path / "out" / "results.png").exists()
