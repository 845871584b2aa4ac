"""`penstock serve`: an HTTP server with OpenAI's and Anthropic's APIs around one model.

Owns the options and what is printed. Settings come from options, then the environment (PENSTOCK_SERVE_* for the server,
PENSTOCK_* for the engine), then the YAML file of `--config`. Called by `command`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import cast

from penstock.cli.options import positive
from penstock.cli.scripted_file import scripted_engine_parts
from penstock.cli.session import JsonObject
from penstock.cli.terminal import note
from penstock.config import ALIASES, EngineConfig, read_mapping
from penstock.errors import ConfigurationError
from penstock.values import integer

EXAMPLES = """examples:
  penstock serve --model Qwen/Qwen3-0.6B
  penstock serve --model ./my-model --port 9000 --served-model-name gpt-4o mine
  penstock serve --model ./my-model --host 0.0.0.0 --api-key SECRET
  penstock serve --model ./my-model --adapter support=./lora-support
  penstock serve --config server.yaml          engine: and serving: in one file
  penstock serve --model ./my-model --replicas 4   a copy on each of four GPUs
  penstock serve --model scripted:answers.yaml for tests of agents
  penstock serve --model ./my-model --tinker   for programs of the Tinker SDK

Settings are also environment variables: PENSTOCK_SERVE_PORT=9000 for the
server, PENSTOCK_MAX_BATCH_SIZE=8 for the engine. Ctrl-C and SIGTERM let open
requests finish for --drain-timeout-s seconds; a second one aborts them.
"""
_SCRIPTED = "scripted:"
_SERVER = (
    *("host", "port", "admin_key", "allow_anonymous", "ssl_certfile", "ssl_keyfile", "access_log"),
    *("served_model_name", "cors_origins", "drain_timeout_s", "tracing"),
    *("tinker", "tinker_folder", "tinker_session_timeout_s"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP with OpenAI's and Anthropic's APIs",
        description="Serve a model over HTTP with OpenAI's and Anthropic's APIs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", metavar="H", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, metavar="P", help="port to listen on (default: 8000; 0: any free one)")
    server.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names of the model in the API")
    server.add_argument("--adapter", action="append", metavar="NAME=FOLDER", help="LoRA adapter to serve; repeatable")
    server.add_argument("--api-key", action="append", metavar="KEY", help="require this key; repeatable")
    server.add_argument("--admin-key", metavar="KEY", help="key of /admin")
    server.add_argument("--allow-anonymous", action="store_true", default=None, help="listen anywhere without keys")
    server.add_argument("--cors-origins", nargs="+", metavar="URL", help="web pages that may call")
    server.add_argument("--ssl-certfile", metavar="FILE", help="certificate chain for TLS")
    server.add_argument("--ssl-keyfile", metavar="FILE", help="private key for TLS")
    server.add_argument(
        "--no-access-log", dest="access_log", action="store_false", default=None, help="log no requests"
    )
    server.add_argument("--tracing", action="store_true", default=None, help="trace requests with OpenTelemetry")
    server.add_argument("--drain-timeout-s", type=float, metavar="S", help="time to finish after SIGTERM (default: 30)")
    _add_tinker_options(parser)
    _add_engine_options(parser)
    parser.set_defaults(run=run)


def _add_tinker_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tinker", "A service for the Tinker SDK, which trains LoRA adapters.")
    group.add_argument("--tinker", action="store_true", default=None, help="also serve the Tinker SDK")
    group.add_argument("--tinker-folder", metavar="DIR", help="saved adapters (~/.local/share/penstock/tinker)")
    group.add_argument(
        "--tinker-session-timeout-s", type=float, metavar="S", help="end sessions that are silent (default: 600)"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What to serve, and how many copies of it."""
    parser.add_argument("--model", metavar="M", help="hub id, folder, or scripted:FILE (default: the shipped model)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections engine and serving")
    parser.add_argument(
        "--replicas", type=positive, metavar="N", help="copies of the model, each on a GPU (default: 1)"
    )
    parser.add_argument(
        "--routing", choices=("prefix", "load", "round_robin"), help="which replica a request goes to (default: prefix)"
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """One option per setting of the engine; values are checked by `EngineConfig`."""
    group = parser.add_argument_group("engine", "Settings of the engine, as in EngineConfig; none is None.")
    names = {name: [name] for name in EngineConfig.model_fields}
    for alias, name in ALIASES.items():
        names[name].append(alias)
    for name, spellings in names.items():
        field = EngineConfig.model_fields[name]
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        options = [f"--{spelling.replace('_', '-')}" for spelling in spellings]
        group.add_argument(*options, dest=f"engine_{name}", metavar="V", help=text)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    try:
        from penstock.cli.tinker import served_engine
        from penstock.serving.process import ProcessSettings, listen, serve
    except ImportError as error:
        raise ConfigurationError(f"serving needs further packages ({error}): pip install 'penstock[serve]'") from None
    sections = _sections(args.config)
    settings = ProcessSettings.over(sections["serving"], _server_options(args))
    engine_settings = sections["engine"] | _engine_options(args)
    placement = _placement(args, engine_settings)
    model, tokenizer = _model_and_tokenizer(
        args.model or engine_settings.pop("model", None), engine_settings, placement.get("replicas", 1)
    )
    EngineConfig(**engine_settings)
    with (
        listen(settings) as listener,
        served_engine(model, tokenizer, settings, engine_settings, placement) as (engine, tinker),
        _requests_on_stderr(settings.access_log),
    ):
        announce = partial(_announce, has_keys=bool(settings.api_keys), has_tinker=settings.tinker)
        return serve(engine, settings, listener, announce, note, tinker)


def _placement(args: argparse.Namespace, settings: JsonObject) -> JsonObject:
    """Keywords of `ReplicatedEngine` from the options or the file; none for one engine. Raises a `PenstockError`."""
    in_file = {name: settings.pop(name, None) for name in ("replicas", "routing")}
    placement = {name: getattr(args, name) or value for name, value in in_file.items()}
    if placement["replicas"] is not None:
        integer("replicas", placement["replicas"], 1)
    if placement["replicas"] in (None, 1) and placement["routing"] is not None:
        raise ConfigurationError(f"routing {placement['routing']} is between replicas: set replicas to 2 or more")
    return {name: value for name, value in placement.items() if value is not None and placement["replicas"] != 1}


def _model_and_tokenizer(model: str | None, settings: JsonObject, num_replicas: int) -> tuple[object, object]:
    """A scripted model is one for each replica, if there are several."""
    if model is None or not model.startswith(_SCRIPTED):
        return model, None
    path = model.removeprefix(_SCRIPTED)
    copies = [scripted_engine_parts(path, dict(settings)) for _ in range(num_replicas)]
    settings.pop("tokenizer", None)
    models = [model for model, _ in copies]
    return models if num_replicas > 1 else models[0], copies[0][1]


def _sections(path: str | None) -> dict[str, JsonObject]:
    """The two sections of the configuration file."""
    sections = dict(read_mapping(path)) if path is not None else {}
    if unknown := set(sections) - {"engine", "serving"}:
        raise ConfigurationError(f"{path} has an unknown section {min(unknown)!r}: it may have engine and serving")
    for name in ("engine", "serving"):
        if not isinstance(sections.setdefault(name, {}), dict):
            raise ConfigurationError(f"the section {name} of {path} must be a mapping of setting names to values")
    return {name: cast(JsonObject, section) for name, section in sections.items()}


def _server_options(args: argparse.Namespace) -> JsonObject:
    """Keywords of `ProcessSettings` for the options that were given."""
    values = {name: value for name in _SERVER if (value := getattr(args, name)) is not None}
    if args.adapter:
        values["adapters"] = dict(map(_named_folder, args.adapter))
    if args.api_key:
        values["api_keys"] = [{"name": f"key-{n}", "key": key} for n, key in enumerate(args.api_key, 1)]
    return values


def _named_folder(text: str) -> tuple[str, str]:
    """Name and folder of an adapter. Raises `ConfigurationError`."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ConfigurationError(f"--adapter takes NAME=FOLDER, got {text!r}")
    return name, folder


def _engine_options(args: argparse.Namespace) -> JsonObject:
    """Keywords of `EngineConfig` for the options that were given."""
    given = {name: getattr(args, f"engine_{name}") for name in EngineConfig.model_fields}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def _requests_on_stderr(is_wanted: bool) -> Iterator[None]:
    """Print the server's log, whose lines are JSON; with `is_wanted=False` only its errors."""
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("penstock.serving")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_wanted else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _announce(url: str, name: str, *, has_keys: bool, has_tinker: bool) -> None:
    """The address, and a request that works."""
    key = ' -H "authorization: Bearer $API_KEY"' if has_keys else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    note(f"serving {name} at {url}/v1")
    if has_tinker:
        key_text = "one of the keys, which begins with tml-" if has_keys else "tml-local"
        note(f"the Tinker SDK: TINKER_BASE_URL={url}, and TINKER_API_KEY={key_text}")
    note(f"try: curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'")
