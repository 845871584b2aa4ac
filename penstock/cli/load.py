"""Load on an OpenAI-compatible server: requests at random times, and the times at which their clients read tokens.

Open loop: a request is sent when its time has come, whether or not earlier ones have been answered, so a slow server
cannot slow down its own measurement. Streams over plain HTTP, without a client library between socket and clock. Called
by `penstock bench --url`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from penstock.cli.workloads import poisson_arrivals
from penstock.errors import ConfigurationError, described

WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "ledge")
CONNECT_S = 10.0
PAUSE_S = 1.0  # of a slow reader between two reads
ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}


@dataclass(frozen=True, slots=True)
class Server:
    """Where the requests go. `url` ends in /v1."""

    url: str
    model: str
    headers: dict[str, str]
    endpoint: str = "chat"


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent. `rate` is the mean number of requests per second; infinity sends all at once.

    `concurrency` limits the requests in flight, which makes the loop a closed one. The shares `disconnecting` and
    `slow` of the clients leave in the middle of their answer, and read it one chunk per second.
    """

    num_requests: int
    rate: float = math.inf
    concurrency: int | None = None
    prompt_words: int = 100
    max_tokens: int = 64
    ignore_eos: bool = False
    temperature: float | None = None  # None: what the server takes by itself
    disconnecting: float = 0.0
    slow: float = 0.0
    seed: int = 0

    def arrivals(self) -> list[float]:
        """When each request is sent, in seconds after the start: a Poisson process."""
        if math.isinf(self.rate):
            return [0.0] * self.num_requests
        return poisson_arrivals(self.rate, self.num_requests, self.seed)

    def prompt(self, number: int) -> str:
        """The text of a request; no two begin alike."""
        rng = random.Random(f"{self.seed}/{number}")
        return " ".join([str(rng.randrange(10**9)), *rng.choices(WORDS, k=max(0, self.prompt_words - 1))])


@dataclass(slots=True)
class Exchange:
    """One request as its client saw it. Times are seconds after the start of the load.

    `error` is None for a complete answer; `is_cut` if the client left by itself.
    """

    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)  # when each chunk with new text was read
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None
    is_cut: bool = False
    is_slow: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer was read."""
        return self.error is None and not self.is_cut


def base_url(url: str) -> str:
    """The address of a server's API, with or without /v1 at its end. Raises `ConfigurationError`."""
    address = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parsed = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"--url {url!r} is not an address: {described(error)}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 2**16:
        raise ConfigurationError(f"--url {url!r} is not an address: give one like http://127.0.0.1:8000")
    address = address.rstrip("/")
    return address if address.endswith("/v1") else f"{address}/v1"


async def find_model(url: str, headers: dict[str, str]) -> str:
    """The first model that the server lists. Raises `ConfigurationError` if it cannot be asked."""
    try:
        async with httpx.AsyncClient(headers=headers, timeout=CONNECT_S) as client:
            response = await client.get(f"{url}/models")
    except httpx.HTTPError as error:
        raise ConfigurationError(f"no server answers at {url}: {described(error)}") from None
    if response.status_code in (401, 403):
        raise ConfigurationError(f"{url} requires a valid key: pass --api-key, or set OPENAI_API_KEY")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ConfigurationError(f"{url}/models lists no model ({response.status_code}): name one by --model") from None


class Clients:
    """Sends a load to a server. `exchanges` fills up while it runs. `transport` replaces the network, for tests."""

    def __init__(
        self,
        server: Server,
        load: Load,
        on_end: Callable[[], object] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.exchanges: list[Exchange] = []
        self._server = server
        self._load = load
        self._on_end = on_end
        self._transport = transport
        self._tls = httpx.create_ssl_context()
        self._places = asyncio.Semaphore(load.concurrency or load.num_requests)
        self._start_s = 0.0

    async def run(self) -> Sequence[Exchange]:
        """Send every request at its time, and read all answers."""
        rng = random.Random(f"{self._load.seed}/clients")
        async with asyncio.TaskGroup() as group:
            self._start_s = time.perf_counter()
            for number, due_s in enumerate(self._load.arrivals()):
                await asyncio.sleep(max(0.0, due_s - self._now()))
                await self._places.acquire()
                exchange = Exchange(due_s, is_slow=rng.random() < self._load.slow)
                leaves_at = rng.randint(1, self._load.max_tokens) if rng.random() < self._load.disconnecting else None
                self.exchanges.append(exchange)
                group.create_task(self._exchange(number, exchange, leaves_at))
        return self.exchanges

    def _new_client(self) -> httpx.AsyncClient:
        """A client of one request. The pool of a shared one walks all its connections whenever a request ends."""
        return httpx.AsyncClient(
            headers=self._server.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            verify=self._tls,
            transport=self._transport,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    async def _exchange(self, number: int, exchange: Exchange, leaves_at: int | None) -> None:
        exchange.sent_s = self._now()
        try:
            await self._stream(number, exchange, leaves_at)
        except Exception as error:  # refused connections, broken streams, invalid JSON: each is a failed request
            exchange.error = described(error)
        finally:
            exchange.ended_s = self._now()
            self._places.release()
            self._on_end()

    async def _stream(self, number: int, exchange: Exchange, leaves_at: int | None) -> None:
        url = f"{self._server.url}/{ENDPOINTS[self._server.endpoint]}"
        async with self._new_client() as client, client.stream("POST", url, json=self._body(number)) as response:
            if response.status_code != 200:
                exchange.error = _refusal(response.status_code, await response.aread())
                return
            is_done = False
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    is_done = self._read(line[6:], exchange)
                    if leaves_at is not None and len(exchange.chunks_s) >= leaves_at:
                        exchange.is_cut = True
                        return
                    if exchange.is_slow:
                        await asyncio.sleep(PAUSE_S)
            if not is_done and exchange.error is None:
                exchange.error = "the stream ended without [DONE]"

    def _body(self, number: int) -> dict[str, object]:
        prompt = self._load.prompt(number)
        is_chat = self._server.endpoint == "chat"
        content = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        body = {"model": self._server.model, "max_tokens": self._load.max_tokens, "stream": True, **content}
        extras: dict[str, object] = {}
        if self._load.ignore_eos:
            extras |= {"ignore_eos": True, "min_tokens": self._load.max_tokens}
        if self._load.temperature is not None:
            extras["temperature"] = self._load.temperature
        return {**body, "stream_options": {"include_usage": True}, **extras}

    def _read(self, data: str, exchange: Exchange) -> bool:
        """Record one event; whether it is the last."""
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if error := event.get("error"):
            exchange.error = str(error.get("message", error) if isinstance(error, dict) else error)
            return False
        if any(_has_text(choice) for choice in event.get("choices") or ()):
            exchange.chunks_s.append(self._now())
        if usage := event.get("usage"):
            exchange.num_tokens, exchange.num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        return False


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice adds to the answer: text of a completion (a token may have none), content or reasoning."""
    delta = choice.get("delta") or {}
    return "text" in choice or any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))


def _refusal(status: int, body: bytes) -> str:
    """A refusal in the server's words; those of a full queue have numbers, which would make each a kind of its own."""
    text = ""
    if status != 429:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(body)["error"]["message"])
    return f"HTTP {status}: {text[:200]}" if text else f"HTTP {status}"
