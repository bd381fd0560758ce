"""Both pages in headless Chromium: a question, a picture, a file that is none; a report, light, dark, on a phone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from muco_ds.metrics import METRIC_KEYS
from muco_ds.models.embedder import Embedder

from programs import REPOSITORY, Job, Programs, free_port, refusal
from tiny_models import export, picture

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
pytest.importorskip("nicegui", reason="needs NiceGUI: pip install -e '.[pages]'")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a program named chromium: apt install chromium")

SEARCH, REPORT = REPOSITORY / "tools" / "search.py", REPOSITORY / "tools" / "report.py"
ATTACK = """<img src=x onerror="document.title='broken'"><b>bold</b>"""
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


Open = Callable[..., tuple[Any, list[str], list[str]]]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """A page at an address, what it asked for, and what its console said; closed after the test."""
    contexts = []

    def opened(url: str, **options: Any) -> tuple[Any, list[str], list[str]]:
        context = browser.new_context(**options)
        contexts.append(context)
        page, requests, said = context.new_page(), [], []
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page, requests, said

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, items with pictures and texts, and their embeddings."""
    folder = tmp_path_factory.mktemp("encoded")
    items: list[dict[str, str]] = [{"text": "a red circle"}, {"text": ATTACK}, {"text": "a blue square"}]
    for seed in range(6):
        picture(seed, 300, 200).save(folder / f"{seed}.png")
        items.append({"image": f"{seed}.png"})
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    embedder = Embedder.from_pretrained(str(export(folder / "model")))
    given = [item | {"image": str(folder / item["image"])} if "image" in item else item for item in items]
    np.save(folder / "emb.npy", embedder.encode(given))
    return folder


def arguments(folder: Path, port: int) -> list[str | Path]:
    named = ["--model", folder / "model", "--input", folder / "items.jsonl", "--embeddings", folder / "emb.npy"]
    return [SEARCH, *named, "--port", str(port)]


@pytest.fixture(scope="module")
def served(encoded: Path, programs: Programs) -> Iterator[tuple[str, int]]:
    """The page's address and port."""
    port = free_port()
    job: Job = programs.start(arguments(encoded, port), cwd=encoded)
    deadline, address = time.monotonic() + 60, f"http://127.0.0.1:{port}"
    said = job.folder / "stdout.0"
    while not said.exists() or address not in said.read_text():
        if time.monotonic() > deadline or (job.folder / "status.json").exists():
            job.kill()
            raise AssertionError(job.wait(1).output)
        time.sleep(0.05)
    yield address, port
    job.kill()


def test_a_question_and_a_picture_find_their_items(served: tuple[str, int], encoded: Path, open_page: Open) -> None:
    page, requests, said = open_page(served[0], viewport=PHONE, color_scheme="dark")
    page.fill(".question input", "a blue square")
    page.keyboard.press("Enter")
    first = page.locator(".hit").first
    first.wait_for()
    assert "a blue square" in first.inner_text() and "1.000" in first.inner_text() and "line 3" in first.inner_text()
    assert page.locator(".hit").count() == 9
    assert page.locator(".hit", has_text=ATTACK).count() == 1, "text, not HTML"
    assert page.title() == "Search" and page.locator(".hit b").count() == 0

    page.fill(".question input", "")
    page.set_input_files("input[type=file]", encoded / "4.png")
    sync_api.expect(first).to_contain_text("line 8")
    sync_api.expect(page.locator(".status")).to_contain_text("encoded in")
    shown = first.locator("img")
    page.wait_for_function("image => image.naturalWidth === 300", arg=shown.element_handle())
    page.click("text=texts")
    sync_api.expect(page.locator(".hit")).to_have_count(3)
    page.locator(".hit", has_text="a red circle").click()
    sync_api.expect(page.locator(".status")).to_contain_text("like line 1")
    sync_api.expect(page.locator(".hit")).to_have_count(2)

    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"
    assert all(url.startswith((served[0], "data:", "blob:")) for url in requests), requests
    assert not said


def test_what_is_no_picture_is_refused(served: tuple[str, int], open_page: Open) -> None:
    page, _, _ = open_page(served[0])
    status = page.locator(".status")
    page.set_input_files("input[type=file]", {"name": "<b>x.png", "mimeType": "image/png", "buffer": b"no picture"})
    sync_api.expect(status).to_contain_text("<b>x.png is not a picture that can be read")
    page.set_input_files("input[type=file]", {"name": "x.txt", "mimeType": "text/plain", "buffer": b"words"})
    sync_api.expect(status).to_contain_text("Only pictures of at most 20 MiB")
    page.fill(".question input", ATTACK)
    page.keyboard.press("Enter")
    sync_api.expect(status).to_contain_text("9 results")
    assert page.title() == "Search" and page.locator(".page b").count() == 0
    page.fill(".question input", " ")
    page.keyboard.press("Enter")
    sync_api.expect(status).to_contain_text("Type a question or drop a picture")


def test_only_pictures_of_items_are_served(served: tuple[str, int], open_page: Open) -> None:
    page, _, _ = open_page(f"{served[0]}/picture/3/0")
    get = page.request.get
    good = get(f"{served[0]}/picture/3/0")
    assert good.status == 200 and good.headers["content-type"] == "image/jpeg"
    for path in ("0/0", "3/1", "99/0", "-1/0", "3/..%2f..%2fitems.jsonl", "..%2f0.png/0", "3"):
        assert get(f"{served[0]}/picture/{path}").status in (404, 422), path
    foreign = get(served[0], headers={"Host": "elsewhere.example"})
    assert foreign.status == 400, "a name of another site that leads here"


def test_a_port_in_use_is_refused(served: tuple[str, int], encoded: Path, programs: Programs) -> None:
    line = refusal(programs.run(arguments(encoded, served[1])))
    assert f"--port {served[1]} of --host 127.0.0.1 can't be used" in line


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": ATTACK, "max_steps": 300}}))
    lines = []
    for step in range(10, 301, 10):
        values = dict.fromkeys(METRIC_KEYS, 0.5) | {"step": step, "loss": 30 / step, "val/overall/precision@1": 0.1}
        lines.append(json.dumps(values) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    with SummaryWriter(str(folder / "tb")) as board:
        board.add_image("val/answers", np.zeros((40, 760, 3), np.uint8), 300, dataformats="HWC")
    (folder / "results.json").write_text(json.dumps({"overall": {f"recall@{k}": 0.5 for k in range(20)}}))
    programs.run([REPORT, folder]).check()
    return folder / "report.html"


@pytest.mark.parametrize(
    ("scheme", "viewport", "background"),
    [
        ("light", {"width": 1280, "height": 900}, "rgb(246, 246, 243)"),
        ("dark", PHONE, "rgb(19, 20, 22)"),
    ],
)
def test_the_report_opens_anywhere(
    report: Path, open_page: Open, scheme: str, viewport: dict[str, int], background: str
) -> None:
    page, requests, said = open_page(report.as_uri(), viewport=viewport, color_scheme=scheme)
    assert page.title() == ATTACK and page.inner_text("h1") == ATTACK
    assert page.locator("#curves svg polyline").count() >= 5
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), "pictures are inside"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert page.evaluate("document.querySelector('.results').parentElement.scrollWidth") >= 300
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert not said
