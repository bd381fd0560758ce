"""Keys and passwords do not get into what is printed or written."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from muco_ds.factory.addresses import shown
from muco_ds.factory.endpoint import Endpoint, EndpointOptions


@pytest.mark.parametrize("kind", [openai.AuthenticationError, openai.NotFoundError, openai.BadRequestError])
def test_a_server_that_repeats_the_key(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "CANARY-KEY")
    endpoint = Endpoint(EndpointOptions("http://user:CANARY-PASSWORD@localhost:1/v1?key=CANARY-TOKEN", "m"))
    response = httpx2.Response(401, request=httpx2.Request("POST", "http://localhost:1/v1"))
    told = str(endpoint._explained(kind("wrong key CANARY-KEY given", response=response, body=None)))
    assert "CANARY" not in told and "wrong key *** given" in told


def test_urls_are_shown_without_secrets() -> None:
    assert shown("https://me:CANARY@host:8/a.jpg?sig=CANARY#x") == "https://host:8/a.jpg?..."
    assert shown("http://host/v1") == "http://host/v1"
    assert shown("http://me:CANARY@[::1/x") == "(not a URL)"
