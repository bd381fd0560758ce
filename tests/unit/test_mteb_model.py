"""mteb's own evaluation of a small retrieval task with pictures, from memory, through the wrapper and the tool.

Shape suffixes: N items, Q queries, C candidates, D embedding size.
"""

# ruff: noqa: E402 - what follows can't be imported where mteb is not installed

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="mteb is not installed")

from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from muco_ds.errors import UserError
from muco_ds.models.embedder import Embedder
from muco_ds.mteb_model import MtebModel, instruction_of

from demo import run_here
from tiny_models import export, picture

ROOT = Path(__file__).parents[2]
PROMPT = "Find the picture that is meant."
PICTURES = [picture(i, 60 + 8 * i, 84) for i in range(12)]
TEXTS = [f"number {i}" if i % 3 else "" for i in range(12)]
QUERIES = [f"what is number {i}" for i in range(5)]
RELEVANT = {f"q{i}": {f"d{2 * i}": 1, f"d{2 * i + 1}": 1} for i in range(5)}


def metadata(**changed: Any) -> TaskMetadata:
    given = {
        "name": "SmallPicturesRetrieval",
        "description": "Texts to pictures with texts.",
        "reference": None,
        "dataset": {"path": "local/none", "revision": "1"},
        "type": "Any2AnyRetrieval",
        "category": "t2it",
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10",
        "modalities": ["text", "image"],
        "prompt": {"query": PROMPT},
        **{name: None for name in ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")},
        **{"sample_creation": None, "bibtex_citation": None},
    }
    return TaskMetadata(**(given | changed))


def corpus(text_first: bool) -> Dataset:
    """Columns in one order or the other."""
    columns: dict[str, Any] = {"text": Value("string"), "image": Image()}
    names = ["id", *(columns if text_first else reversed(columns))]
    rows = {"id": [f"d{i}" for i in range(12)], "text": TEXTS, "image": PICTURES}
    return Dataset.from_dict(
        {n: rows[n] for n in names}, features=Features({n: columns.get(n, Value("string")) for n in names})
    )


class SmallPicturesRetrieval(AbsTaskRetrieval):
    metadata = metadata()
    text_first = True

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        queries = Dataset.from_dict({"id": [f"q{i}" for i in range(5)], "text": QUERIES})
        split = {"queries": queries, "corpus": corpus(self.text_first), "relevant_docs": RELEVANT, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": split}}, True  # type: ignore[dict-item]


class PictureFirst(SmallPicturesRetrieval):
    metadata = metadata(name="PictureFirstRetrieval")
    text_first = False


class Sounds(SmallPicturesRetrieval):
    metadata = metadata(name="SoundsRetrieval", modalities=["audio", "text"])


class Unreachable(SmallPicturesRetrieval):
    metadata = metadata(name="UnreachableRetrieval")

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more lines")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("mteb") / "model")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu")


class Recorded(MtebModel):
    """Keeps what mteb was given, by side."""

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        emb_ND = super().encode(inputs, prompt_type=prompt_type, **kwargs)
        self.__dict__.setdefault("seen", {})[prompt_type.value if prompt_type else "none"] = emb_ND
        return emb_ND


def by_hand(query_QD: np.ndarray, candidate_CD: np.ndarray) -> dict[str, float]:
    """nDCG@10 and recall@3 of RELEVANT from embeddings."""
    ndcg, recall = [], []
    for scores_C, relevant in zip(query_QD @ candidate_CD.T, RELEVANT.values(), strict=True):
        order = [f"d{i}" for i in np.argsort(-scores_C)]
        gain = sum(1 / math.log2(rank + 2) for rank, name in enumerate(order[:10]) if name in relevant)
        ndcg.append(gain / sum(1 / math.log2(rank + 2) for rank in range(len(relevant))))
        recall.append(sum(name in relevant for name in order[:3]) / len(relevant))
    return {"ndcg_at_10": float(np.mean(ndcg)), "recall_at_3": float(np.mean(recall))}


def test_scores_are_those_of_the_embedder_and_the_picture_comes_first(embedder: Embedder) -> None:
    query_QD = embedder.encode([{"instruction": PROMPT, "text": text} for text in QUERIES])
    candidate_CD = embedder.encode(
        [{"image": image, "text": text} for image, text in zip(PICTURES, TEXTS, strict=True)]
    )
    want = by_hand(query_QD, candidate_CD)
    assert 0 < want["ndcg_at_10"] < 1 and want["recall_at_3"] < 1
    for task in (SmallPicturesRetrieval(), PictureFirst()):
        model = Recorded(embedder, name="local/tiny", revision="1")
        result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 5})
        np.testing.assert_allclose(model.seen["query"], query_QD, atol=1e-5)  # type: ignore[attr-defined]
        np.testing.assert_allclose(model.seen["document"], candidate_CD, atol=1e-5)  # type: ignore[attr-defined]
        (scores,) = result.task_results[0].scores["test"]
        for name, value in want.items():
            assert scores[name] == pytest.approx(value, abs=1e-5), name


def test_batches_are_packed_together_and_a_smaller_size_is_scored(embedder: Embedder) -> None:
    batches = [{"text": [f"{i} a", f"{i} b"]} for i in range(20)] + [{"text": [" "], "image": [None]}]
    packs: list[int] = []
    hook = embedder.register_forward_hook(lambda _, args, out: packs.append(len(out)))
    emb_ND = MtebModel(embedder, name="a/b", revision="1", dim=8, pack_tokens=10**5).encode(
        batches, task_metadata=metadata(prompt=None), prompt_type=PromptType.document
    )
    hook.remove()
    assert packs == [41] and emb_ND.shape == (41, 8)
    np.testing.assert_allclose(np.linalg.norm(emb_ND, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "query", "document", "neither"),
    [
        (None, None, None, None),
        ("Find.", "Find.", None, "Find."),
        ({"query": "Find."}, "Find.", None, "Find."),
        ({"query": "Find.", "document": "Be found."}, "Find.", "Be found.", "Find."),
    ],
)
def test_a_tasks_prompt_is_for_queries(prompt: Any, query: Any, document: Any, neither: Any) -> None:
    task = metadata(prompt=prompt)
    sides = (PromptType.query, PromptType.document, None)
    assert [instruction_of(task, side) for side in sides] == [query, document, neither]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """mteb's lists hold what is in this file."""
    found = (SmallPicturesRetrieval, PictureFirst, Sounds, Unreachable)
    monkeypatch.setattr(mteb, "get_tasks", lambda **_: [task() for task in found])
    benchmark = SimpleNamespace(name="MIEB(lite)", tasks=[SmallPicturesRetrieval()])
    monkeypatch.setattr(mteb, "get_benchmarks", lambda: [benchmark])  # the real list takes seconds


@pytest.mark.usefixtures("tasks")
def test_the_tool_keeps_results_and_names_what_it_cannot_fetch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*names: str) -> int:
        given = ("--tasks", *names) if names else ("--benchmark", "MIEB(lite)")
        options = (*given, "--output", tmp_path / "out", "--device", "cpu")
        return run_here(monkeypatch, ROOT / "tools" / "evaluate_mteb.py", "--model", folder, *options)

    assert run("UnreachableRetrieval", "SmallPicturesRetrieval") == 2
    said = capsys.readouterr()
    line = "error: UnreachableRetrieval: its data set 'local/none' can't be had: Couldn't reach the Hub (1 of 2 tasks"
    assert line in said.err and "Traceback" not in said.err and "SmallPicturesRetrieval" in said.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    score = results["SmallPicturesRetrieval"]["main_score"]
    assert {name: results["overall"][name] for name in ("main_score", "tasks")} == {"main_score": score, "tasks": 1}
    assert run("PictureFirstRetrieval", "SoundsRetrieval") == 2
    assert "SoundsRetrieval: is about audio: the model embeds texts and pictures" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["overall"]["tasks"] == 2 and results["SmallPicturesRetrieval"]["main_score"] == score

    monkeypatch.setattr(Embedder, "encode", None)  # what is finished is not encoded again
    assert run("SmallPicturesRetrieval") == run() == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


@pytest.mark.usefixtures("tasks")
def test_the_tool_names_mistakes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: Any) -> str:
        arguments = ("--model", folder, "--output", tmp_path / "out", *options)
        assert run_here(monkeypatch, ROOT / "tools" / "evaluate_mteb.py", *arguments) == 2
        return capsys.readouterr().err

    assert "no task 'smallpicturesretreival': did you mean SmallPicturesRetrieval" in refusal(
        "--tasks", "smallpicturesretreival"
    )
    assert "no task 'x': see --help" in refusal("--tasks", "x")
    assert "--benchmark: mteb has no 'MIEB(light)': did you mean MIEB(lite)" in refusal("--benchmark", "MIEB(light)")
    assert "--tasks: name at least one" in refusal()
    assert "device foo: give cpu, cuda or cuda:N" in refusal("--tasks", "x", "--device", "foo")
    assert "--pack_tokens 0" in refusal("--tasks", "SmallPicturesRetrieval", "--pack_tokens", 0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mteb", None)
        assert "mteb is not installed" in refusal("--tasks", "SmallPicturesRetrieval")


def test_another_model_begins_its_own_results(embedder: Embedder, tmp_path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "evaluate_mteb.py"))
    (tmp_path / "results.json").write_text(json.dumps({"overall": {"revision": "1"}, "task": {"main_score": 0.5}}))
    for revision, kept in (("1", ["task"]), ("2", [])):
        model = MtebModel(embedder, name="a/b", revision=revision)
        assert list(tool["kept_entries"](tmp_path, model)) == kept
    (tmp_path / "results.json").write_text("[1]")
    assert tool["kept_entries"](tmp_path, model) == {}


def test_a_mistake_of_the_embedder_stays_one(embedder: Embedder) -> None:
    with pytest.raises(UserError, match="dim is 97"):
        MtebModel(embedder, name="a/b", revision="1", dim=97)
