"""The picture of validation answers for TensorBoard."""

from __future__ import annotations

import numpy as np
import torch

from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import Record, RecordTurn
from muco_ds.eval.m3t import M3TTask
from muco_ds.eval.picture import retrieval_picture
from muco_ds.eval.retrieval import Ranking, rank_candidates

from tiny_models import demo_folder


def ranking(task: M3TTask, right: bool) -> Ranking:
    one_hot = torch.eye(len(task.candidates))
    answers = torch.tensor(task.answers)
    return rank_candidates(one_hot[answers if right else (answers + 1) % len(task.candidates)], one_hot, answers, top=3)


def greens_and_reds(image: np.ndarray) -> tuple[int, int]:
    """Pixels in the exact ink of right and wrong answers, right of the thumbnails."""
    text = image[:, 180:].reshape(-1, 3)
    return int((text == (20, 120, 40)).all(1).sum()), int((text == (180, 40, 30)).all(1).sum())


def test_rows_with_pictures() -> None:
    data = demo_folder() / "data"
    task, _ = M3TTask.from_reader(M3TReader(str(data / "test.parquet"), str(data / "images"), "data.val"))
    image = retrieval_picture(task, ranking(task, right=True), queries=4)
    assert image.dtype == np.uint8 and image.shape == (4 * 176, 760, 3)
    assert retrieval_picture(task, ranking(task, right=True)).shape[0] == 6 * 176
    thumbnail = image[8 : 8 + 84, 8 : 8 + 84]
    assert thumbnail.std() > 10  # the first query's own picture is drawn
    wrong = retrieval_picture(task, ranking(task, right=False), queries=4)
    assert greens_and_reds(image)[0] > 100 and greens_and_reds(wrong)[0] == 0 and greens_and_reds(wrong)[1] > 100


def test_rows_without_pictures_and_fewer_than_asked_for() -> None:
    turns = (RecordTurn(("what? " * 40,), "red 雪", 0), RecordTurn(("where?",), "there", 1))
    task = M3TTask.from_records([Record(0, turns)])
    image = retrieval_picture(task, ranking(task, right=True), queries=6)
    assert image.shape == (2 * 176, 760, 3) and image.dtype == np.uint8
    assert (image[:, :160] == 255).all()  # no thumbnail, and the long question does not run into its place
