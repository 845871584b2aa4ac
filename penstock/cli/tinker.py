"""The engine of `penstock serve`; with `--tinker`, a service that trains adapters of the module which it borrows.

Owns how these are made of the options. Called by `serve`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

from penstock.cli.session import (
    JsonObject,
    exit_on_interrupt,
    loaded_engine,
    loading_line,
    quiet_libraries,
    started_engine,
)
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.engine.inference import InferenceEngine
from penstock.engine.replicas.engine import ReplicatedEngine
from penstock.errors import ConfigurationError, PackageMissing
from penstock.serving.process import ProcessSettings
from penstock.serving.tinker.service import TinkerService
from penstock.serving.tinker.settings import TinkerSettings, default_folder

Served: TypeAlias = tuple[InferenceEngine, TinkerService]


@contextlib.contextmanager
def served_engine(
    model: object, tokenizer: object, settings: ProcessSettings, engine_settings: JsonObject, placement: JsonObject
) -> Iterator[tuple[InferenceEngine | ReplicatedEngine, TinkerService | None]]:
    """The engine to serve, and with the setting `tinker` the service that trains adapters of its model.

    `placement` are keywords of `ReplicatedEngine`; none for a single engine. Raises `ConfigurationError`.
    """
    if placement and settings.tinker:
        raise ConfigurationError("--tinker trains the module of a single engine: leave --replicas out")
    if placement:
        config = EngineConfig(**engine_settings)
        replicated = ReplicatedEngine(model, tokenizer, config, **placement)
        with started_engine(replicated, loading_line(model, config)):
            yield replicated, None
    elif settings.tinker:
        with _trained_engine(model, settings, engine_settings) as parts:
            yield parts
    else:
        with loaded_engine(model, tokenizer, **engine_settings) as engine:
            yield engine, None


@contextlib.contextmanager
def _trained_engine(model: object, settings: ProcessSettings, engine_settings: JsonObject) -> Iterator[Served]:
    """An engine that borrows the module of which the service trains adapters."""
    _require_package()
    if model is not None and not isinstance(model, str):
        raise ConfigurationError("a scripted model has no weights to train: leave --tinker out, or name a real model")
    source = str(MODEL_DIR if model is None else model)
    config = EngineConfig(**engine_settings)
    from penstock.models.folder import check_source, check_tokenizer_files
    from penstock.models.loading import load_bare
    from penstock.training.lora.trainer import LoraTrainer

    if config.tokenizer is None and not config.skip_tokenizer_init:
        check_tokenizer_files(source)
    with exit_on_interrupt(), loading_line(source, config):
        quiet_libraries()
        module = load_bare(check_source(source), config)
    borrowing = {name: value for name, value in engine_settings.items() if name not in ("device", "dtype")}
    tokenizer = None if config.tokenizer is not None or config.skip_tokenizer_init else source
    with loaded_engine(module, tokenizer, **borrowing) as engine:
        trainer = LoraTrainer(module, max_length=engine.get_stats()["max_sequence_length"])
        folder = settings.tinker_folder or default_folder()
        options = TinkerSettings(folder=folder, session_timeout_s=settings.tinker_session_timeout_s)
        yield engine, TinkerService(engine, trainer, options)


def _require_package() -> None:
    try:
        from tinker.proto import tinker_public_pb2  # noqa: F401
    except ImportError as error:
        raise PackageMissing(
            f"--tinker needs the messages of the package tinker ({error}): pip install 'penstock[tinker]'"
        ) from None
