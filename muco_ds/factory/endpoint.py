"""A chat model behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, OpenAI, ...)."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from PIL import Image

from muco_ds.errors import UserError
from muco_ds.factory.addresses import shown
from muco_ds.factory.failures import PictureError
from muco_ds.factory.pace import Pace
from muco_ds.factory.replies import NonsenseError

NO_KEY = "EMPTY"
"""What servers without keys are sent, since the client library wants one."""

MAX_PAUSE_S = 120.0
"""The client library waits as long as a Retry-After asks for up to this, and repeats no request that asks for more."""

Message = dict[str, Any]


@dataclass(frozen=True)
class EndpointOptions:
    """Where a model is and how to ask it.

    Args:
        url: Base URL, such as http://localhost:8000/v1.
        model: The model's name there.
        key_variable: Environment variable with the key; no key where it is not set.
        timeout: Seconds without a byte of the reply after which a request counts as lost.
        request_retries: How often a request is repeated after a timeout, a lost connection, 429 or 5xx.
        requests_per_minute: Requests that may start in a minute, repeated ones included; 0 sets no limit.
        temperature: Of sampling.
        max_tokens: Longest reply.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    request_retries: int = 5
    requests_per_minute: float = 0.0
    temperature: float = 0.7
    max_tokens: int = 2048


@dataclass
class Traffic:
    """What went over the wire. Requests include repeated ones; tokens are those the server reports."""

    requests: int = 0
    rate_limited: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})


def load_openai() -> ModuleType:
    """The client library. Raises UserError where it is not installed."""
    try:
        import openai
    except ImportError as error:
        raise UserError(f"asking an endpoint needs openai ({error}): pip install -e '.[factory]'") from error
    return openai


class Endpoint:
    """Asks one model, at the pace that its options and its server allow. An async context manager."""

    def __init__(self, options: EndpointOptions) -> None:
        self.options, self.traffic = options, Traffic()
        self._openai = load_openai()
        self._pace = Pace(options.requests_per_minute)
        self._json_mode = True
        self._key = os.environ.get(options.key_variable, "").strip() or NO_KEY
        hooks = {"request": [self._before], "response": [self._after]}
        self._client = self._openai.AsyncOpenAI(
            base_url=options.url,
            api_key=self._key,
            timeout=options.timeout,
            max_retries=options.request_retries,
            http_client=self._openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def check(self, *, pictures: bool) -> None:
        """One small request, which also finds out whether the server takes `response_format`.

        Raises:
            UserError: nobody answers there, or not to this key, model or kind of message.
        """
        text = 'Reply with the JSON object {"ready": true}.'
        message = user(text, data_url(Image.new("RGB", (56, 56), "grey"))) if pictures else user(text)
        try:
            try:
                await self.reply([message])
            except PictureError as error:
                if error.kind != "refused":
                    raise
                self._json_mode = False
                await self.reply([message])
        except NonsenseError:
            pass  # it answers; what it answers is looked at picture by picture
        except PictureError as error:
            sent = "a request with a picture" if pictures else "a request"
            raise UserError(
                f"{shown(self.options.url)}: {error.kind} at {sent} to '{self.options.model}': {error}"
            ) from error

    async def reply(self, messages: list[Message]) -> str:
        """The text that follows `messages`.

        Raises:
            NonsenseError: it is empty or was cut off.
            PictureError: the server can't be reached or refuses this request.
            UserError: the server refuses every request: wrong key, no such model.
        """
        extra = {"response_format": {"type": "json_object"}} if self._json_mode else {}
        try:
            response = await self._client.chat.completions.create(
                model=self.options.model,
                messages=messages,
                temperature=self.options.temperature,
                max_tokens=self.options.max_tokens,
                **extra,
            )
            return self._text(response)
        except self._openai.OpenAIError as error:
            raise self._explained(error) from error
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            if isinstance(error, NonsenseError):
                raise
            raise PictureError("server error", "the reply is no chat completion: does --url end in /v1?") from error

    def _text(self, response: Any) -> str:
        if response.usage is not None:
            self.traffic.tokens["prompt"] += response.usage.prompt_tokens or 0
            self.traffic.tokens["completion"] += response.usage.completion_tokens or 0
        choice = response.choices[0]
        if choice.finish_reason == "length":
            raise NonsenseError(f"it was cut off after {self.options.max_tokens} tokens (--max_tokens)")
        if not choice.message.content:
            raise NonsenseError("it is empty")
        return choice.message.content

    def _explained(self, error: Exception) -> Exception:
        """What the user or the list of failures is told about an error of the client library."""
        library, url, model = self._openai, shown(self.options.url), self.options.model
        message = " ".join(str(error).replace(self._key, "***").split())[:300]  # some servers repeat what they refuse
        if isinstance(error, library.AuthenticationError):
            return UserError(f"{url}: the key is refused ({message}): set {self.options.key_variable} to a valid one")
        if isinstance(error, library.NotFoundError):
            return UserError(f"{url}: no model '{model}' or no chat endpoint ({message}): --url ends in /v1 as a rule")
        if isinstance(error, library.APITimeoutError):
            return PictureError("timeout", f"no reply within {self.options.timeout:g} s, {self._attempts}")
        if isinstance(error, library.APIConnectionError):
            cause = error.__cause__ or error
            return PictureError("connection", f"{cause or type(cause).__name__}, {self._attempts}")
        if isinstance(error, library.RateLimitError):
            return PictureError("rate limit", f"{message}, {self._attempts}")
        if isinstance(error, library.InternalServerError):
            return PictureError("server error", f"{message}, {self._attempts}")
        return PictureError("refused", message)

    @property
    def _attempts(self) -> str:
        return f"tried {self.options.request_retries + 1} times"

    async def _before(self, _request: Any) -> None:
        await self._pace.wait()
        self.traffic.requests += 1

    async def _after(self, response: Any) -> None:
        if response.status_code != 429:
            return
        self.traffic.rate_limited += 1
        # The library makes this one request wait; all others would only be turned away meanwhile.
        try:
            seconds = float(response.headers.get("retry-after", ""))
        except ValueError:  # none, or a date
            return
        if 0 < seconds <= MAX_PAUSE_S:
            self._pace.pause(seconds)


def user(text: str, picture: str | None = None) -> Message:
    """A user's message, with a picture (a data URL) before its text."""
    if picture is None:
        return {"role": "user", "content": text}
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}],
    }


def assistant(text: str) -> Message:
    """An earlier reply."""
    return {"role": "assistant", "content": text}


def data_url(picture: Image.Image) -> str:
    """An RGB picture as a data URL of a JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
