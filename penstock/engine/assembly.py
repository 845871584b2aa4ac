"""`Assembly`: builds an engine (model, cache, scheduler, tokenizers) and releases it again.

Building happens once, on the model's thread. Only here, and for a draft model in `drafting`, is `models.loading`
imported, and torch with it. Called by `InferenceEngine` and by `Host` at boot.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, cast

from penstock.api.callbacks import Callbacks
from penstock.api.log import Logger
from penstock.api.weights import SleepLevel
from penstock.cache.manager import CacheManager
from penstock.cache.sizing import num_blocks, num_host_blocks
from penstock.config import EngineConfig
from penstock.engine.drafting import load_draft_model, make_drafter
from penstock.engine.loop.core import CoreParts, EngineCore
from penstock.engine.loop.gate import ModelJobs
from penstock.engine.loop.host import Host
from penstock.engine.loop.housekeeping import Housekeeper
from penstock.engine.loop.speculator import Speculator
from penstock.engine.loop.tuning import Tuning
from penstock.engine.loop.worker import Worker
from penstock.engine.observe.metrics import Metrics, StepObserver
from penstock.engine.requests.input_processor import InputProcessor
from penstock.engine.text.tokenizer import Tokenizer, copy_tokenizer
from penstock.engine.text.tokenizer_pool import TokenizerPool
from penstock.errors import ConfigurationError
from penstock.held_settings import LIVE_SETTINGS, hold
from penstock.models.folder import check_source
from penstock.models.hub import check_available
from penstock.models.protocol import GuessingRunner, ModelRunner, ModelSpec
from penstock.optimizers.speculation.draft_model import ModelDrafter
from penstock.optimizers.speculation.drafter import Drafter
from penstock.optimizers.tuning.tuner import ceilings
from penstock.scheduling.admission import Admission
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.scheduling.limits import Limits
from penstock.scheduling.packing import engine_packing
from penstock.scheduling.scheduler import Scheduler

# The rest of the program needs host memory too: gpu_memory_utilization is a fraction of this share of the free memory.
HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an assembled engine."""

    runner: ModelRunner
    tokenizer: Tokenizer | None
    pool: TokenizerPool
    cache: CacheManager
    wanted_blocks: Mapping[str, int]
    scheduler: Scheduler
    inputs: InputProcessor
    tuning: Tuning
    drafter: Drafter
    draft: GuessingRunner | None

    def trim_draft(self) -> int:
        """Release memory that the draft model does not need; returns the bytes. On the model's thread."""
        if self.draft is None or not isinstance(self.drafter, ModelDrafter):
            return 0
        return self.draft.trim_memory(self.drafter.unused_blocks())

    def unload(self, level: SleepLevel) -> None:
        """Free what an engine that is asleep does without. On the model's thread."""
        self.runner.unload(level)
        if self.draft is not None and level != "weights":
            self.draft.unload("cache")

    def reload(self, level: SleepLevel) -> None:
        """Take back what `unload` freed. On the model's thread. Raises `WeightsError`, `OutOfMemory`."""
        if level != "cache":
            self.runner.reload()
        if level == "weights":
            return
        cache = self.cache
        self.runner.allocate(cache.num_blocks, cache.block_size, cache.num_host_blocks)
        if self.draft is not None:
            self.draft.allocate(cache.num_blocks, cache.block_size)

    def close(self) -> None:
        """Release the models, their memory and the tokenizer threads."""
        self.pool.close()
        if self.draft is not None:
            self.draft.close()
        self.runner.close()


def check_model(model: object) -> None:
    """Refuse an unusable model argument before anything heavy is imported. Raises `ConfigurationError`."""
    if isinstance(model, str | Path):
        check_source(str(model))
    elif not (model is None or _is_runner(model) or hasattr(model, "parameters")):
        raise ConfigurationError(
            f"a model cannot be of type {type(model).__name__}: pass a hub id, a folder, an nn.Module, or nothing"
        )


def check_tokenizer(tokenizer: object) -> None:
    """Refuse an unusable tokenizer argument before anything is loaded. Raises `ConfigurationError`."""
    if isinstance(tokenizer, EngineConfig):
        raise ConfigurationError(
            "the settings were passed as the tokenizer: write InferenceEngine(model, config=config)"
        )
    if not (tokenizer is None or isinstance(tokenizer, str | Path) or hasattr(tokenizer, "decode")):
        raise ConfigurationError(
            f"a tokenizer cannot be of type {type(tokenizer).__name__}: pass a hub id, a folder, an object with "
            "encode() and decode(), or nothing"
        )


def assemble(model: object, tokenizer: object, config: EngineConfig, admission: Admission, log: Logger) -> Parts:
    """Load the model and build everything around it. Raises `ConfigurationError`, `OutOfMemory`."""
    from penstock import __version__

    log.info(f"Initializing an LLM engine (v{__version__}) with config: {config.model_dump(exclude_defaults=True)}")
    runner, loaded_tokenizer = _load(model, tokenizer, config)
    log.info("Model weights loaded.", model=runner.spec.name, device=runner.spec.device, dtype=runner.spec.dtype)
    draft: GuessingRunner | None = None
    try:
        draft = load_draft_model(model, runner.spec, config)
        return _build_parts(runner, draft, loaded_tokenizer, config, admission, log)
    except BaseException:
        for loaded in (draft, runner):
            if loaded is not None:
                loaded.close()
        raise


def _build_parts(
    runner: ModelRunner,
    draft: GuessingRunner | None,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    admission: Admission,
    log: Logger,
) -> Parts:
    """Build cache, scheduler, tokenizers and drafter for a loaded model."""
    longest = min(runner.spec.max_length, config.max_sequence_length or runner.spec.max_length)
    cache, wanted_blocks = _make_cache(runner, draft, longest, config, log)
    if cache.capacity < longest and "max_sequence_length" in config.model_fields_set:
        log.warning(f"the K/V cache holds {cache.capacity} tokens: no sequence can reach max_sequence_length={longest}")
    max_logit_rows = max(1, config.logits_chunk_bytes // (4 * runner.spec.vocab_size))
    limits = Limits(config)
    packing = engine_packing(config, limits, cache.capacity, runner.spec.kv_bytes_per_token, runner.spec.weight_bytes)
    scheduler = Scheduler(config, cache, max_logit_rows=max_logit_rows, limits=limits, packing=packing)
    pool = TokenizerPool(tokenizer)
    limit = min(longest, cache.capacity)
    remedy = _remedy(runner.spec, longest, cache.capacity)
    own_tokenizer = copy_tokenizer(tokenizer)
    inputs = InputProcessor(config, runner.spec, limit, own_tokenizer, pool, admission, remedy=remedy, log=log)
    drafter = make_drafter(config, draft, cache)
    tuning = Tuning(config, limits, log)
    return Parts(runner, tokenizer, pool, cache, wanted_blocks, scheduler, inputs, tuning, drafter, draft)


def _remedy(spec: ModelSpec, longest: int, capacity: int) -> str:
    """How to allow longer sequences, as a hint."""
    if capacity < longest:
        return "To allow more, raise memory_pool_size or kv_cache_tokens."
    return spec.max_length_reason or "To allow more, raise max_sequence_length; None is the model's own limit."


def _make_cache(
    runner: ModelRunner, draft: GuessingRunner | None, longest: int, config: EngineConfig, log: Logger
) -> tuple[CacheManager, dict[str, int]]:
    """A cache of the configured size and its memory; a draft model gets as many tokens of its own.

    Also returns the sizes that the settings asked for, which may exceed the available memory.
    """
    on_gpu = "cuda" in runner.spec.device
    share = 1.0 if on_gpu else HOST_SHARE
    loaded = [runner] if draft is None else [runner, draft]
    per_token = sum(model.spec.kv_bytes_per_token for model in loaded)
    max_rows = ceilings(config).max_batch_size
    room = num_blocks(config, per_token, runner.free_bytes(), longest, max_rows, share=share)
    blocks = room.blocks
    cache_bytes = 0 if on_gpu else blocks * per_token * config.block_size
    host = num_host_blocks(config, runner.spec.kv_bytes_per_token, runner.host_free_bytes() - cache_bytes)
    for warning in filter(None, (room.warning, host.warning)):
        log.warning(warning)
    runner.allocate(blocks, config.block_size, host.blocks)
    if draft is not None:
        draft.allocate(blocks, config.block_size)
    on_host = host.blocks + (0 if on_gpu else blocks)
    log.info(f"# GPU blocks: {blocks if on_gpu else 0}, # CPU blocks: {on_host}")
    cache = CacheManager(
        blocks,
        config.block_size,
        enable_prefix_caching=config.enable_kv_cache,
        max_cached_blocks=config.kv_cache_max_size,
        num_host_blocks=host.blocks,
    )
    return cache, {"num_wanted_blocks": room.requested, "num_wanted_host_blocks": host.requested}


def _is_runner(model: object) -> TypeGuard[ModelRunner]:
    return hasattr(model, "execute") and hasattr(model, "spec")


def _load(model: object, tokenizer: object, config: EngineConfig) -> tuple[ModelRunner, Tokenizer | None]:
    if _is_runner(model):
        return model, cast(Tokenizer | None, tokenizer)
    if isinstance(model, str | Path):
        check_available(str(model), config)  # before the import of torch, which takes seconds
    from penstock.models.loading import load

    loaded = load(model, tokenizer, config)  # type: ignore[arg-type]  # checked by `check_model`
    return loaded.runner, loaded.tokenizer


class Assembly:
    """Assembles one engine, on the model's thread; `parts` are set once the model is loaded, until `close`.

    It releases `model` and `tokenizer` when assembly begins. It holds no reference to the `InferenceEngine`, so that
    dropping the engine stops everything.
    """

    def __init__(
        self,
        model: object,
        tokenizer: object,
        config: EngineConfig,
        admission: Admission,
        metrics: Metrics,
        advisor: BatchingOptimizer,
        log: Logger,
    ) -> None:
        self.parts: Parts | None = None
        self._sources: tuple[object, object] | None = (model, tokenizer)
        self._config = config
        self._admission = admission
        self._metrics = metrics
        self._advisor = advisor
        self._log = log
        self._last_weight_version = 0  # when the parts were released
        self._release_settings: Callable[[], object] = lambda: None

    @property
    def weight_version(self) -> int:
        """The version of the weights; once all is released, the last one."""
        parts = self.parts
        return self._last_weight_version if parts is None else parts.runner.weight_version

    async def boot(self, worker: Worker) -> EngineCore:
        """Load the model and build everything around it, once. Raises `ConfigurationError`, `OutOfMemory`."""
        assert self._sources is not None
        (model, tokenizer), self._sources = self._sources, None
        config, admission, log = self._config, self._admission, self._log
        self._release_settings = hold(config, LIVE_SETTINGS)
        try:
            parts = self.parts = await worker.run(assemble, model, tokenizer, config, admission, log).done
        except BaseException:
            self._release_settings()  # for another attempt with other settings
            raise
        observer = StepObserver(config, parts.scheduler, self._metrics, parts.tuning, self._advisor, log)
        admission.estimate_wait = observer.forecast.wait_s
        core_parts = CoreParts(
            jobs=ModelJobs(runner=parts.runner, run=worker.run, unload=parts.unload, reload=parts.reload),
            scheduler=parts.scheduler,
            admission=admission,
            inputs=parts.inputs,
            housekeeper=Housekeeper(config, parts.runner, parts.cache, time.monotonic, worker.run, parts.trim_draft),
            metrics=self._metrics,
            log=log,
            observe=observer.observe,
            speculator=Speculator(
                *(config, parts.scheduler, parts.drafter, worker.run, time.monotonic, log),
                is_batch_invariant=parts.runner.spec.is_batch_invariant,
            ),
        )
        execute = functools.partial(worker.run, parts.runner.execute)  # type: ignore[arg-type]  # mypy: TypeVarTuple
        return EngineCore(core_parts, execute, time.monotonic)

    def close(self) -> None:
        """Release all parts, and the settings."""
        self._release_settings()
        self._last_weight_version = self.weight_version
        parts, self.parts = self.parts, None
        if parts is not None:
            parts.close()

    def halt(self, until: float) -> None:
        """End the tokenizer threads, because the process exits."""
        if self.parts is not None:
            self.parts.pool.halt(until)


def shut_down(host: Host, callbacks: Callbacks, assembly: Assembly, unregister: Callable[[], None]) -> None:
    """Stop at once and release all parts; `unregister` removes the exit handler.

    While the model loads, stopping takes as long as loading. A caller who merely dropped an engine should not wait for
    that, so a separate thread does it.
    """
    args = (host, callbacks, assembly, unregister)
    if host.loading:
        threading.Thread(target=_shut_down, args=args, name="penstock-end", daemon=True).start()
    else:
        _shut_down(*args)


def _shut_down(host: Host, callbacks: Callbacks, assembly: Assembly, unregister: Callable[[], None]) -> None:
    host.stop(0.0)
    callbacks.close()
    assembly.close()
    unregister()
