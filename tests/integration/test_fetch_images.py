"""tools/fetch_images.py against a server with good, bad, late and missing pictures."""

from __future__ import annotations

import io
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from muco_ds.errors import UserError
from muco_ds.factory.download import DownloadOptions
from muco_ds.factory.fetch import Fetch, FetchOptions, name_of

from local_server import Answer, Program, Request, Server, paint
from programs import REPOSITORY, refusal

TOOL = REPOSITORY / "tools" / "fetch_images.py"


def picture(i: int = 0, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    paint(i, size).save(buffer, kind)
    return buffer.getvalue()


def served(_request: Request) -> Answer:
    return Answer(body=picture())


def data(folder: Path, *rows: tuple[str | None, str | None], **columns: list[Any]) -> Path:
    """A parquet file of (name, URL)."""
    path = folder / "data.parquet"
    table = {"qry_image_path": [name for name, _ in rows], "url": [url for _, url in rows], **columns}
    pq.write_table(pa.table(table), path)
    return path


def fetch(path: Path, **options: Any) -> Fetch:
    """In this process. Options of the download are given by their names too."""
    given = {name: options.pop(name) for name in list(options) if name in DownloadOptions.__dataclass_fields__}
    download = DownloadOptions(**{"timeout": 5.0, "retries": 2, "allow_private": True, **given})
    return Fetch(FetchOptions(path, path.parent / "images", download, **{"concurrency": 4, **options}))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def failures(folder: Path) -> dict[str, str]:
    """Name -> reason, of the list beside the pictures."""
    lines = (folder / "images.failed.jsonl").read_text().splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def test_pictures_get_the_names_of_the_column(tmp_path: Path) -> None:
    def respond(request: Request) -> Answer:
        if request.path == "/moved":
            return Answer(302, headers={"Location": "/1"})
        return Answer(body=picture(int(request.path[1:]), kind="PNG" if request.path == "/2" else "JPEG"))

    with Server(respond).running() as server:
        rows = [("a/0.jpg", f"{server.url}/0"), ("a/b/1.jpg", f"{server.url}/moved"), ("2.png", f"{server.url}/2")]
        run = fetch(data(tmp_path, *rows, ("a/0.jpg", f"{server.url}/0"), ("3.jpg", None)))
        assert run.run() == 0
        for i, name in enumerate(("a/0.jpg", "a/b/1.jpg", "2.png")):
            assert (tmp_path / "images" / name).read_bytes() == picture(i, kind="PNG" if i == 2 else "JPEG")
        assert files(tmp_path) == ["data.parquet", "images.report.json"] + [
            f"images/{name}" for name in ("2.png", "a/0.jpg", "a/b/1.jpg")
        ]
        asked = len(server.requests)
        assert asked == 4
        again = fetch(data(tmp_path, *rows))
        assert again.run() == 0 and len(server.requests) == asked
    assert run.report | {"seconds": 0} == {
        **{"complete": True, "rows": 5, "fetched": 3, "there_before": 0, "without_url": 1, "repeated": 1},
        **{"failed": {}, "bytes": sum(len(picture(i, kind="PNG" if i == 2 else "JPEG")) for i in range(3))},
        "seconds": 0,
    }
    assert again.report["there_before"] == 3
    assert json.loads((tmp_path / "images.report.json").read_text()) == again.report


def test_what_fails_is_listed_with_its_reason(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {
        "/good": Answer(body=picture()),
        "/missing": Answer(404),
        "/page": Answer(body=b"<html>not here any more</html>"),
        "/half": Answer(body=picture(size=(640, 480))[:-900]),
        "/large": Answer(body=b"\0" * 30_000),
        "/endless": Answer(body=b"7530\r\n" + b"\0" * 30_000, headers={"Transfer-Encoding": "chunked"}),
        "/late": Answer(body=picture(), stall=3.0),
        "/short": Answer(body=picture(), headers={"Content-Length": "9999"}),
        "/drop": Answer(drop=True),
        "/broken": Answer(500),
        "/private": Answer(body=picture(), headers={"X-Robots-Tag": "noindex, NoAI"}),
        "/file": Answer(302, headers={"Location": "file:///etc/passwd"}),
        "/circle": Answer(302, headers={"Location": "/circle"}),
    }
    with Server(lambda request: answers[request.path]).running() as server:
        rows: list[tuple[str | None, str | None]] = [(f"{path[1:]}.jpg", server.url + path) for path in answers]
        rows += [("no_url.jpg", "ftp://here/x.jpg"), ("odd.jpg", "http://[::1/x.jpg"), ("good.jpg", f"{server.url}/2")]
        run = fetch(data(tmp_path, *rows), timeout=0.8, retries=1, max_bytes=20_000)
        assert run.run() == 0
    asked = Counter(request.path for request in server.requests)
    assert failures(tmp_path) == {
        **{"missing.jpg": "http 404", "page.jpg": "picture", "half.jpg": "picture", "large.jpg": "size"},
        **{"endless.jpg": "size"},
        **{"late.jpg": "timeout", "short.jpg": "timeout", "drop.jpg": "connection", "broken.jpg": "http 500"},
        **{"private.jpg": "opt-out", "file.jpg": "url", "circle.jpg": "url", "no_url.jpg": "url", "odd.jpg": "url"},
        "good.jpg": "name",
    }
    # Only what may go better the next time is asked for twice.
    assert {path for path, times in asked.items() if times == 2} == {"/late", "/short", "/drop", "/broken"}
    assert asked.pop("/circle") > 2 and max(asked.values()) == 2
    assert files(tmp_path / "images") == ["good.jpg"]
    assert run.report["failed"]["picture"] == 2 and run.report["complete"]


def test_a_server_that_dribbles_is_given_up(tmp_path: Path) -> None:
    """Each byte comes in time, the whole never does."""
    with Server(served).running() as server:
        handler = server._http.RequestHandlerClass

        def dribble(self: Any) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"\xff")
                self.wfile.flush()
                if server.ended.wait(0.05):
                    return

        handler.do_GET = dribble  # type: ignore[attr-defined]
        begun = time.monotonic()
        with pytest.raises(UserError, match="timeout"):
            fetch(data(tmp_path, ("a.jpg", f"{server.url}/a")), timeout=0.3, retries=0).run()
        assert time.monotonic() - begun < 3


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    times: list[float] = []

    def respond(request: Request) -> Answer:
        times.append(time.monotonic())
        return Answer(429, headers={"Retry-After": "1"}) if len(times) == 1 else Answer(body=picture())

    with Server(respond).running() as server:
        assert fetch(data(tmp_path, ("a.jpg", f"{server.url}/a"))).run() == 0
    assert len(times) == 2 and times[1] - times[0] >= 0.95


@pytest.mark.parametrize(
    "name", ["../out.jpg", "/tmp/out.jpg", "a/../../out.jpg", "", ".", "a\0b.jpg", "x" * 300, None]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str | None) -> None:
    with Server(served).running() as server:
        run = fetch(data(tmp_path, ("in/a.jpg", f"{server.url}/a"), (name, f"{server.url}/b")))
        assert run.run() == 0 and run.report["failed"] == {"name": 1}
        assert [request.path for request in server.requests] == ["/a"]
    assert files(tmp_path / "images") == ["in/a.jpg"]


def test_names_that_clash_with_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "images" / "folder").mkdir(parents=True)
    (tmp_path / "images" / "file").touch()
    with Server(served).running() as server:
        rows = [(name, f"{server.url}/{i}") for i, name in enumerate(("folder", "file/a.jpg", "good.jpg"))]
        run = fetch(data(tmp_path, *rows))
        assert run.run() == 0
    assert failures(tmp_path) == {"folder": "name", "file/a.jpg": "name"}


@pytest.mark.parametrize(("kind", "written"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("GIF", "JPEG")])
def test_larger_pictures_are_made_smaller(tmp_path: Path, kind: str, written: str) -> None:
    sizes = {"/large": (300, 200), "/small": (50, 30)}
    with Server(lambda request: Answer(body=picture(3, sizes[request.path], kind))).running() as server:
        fetch(data(tmp_path, ("l.x", f"{server.url}/large"), ("s.x", f"{server.url}/small")), short_side=100).run()
    with Image.open(tmp_path / "images" / "l.x") as image:
        assert image.size == (150, 100) and image.format == written
        assert abs(image.convert("L").getpixel((70, 50)) - 80) < 4  # type: ignore[operator]
    assert (tmp_path / "images" / "s.x").read_bytes() == picture(3, (50, 30), kind)


def test_names_are_made_of_the_urls(tmp_path: Path) -> None:
    path, named = tmp_path / "data.parquet", tmp_path / "named.parquet"
    with Server(served).running() as server:
        urls = [f"{server.url}/a.PNG?size=1", f"{server.url}/b.php", None, f"{server.url}/a.PNG?size=1"]
        pq.write_table(pa.table({"link": urls, "text": ["a", "b", "c", "d"]}), path)
        run = fetch(path, url_column="link", name_column="image", named=named)
        assert run.run() == 0 and len(server.requests) == 2
    rows = pq.read_table(named).to_pylist()
    assert [(row["link"], row["text"]) for row in rows] == list(zip(urls, "abcd", strict=True))
    names = [row["image"] for row in rows]
    assert names[0] == names[3] == name_of(urls[0]) and names[0].endswith(".png")  # type: ignore[arg-type]
    assert names[1].endswith(".jpg") and names[2] == ""
    assert files(tmp_path / "images") == sorted(set(names) - {""})


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of a picture: what is there is whole and is not fetched again."""

    def respond(request: Request) -> Answer:
        late = request.path in ("/3", "/4", "/5")
        return Answer(body=picture(), headers={"Content-Length": "9999"} if late else {})

    folder = tmp_path / "images"
    with Server(respond).running() as server:
        path = data(tmp_path, *((f"{i}.jpg", f"{server.url}/{i}") for i in range(6)))
        argv = [TOOL, "--allow_private", "--data", path, "--output", folder]

        middle = [".3.jpg.part", ".4.jpg.part", ".5.jpg.part", "0.jpg", "1.jpg", "2.jpg"]
        result = Program(argv).stop_once(lambda: files(folder) == middle, signal.SIGKILL)
        assert result.codes == [-signal.SIGKILL] and files(folder) == middle
        first = len(server.requests)
        server.respond = served
        result = Program(argv).wait().check()
        assert sorted(request.path for request in server.requests[first:]) == ["/3", "/4", "/5"]
    assert "3 fetched" in result.output and "3 there before" in result.output
    assert files(folder) == [f"{i}.jpg" for i in range(6)]
    assert all((folder / name).read_bytes() == picture() for name in files(folder))


def test_a_signal_ends_it_cleanly(tmp_path: Path) -> None:
    def respond(request: Request) -> Answer:
        return Answer(body=picture(), stall=0.0 if request.path == "/0" else 60.0)

    folder = tmp_path / "images"
    with Server(respond).running() as server:
        path = data(tmp_path, *((f"{i}.jpg", f"{server.url}/{i}") for i in range(6)))
        program = Program([TOOL, "--allow_private", "--data", path, "--output", folder])
        result = program.stop_once((folder / "0.jpg").exists, signal.SIGTERM)
    assert result.codes == [128 + signal.SIGTERM] and "Traceback" not in result.output
    assert "stopped by SIGTERM: the same command goes on" in result.output
    assert files(tmp_path) == ["data.parquet", "images.report.json", "images/0.jpg"]


REFUSED: dict[str, tuple[Callable[[Path], Fetch], str]] = {
    "no URLs": (lambda path: fetch(path, url_column="link"), "no column 'link': --url_column, of qry_image_path, url"),
    "no names": (lambda path: fetch(path, name_column="image"), "no column 'image': give --name_column"),
    "names twice": (
        lambda path: fetch(path, named=path.with_name("n.parquet")),
        "has names in 'qry_image_path' already",
    ),
    "no parquet": (lambda path: fetch(Path(__file__)), "can't be read as parquet"),
    "no file": (lambda path: fetch(path.with_name("nothing.parquet")), "can't be read as parquet"),
}


@pytest.mark.parametrize(("start", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(tmp_path: Path, start: Callable[[Path], Fetch], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(data(tmp_path, ("a.jpg", "http://localhost/a")))


def test_refusals_are_one_line(tmp_path: Path) -> None:
    with Server(lambda request: Answer(404)).running() as server:
        path = data(tmp_path, ("a.jpg", f"{server.url}/a"))
        line = refusal(Program([TOOL, "--allow_private", "--data", path, "--output", tmp_path / "images"]).wait())
    assert "no picture came; the first: a.jpg" in line and "http 404" in line
