"""API keys: who a request comes from, and how much its owner may ask for.

Compares SHA-256 digests in constant time, so nothing of a key leaks through timing, and keys are not kept. A `Client`
counts its open requests and its rate. Called by the gate for every request.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import SecretStr

from penstock.errors import ConfigurationError, text_of
from penstock.sampling import RequestPriority
from penstock.serving.errors import HttpError
from penstock.serving.settings import ApiKey, ServingSettings

Clock = Callable[[], float]


class Client:
    """The owner of a key, or everybody where there are no keys."""

    def __init__(self, key: ApiKey | None = None, clock: Clock = time.monotonic) -> None:
        self.name = "" if key is None else key.name
        self.namespace = "" if key is None else key.cache_namespace
        self.priority_ceiling = RequestPriority.CRITICAL if key is None else key.priority_ceiling
        self.has_key = key is not None
        self._max_concurrent = None if key is None else key.max_concurrent
        self._per_minute = None if key is None else key.requests_per_minute
        self._clock = clock
        self._tokens, self._refilled = max(1.0, self._per_minute or 1.0), clock()
        self._num_open = 0

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as open. Raises a 429 that says when to come back."""
        self._take_token()
        if self._max_concurrent is not None and self._num_open >= self._max_concurrent:
            text = f"this key has {self._num_open} open requests, its limit: wait for one of them"
            raise HttpError(429, text, code="concurrency_limit_exceeded", retry_after_s=1)
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _take_token(self) -> None:
        """A token bucket that holds one minute's worth."""
        if self._per_minute is None:
            return
        now, rate = self._clock(), self._per_minute / 60
        self._tokens = min(max(1.0, self._per_minute), self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1:
            text = f"this key may send {self._per_minute:g} requests per minute"
            raise HttpError(429, text, code="rate_limit_exceeded", retry_after_s=(1 - self._tokens) / rate)
        self._tokens -= 1


class KeyRing:
    """All keys. Raises `ConfigurationError` for a key that cannot be read."""

    def __init__(self, settings: ServingSettings) -> None:
        self._clients = [(_digest_of(key), Client(key)) for key in settings.api_keys]
        _check_distinct(self._clients)
        self._anonymous = None if self._clients else Client()
        self._administrator = Client(ApiKey(name="admin", key=SecretStr("-"), max_priority="critical"))
        self._admin = _admin_digest(settings.admin_key)

    def client(self, headers: Mapping[str, str]) -> Client:
        """The owner of the key in the headers, who may be an administrator. Raises a 401."""
        if self._anonymous is not None:
            return self._anonymous
        digest = _digest(_presented(headers))
        if self._admin is not None and hmac.compare_digest(self._admin, digest):
            return self._administrator
        owners = [client for known, client in self._clients if hmac.compare_digest(known, digest)]
        if not owners:
            raise _unauthorized()
        return owners[0]

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Raises a 401 without the admin key, and a 404 where there is none."""
        if self._admin is None:
            raise HttpError(404, "this server has no admin key: set PENSTOCK_SERVE_ADMIN_KEY", code="not_found")
        if not hmac.compare_digest(self._admin, _digest(_presented(headers))):
            raise _unauthorized()


def _presented(headers: Mapping[str, str]) -> str:
    """The key as text; headers are Latin-1 to ASGI, and most clients send UTF-8."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    try:
        return key.encode("latin-1").decode()
    except UnicodeError:
        return key


def _unauthorized() -> HttpError:
    text = 'the API key is missing or wrong: send "Authorization: Bearer KEY" or "x-api-key: KEY"'
    return HttpError(401, text, code="invalid_api_key")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def _admin_digest(key: SecretStr | None) -> bytes | None:
    """Raises `ConfigurationError` for an empty key, which every request without one would present."""
    if key is None:
        return None
    if not key.get_secret_value():
        raise ConfigurationError("admin_key is empty: set one (PENSTOCK_SERVE_ADMIN_KEY), or leave it out")
    return _digest(key.get_secret_value())


def _check_distinct(clients: Sequence[tuple[bytes, Client]]) -> None:
    """Raises `ConfigurationError` for a key with two names, of which only one could count."""
    names: dict[bytes, str] = {}
    for digest, client in clients:
        if digest in names:
            raise ConfigurationError(f"the API keys {names[digest]!r} and {client.name!r} are the same key")
        names[digest] = client.name


def _digest_of(key: ApiKey) -> bytes:
    if key.sha256 is not None:
        digest = bytes.fromhex(key.sha256)
        if digest == _digest(""):
            raise ConfigurationError(f"the API key {key.name!r} is empty: its sha256 is that of no text")
        return digest
    try:
        secret = _secret_of(key)
    except KeyError:
        raise ConfigurationError(f"the API key {key.name!r}: the environment variable {key.env} is not set") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the API key {key.name!r} cannot be read: {text_of(error)}") from None
    if not secret:
        raise ConfigurationError(f"the API key {key.name!r} is empty")
    return _digest(secret)


def _secret_of(key: ApiKey) -> str:
    if key.key is not None:
        return key.key.get_secret_value()
    return Path(key.file).read_text().strip() if key.file is not None else os.environ[str(key.env)]
