"""Reads a model or a tokenizer from a folder or the hub: `read_module`, `read_tokenizer`.

Builds the module itself where it can, so that loads in other threads, this program's own included, cannot disturb it
nor it them; what only transformers can load goes through `from_pretrained`, one at a time. Every checkpoint is refused
that does not hold all its model needs. Called by `loading`, off the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from penstock.config import EngineConfig
from penstock.errors import PenstockError, described, text_of
from penstock.models.building import build
from penstock.models.checkpoint import fetch, hub_options, locate
from penstock.models.completeness import Findings, findings_of

T = TypeVar("T")

# Two threads that import modules of transformers at once can see half of one, which the other thread then completes.
IMPORT_ATTEMPTS, IMPORT_PAUSE_S = 20, 0.1
_HALF_IMPORTED = ("partially initialized", "Could not import module")
_importing = threading.Lock()  # never held while weights are downloaded
_from_pretrained_alone = threading.Lock()

log = logging.getLogger("penstock")


def read_module(source: str, dtype: torch.dtype | str, config: EngineConfig) -> nn.Module:
    """A model on the CPU in evaluation mode, with sdpa attention; `dtype` may be "auto".

    Raises `ConfigurationError` for a checkpoint that is not complete, and whatever transformers raises.
    """
    module, findings = _built(source, dtype, config) or _from_pretrained(source, dtype, config)
    findings.check(source)
    return module


def read_tokenizer(source: str, config: EngineConfig) -> Any:
    """The tokenizer at a folder or hub id. Raises whatever transformers raises."""

    def read() -> Any:
        from transformers import AutoTokenizer

        options = hub_options(config)
        return AutoTokenizer.from_pretrained(
            source,
            use_fast=config.tokenizer_mode == "auto",
            trust_remote_code=config.trust_remote_code,
            **options | {"revision": config.tokenizer_revision or options["revision"]},
        )

    with _importing:
        return _patiently(read)


def _built(source: str, dtype: torch.dtype | str, config: EngineConfig) -> tuple[nn.Module, Findings] | None:
    """The module as we build it; None where that is not possible, for whatever reason."""
    try:
        with _importing:
            architecture = _patiently(lambda: locate(source, config))
        checkpoint = None if architecture is None else fetch(architecture, config.load_format)
        return None if checkpoint is None else build(checkpoint, dtype)
    except (PenstockError, OSError, torch.OutOfMemoryError, MemoryError):
        raise  # from_pretrained would only try the same again
    except Exception as error:
        log.debug("%s is left to from_pretrained: %s", source, described(error))
        return None


def _from_pretrained(source: str, dtype: torch.dtype | str, config: EngineConfig) -> tuple[nn.Module, Findings]:
    """As transformers loads it, which sets the default dtype of the whole process meanwhile."""

    def read() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors={"auto": None, "safetensors": True, "pt": False}[config.load_format],
            output_loading_info=True,
            **hub_options(config),
        )

    with _from_pretrained_alone, _no_bar() if Path(source).is_dir() else contextlib.nullcontext():
        module, info = _patiently(read)
    return module.eval(), findings_of(info)


def _patiently(read: Callable[[], T]) -> T:
    """Run what imports modules of transformers; again, while another thread of the program imports the same ones."""
    for _ in range(IMPORT_ATTEMPTS):
        try:
            return read()
        except (ImportError, AttributeError) as error:
            if not any(text in text_of(error) for text in _HALF_IMPORTED):
                raise
            log.debug("an import is tried again: %s", text_of(error))
            time.sleep(IMPORT_PAUSE_S)
    return read()


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """No bar over weights that lie on disk: making one fixes the whole program's multiprocessing start method."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
