"""Requests go to public addresses alone: a data set's URLs, and where their servers redirect to, are others' words.

A name is resolved once, all its addresses are looked at, and the connection goes to one of these: a name server that
answers otherwise the next time gains nothing. Through a proxy, which connects by itself, names are only looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from muco_ds.factory.failures import PictureError

_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is handed out; beside it lie ways to addresses of IPv4
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an address is one of the internet: no private, loopback, link-local, multicast or reserved one."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found not in _UNICAST:
            return False
    return found.is_global and not found.is_multicast


def shown(url: str) -> str:
    """A URL for files and messages: without name and password, and without what may be a key behind the `?`."""
    try:
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "(not a URL)"
    return place + ("?..." if parts.query else "")


def guarded_transport(httpx: ModuleType, *, allow_private: bool, **options: Any) -> Any:
    """A transport for `httpx.AsyncClient`, with the environment's proxies.

    Args:
        allow_private: every address will do.
        options: of `httpx.AsyncHTTPTransport`.
    """
    direct = httpx.AsyncHTTPTransport(**options)
    proxies = {
        scheme: httpx.AsyncHTTPTransport(proxy=url, **options)
        for scheme, url in getproxies().items()
        if scheme in ("http", "https", "all") and url
    }

    class Guarded(httpx.AsyncBaseTransport):  # type: ignore[name-defined, misc]
        async def handle_async_request(self, request: Any) -> Any:
            scheme, host = request.url.scheme, request.url.host
            if scheme not in ("http", "https"):
                raise PictureError("url", f"'{scheme}' is neither http nor https")
            proxy = None if proxy_bypass(host) else proxies.get(scheme, proxies.get("all"))
            if allow_private:
                return await (proxy or direct).handle_async_request(request)
            addresses = await _public_addresses(host, request.url.port, must_resolve=proxy is None)
            if proxy is not None:
                return await proxy.handle_async_request(request)
            for address in addresses[:-1]:
                try:
                    return await direct.handle_async_request(_to_address(httpx, request, address))
                except httpx.ConnectError:
                    pass
            return await direct.handle_async_request(_to_address(httpx, request, addresses[-1]))

        async def aclose(self) -> None:
            for transport in (direct, *proxies.values()):
                await transport.aclose()

    return Guarded()


async def _public_addresses(host: str, port: int | None, *, must_resolve: bool) -> list[str]:
    """The addresses of a host. Raises PictureError where one of them is not public, or there is none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if not must_resolve:  # behind a proxy this machine may know no names
            return []
        raise PictureError("connection", f"'{host}' is not known ({error})") from error
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if not all(map(is_public, addresses)):
        raise PictureError("address", f"'{host}' is no public address (--allow_private)")
    return addresses


def _to_address(httpx: ModuleType, request: Any, address: str) -> Any:
    """The same request to an address; the host's name stays in its headers and in what TLS asks for and checks."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )
