"""The search page: a question, a picture or both; the nearest items as cards.

Whatever a user or a file says is shown by labels, which are text: nothing of it becomes HTML.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fastapi import Response
from nicegui import app, events, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from muco_ds.data.decode import FORMATS, ImageError
from muco_ds.errors import UserError
from muco_ds.pages.collection import Hit
from muco_ds.pages.searcher import MAX_TEXT, Answer, Dropped, Query, Searcher

log = logging.getLogger(__name__)

MAX_UPLOAD = 20 * 2**20
"""Bytes of a picture that is dropped."""

COUNTS = (12, 24, 48, 96)
PICTURED = {"all": None, "pictures": True, "texts": False}
LOCAL = {"127.0.0.1": "127.0.0.1", "localhost": "localhost", "::1": "[::1]"}
"""--host of this machine alone, and how a browser names it."""

STYLE = Path(__file__).with_name("search.css")
DROP = Path(__file__).with_name("search.js")


def serve(searcher: Searcher, *, host: str, port: int, top: int) -> None:
    """Serve the page until the program is ended. Raises UserError where the port can't be used."""
    check_port(host, port)
    if host in LOCAL:  # another site's name that leads here must not reach what is on this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL.values()])
    app.add_middleware(UploadLimit)
    app.get("/picture/{row}/{number}")(picture_route(searcher))
    started = int(time.time())
    ui.page("/")(lambda: SearchPage(searcher, top, f"?v={started}").build())
    shown = f"[{host}]" if ":" in host else host
    app.on_startup(lambda: print(f"http://{shown}:{port} searches {len(searcher.collection):,} items", flush=True))
    options: dict[str, Any] = {"reload": False, "show": False, "show_welcome_message": False}
    with suppress(KeyboardInterrupt):  # that is how it is ended
        ui.run(host=host, port=port, title="Search", dark=None, favicon="🔍", **options)


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port} of --host {host} can't be used ({reason}): give another") from error


def picture_route(searcher: Searcher) -> Callable[[int, int], Response]:
    """Serves the pictures of items by number, made small: a browser names no path."""
    thumbnail = lru_cache(512)(searcher.collection.thumbnail)

    def picture(row: int, number: int) -> Response:
        try:
            content = thumbnail(row, number)
        except LookupError:
            return PlainTextResponse("no such picture", 404)
        except (ImageError, UserError) as error:
            log.warning("row %d: picture %d: %s", row, number, error)
            return PlainTextResponse("the picture can't be read", 404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return picture


class UploadLimit:
    """Refuses a body over the limit before it is read: the browser's own check can be left out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit() or int(size) > MAX_UPLOAD + 4096:  # a form's own lines
                await PlainTextResponse("too large", 413)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SearchPage:
    """One visitor's page."""

    def __init__(self, searcher: Searcher, top: int, version: str) -> None:
        self.searcher, self.top, self.version = searcher, top, version
        self.dropped: Dropped | None = None
        self.asked = 0
        self.again: Callable[[], Awaitable[None]] = self.search

    def build(self) -> None:
        ui.add_css(STYLE.read_text(encoding="utf-8"))
        self.dark = ui.dark_mode(None)
        with ui.element("main").classes("page"):
            self._header()
            with ui.element("section").classes("ask"):
                self._query()
                self._options()
            self.status = ui.label("").classes("status").props("role=status aria-live=polite")
            self.results = ui.element("div").classes("hits")
            self._welcome()
        self._receive_pictures()

    def _header(self) -> None:
        collection = self.searcher.collection
        with ui.element("header").classes("top"):
            with ui.element("div"):
                ui.label("Search").classes("title").props("role=heading aria-level=1")
                ui.label(f"{len(collection):,} items · {collection.rows.width} components").classes("subtitle")
            modes = {None: "brightness_auto", True: "dark_mode", False: "light_mode"}
            following = {None: True, True: False, False: None}

            def switch() -> None:
                self.dark.value = following[self.dark.value]
                button.props(f"icon={modes[self.dark.value]}")

            button = ui.button(icon=modes[None], on_click=switch).props("flat round color=none")
            button.props('aria-label="light or dark"').classes("mode").tooltip("light, dark or as the system")

    def _query(self) -> None:
        with ui.element("div").classes("bar"):
            self.preview = ui.element("div").classes("preview")
            self.preview.set_visibility(False)
            self.text = ui.input(placeholder="Ask a question, or drop a picture anywhere")
            self.text.props("borderless dense autofocus aria-label=question")
            self.text.props(f"maxlength={MAX_TEXT}").classes("question")
            self.text.on("keydown.enter", self.search)
            self.choose = ui.button(icon="add_photo_alternate").props("flat round color=none aria-label=picture")
            self.choose.tooltip("drop, paste or choose a picture")
            self.go = ui.button(icon="search", color=None, on_click=self.search).props("unelevated round")
            self.go.classes("go").props("aria-label=search")

    def _options(self) -> None:
        with ui.element("div").classes("options"):
            self.pictured = ui.toggle(list(PICTURED), value="all", on_change=self._again)
            self.pictured.props("no-caps unelevated dense color=none toggle-color=none")
            self.pictured.props("text-color=none toggle-text-color=none").classes("kinds")
            counts = sorted({*COUNTS, self.top})
            self.count = ui.select(counts, value=self.top, label="results", on_change=self._again)
            self.count.props("dense borderless options-dense").classes("count")
            self.instruction = ui.input(placeholder="instruction before the question (optional)")
            self.instruction.props(f"dense borderless aria-label=instruction maxlength={MAX_TEXT}")
            self.instruction.classes("instruction")
            self.instruction.on("keydown.enter", self.search)

    def _receive_pictures(self) -> None:
        upload = ui.upload(
            auto_upload=True, max_file_size=MAX_UPLOAD, on_upload=self._received, on_rejected=self._rejected
        )
        upload.props('accept="image/*"').classes("hidden-upload")
        self.upload = upload
        self.choose.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
        ui.add_body_html(f"<script>{DROP.read_text(encoding='utf-8')}; acceptPictures({upload.id})</script>")

    def _welcome(self) -> None:
        with self.results, ui.element("div").classes("welcome"):
            ui.icon("image_search")
            ui.label("Type a question and press Enter, drop or paste a picture, or do both.")
            ui.label("A click on a result finds more like it.")

    async def _received(self, event: events.UploadEventArguments) -> None:
        self.upload.reset()
        name, size = event.file.name, event.file.size()
        if size > MAX_UPLOAD:
            self._rejected()
            return
        content = await event.file.read()
        try:
            dropped = await run.io_bound(self.searcher.dropped, name, content)
        except ImageError as error:
            self._say(f"{name} {error}: drop a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", wrong=True)
            return
        if dropped is not None:
            self._show_picture(dropped)
            await self.search()

    def _rejected(self) -> None:
        self.upload.reset()
        self._say(f"Only pictures of at most {MAX_UPLOAD >> 20} MiB are taken.", wrong=True)

    def _show_picture(self, dropped: Dropped | None) -> None:
        self.dropped = dropped
        self.preview.clear()
        self.preview.set_visibility(dropped is not None)
        if dropped is None:
            return
        with self.preview:
            ui.image(dropped.preview)
            remove = ui.button(icon="close", color=None, on_click=self._remove_picture)
            remove.props("round dense size=xs aria-label=remove")

    def _remove_picture(self) -> None:
        self._show_picture(None)

    async def search(self) -> None:
        picture = None if self.dropped is None else self.dropped.picture
        query = Query(self.text.value or "", picture, self.instruction.value or "")
        self.again = self.search
        await self._answer(partial(self.searcher.search, query), "")

    async def like(self, hit: Hit) -> None:
        self.again = partial(self.like, hit)
        await self._answer(partial(self.searcher.like, hit.row), f"like {_place(hit)} · ")
        ui.run_javascript("window.scrollTo({top: 0, behavior: 'smooth'})")

    async def _again(self) -> None:
        if self.asked:
            await self.again()

    async def _answer(self, ask: Callable[..., Answer], about: str) -> None:
        self.asked += 1
        mine = self.asked
        self.go.props("loading")
        answer, problem = None, ""
        try:
            answer = await run.io_bound(ask, self.count.value, pictured=PICTURED[self.pictured.value])
        except UserError as error:
            problem = str(error)
        except Exception:
            log.exception("a search failed")
            problem = "The search failed: the program's output says why."
        if mine != self.asked:  # a later question is on its way
            return
        self.go.props(remove="loading")
        if problem:
            self._say(problem, wrong=True)
        elif answer is not None:  # None: the program is ending
            self._show(answer, about)

    def _say(self, message: str, *, wrong: bool = False) -> None:
        self.status.set_text(message)
        self.status.classes(add="wrong") if wrong else self.status.classes(remove="wrong")

    def _show(self, answer: Answer, about: str) -> None:
        times = "" if answer.encode_s is None else f"encoded in {_duration(answer.encode_s)}, "
        self._say(f"{about}{len(answer.hits)} results · {times}searched in {_duration(answer.search_s)}")
        self.results.clear()
        with self.results:
            for hit in answer.hits:
                self._card(hit)
            if not answer.hits:
                ui.label("There is nothing of this kind.").classes("welcome")

    def _card(self, hit: Hit) -> None:
        card = ui.element("article").classes("hit" if hit.pictures else "hit words").props("role=button tabindex=0")
        card.on("click", partial(self.like, hit)).on("keydown.enter", partial(self.like, hit))
        with card:
            if hit.pictures:
                with ui.element("div").classes("frame"):
                    image = ui.element("img").props('loading=lazy alt="the picture can\'t be read"')
                    image.props(f'src="/picture/{hit.row}/0{self.version}"')
                    if hit.pictures > 1:
                        ui.label(f"1 of {hit.pictures}").classes("badge")
            if hit.text:
                ui.label(hit.text).classes("text")
            with ui.element("footer"):
                with ui.label(_place(hit)).classes("place"):
                    ui.tooltip(hit.place)
                ui.label(f"{hit.score:.3f}").classes("score")


def _place(hit: Hit) -> str:
    return hit.place.rpartition(": ")[2] + ("" if hit.question is None else f", question {hit.question}")


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
