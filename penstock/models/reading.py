"""Reads a model or a tokenizer from a folder or the hub: `read_module`, `read_tokenizer`.

Builds the module itself where it can, so that loads in different threads do not disturb each other, whoever started
them; what only transformers can load goes through `from_pretrained`, one at a time. A checkpoint that lacks tensors of
its model is refused. Called by `loading`, off the event loop.
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
from transformers import PreTrainedModel

from penstock.config import EngineConfig
from penstock.errors import PenstockError, described, text_of
from penstock.models.building import build
from penstock.models.checkpoint import fetch, hub_options, locate
from penstock.models.completeness import Findings

T = TypeVar("T")

# Of two threads that import a module of transformers at once, one can see it half imported until the other is done.
IMPORT_ATTEMPTS, IMPORT_PAUSE_S = 20, 0.1
_HALF_IMPORTED = ("partially initialized", "Could not import module")
_import_lock = threading.Lock()  # never held while weights are downloaded
_from_pretrained_lock = threading.Lock()

log = logging.getLogger("penstock")


def read_module(source: str, dtype: torch.dtype | str, config: EngineConfig) -> nn.Module:
    """A model on the CPU in evaluation mode, with sdpa attention; `dtype` may be "auto".

    Raises `ConfigurationError` for an incomplete checkpoint, and whatever transformers raises.
    """
    module, findings = _built(source, dtype, config) or _from_pretrained(source, dtype, config)
    findings.check(source)
    return module


def read_tokenizer(source: str, config: EngineConfig) -> object:
    """The tokenizer at a folder or hub id. Raises whatever transformers raises."""

    def read() -> object:
        from transformers import AutoTokenizer

        options = hub_options(source, config)
        return AutoTokenizer.from_pretrained(
            source,
            use_fast=config.tokenizer_mode == "auto",
            trust_remote_code=config.trust_remote_code,
            **options | {"revision": config.tokenizer_revision or options["revision"]},
        )

    with _import_lock:
        return _with_retries(read)


def _built(source: str, dtype: torch.dtype | str, config: EngineConfig) -> tuple[nn.Module, Findings] | None:
    """The module from `building`; None where that is not possible, for whatever reason."""
    try:
        with _import_lock:
            architecture = _with_retries(lambda: locate(source, config))
        checkpoint = None if architecture is None else fetch(architecture, config.load_format)
        return None if checkpoint is None else build(checkpoint, dtype)
    except (PenstockError, OSError, torch.OutOfMemoryError, MemoryError):
        raise  # from_pretrained would only fail in the same way
    except Exception as error:
        log.debug("%s is left to from_pretrained: %s", source, described(error))
        return None


def _from_pretrained(source: str, dtype: torch.dtype | str, config: EngineConfig) -> tuple[nn.Module, Findings]:
    """The module from transformers, which sets the default dtype of the whole process while it loads."""

    def read() -> tuple[PreTrainedModel, dict[str, Any]]:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, with `output_loading_info`
            source,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors={"auto": None, "safetensors": True, "pt": False}[config.load_format],
            output_loading_info=True,
            **hub_options(source, config),
        )
        module, info = loaded
        return module, info

    with _from_pretrained_lock, _no_progress_bar() if Path(source).is_dir() else contextlib.nullcontext():
        module, info = _with_retries(read)
    return module.eval(), Findings.of(info)


def _with_retries(read: Callable[[], T]) -> T:
    """Run what imports modules of transformers, again and again while another thread has them half imported."""
    for _ in range(IMPORT_ATTEMPTS):
        try:
            return read()
        except (ImportError, AttributeError) as error:
            if not any(text in text_of(error) for text in _HALF_IMPORTED):
                raise
            log.debug("retrying an import: %s", text_of(error))
            time.sleep(IMPORT_PAUSE_S)
    return read()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """No progress bar for files on disk: making one fixes the multiprocessing start method of the whole program."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
