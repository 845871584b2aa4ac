"""Samples for the Tinker SDK: its parameters to the engine's, and outputs to its message.

Log probabilities are the model's own, without temperature and filters, so that they equal those of a forward pass.
Called by the endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from penstock.errors import EngineOverloaded, ExecutionError, RequestError
from penstock.outputs import CompletionOutput, Logprob, RequestOutput
from penstock.sampling import SamplingParams
from penstock.serving.sampling_fields import MAX_TOKEN_IDS, check_limit
from penstock.serving.settings import ServingSettings
from penstock.serving.tinker.adapters import Weights
from penstock.serving.tinker.checkpoints import WeightsPath
from penstock.serving.tinker.futures import PROTOBUF, Answer
from penstock.serving.tinker.positions import Positions, alternatives, target_logprobs
from penstock.serving.tinker.requests import CreateSamplingSession, PromptFields, Sample
from penstock.serving.tinker.service import TinkerService
from penstock.serving.tinker.sessions import Sampler
from penstock.serving.tinker.wire import sequence_message, top_message

MAX_TOP = 1024
_RETRY_S = 0.25  # of a full queue, which empties within steps


def create_sampler(service: TinkerService, owner: str, body: CreateSamplingSession, names: tuple[str, ...]) -> Sampler:
    """A sampling session over saved weights, or over the base model. Raises `RequestError`, `HttpError`."""
    session = service.sessions.get(body.session_id, owner)
    sampler_id = f"{session.id}:sample:{body.sampling_session_seq_id}"
    if (sampler := session.samplers.get(sampler_id)) is not None:
        return sampler
    if body.model_path is None:
        if body.base_model is None:
            raise RequestError("pass base_model, or the model_path of saved weights")
        sampler = Sampler(sampler_id, service.check_base_model(body.base_model, names))
    else:
        saved = service.checkpoints.find(WeightsPath.parse(body.model_path), owner)
        base_model = service.check_base_model(saved.info.base_model, names)
        weights = Weights(f"tinker-{saved.info.id}", saved)
        sampler = Sampler(sampler_id, base_model, weights, body.model_path)
    session.add_sampler(sampler, service.settings.max_samplers)
    return sampler


def check_limits(body: Sample, settings: ServingSettings) -> None:
    """Refuse more samples or stops than this server allows. Raises `HttpError`."""
    stop = body.sampling_params.stop
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    strings = [item for item in stops if isinstance(item, str)]
    check_limit("num_samples", body.num_samples, settings.max_choices, "samples")
    check_limit("stop", len(strings), settings.max_stop, "stop strings")
    check_limit("stop", sum(map(len, strings)), settings.max_stop_characters, "characters of stop strings")
    check_limit("stop", len(stops), MAX_TOKEN_IDS, "stop tokens")


def sample(service: TinkerService, owner: str, body: Sample, namespace: str) -> tuple[str, list[str]]:
    """Begin to sample; the id of the future, and one of each sequence. Raises `RequestError`, `HttpError`."""
    sampler = service.sessions.sampler(body.sampling_session_id, owner)
    session = service.sessions.of_part(sampler.id, owner)
    ids, params = _tokens(body.prompt), _params(body)
    _check_scores(body, len(ids))
    request_id = f"{sampler.id}:{body.seq_id}"
    if request_id not in service.futures:
        service.futures.check_room(owner)
    space = f"{namespace}/{sampler.id}" if sampler.is_inflight else namespace

    async def work() -> Answer:
        async with AsyncExitStack() as stack:
            adapter = ""
            if sampler.weights is not None:
                adapter = await stack.enter_async_context(service.adapters.using(sampler.weights))
            output = await _generate(service, ids, params, space, adapter)
            asks_top = body.topk_prompt_logprobs or body.topk_sample_logprobs
            # Thousands of places with a thousand tokens each take seconds.
            message = await asyncio.to_thread(_message, body, output) if asks_top else _message(body, output)
            await _add_positions(message, body, Positions(service.engine, ids, space, adapter))
        return Answer(message.SerializeToString(), PROTOBUF)

    service.submit(request_id, session, work(), can_be_cancelled=True)
    return request_id, [f"{request_id}:{i}" for i in range(body.num_samples)]


async def _generate(
    service: TinkerService, ids: list[int], params: SamplingParams, namespace: str, adapter: str
) -> RequestOutput:
    """The output; waits for a place in the queue, of which the SDK knows nothing."""
    while True:
        try:
            return await service.engine.generate(ids, params, namespace=namespace, adapter=adapter)
        except EngineOverloaded as error:
            await asyncio.sleep(min(max(error.retry_after_s, _RETRY_S), 5.0))


def _tokens(prompt: PromptFields) -> list[int]:
    for chunk in prompt.chunks:
        if chunk.type != "encoded_text":
            raise RequestError(f"prompt has a chunk of the type {chunk.type[:100]!r}: this model takes tokens alone")
    ids = [token for chunk in prompt.chunks for token in chunk.tokens]
    if not ids:
        raise RequestError("the prompt is empty: pass at least one token")
    return ids


def _params(body: Sample) -> SamplingParams:
    """The engine's parameters. A stop list that is empty turns the model's own end tokens off."""
    fields, stop = body.sampling_params, body.sampling_params.stop
    listed = [stop] if isinstance(stop, str) else list(stop or ())
    strings = [item for item in listed if isinstance(item, str)]
    top, asks = body.topk_prompt_logprobs, body.prompt_logprobs or body.topk_prompt_logprobs
    return SamplingParams(
        n=body.num_samples,
        max_tokens=fields.max_tokens,
        seed=fields.seed,
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        stop=strings,
        stop_token_ids=[item for item in listed if isinstance(item, int)],
        ignore_eos=stop is not None and not listed,
        detokenize=bool(strings),
        logprobs=body.topk_sample_logprobs or None,
        prompt_logprobs=top if asks else None,
    )


def _check_scores(body: Sample, count: int) -> None:
    """Refuse wishes about the prompt that do not fit it."""
    last = body.prompt_logprobs_last_n
    if last is not None and not (body.prompt_logprobs and last < count):
        raise RequestError("prompt_logprobs_last_n needs prompt_logprobs, and must be below the length of the prompt")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if getattr(body, name) > MAX_TOP:
            raise RequestError(f"{name} may be at most {MAX_TOP}")
    if body.target_prompt_logprobs is not None and body.target_prompt_logprobs.dtype != "int64":
        raise RequestError("target_prompt_logprobs must be an int64 tensor of token ids")


def _message(body: Sample, output: RequestOutput) -> pb.SampleResponse:
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.num_cached_tokens)
    if len(output.outputs) != body.num_samples:
        raise ExecutionError(f"the engine returned {len(output.outputs)} samples of {body.num_samples}")
    for completion in output.outputs:
        message.sequences.append(_sequence(body, completion))
    scores = output.prompt_logprobs
    if scores is not None:
        skipped = 0 if body.prompt_logprobs_last_n is None else len(scores) - body.prompt_logprobs_last_n
        entries = [None if i < skipped else entry for i, entry in enumerate(scores)]
        pairs = zip(output.prompt_token_ids, entries, strict=True)
        if body.prompt_logprobs:
            chosen = [np.nan if entry is None else entry[token].logprob for token, entry in pairs]
            message.prompt_logprobs = np.array(chosen, dtype=np.float32).tobytes()
        if body.topk_prompt_logprobs:
            message.topk_prompt_logprobs.CopyFrom(_top(entries, body.topk_prompt_logprobs))
    return message


def _sequence(body: Sample, completion: CompletionOutput) -> pb.SampledSequence:
    reason = completion.finish_reason
    if reason not in ("stop", "length"):
        raise ExecutionError(f"a sample ended with {reason!r}")
    k = body.topk_sample_logprobs
    top = None if completion.logprobs is None else _top(completion.logprobs, k)
    return sequence_message(completion.token_ids, completion.token_logprobs, reason, top)


def _top(entries: Sequence[Mapping[int, Logprob] | None], k: int) -> pb.TopkLogprobs:
    """The k most likely tokens of each position, of which an entry also has the chosen one."""
    rows = [
        sorted(((token, value.logprob) for token, value in entry.items()), key=lambda pair: -pair[1])
        for entry in ({} if entry is None else entry for entry in entries)
    ]
    return top_message(rows, k)


async def _add_positions(message: pb.SampleResponse, body: Sample, positions: Positions) -> None:
    """What is asked about the distributions at the prompt's positions."""
    if body.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(await target_logprobs(positions, body.target_prompt_logprobs))
    if body.prompt_alt_tokens_k:
        fields = body.sampling_params
        proposals = await alternatives(positions, body.prompt_alt_tokens_k, fields.temperature, fields.seed)
        message.prompt_alt_tokens.CopyFrom(proposals)
