"""Updates of a borrowed module while it serves: every token comes from the weights whose version it has.

The oracle is the module's own forward pass under a copy of the weights of each version.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from penstock import (
    CompletionOutput,
    EngineClosed,
    InferenceEngine,
    RequestAborted,
    RequestError,
    RequestHandle,
    RequestOutput,
    SamplingParams,
    WeightsError,
)
from penstock.api.weights import SleepLevel, UpdateMode
from penstock.kernels import native
from penstock.models.memory import resident_bytes
from tests.drive import logprobs_by_transformers
from tests.held_passes import Served, watched
from tests.tiny_models import VOCAB, build

NUM_CLIENTS, NUM_UPDATES = 64, 100
Record = tuple[list[int], CompletionOutput]


OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1, "batch_timeout_ms": 0, "block_size": 4}


def engine_of(model: nn.Module, **settings: Any) -> InferenceEngine:
    return InferenceEngine(model, **{**OPTIONS, **settings})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def noisy(values: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Other weights, different enough to show in every logprob."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * value.abs().mean() * torch.randn(value.shape, generator=generator)
        for name, value in values.items()
    }


class Run:
    """Clients that submit one request after another, while the weights change; `versions` are the weights so far."""

    def __init__(self, seed: int, model: nn.Module, num_updates: int = NUM_UPDATES) -> None:
        self.num_updates = num_updates
        self.rng = random.Random(seed)
        self.model = watched(model, self.note_pass)
        self.versions = [snapshot(model)]
        self.records: list[Record] = []
        self.is_over = self.is_writing = False
        self.num_passes = self.num_overlaps = 0
        self.num_tokens = 0
        self.num_samples = [1]
        self.progress = asyncio.Event()

    def note_pass(self) -> None:
        self.num_passes += 1
        self.num_overlaps += self.is_writing

    async def client(self, engine: InferenceEngine, number: int) -> None:
        rng = random.Random(number)
        common = [2 + i % 150 for i in range(24)]
        while not self.is_over:
            prompt = common[: rng.randint(0, 24)] + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 12))]
            sampling = {"temperature": rng.choice([0.0, 1.0]), "seed": number, "n": rng.choice(self.num_samples)}
            handle = engine.generate(prompt, SamplingParams(max_tokens=rng.randint(1, 24), ignore_eos=True, **sampling))
            output = await self.result_of(handle, streams=rng.random() < 0.5)
            self.note_progress(1)
            self.records += [(prompt, completion) for completion in output.outputs]

    async def result_of(self, handle: RequestHandle, *, streams: bool) -> RequestOutput:
        """The output of a request, partial if an update ended it."""
        try:
            if streams:
                async for delta in handle:
                    self.note_progress(len(delta.token_ids))
            return await handle
        except RequestAborted as error:
            return cast(RequestOutput, error.output)

    def note_progress(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.progress.set()

    async def update(self, engine: InferenceEngine, mode: UpdateMode, stale_kv: bool) -> None:
        values = noisy(self.versions[0], len(self.versions))
        source = self.rng.choice(["block", "mapping", "iterator"])
        self.versions.append(values)
        if source == "block":
            async with engine.updating(mode, stale_kv=stale_kv):
                self.is_writing = True
                await asyncio.to_thread(self.write, values)
                self.is_writing = False
        else:
            given = values if source == "mapping" else iter(values.items())
            assert await engine.update_weights(given, mode=mode, stale_kv=stale_kv) == len(self.versions) - 1

    def write(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(values[name])

    async def serve(self, modes: list[UpdateMode], *, stale_kv: bool = False, **settings: Any) -> None:
        async with engine_of(self.model, **settings) as engine, asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                tasks.create_task(self.client(engine, number))
            for _ in range(self.num_updates):
                target = self.num_tokens + self.rng.randrange(80)
                while self.num_tokens < target:
                    self.progress.clear()
                    await self.progress.wait()
                await self.update(engine, self.rng.choice(modes), stale_kv)
            self.is_over = True

    def check_records(self) -> None:
        """Equal lengths, versions that never go back, and no forward pass during a write."""
        assert self.num_passes > self.num_updates
        assert self.num_overlaps == 0
        for _, out in self.records:
            lengths = {len(out.token_ids), len(out.token_logprobs), len(out.sampled_logprobs), len(out.weight_versions)}
            assert len(lengths) == 1
            assert out.weight_versions == sorted(out.weight_versions)
        assert len({version for _, out in self.records for version in out.weight_versions}) > self.num_updates / 2


def spans(record: Record) -> bool:
    return len(set(record[1].weight_versions)) > 1


def largest_difference(run: Run, oracle: nn.Module, shift: int = 0) -> float:
    """Between the records' logprobs and recomputations under the weights of each token's version plus `shift`."""
    by_version: defaultdict[int, list[Record]] = defaultdict(list)
    for record in run.records:
        for version in set(record[1].weight_versions):
            by_version[version + shift].append(record)
    largest = 0.0
    for version, records in by_version.items():
        if version < len(run.versions):
            oracle.load_state_dict(run.versions[version], strict=False)
            for (_, out), expected in zip(records, recomputed(oracle, records), strict=True):
                triples = zip(out.weight_versions, out.token_logprobs, expected, strict=True)
                largest = max([largest, *(abs(a - b) for v, a, b in triples if v + shift == version)])
    return largest


def recomputed(oracle: nn.Module, records: list[Record]) -> list[list[float]]:
    """The logprobs of all outputs by one forward pass over the whole texts; causal, so padding changes nothing."""
    texts = [torch.tensor(prompt + out.token_ids) for prompt, out in records]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    with torch.inference_mode():
        logprobs = torch.log_softmax(oracle(ids).logits.float(), dim=-1)
    chosen = logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(out.token_ids)].tolist()
        for row, (prompt, out) in zip(chosen, records, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1])
async def test_every_logprob_equals_a_recomputation_under_the_version_of_its_token(seed: int) -> None:
    """64 concurrent requests, 100 updates: what is kept is computed again, also where blocks are scarce."""
    oracle, model = build("llama"), build("llama")
    run = Run(seed, model)
    run.num_samples = [1, 1, 1, 3]
    await run.serve(["abort", "wait", "keep", "keep"], kv_cache_tokens=4 * (600 if seed else 300))
    run.check_records()
    assert any(map(spans, run.records))
    assert not any(out.stale_kv for _, out in run.records)
    assert any(out.finish_reason == "abort" for _, out in run.records)
    assert largest_difference(run, oracle) < 2e-4
    assert largest_difference(run, oracle, shift=1) > 0.1, "the weights differ too little to tell versions apart"


async def test_rollouts_span_no_update_that_waits_for_them() -> None:
    run = Run(2, build("llama"), num_updates=20)
    run.num_samples = [1, 3]
    await run.serve(["wait"])
    run.check_records()
    assert not any(map(spans, run.records))
    assert all(out.finish_reason == "length" for _, out in run.records)


def replayed(run: Run, oracle: nn.Module, record: Record) -> list[float]:
    """The logprobs of a request whose K/V stay what they were when they were computed."""
    prompt, out = record
    cache, ids, logprobs = DynamicCache(), prompt, []
    for token, version in zip(out.token_ids, out.weight_versions, strict=True):
        oracle.load_state_dict(run.versions[version], strict=False)
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        logprobs.append(float(torch.log_softmax(logits.float(), -1)[token]))
        ids = [token]
    return logprobs


async def test_requests_that_keep_stale_kv_equal_their_replay_and_say_so() -> None:
    oracle, run = build("llama"), Run(3, build("llama"))
    await run.serve(["keep"], stale_kv=True)
    run.check_records()
    assert all(out.stale_kv == spans(record) for record in run.records for out in [record[1]])
    assert any(map(spans, run.records))
    for record in run.records[:200]:
        assert record[1].token_logprobs == pytest.approx(replayed(run, oracle, record), abs=2e-4)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_after_an_update_a_repeated_prompt_equals_a_fresh_engine_bitwise(mode: UpdateMode) -> None:
    model = build("llama")
    prompt, params = list(range(5, 50)), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    async with Served(model, **OPTIONS) as served:
        engine = served.engine
        before = (await engine.generate(prompt, params)).outputs[0]
        beside = await served.begin(prompt[:7], params, 1)
        update = asyncio.ensure_future(engine.update_weights(noisy(snapshot(model), 1), mode=mode))
        await asyncio.sleep(0)  # until the order was given
        served.passes.release()
        await update
        if mode == "abort":
            with pytest.raises(RequestAborted):
                await beside
        else:
            assert len((await beside).generated_ids) == 20
        after = (await engine.generate(prompt, params)).outputs[0]
    async with engine_of(copy.deepcopy(model)) as fresh:
        expected = (await fresh.generate(prompt, params)).outputs[0]
    assert (after.token_ids, after.token_logprobs) == (expected.token_ids, expected.token_logprobs)
    assert after.token_logprobs != before.token_logprobs


async def test_an_optimizer_step_in_a_block_is_what_the_engine_serves_next() -> None:
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    async with engine_of(model) as engine:
        for step in range(3):
            out = (await engine.generate(prompt, params)).outputs[0]
            assert out.weight_versions == [step] * 8
            expected = logprobs_by_transformers(copy.deepcopy(model).eval(), prompt, out.token_ids)
            assert out.token_logprobs == pytest.approx(expected, abs=1e-4)
            ids = torch.tensor([prompt + out.token_ids])
            model(ids, labels=ids).loss.backward()
            async with engine.updating():
                optimizer.step()
                optimizer.zero_grad()
        assert model.training


async def test_a_folder_and_an_engine_that_loaded_its_model(tmp_path: Path) -> None:
    model, other = build("llama"), build("llama")
    other.load_state_dict(noisy(snapshot(other), 5), strict=False)
    for folder, module in (("a", model), ("b", other)):
        module.save_pretrained(tmp_path / folder)  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    async with engine_of(cast(Any, str(tmp_path / "a")), disabled_rewrites=("kernels",)) as engine:
        assert await engine.update_weights(tmp_path / "b") == 1
        out = (await engine.generate(prompt, params)).outputs[0]
        assert out.token_logprobs == pytest.approx(logprobs_by_transformers(other, prompt, out.token_ids), abs=1e-4)
        with pytest.raises(WeightsError, match="pass a source"):
            await engine.update_weights()
        with pytest.raises(WeightsError, match="no folder"):
            await engine.update_weights(tmp_path / "c")
        with pytest.raises(WeightsError, match="no weight"):
            await engine.update_weights({"no.such.weight": torch.ones(1)})
        again = (await engine.generate(prompt, params)).outputs[0]
        assert again.weight_versions == [1] * 8
        assert again.token_logprobs == pytest.approx(out.token_logprobs, abs=1e-6)


def broken(values: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from list(values.items())[:3]
    raise ValueError("a shard is missing")


async def test_an_iterator_that_breaks_off_never_leaves_a_mix_in_service() -> None:
    model = build("llama")
    async with engine_of(model) as engine:
        with pytest.raises(WeightsError, match="close the engine") as caught:
            await engine.update_weights(broken(noisy(snapshot(model), 1)))
        assert caught.value.is_mixed
        with pytest.raises(Exception, match="half way"):
            await engine.generate([5, 6], SamplingParams(max_tokens=1))


async def test_sleep_gives_the_cache_back_and_requests_go_on_after_it() -> None:
    model = build("llama")
    prompt, params = list(range(5, 50)), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    num_tokens = 200_000
    async with engine_of(model, kv_cache_tokens=num_tokens, preallocate_kv_cache=True) as engine:
        expected = await engine.generate(prompt, params)
        for level in ("cache", "weights", "all"):
            handle = engine.generate(prompt, params)
            await anext(handle)
            bytes_before = resident_bytes(torch.device("cpu"))
            await engine.sleep(level, mode="keep")
            if native.available() and level != "weights":
                cache_bytes = num_tokens * 256  # two layers of two heads of 8 channels, keys and values in float32
                assert bytes_before - resident_bytes(torch.device("cpu")) > 0.9 * cache_bytes
            await engine.wake()
            output = await handle
            assert output.generated_ids == expected.generated_ids
            assert output.outputs[0].token_logprobs == pytest.approx(expected.outputs[0].token_logprobs, abs=1e-5)


async def test_prompt_logprobs_come_from_one_version_of_the_weights() -> None:
    """Those of the chunks before an update were of the old weights, and those after it of the new ones."""
    armed, begun, may_go_on = threading.Event(), threading.Event(), threading.Event()
    num_passes = itertools.count()

    def wait_in_the_fifth() -> None:
        if armed.is_set() and next(num_passes) == 4:
            begun.set()
            may_go_on.wait(60)

    model = watched(build("llama"), wait_in_the_fifth)
    prompt = [2 + i % 150 for i in range(400)]  # of 25 steps
    async with engine_of(model, max_num_batched_tokens=16, kv_cache_tokens=4096) as engine:
        armed.set()
        handle = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        await asyncio.to_thread(begun.wait, 60)
        update = asyncio.ensure_future(engine.update_weights(noisy(snapshot(model), 1), mode="keep"))
        await asyncio.sleep(0)
        may_go_on.set()
        assert await update == 1
        output = await handle
    assert output.outputs[0].weight_versions == [1]
    assert output.prompt_logprobs is not None
    entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    found = [entry[token].logprob for entry, token in entries if entry]
    assert found == pytest.approx(logprobs_by_transformers(model, prompt[:1], prompt[1:]), abs=2e-4)


@pytest.mark.parametrize("how", ["in place", "state dict", "one by one"])
async def test_packed_copies_follow_every_kind_of_update(how: str) -> None:
    model = build("llama")
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(model, weight_mode="packed") as engine:
        await engine.generate(prompt, params)
        weights = noisy(snapshot(model), 1)
        if how == "in place":
            async with engine.updating():
                model.load_state_dict(weights, strict=False)
        else:
            await engine.update_weights(weights if how == "state dict" else iter(weights.items()))
        out = (await engine.generate(prompt, params)).outputs[0]
    assert out.weight_versions == [1] * 12
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)


@pytest.mark.parametrize("how", ["state dict", "one by one", "folder"])
async def test_a_model_that_the_engine_loaded_takes_new_weights(how: str, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "old")  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    weights = noisy(snapshot(model), 1)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path / "new")  # type: ignore[operator]
    source = {"state dict": weights, "one by one": iter(weights.items()), "folder": tmp_path / "new"}[how]
    async with engine_of(tmp_path / "old") as engine:
        await engine.generate(prompt, params)
        assert await engine.update_weights(source) == 1
        out = (await engine.generate(prompt, params)).outputs[0]
    async with engine_of(tmp_path / "new") as fresh:
        expected = (await fresh.generate(prompt, params)).outputs[0]
    assert out.token_logprobs == expected.token_logprobs
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)


async def test_packed_copies_are_released_in_sleep_and_made_again_from_the_weights_of_then() -> None:
    model = build("llama")
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(model, weight_mode="packed") as engine:
        before = (await engine.generate(prompt, params)).outputs[0]
        await engine.sleep()
        await engine.wake()
        assert (await engine.generate(prompt, params)).outputs[0].token_logprobs == before.token_logprobs
        await engine.sleep()
        async with engine.updating():
            model.load_state_dict(noisy(snapshot(model), 1), strict=False)
        await engine.wake()
        out = (await engine.generate(prompt, params)).outputs[0]
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)


async def test_an_update_that_packed_copies_cannot_follow_closes_the_engine() -> None:
    """What no kernel packed was new already, and the engine went on with its old copies of the rest."""
    model = build("llama")
    async with engine_of(model, weight_mode="packed") as engine:
        await engine.generate([5, 6], SamplingParams(max_tokens=1))
        with pytest.raises(WeightsError, match="mixed") as caught:
            async with engine.updating():
                model.to(torch.bfloat16)
        assert caught.value.is_mixed
        with pytest.raises(EngineClosed):
            await engine.generate([5, 6], SamplingParams(max_tokens=1))


LEVELS: list[SleepLevel] = ["weights", "all", "discard"]
SLEEPERS: list[dict[str, Any]] = [{}, {"weight_mode": "shared"}, {"dtype": "bfloat16"}]
if native.available():
    SLEEPERS.append({"quantization": "int8"})


@pytest.mark.parametrize("settings", SLEEPERS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
async def test_an_engine_that_loaded_its_weights_drops_them_in_sleep_and_reads_them_again(
    level: SleepLevel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """It refused every level but "cache": the weights of a sleeping engine stayed in memory beside the trainer's."""
    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(tmp_path, **settings) as engine:
        before = (await engine.generate(prompt, params)).outputs[0]
        for _ in range(2):
            await engine.sleep(level)
            await engine.wake()
            engine.reset_prefix_cache()  # plain torch rounds a chunk after cached tokens in another way
            after = (await engine.generate(prompt, params)).outputs[0]
            assert after.token_logprobs == before.token_logprobs
            assert after.weight_versions == [0] * 12


async def test_weights_that_were_dropped_take_no_memory() -> None:
    async with InferenceEngine(max_sequence_length=256, kv_cache_tokens=1024) as engine:
        await engine.generate("def f(", SamplingParams(max_tokens=4))
        await asyncio.to_thread(engine.optimize_memory)
        weight_bytes = engine.get_stats()["packed_bytes"]
        before = resident_bytes(torch.device("cpu"))
        await engine.sleep("weights")
        assert before - resident_bytes(torch.device("cpu")) > 0.8 * weight_bytes
        await engine.wake()


async def test_a_wake_that_cannot_read_the_weights_leaves_the_engine_asleep_and_may_be_repeated(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "moved"
    build("llama").save_pretrained(folder)  # type: ignore[operator]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    async with engine_of(folder) as engine:
        before = (await engine.generate([5, 6], params)).outputs[0]
        await engine.sleep()
        folder.rename(elsewhere)
        for _ in range(2):
            with pytest.raises(WeightsError, match=r"put these back.*wake"):
                await engine.wake()
            assert engine.get_stats()["engine_status"] == "asleep"
        elsewhere.rename(folder)
        await engine.wake()
        assert (await engine.generate([5, 6], params)).outputs[0].token_logprobs == before.token_logprobs


async def test_a_folder_that_was_written_over_in_the_meantime_is_not_taken_for_the_old_weights(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(tmp_path) as engine:
        await engine.sleep()
        model.load_state_dict(noisy(snapshot(model), 1), strict=False)
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        with pytest.raises(WeightsError, match="not those that were read before"):
            await engine.wake()
        await engine.update_weights(tmp_path)
        await engine.wake()
        out = (await engine.generate(prompt, params)).outputs[0]
    assert out.weight_versions == [1] * 12
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)


@pytest.mark.parametrize("level", LEVELS)
async def test_updates_of_a_sleeping_engine_are_kept_and_the_rest_is_read_again(
    level: SleepLevel, tmp_path: Path
) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    weights = noisy(snapshot(model), 1)
    some = {name: weights[name] for name in list(weights)[::2]}
    model.load_state_dict(some, strict=False)
    async with engine_of(tmp_path) as engine:
        await engine.sleep(level)
        await engine.update_weights(some)
        await engine.wake()
        out = (await engine.generate(prompt, params)).outputs[0]
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)


async def test_weights_that_no_folder_has_are_dropped_only_on_demand(tmp_path: Path) -> None:
    """As RL frameworks do it: sleep, train, update in several parts, wake, and the same again."""
    model = build("llama")
    model.save_pretrained(tmp_path / "first")  # type: ignore[operator]
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(tmp_path / "first") as engine:
        for seed in (1, 2):
            weights = noisy(snapshot(model), seed)
            model.load_state_dict(weights, strict=False)
            await engine.sleep("discard")
            await engine.update_weights(dict(list(weights.items())[:5]))
            if seed == 2:
                with pytest.raises(WeightsError, match="discarded"):
                    await engine.wake()
            await engine.update_weights(iter(list(weights.items())[5:]))
            await engine.wake()
            out = (await engine.generate(prompt, params)).outputs[0]
            assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, out.token_ids), abs=1e-4)
            running = engine.generate([5, 6], SamplingParams(max_tokens=500, ignore_eos=True))
            await anext(running)
            with pytest.raises(WeightsError, match="level='discard'"):
                await engine.sleep("all")
            assert len((await running).generated_ids) == 500  # a refused order disturbs nobody
        model.save_pretrained(tmp_path / "last")  # type: ignore[operator]
        await engine.update_weights(tmp_path / "last")
        await engine.sleep("all")
        await engine.wake()
        after = (await engine.generate(prompt, params)).outputs[0]
    assert after.token_logprobs == out.token_logprobs


async def test_adapters_and_cached_blocks_survive_a_sleep_without_weights(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    policy = get_peft_model(build("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    async with engine_of(tmp_path) as engine:
        await engine.load_adapter("policy", policy)
        before = [await engine.generate(prompt, params, adapter=name) for name in ("", "policy")]
        await engine.sleep("weights")
        await engine.wake()
        after = [await engine.generate(prompt, params, adapter=name) for name in ("", "policy")]
    assert [out.outputs[0].token_logprobs for out in before] == [out.outputs[0].token_logprobs for out in after]
    assert all(out.num_cached_tokens == 24 for out in after)


async def test_updates_of_a_draft_model_engine_keep_its_drafts_apart(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    model = build("llama")
    settings = {"draft_model": str(tmp_path), "enable_speculative_decoding": True, "kv_cache_tokens": 4096}
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    async with engine_of(model, **settings) as engine:
        handle = engine.generate(prompt, params)
        await anext(handle)
        await engine.sleep("cache", mode="keep")
        await engine.wake()
        async with engine.updating("keep"):
            model.load_state_dict(noisy(snapshot(model), 1), strict=False)
        out = (await handle).outputs[0]
        fresh = (await engine.generate(prompt, params)).outputs[0]
    assert fresh.token_logprobs == pytest.approx(logprobs_by_transformers(model, prompt, fresh.token_ids), abs=1e-4)
    assert len(out.token_ids) == len(out.weight_versions) == 40


def test_modes_are_checked_at_once() -> None:
    with pytest.raises(RequestError, match="unknown"):
        engine_of(build("llama")).updating("later")  # type: ignore[arg-type]
