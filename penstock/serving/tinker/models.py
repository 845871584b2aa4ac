"""Models in training: create, compute, step, save and load, each as the work of a future.

What can be checked at once is refused at once; whatever runs does so on the training thread, for each key in the order
of arrival. Called by the endpoints.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from penstock.errors import RequestError
from penstock.serving.tinker.adapters import Weights
from penstock.serving.tinker.checkpoints import SAMPLER, TRAINING, Info, Saved, WeightsPath
from penstock.serving.tinker.futures import PROTOBUF, Answer
from penstock.serving.tinker.requests import (
    CreateModel,
    LoadWeights,
    ModelRequest,
    OptimizerConfig,
    OptimStep,
    SaveWeights,
)
from penstock.serving.tinker.service import TinkerService
from penstock.serving.tinker.sessions import Run, Sampler, Session
from penstock.serving.tinker.wire import LossRequest, loss_message
from penstock.training.lora.records import Adam, LoraShape


def create_model(service: TinkerService, owner: str, body: CreateModel, base_model: str) -> tuple[str, Run]:
    """Begin to make an adapter; the id of its future. Raises `RequestError`, `HttpError`."""
    _check_optimizer(body.optimizer_config)
    if body.lora_config is None:
        raise RequestError("lora_config is missing: this service trains LoRA adapters")
    fields = body.lora_config
    shape = LoraShape(fields.rank, fields.seed, fields.train_attn, fields.train_mlp, fields.train_unembed)
    session = service.sessions.get(body.session_id, owner)
    run = _new_run(service, session, body.model_seq_id, base_model, shape)

    def job() -> None:
        run.adapter = service.trainer.create(shape)

    async def work() -> Answer:
        await _make(service, session, run, job)
        return Answer.of(model_id=run.id, type="create_model")

    return service.submit(f"{run.id}:0", session, work()), run


def compute(service: TinkerService, owner: str, request: LossRequest) -> str:
    """Begin to compute losses, with gradients or without; the id of the future."""
    session, run, request_id = _ordered(service, owner, request.model_id, request.seq_id)

    def job() -> bytes:
        adapter = run.trained()
        if request.is_forward_only:
            return loss_message(adapter.forward(request.batch()))
        try:
            batch = request.batch()
        except BaseException:
            adapter.mark_incomplete()
            raise
        return loss_message(adapter.forward_backward(batch))

    async def work() -> Answer:
        return Answer(await service.thread.run(owner, job), PROTOBUF)

    return service.submit(request_id, session, work())


def optim_step(service: TinkerService, owner: str, body: OptimStep) -> str:
    """Begin a step; the id of the future. Raises `RequestError` for values that no step takes."""
    session, run, request_id = _ordered(service, owner, body.model_id, body.seq_id)
    if body.adam_params is None:
        raise RequestError("adam_params is missing: this service has no other optimizer than AdamW")
    adam = Adam(**body.adam_params.model_dump())

    async def work() -> Answer:
        norm = await service.thread.run(owner, lambda: run.trained().step(adam))
        return Answer.of(metrics={"grad_norm": norm}, type="optim_step")

    return service.submit(request_id, session, work())


def save_weights(service: TinkerService, owner: str, body: SaveWeights) -> str:
    """Begin to save weights and the optimizer's state; the id of the future."""
    return _save(service, owner, body, TRAINING)


def save_for_sampler(service: TinkerService, owner: str, body: SaveWeights) -> str:
    """Begin to save weights to sample from, by a name or for a sampling session; the id of the future."""
    if body.path is not None or body.sampling_session_seq_id is None:
        return _save(service, owner, body, SAMPLER)
    session, run, request_id = _ordered(service, owner, body.model_id, body.seq_id)
    sampler_id = f"{session.id}:sample:{body.sampling_session_seq_id}"

    async def work() -> Answer:
        weights = await _snapshot(service, owner, run, is_inflight=body.kind == "inflight")
        sampler = Sampler(sampler_id, run.base_model, weights, is_inflight=body.kind == "inflight")
        session.add_sampler(sampler, service.settings.max_samplers)
        return Answer.of(sampling_session_id=sampler_id, type="save_weights_for_sampler")

    return service.submit(request_id, session, work())


def load_weights(service: TinkerService, owner: str, body: LoadWeights, names: tuple[str, ...]) -> tuple[str, str]:
    """Begin to load weights into a model, or into a new one; the ids of the future and of the model."""
    _check_optimizer(body.optimizer_config)
    if body.session_id is None:
        session, run, request_id = _ordered(service, owner, body.model_id or "", body.seq_id)
    saved = service.checkpoints.find(WeightsPath.parse(body.path), owner)
    if body.session_id is not None:
        base_model = service.check_base_model(body.base_model or saved.info.base_model, names)
        session = service.sessions.get(body.session_id, owner)
        run = _new_run(service, session, _required(body.model_seq_id), base_model, saved.info.shape())
        request_id = f"{run.id}:0"

    def job() -> None:
        adapter = run.adapter or service.trainer.create(saved.info.shape())
        adapter.load(saved.folder, optimizer=body.optimizer)
        run.adapter = adapter

    async def work() -> Answer:
        await _make(service, session, run, job)
        return Answer.of(path=body.path, model_id=run.id, type="load_weights")

    return service.submit(request_id, session, work()), run.id


def info_of(service: TinkerService, owner: str, body: ModelRequest) -> dict[str, object]:
    """What a client is told of its model. Raises an `HttpError`."""
    run = service.sessions.run(body.model_id, owner)
    names = {"model_name": run.base_model, "tokenizer_id": run.base_model}
    rank = run.trained().shape.rank
    return {
        **{"type": "get_info", "model_id": run.id, "model_name": run.base_model, "model_data": {"arch": None, **names}},
        **{"is_lora": True, "lora_rank": rank, "optimizer_config": {"type": "adamw"}},
    }


def _save(service: TinkerService, owner: str, body: SaveWeights, kind: str) -> str:
    session, run, request_id = _ordered(service, owner, body.model_id, body.seq_id)
    if body.path is None:
        raise RequestError("path is missing: pass the name to save under")
    path, optimizer = WeightsPath(run.id, kind, body.path), kind == TRAINING
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds

    def job() -> None:
        adapter = run.trained()
        info = Info.new(owner, run.base_model, adapter.shape)
        info = replace(info, expires=expires, user_metadata=body.user_metadata)
        write = lambda folder: adapter.save(folder, optimizer=optimizer)  # noqa: E731
        service.checkpoints.save(path, info, write, overwrite=body.overwrite)

    async def work() -> Answer:
        await service.thread.run(owner, job)
        return Answer.of(path=str(path), type=None)

    return service.submit(request_id, session, work())


async def _snapshot(service: TinkerService, owner: str, run: Run, *, is_inflight: bool) -> Weights:
    """The weights of now: fixed, or (inflight) those of all samplers of the run that follow it."""

    def job() -> Saved:
        adapter = run.trained()
        info = Info.new(owner, run.base_model, adapter.shape)
        return service.checkpoints.snapshot(run.id, info, lambda folder: adapter.save(folder, optimizer=False))

    saved = await service.thread.run(owner, job)
    if not is_inflight:
        weights = Weights(f"tinker-{saved.info.id}", saved)
        run.snapshots.append(weights)
        if len(run.snapshots) > service.settings.max_snapshots:
            _forget(service, owner, run.snapshots.popleft())
        return weights
    if run.inflight is None:
        run.inflight = Weights(f"tinker-{uuid.uuid4().hex}", saved)
        return run.inflight
    replaced, run.inflight.saved = run.inflight.saved, saved
    async with service.adapters.using(run.inflight):
        pass  # so that samples from now on have the new weights
    if replaced is not None:
        service.thread.post(owner, lambda: service.checkpoints.discard(replaced))
    return run.inflight


def _forget(service: TinkerService, owner: str, weights: Weights) -> None:
    saved, weights.saved = weights.saved, None
    if saved is not None:
        service.thread.post(owner, lambda: service.checkpoints.discard(saved))


def _new_run(service: TinkerService, session: Session, number: int, base_model: str, shape: LoraShape) -> Run:
    """The model with this number in its session, made if it is new. Raises an `HttpError` beyond the limits."""
    run_id = f"{session.id}:train:{number}"
    if (run := session.runs.get(run_id)) is not None:
        return run
    num_bytes = service.trainer.num_bytes(shape)
    service.sessions.check_models(session.owner, num_bytes)
    run = session.runs[run_id] = Run(run_id, base_model, num_bytes)
    return run


async def _make(service: TinkerService, session: Session, run: Run, job: Callable[[], None]) -> None:
    """Run the job that makes a model. One that could not be made does not count against the limit."""
    try:
        await service.thread.run(session.owner, job)
    except Exception:
        if run.adapter is None:
            session.runs.pop(run.id, None)
        raise


def _ordered(service: TinkerService, owner: str, model_id: str, seq_id: int | None) -> tuple[Session, Run, str]:
    """The session, the model, and the id of a request, of which the SDK sends one after the other.

    Where a number is left out, a request was lost or not read. It may have held data of the next step.
    """
    session, run = service.sessions.of_part(model_id, owner), service.sessions.run(model_id, owner)
    request_id = f"{run.id}:{seq_id or uuid.uuid4().hex}"
    if request_id not in service.futures:
        service.futures.check_room(owner)
    if not seq_id:
        return session, run, request_id
    if seq_id <= run.last_seq and request_id not in service.futures:
        raise RequestError(f"request {seq_id} of {run.id} comes after {run.last_seq}: send requests in their order")
    if seq_id > run.last_seq + 1:
        service.thread.post(owner, lambda: run.trained().mark_incomplete())
    run.last_seq = max(run.last_seq, seq_id)
    return session, run, request_id


def _check_optimizer(config: OptimizerConfig | None) -> None:
    if config is not None and config.type != "adamw":
        raise RequestError(f"the optimizer {config.type[:100]!r} is not offered here: use adamw")


def _required(number: int | None) -> int:
    if number is None:
        raise RequestError("model_seq_id is missing")
    return number
