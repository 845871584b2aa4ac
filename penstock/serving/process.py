"""A server process: uvicorn around the app, TLS, signals, and the drain at its end. Called by `penstock serve`.

SIGTERM and SIGINT make the server not ready, then refuse new calls, then wait for the open ones; a second signal aborts
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Unpack, cast

import uvicorn
from pydantic import Field, model_validator
from starlette.types import ASGIApp

from penstock.api.blocking import run
from penstock.api.event_loop import new_event_loop
from penstock.api.protocols import Engine, WithAdapters
from penstock.config import explained, warn_of_misspelled_variables
from penstock.errors import ConfigurationError
from penstock.serving.application import app
from penstock.serving.draining import Drain
from penstock.serving.http_protocol import HttpProtocol
from penstock.serving.lifecycle import Lifecycle
from penstock.serving.server import Server
from penstock.serving.settings import SECRETS, ServingKeywords, ServingSettings
from penstock.serving.tinker.service import TinkerService


class ProcessKeywords(ServingKeywords, total=False):
    """The keywords of `ProcessSettings`; see there what each means."""

    host: str
    port: int
    ssl_certfile: Path | None
    ssl_keyfile: Path | None
    allow_anonymous: bool
    access_log: bool
    adapters: Mapping[str, Path]
    tinker: bool
    tinker_folder: Path | None
    tinker_session_timeout_s: float


class ProcessSettings(ServingSettings):
    """`ServingSettings`, and where the process listens."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 is any free one.")
    ssl_certfile: Path | None = Field(None, description="Certificate chain for TLS, in PEM format.")
    ssl_keyfile: Path | None = Field(None, description="Private key for TLS, in PEM format.")
    allow_anonymous: bool = Field(False, description="Listen on addresses other than loopback without API keys.")
    access_log: bool = Field(True, description="Log one line per request on stderr, without any text of it.")
    adapters: Mapping[str, Path] = Field(
        {}, description="Folders of LoRA adapters to load at the start, by their names."
    )
    tinker: bool = Field(False, description="Also serve the Tinker SDK: train LoRA adapters and sample from them.")
    tinker_folder: Path | None = Field(None, description="Folder of saved adapters; None: in the user's data folder.")
    tinker_session_timeout_s: float = Field(
        600.0, ge=1, description="A session of the Tinker SDK ends after so many seconds without a sign of life."
    )

    def __init__(self, **values: Unpack[ProcessKeywords]) -> None:
        warn_of_misspelled_variables("PENSTOCK_SERVE_", tuple(ProcessSettings.model_fields))
        with explained(ProcessSettings.model_fields, secrets=SECRETS):
            super().__init__(**values)  # type: ignore[misc]  # the base takes these fields too: it reads `model_fields`

    @property
    def trusts_host(self) -> bool:
        """Not on loopback: any site may give its own name this address, and so appear to be the host."""
        return not _is_loopback(self.host)

    @classmethod
    def over(cls, file: Mapping[str, object], options: Mapping[str, object]) -> ProcessSettings:
        """Settings from options, then the environment, then a file. Raises `ConfigurationError`."""
        from_file = {name: value for name, value in file.items() if f"PENSTOCK_SERVE_{name.upper()}" not in os.environ}
        return cls(**cast(ProcessKeywords, {**from_file, **options}))

    @model_validator(mode="after")
    def _check_exposure(self) -> ProcessSettings:
        if not (self.api_keys or self.allow_anonymous or _is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} is reachable by others and there is no API key: set one (--api-key), "
                "or allow anybody (--allow-anonymous)"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("TLS needs both ssl_certfile and ssl_keyfile")
        return self


def serve(
    engine: Engine,
    settings: ProcessSettings,
    listener: socket.socket,
    on_ready: Callable[[str, str], None],
    say: Callable[[str], None],
    tinker: TinkerService | None = None,
) -> int:
    """Serve on a socket of `listen` until a signal; returns the exit code.

    `on_ready(url, name)` announces the port; `say` receives what happens at the end, in lines. Raises
    `ConfigurationError`, and `WeightsError` for an adapter that cannot be loaded.
    """
    api = app(engine, settings, tinker=tinker)
    parts: Server = api.state.server
    _load_adapters(parts, settings.adapters)

    def announce() -> None:
        on_ready(_url(listener, settings), parts.names[0])

    server = _Server(_config(api, settings), parts.lifecycle, settings, announce, say)
    gc.collect()
    gc.freeze()  # what was loaded stays: later collections need not look at it, which takes a tenth of a second
    with contextlib.closing(listener), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve([listener]))
    return 0


def _load_adapters(server: Server, folders: Mapping[str, Path]) -> None:
    """Load the adapters of the settings. Raises `ConfigurationError`, `WeightsError`."""
    for name, folder in folders.items():
        if not isinstance(server.engine, WithAdapters):
            raise ConfigurationError("this engine takes no adapters: leave them out")
        if name in server.names:
            raise ConfigurationError(f"the adapter {name!r} has the name of the model: give it another")
        run(server.engine.load_adapter(name, folder))


class _Server(uvicorn.Server):
    """uvicorn with signal handlers that drain, and that leave no signal behind to kill the process."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        settings: ServingSettings,
        on_ready: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain = Drain(lifecycle, settings, say, self._end)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the two signals that end a server while it runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or go on with that. uvicorn's `force_exit` would leave tasks that end in a traceback."""
        self._drain.signal()

    def _end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port and all connections; at once if a client does not read that its request was aborted."""
        if self._lifecycle.num_open:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)


def _config(api: ASGIApp, settings: ProcessSettings) -> uvicorn.Config:
    return uvicorn.Config(
        api,
        loop="none",
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile and str(settings.ssl_keyfile),
        timeout_graceful_shutdown=5,
    )


def listen(settings: ProcessSettings) -> socket.socket:
    """A socket bound to the address; it refuses connections until `serve`. Raises `ConfigurationError`.

    Called before the model is loaded, so that a port in use and a bad certificate are known at once.
    """
    _check_certificate(settings)
    try:
        host, port = settings.host, settings.port
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends small answers at once only if it is TCP's
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        where, reason = f"{settings.host}:{settings.port}", error.strerror or error
        raise ConfigurationError(f"cannot listen on {where}: {reason}; choose another --port") from None
    return listener


def _check_certificate(settings: ProcessSettings) -> None:
    """Raises `ConfigurationError` unless TLS could begin with these files."""
    if settings.ssl_certfile is None or settings.ssl_keyfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # of a file, or of what is in it
        files = f"ssl_certfile={settings.ssl_certfile} and ssl_keyfile={settings.ssl_keyfile}"
        raise ConfigurationError(f"TLS cannot use {files}: {error.strerror or error}") from None


def _url(listener: socket.socket, settings: ProcessSettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
