"""HTTP towards one capture server, within bounds: of an answer's bytes, and of the time until its last one.

And what a status other than 200 means.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
import ssl
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from specforge.errors import EngineError, PromptRefused, ServerBusy, ServerRefused, ServerUnavailable

CLOSE_S = 5.0
"""The longest that closing waits for the connections to end."""

BUSY = 503
LATER = {408, 425, 429}
"""Of the statuses that are no server's fault (below 500) those after which the same request may succeed."""
TOO_LARGE = 413
UNFIT = {400, 422}
"""Those that are about the request itself, which may be its size."""


@functools.cache
def _trust() -> ssl.SSLContext:
    """Reading the certificates takes longer than most requests."""
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """``media_type`` without its parameters."""

    status: int
    media_type: str
    body: bytearray


class Unfit(ServerRefused):
    """The server says that it cannot serve the request as it is."""


def refusal(url: str, path: str, answer: Answer, advice: Mapping[int, str], otherwise: str) -> EngineError:
    """What ``answer``, whose status is not 200, means. ``advice``: what to do about a status, ``otherwise`` of others.

    Each ends the sentence that names the server and says what it answered.
    """
    said = f"the capture server {url} answered {path} with {answer.status}: {_reason(answer)}"
    if answer.status == BUSY:
        return ServerBusy(said)
    if answer.status >= 500 or answer.status in LATER:
        return ServerUnavailable(said)
    if answer.status == TOO_LARGE:
        return PromptRefused(said)
    kind = Unfit if answer.status in UNFIT else ServerRefused
    return kind(said + advice.get(answer.status, otherwise))


def _reason(answer: Answer) -> str:
    """What an error says in the manner of our protocol, of vLLM or of SGLang; the beginning of what another says."""
    text = bytes(answer.body[:4096]).decode(errors="replace")
    try:
        said = json.loads(text)
        said = said["reason"] if "reason" in said else said["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:500]
    except (ValueError, KeyError, TypeError):
        return repr(text[:100])


class ServerHttp:
    """Requests to the server at ``url`` over kept connections. Safe to call from several threads.

    The connections live in an event loop of their own, in a thread: there a request ends at its deadline, whatever the
    server does, and :meth:`close` ends all of them at once. Redirects are answers; proxies of the environment are not
    for capture servers.
    """

    def __init__(self, url: str, token: str | None, max_connections: int) -> None:
        self.url = url
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._closed = False
        self._client: httpx.AsyncClient | None = None
        self._requests: set[asyncio.Task[Answer]] = set()
        self._scopes: set[anyio.CancelScope] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=f"connections of {url}", daemon=True)
        self._thread.start()

    def send(
        self,
        method: str,
        path: str,
        content: bytes | None,
        timeout_s: float,
        max_bytes: int,
        kind: str = "application/json",
    ) -> Answer:
        """The answer, of any status. ``content`` is of the media type ``kind``.

        Raises ``ServerUnavailable`` where there is none within ``timeout_s``, or one of more than ``max_bytes``.
        """
        answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise ServerUnavailable(f"the connection to the capture server {self.url} was closed")
            request = self._request(method, path, content, timeout_s, max_bytes, kind)
            self._loop.call_soon_threadsafe(self._begin, request, answer)
        try:
            return answer.result()
        except TimeoutError:
            raise self._unavailable(path, f"no whole answer within {timeout_s:g} s") from None
        except ServerUnavailable:
            raise
        except Exception as error:  # what a server or an address can bring a client to raise is no fixed list
            raise self._unavailable(
                path, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            ) from error

    def close(self) -> None:
        """Idempotent. Requests in flight raise ``ServerUnavailable``; from any thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def _unavailable(self, path: str, why: str) -> ServerUnavailable:
        return ServerUnavailable(f"the capture server {self.url} did not answer {path} ({why})")

    async def _request(
        self, method: str, path: str, content: bytes | None, timeout_s: float, max_bytes: int, kind: str
    ) -> Answer:
        if self._client is None:
            limits = httpx.Limits(
                max_connections=self._max_connections, max_keepalive_connections=self._max_connections
            )
            # The time of a request is that of the whole, below.
            self._client = httpx.AsyncClient(verify=_trust(), limits=limits, timeout=None, trust_env=False)  # noqa: S113
        headers = self._headers if content is None else {**self._headers, "Content-Type": kind}
        # Whatever ends a request must be a scope of anyio: the client leaks connections when its task is cancelled.
        with anyio.fail_after(timeout_s) as scope:
            self._scopes.add(scope)
            try:
                if self._closed:
                    scope.cancel()
                async with self._client.stream(method, self.url + path, content=content, headers=headers) as response:
                    body = bytearray()
                    self._check_size(path, int(response.headers.get("Content-Length", "0")), max_bytes)
                    async for chunk in response.aiter_raw():
                        body += chunk
                        self._check_size(path, len(body), max_bytes)
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                return Answer(response.status_code, media_type, body)
            finally:
                self._scopes.discard(scope)
        raise self._unavailable(path, "the connection was closed on this side")

    def _check_size(self, path: str, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise self._unavailable(path, f"its answer has more than the {max_bytes:,} bytes that it may have")

    def _begin(self, request: Coroutine[Any, Any, Answer], answer: concurrent.futures.Future[Answer]) -> None:
        task = self._loop.create_task(request)
        self._requests.add(task)
        task.add_done_callback(functools.partial(self._pass_on, answer))

    def _pass_on(self, answer: concurrent.futures.Future[Answer], task: asyncio.Task[Answer]) -> None:
        self._requests.discard(task)
        if (error := task.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())

    def _serve(self) -> None:
        """Until :meth:`close` stops the loop; then its requests are ended and its connections closed."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _end(self) -> None:
        for scope in list(self._scopes):
            scope.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
