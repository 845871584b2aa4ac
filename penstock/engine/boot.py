"""Puts an engine together: model, cache sized for it, scheduler, tokenizer pool, door; and takes it apart.

Assembling runs once, on the model's thread; the only place where `models.loading` (and with it torch) is imported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.cache.manager import CacheManager
from penstock.cache.sizing import num_blocks, num_host_blocks
from penstock.config import BatchingStrategy, EngineConfig
from penstock.engine.callbacks import Callbacks
from penstock.engine.core import EngineCore
from penstock.engine.door import Door
from penstock.engine.drafting import load_draft_model, make_drafter
from penstock.engine.host import Boot, Host
from penstock.engine.housekeeping import Housekeeper
from penstock.engine.log import Logger
from penstock.engine.metrics import Metrics
from penstock.engine.speculator import Speculator
from penstock.engine.tokenizer_copies import copy_tokenizer
from penstock.engine.tokenizing import TokenizerPool
from penstock.engine.tuning import Tuning
from penstock.engine.worker import Worker
from penstock.errors import ConfigurationError
from penstock.models.folder import check_source
from penstock.models.protocol import GuessingRunner, ModelRunner, ModelSpec
from penstock.optimizers.speculation.draft_model import ModelDrafter
from penstock.optimizers.speculation.drafter import Drafter
from penstock.optimizers.tuner import ceilings
from penstock.scheduling.admission import Admission
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.scheduling.forecast import Forecast
from penstock.scheduling.limits import Limits
from penstock.scheduling.packing import engine_packing, strategy_of
from penstock.scheduling.scheduler import Scheduler
from penstock.step import StepRecord

# A host's free memory belongs to the rest of the program too: gpu_memory_utilization is a fraction of this part.
HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Parts:
    """What an assembled engine is made of."""

    runner: ModelRunner
    tokenizer: Any
    pool: TokenizerPool
    cache: CacheManager
    wanted_blocks: Mapping[str, int]
    scheduler: Scheduler
    door: Door
    tuning: Tuning
    drafter: Drafter
    draft: GuessingRunner | None

    def trim_draft(self) -> int:
        """Give back what a draft model holds without need; how many bytes. On the model's thread."""
        if self.draft is None or not isinstance(self.drafter, ModelDrafter):
            return 0
        return self.draft.trim_memory(self.drafter.unused())

    def close(self) -> None:
        """Let go of the models, their memory and the tokenizer threads."""
        self.pool.close()
        if self.draft is not None:
            self.draft.close()
        self.runner.close()


def check_early(model: Any) -> None:
    """Refuse a model source that cannot work before anything heavy is imported. Raises `ConfigurationError`."""
    if isinstance(model, str | Path):
        check_source(str(model))
    elif not (model is None or _is_runner(model) or hasattr(model, "parameters")):
        raise ConfigurationError(
            f"a model cannot be a {type(model).__name__}: pass a hub id, a folder, an nn.Module, or nothing"
        )


def assemble(model: Any, tokenizer: Any, config: EngineConfig, admission: Admission, log: Logger) -> Parts:
    """Load the model and build everything around it. Raises `ConfigurationError`, `OutOfMemory`."""
    from penstock import __version__

    log.info(f"Initializing an LLM engine (v{__version__}) with config: {config.model_dump(exclude_defaults=True)}")
    runner, tokenizer = _load(model, tokenizer, config)
    log.info("Model weights loaded.", model=runner.spec.name, device=runner.spec.device, dtype=runner.spec.dtype)
    draft: GuessingRunner | None = None
    try:
        draft = load_draft_model(model, runner.spec, config)
        return _around(runner, draft, tokenizer, config, admission, log)
    except BaseException:
        for loaded in (draft, runner):
            if loaded is not None:
                loaded.close()
        raise


def _around(
    runner: ModelRunner,
    draft: GuessingRunner | None,
    tokenizer: Any,
    config: EngineConfig,
    admission: Admission,
    log: Logger,
) -> Parts:
    """What a loaded model needs around it."""
    longest = min(runner.spec.max_length, config.max_sequence_length or runner.spec.max_length)
    cache, wanted = _cache(runner, draft, longest, config, log)
    if cache.capacity < longest and "max_sequence_length" in config.model_fields_set:
        log.warning(f"the K/V cache holds {cache.capacity} tokens: no sequence reaches max_sequence_length={longest}")
    max_logit_rows = max(1, config.logits_chunk_bytes // (4 * runner.spec.vocab_size))
    limits = Limits(config)
    packing = engine_packing(config, limits, cache.capacity, runner.spec.kv_bytes_per_token, runner.spec.weight_bytes)
    scheduler = Scheduler(config, cache, max_logit_rows=max_logit_rows, limits=limits, packing=packing)
    pool = TokenizerPool(tokenizer)
    limit = min(longest, cache.capacity)
    remedy = _remedy(runner.spec, longest, cache.capacity)
    door = Door(config, runner.spec, limit, copy_tokenizer(tokenizer), pool, admission, remedy=remedy, log=log)
    drafter = make_drafter(config, draft, cache)
    return Parts(runner, tokenizer, pool, cache, wanted, scheduler, door, Tuning(config, limits, log), drafter, draft)


def _remedy(spec: ModelSpec, longest: int, capacity: int) -> str:
    """What makes longer sequences possible, as the end of a sentence that says what else to do."""
    if capacity < longest:
        return ", or raise memory_pool_size or kv_cache_tokens"
    return f"; {spec.max_length_reason}" if spec.max_length_reason else ", or raise max_sequence_length"


def _cache(
    runner: ModelRunner, draft: GuessingRunner | None, longest: int, config: EngineConfig, log: Logger
) -> tuple[CacheManager, dict[str, int]]:
    """A cache of the configured size, and the memory behind it; a draft model's holds as many tokens, beside it.

    With it come the sizes that the settings ask for, which may be more than there is memory.
    """
    on_gpu = "cuda" in runner.spec.device
    share = 1.0 if on_gpu else HOST_SHARE
    loaded = [runner] if draft is None else [runner, draft]
    per_token = sum(model.spec.kv_bytes_per_token for model in loaded)
    most = ceilings(config).max_batch_size
    room = num_blocks(config, per_token, runner.free_bytes(), longest, most, share=share)
    blocks = room.blocks
    taken = 0 if on_gpu else blocks * per_token * config.block_size
    host = num_host_blocks(config, runner.spec.kv_bytes_per_token, runner.host_free_bytes() - taken)
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
    return cache, {"num_wanted_blocks": room.wanted, "num_wanted_host_blocks": host.wanted}


def _is_runner(model: Any) -> bool:
    return hasattr(model, "execute") and hasattr(model, "spec")


def _load(model: Any, tokenizer: Any, config: EngineConfig) -> tuple[ModelRunner, Any]:
    if _is_runner(model):
        return model, tokenizer
    from penstock.models.loading import load

    loaded = load(model, tokenizer, config)
    return loaded.runner, loaded.tokenizer


def booter(
    model: Any,
    tokenizer: Any,
    config: EngineConfig,
    admission: Admission,
    metrics: Metrics,
    advisor: BatchingOptimizer,
    log: Logger,
    parts: list[Parts],
) -> Boot:
    """What the host runs first; what it assembles is put into `parts`.

    Holds no reference to the engine object, so that dropping that one stops everything.
    """

    async def boot(worker: Worker) -> EngineCore:
        made = await worker.run(assemble, model, tokenizer, config, admission, log).done
        parts.append(made)
        return EngineCore(
            config,
            made.runner,
            made.scheduler,
            made.door,
            execute=lambda plan: worker.run(made.runner.execute, plan),
            clock=time.monotonic,
            metrics=metrics,
            log=log,
            housekeeper=Housekeeper(config, made.runner, made.cache, time.monotonic, worker.run, made.trim_draft),
            watchers=_watchers(config, made, advisor, admission),
            speculator=Speculator(config, made.scheduler, made.drafter, worker.run, time.monotonic, log),
        )

    return boot


def _watchers(
    config: EngineConfig, parts: Parts, advisor: BatchingOptimizer, admission: Admission
) -> list[Callable[[StepRecord], None]]:
    """Who learns from every step."""
    strategy, scheduler = strategy_of(config), parts.scheduler
    forecast = Forecast(scheduler, time.monotonic, static=strategy is BatchingStrategy.NAIVE)
    admission.foresee = forecast.wait_s

    def advise(record: StepRecord) -> None:
        advisor.record_step(record, strategy, scheduler.limits, scheduler.num_shortages)

    return [parts.tuning.observe, forecast.record, *([advise] if config.enable_metrics else [])]


def shut_down(host: Host, callbacks: Callbacks, parts: list[Parts], forget: Callable[[], None]) -> None:
    """Stop at once, and let go of whatever was assembled.

    While the model loads that takes as long, which nobody should wait for who only dropped an engine: then it is left
    to a thread of its own.
    """
    args = (host, callbacks, parts, forget)
    if host.loading:
        threading.Thread(target=_shut_down, args=args, name="penstock-end", daemon=True).start()
    else:
        _shut_down(*args)


def _shut_down(host: Host, callbacks: Callbacks, parts: list[Parts], forget: Callable[[], None]) -> None:
    host.stop(0.0)
    callbacks.close()
    for part in parts:
        part.close()
    parts.clear()
    forget()
