"""Who may use the server: what a request has to be before anything else looks at it.

A server on this machine is open to every page in its user's browser, which can send it requests, and under a
name that resolves to 127.0.0.1 read the answers too (DNS rebinding). So a request needs a known host, the
origin of the server itself if it has one, and a token, and its body has a limit.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from rapidin.settings import whole

Scope = Mapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

COOKIE = "rapidin-token"
OPEN = ("/health",)  # paths that need no token, and say nothing
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MISSING = "this view needs a token: open the address that 'rapidin serve' printed, or ask for it"
_WRONG = "the token is wrong: use the address that 'rapidin serve' printed last"
_PAGE_STYLE = (
    "<style>:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{margin:32px}</style>"
)
_TOKEN_FORM = (
    '<form method="get"><label>Token <input name="token" type="password" autocomplete="off" required>'
    "</label> <button>Open</button></form>"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    token: that a request must have, None for none; hosts: names under which the server may be addressed;
    most_bytes: of a request's body.
    """

    token: str | None
    hosts: Iterable[str] = LOOPBACK
    most_bytes: int = 1 << 20


class BodyTooLargeError(Exception):
    """The body of a request is larger than it may be."""


class Guard:
    """An ASGI application in front of another, which gets the requests that may be made alone."""

    def __init__(self, app: App, access: Access) -> None:
        self._app, self._access = app, access
        self._hosts = {host.lower() for host in access.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        secured = _secured(send)
        respond = _Refusal(secured, is_page="text/html" in headers.get("accept", ""))
        refused = self._refusal(scope["method"], headers)
        if refused is not None:
            await respond(403, refused)
            return
        if self._access.token is not None and scope["path"] not in OPEN:
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            given = dict(query).get("token")
            if given is not None and scope["method"] == "GET":
                if not self._is_token(given):
                    await respond(401, _WRONG)
                    return
                await self._sign_in(scope, headers, query, given, secured)
                return
            if not self._has_token(headers):
                await respond(401, _WRONG if "authorization" in headers else _MISSING)
                return
        if _length(headers) > self._access.most_bytes:
            await respond(413, self._too_large)
            return
        body = _Body(receive, self._access.most_bytes)

        async def sent(message: Message) -> None:
            if not body.too_large:  # else what the application says of it is not the reason
                await secured(message)

        with suppress(BodyTooLargeError):
            await self._app(scope, body, sent)
        if body.too_large:
            await respond(413, self._too_large)

    @property
    def _too_large(self) -> str:
        return f"a request has at most {self._access.most_bytes:,} bytes"

    def _refusal(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why a request is from where none may come, None if it is not."""
        host = headers.get("host", "")
        name = _name_of(host)
        if name is None or name not in self._hosts:
            return f"the host {host[:100]!r} is not allowed; start the server with --allow-host for it"
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return "the request comes from another site"
        # A link on another site may be followed: its page cannot see where it leads.
        followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
            return "the request comes from another site"
        return None

    async def _sign_in(
        self, scope: Scope, headers: Mapping[str, str], query: list[tuple[str, str]], given: str, send: Send
    ) -> None:
        """Keep the token of an address in a cookie, so that it stands in no other address."""
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        # One slash in front: two would name another host.
        place = "/" + quote(str(scope["path"]).lstrip("/\\")) + (f"?{rest}" if rest else "")
        cookie = f"{_cookie(headers)}={given}; Path=/; HttpOnly; SameSite=Lax"
        headers_of_page = [(b"location", place.encode()), (b"set-cookie", cookie.encode())]
        await _respond(send, 303, b"", headers_of_page)

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(token.strip()):
            return True
        # By hand: a parser of cookies drops all of them if another page of this host has set a strange one.
        cookies = (part.partition("=") for part in headers.get("cookie", "").split(";"))
        name = _cookie(headers)
        return any(key.strip() == name and self._is_token(value.strip()) for key, _, value in cookies)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self._access.token or "").encode())


def _cookie(headers: Mapping[str, str]) -> str:
    """The name of the cookie with the token: servers on other ports of a host have others."""
    port = headers["host"].rpartition("]")[2].rpartition(":")[2]
    return f"{COOKIE}-{port if port.isdecimal() else 80}"


def _name_of(host: str) -> str | None:
    """The name in a Host header, None if it is malformed."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", host, re.ASCII)
    return None if found is None else found[1].strip("[]").lower()


def _length(headers: Mapping[str, str]) -> int:
    length = whole(headers.get("content-length", "0"))
    return 1 << 62 if length is None else length


def _secured(send: Send) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            added = [pair for pair in _HEADERS if pair[0] not in given]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return secured


class _Body:
    """`receive` for a body whose length may not be said beforehand. too_large: whether it is."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.too_large = False
        self._receive, self._left = receive, most

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_large = True
            raise BodyTooLargeError
        return message


class _Refusal:
    """Says why a request is refused: as JSON, or as a page to a browser."""

    def __init__(self, send: Send, *, is_page: bool) -> None:
        self._send, self._is_page = send, is_page

    async def __call__(self, status: int, text: str) -> None:
        if not self._is_page:
            body = json.dumps({"detail": text}).encode()
            await _respond(self._send, status, body, [(b"content-type", b"application/json")])
            return
        form = _TOKEN_FORM if status == 401 else ""
        page = (
            f"<!DOCTYPE html><title>rapidin</title>{_PAGE_STYLE}<h1>rapidin</h1><p>{escape(text)}.</p>{form}"
        )
        headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (
                b"content-security-policy",
                b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'",
            ),
        ]
        await _respond(self._send, status, page.encode(), headers)


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})
