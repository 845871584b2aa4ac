"""Parts of the Tinker service by themselves: messages, futures, sessions, saved weights, loaded adapters."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.response_conv import deserialize_forward_backward_output

from penstock import ConfigurationError, RequestError
from penstock.serving.errors import HttpError
from penstock.serving.tinker import kept_answers
from penstock.serving.tinker.adapters import LoadedAdapters, Weights
from penstock.serving.tinker.checkpoints import Checkpoints, Info, WeightsPath, bytes_of
from penstock.serving.tinker.futures import Answer, Futures
from penstock.serving.tinker.sessions import Run, Sampler, Sessions
from penstock.serving.tinker.settings import TinkerSettings
from penstock.serving.tinker.training import TrainingThread
from penstock.serving.tinker.wire import MAX_ELEMENTS, LossRequest, array_of, loss_message
from penstock.training.lora.records import LoraShape, LossResult

RUN = "session-1:train:0"
INT64 = pb.DTYPE_INT64
BYTES = 1 << 20


def sparse(values: list[int], crow: list[int], columns: list[int], shape: list[int]) -> pb.Tensor:
    parts = (np.array(each, dtype=np.int64).tobytes() for each in (values, crow, columns))
    csr = pb.SparseCsr(**dict(zip(("values", "crow_indices", "col_indices"), parts, strict=True)))
    return pb.Tensor(sparse_csr=csr, dtype=INT64, shape=shape)


def test_tensors_of_every_layout_are_arrays() -> None:
    floats = np.array([[1.5, -2.0]], dtype=np.float32)
    half = (floats.view(np.uint32) >> 16).astype(np.uint16)
    assert array_of(pb.Tensor(dense=half.tobytes(), dtype=pb.DTYPE_BFLOAT16, shape=[1, 2])).tolist() == [[1.5, -2.0]]
    small = pb.Tensor(dense=np.array([3], dtype=np.int32).tobytes(), dtype=pb.DTYPE_INT32)
    assert array_of(small).dtype == np.int64
    assert array_of(sparse([7], [0, 0, 1], [1], [2, 2])).tolist() == [[0, 0], [0, 7]]


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(dense=b"123", dtype=INT64),
        pb.Tensor(dense=bytes(8), dtype=INT64, shape=[2]),
        pb.Tensor(dense=bytes(8), dtype=INT64, shape=[-1]),
        pb.Tensor(dense=bytes(8), dtype=pb.DTYPE_UNSPECIFIED),
        sparse([1], [0, 1], [0], [MAX_ELEMENTS, 2]),
        sparse([1], [0, 1], [5], [1, 2]),
        sparse([1], [0, 2], [0], [1, 2]),
        sparse([1, 1], [2, 0, 2], [0, 1], [2, 2]),
        sparse([], [], [], [0, 2]),
        sparse([1], [0, 1], [0], [2]),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(tensor: pb.Tensor) -> None:
    with pytest.raises(RequestError):
        array_of(tensor)


def test_sparse_tensors_that_are_small_in_a_message_cannot_fill_the_memory() -> None:
    tensor = sparse([], [0] * 4097, [], [4096, 4096])
    data = [pb.Datum(loss_fn_inputs={"weights": tensor})] * 5
    request = LossRequest(pb.ForwardBackwardRequest(data=data).SerializeToString())
    with pytest.raises(RequestError, match="83886080 elements"):
        request.batch()


def test_outputs_of_several_widths_arrive_in_their_order() -> None:
    arrays = [
        np.arange(n, dtype=np.float32).reshape(shape) for n, shape in ((3, (3,)), (4, (2, 2)), (2, (1, 2)), (1, (1,)))
    ]
    output = deserialize_forward_backward_output(loss_message(LossResult(2.5, arrays)))
    assert output.metrics == {"loss:sum": 2.5}
    for record, array in zip(output.loss_fn_outputs, arrays, strict=True):
        np.testing.assert_array_equal(record["logprobs"].to_numpy(), array)


def test_a_message_without_fields_is_read() -> None:
    request = LossRequest(b"")
    assert (request.model_id, request.seq_id, request.batch().data) == ("", 0, [])


async def answered(value: int) -> Answer:
    return Answer.of(value=value)


async def test_answers_can_be_read_again_until_many_others_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_READ", 2)
    futures = Futures(10, BYTES)
    for i in range(4):
        futures.start(f"r{i}", "s", "", answered(i))
    for i in range(4):
        answer = await futures.wait(f"r{i}", "", 60)
        assert answer is not None
        assert json.loads(answer.body) == {"value": i}
    kept = [f"r{i}" in futures for i in range(4)]
    assert kept == [False, False, True, True]
    other = await futures.wait("r3", "somebody else", 60)
    assert other is not None
    assert b"is not known" in other.body


async def test_answers_that_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_UNREAD", 3)
    futures = Futures(10, BYTES)
    for i in range(6):
        futures.start(f"r{i}", "s", "", answered(i))
    for _ in range(20):  # turns of the loop, in which they end
        await asyncio.sleep(0)
    assert [f"r{i}" in futures for i in range(6)] == [False, False, False, True, True, True]


async def test_too_many_requests_are_told_to_wait() -> None:
    futures, release = Futures(2, BYTES), asyncio.Event()

    async def work() -> Answer:
        await release.wait()
        return Answer.of()

    for i in range(2):
        futures.check_room("")
        futures.start(f"r{i}", "s", "", work())
    with pytest.raises(HttpError, match="2 requests are under way") as caught:
        futures.check_room("")
    assert caught.value.status == 429
    assert await futures.wait("r0", "", 0.001) is None
    release.set()
    await futures.wait("r0", "", 60)
    futures.check_room("")


async def test_no_key_takes_the_room_of_the_others() -> None:
    """One key could fill all places, and others were refused until it had its answers."""
    futures, release = Futures(8, BYTES), asyncio.Event()

    async def work() -> Answer:
        await release.wait()
        return Answer.of()

    def fill(owner: str) -> int:
        count = 0
        while True:
            try:
                futures.check_room(owner)
            except HttpError:
                return count
            futures.start(f"{owner}{count}", "s", owner, work())
            count += 1

    assert [fill(owner) for owner in ("ann", "bob", "cid")] == [4, 2, 1]
    with pytest.raises(HttpError, match="4 requests are under way for this key") as caught:
        futures.check_room("ann")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    release.set()
    for i in range(4):
        await futures.wait(f"ann{i}", "ann", 60)
    futures.check_room("bob")


async def big(size: int) -> Answer:
    return Answer(bytes(size))


async def finished(futures: Futures, owner: str, sizes: dict[str, int]) -> None:
    """Answers of these sizes, which nobody reads."""
    for name, size in sizes.items():
        futures.start(name, "s", owner, big(size))
        for _ in range(5):  # turns of the loop, in which it ends
            await asyncio.sleep(0)


async def test_unread_answers_are_bounded_by_bytes_and_the_key_that_holds_most_loses_its_oldest() -> None:
    """They were bounded by count alone, and large ones filled the memory."""
    futures = Futures(10, max_bytes=1000)
    await finished(futures, "ann", {"small": 100})
    await finished(futures, "bob", {"b0": 300, "b1": 300, "b2": 300})
    assert all(name in futures for name in ("small", "b0", "b1", "b2"))
    await finished(futures, "bob", {"b3": 300})
    assert [name in futures for name in ("small", "b0", "b1", "b2", "b3")] == [True, False, True, True, True]
    await finished(futures, "ann", {"large": 550})
    assert [name in futures for name in ("small", "b1", "b2", "b3", "large")] == [False, False, False, True, True]
    lost = await futures.wait("b2", "bob", 60)
    assert lost is not None
    assert b"dropped because too much was unread" in lost.body


async def test_answers_that_were_read_make_room_for_those_that_were_not() -> None:
    futures = Futures(10, max_bytes=1000)
    await finished(futures, "ann", {"a": 400, "b": 400})
    await futures.wait("b", "ann", 60)
    await finished(futures, "bob", {"c": 400})
    assert [name in futures for name in "abc"] == [True, False, True]
    futures.drop("s")
    await finished(futures, "bob", {"d": 1000})
    assert "d" in futures


async def test_an_answer_that_is_larger_than_all_that_are_kept_is_refused() -> None:
    futures = Futures(10, max_bytes=1000)
    await finished(futures, "ann", {"a": 1001})
    answer = await futures.wait("a", "ann", 60)
    assert answer is not None
    assert json.loads(answer.body) == {
        "error": "the answer has 1001 bytes, and 1000 are kept: ask for less",
        "category": "user",
    }


async def test_only_a_sample_can_be_cancelled_and_only_by_its_owner() -> None:
    """A pass that was cancelled before it began was missing from the next step, which was made all the same."""
    futures, release = Futures(10, BYTES), asyncio.Event()

    async def work() -> Answer:
        await release.wait()
        return Answer.of(done=True)

    for name in ("pass", "sample", "another's"):
        futures.start(name, "s", "ann", work(), can_be_cancelled=name != "pass")
        await asyncio.sleep(0)  # it begins
        futures.cancel(name, "bob" if name == "another's" else "ann")
    release.set()
    answers = {name: await futures.wait(name, "ann", 60) for name in ("pass", "sample", "another's")}
    assert [b"done" in answer.body for answer in answers.values() if answer is not None] == [True, False, True]


async def test_faults_are_answers_that_tell_nothing_of_the_server() -> None:
    futures = Futures(10, BYTES)

    async def fail(error: BaseException) -> Answer:
        raise error

    for number, (error, category) in enumerate(
        [(RequestError("bad"), "user"), (HttpError(404, "none"), "user"), (KeyError("secret"), "server")]
    ):
        futures.start(str(number), "s", "", fail(error))
        answer = await futures.wait(str(number), "", 60)
        assert answer is not None
        assert json.loads(answer.body)["category"] == category
        assert b"secret" not in answer.body


def settings(max_sessions: int, **values: Any) -> TinkerSettings:
    return TinkerSettings(session_timeout_s=10, max_sessions=max_sessions, **values)


def test_sessions_end_when_their_clients_are_silent_and_not_while_they_wait() -> None:
    clock, busy = [0.0], {"any": False}
    sessions = Sessions(settings(2), lambda session_id: busy["any"], lambda: clock[0])
    first, second = sessions.create("ann", None, None), sessions.create("bob", None, None)
    with pytest.raises(HttpError, match="2 sessions are open, this server's limit"):
        sessions.create("ann", None, None)
    clock[0] = 9.0
    assert sessions.get(first.id, "ann") is first
    clock[0], busy["any"] = 11.0, True
    assert list(sessions.expired()) == []
    busy["any"] = False
    assert list(sessions.expired()) == [second]
    sessions.end(second)
    for session_id, owner, status in ((second.id, "bob", 410), (first.id, "bob", 404), ("nobody", "ann", 404)):
        with pytest.raises(HttpError) as caught:
            sessions.get(session_id, owner)
        assert caught.value.status == status


def write(folder: Path) -> None:
    (folder / "adapter").write_text("x")


def test_saved_weights_are_found_by_their_owner_until_their_time_is_over(tmp_path: Path) -> None:
    checkpoints, path = Checkpoints(tmp_path), WeightsPath(RUN, "weights", "a")
    info = Info.new("ann", "base", LoraShape(4))
    checkpoints.save(path, info, write, overwrite=False)
    assert checkpoints.find(path, "ann").info == info
    assert [str(each) for each, _ in checkpoints.of_run(RUN, "ann")] == [f"tinker://{RUN}/weights/a"]
    assert list(checkpoints.of_run(RUN, "bob")) == list(checkpoints.of_run("../x", "ann")) == []
    with pytest.raises(HttpError):
        checkpoints.find(path, "bob")
    with pytest.raises(RequestError, match="exists"):
        checkpoints.save(path, info, write, overwrite=False)
    checkpoints.save(path, replace(info, id="new", expires=time.time() - 1), write, overwrite=True)
    checkpoints.save(
        path, replace(info, id="newer", expires=time.time() - 1), write, overwrite=False
    )  # of a time that is over
    with pytest.raises(HttpError, match="no saved weights"):
        checkpoints.find(path, "ann")
    assert bytes_of(tmp_path / "nothing") == 0
    assert [file.name for file in tmp_path.rglob("adapter")] == []


def test_snapshots_of_another_server_are_deleted_only_once_it_has_ended(tmp_path: Path) -> None:
    """A second server with the same folder deleted the snapshots from which clients of the first sampled."""
    first = Checkpoints(tmp_path / "adapters")
    snapshot = first.snapshot(RUN, Info.new("", "base", LoraShape(1)), write)
    second = Checkpoints(tmp_path / "adapters")
    assert snapshot.is_there()
    first.close()
    second.close()
    third = Checkpoints(tmp_path / "adapters")
    assert not snapshot.is_there()
    third.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="name another folder"):
        Checkpoints(tmp_path / "file")


def test_the_training_thread_does_what_was_posted_before_it_ends() -> None:
    """Files of the sessions that end with the server were left behind."""
    thread, release, done = TrainingThread(), threading.Event(), list[int]()
    thread.post("", release.wait)
    thread.post("", lambda: done.append(1))
    closing = threading.Thread(target=thread.close)
    closing.start()
    release.set()
    closing.join()
    assert done == [1]


async def test_keys_take_turns_on_the_training_thread() -> None:
    """A key that had sent a hundred passes held up the step of another one until all of them were done."""
    thread, release, order = TrainingThread(), threading.Event(), list[str]()

    async def run(owner: str, number: int) -> None:
        await thread.run(owner, lambda: order.append(f"{owner}{number}"))

    thread.post("ann", release.wait)
    counts = {"ann": 5, "bob": 1, "cid": 2}
    tasks = [asyncio.create_task(run(owner, i)) for owner, count in counts.items() for i in range(count)]
    await asyncio.sleep(0)  # all of them wait
    release.set()
    await asyncio.gather(*tasks)
    assert order == ["ann0", "bob0", "cid0", "ann1", "cid1", "ann2", "ann3", "ann4"]
    thread.close()


async def test_jobs_of_the_training_thread_that_nobody_waits_for_are_dropped_and_errors_raised() -> None:
    thread, release, done = TrainingThread(), threading.Event(), list[str]()
    thread.post("", release.wait)

    async def run(name: str) -> None:
        await thread.run("", lambda: done.append(name))

    async def fail() -> None:
        await thread.run("", lambda: 1 / 0)

    tasks = [asyncio.create_task(run("first")), asyncio.create_task(run("second")), asyncio.create_task(fail())]
    await asyncio.sleep(0)  # all of them wait
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None), ZeroDivisionError]
    assert done == ["second"]
    thread.close()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("disk full")

    checkpoints, path = Checkpoints(tmp_path), WeightsPath(RUN, "weights", "a")
    checkpoints.save(path, Info.new("", "base", LoraShape(4)), write, overwrite=False)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(path, Info.new("", "base", LoraShape(4)), fail, overwrite=True)
    assert (checkpoints.find(path, "").folder / "adapter").read_text() == "x"
    assert len(list(tmp_path.rglob("adapter"))) == 1


def test_one_key_leaves_sessions_for_others() -> None:
    sessions = Sessions(settings(4), lambda session_id: False, lambda: 0.0)
    for owner in ("ann", "ann", "bob"):
        sessions.create(owner, None, None)
    with pytest.raises(HttpError, match="2 sessions are open for this key"):
        sessions.create("ann", None, None)
    sessions.create("cid", None, None)
    anonymous = Sessions(settings(4), lambda session_id: False, lambda: 0.0)
    for _ in range(4):
        anonymous.create("", None, None)


def test_one_key_leaves_models_for_others() -> None:
    """One key could take all models that the server trains."""
    sessions = Sessions(settings(8, max_models=4), lambda session_id: False, lambda: 0.0)

    def fill(owner: str) -> tuple[int, HttpError]:
        session = sessions.create(owner, None, None)
        while True:
            try:
                sessions.check_models(owner, 10)
            except HttpError as error:
                return len(session.runs), error
            run = Run(f"{session.id}:train:{len(session.runs)}", "base", 10)
            session.runs[run.id] = run

    counts = [fill(owner)[0] for owner in ("ann", "bob")]
    assert counts == [2, 1]
    none, error = fill("ann")
    assert (none, error.status) == (0, 400)
    assert "2 models are in training for this key, as many as the server has room for from others" in str(error)
    number, error = fill("")
    assert number == 1
    assert "4 models are in training, this server's limit: close a session" in str(error)


def test_models_in_training_are_bounded_by_bytes_of_which_one_key_leaves_some_for_others() -> None:
    """A few dozen adapters of the largest rank took all memory of the machine."""
    sessions = Sessions(settings(8, max_model_bytes=100), lambda session_id: False, lambda: 0.0)
    ann = sessions.create("ann", None, None)
    for size in (101, 51):
        with pytest.raises(HttpError):
            sessions.check_models("ann", size)
    sessions.check_models("ann", 50)
    ann.runs["a"] = Run("a", "base", 50)
    with pytest.raises(HttpError, match="50 bytes of models are in training for this key"):
        sessions.check_models("ann", 1)
    with pytest.raises(HttpError, match="and 60 more are beyond this server's limit of 100: close a session, or train"):
        sessions.check_models("bob", 60)
    sessions.check_models("bob", 25)
    sessions.check_models("", 50)
    sessions.end(ann)
    sessions.check_models("bob", 50)


def test_samplers_that_were_not_used_for_the_longest_time_are_forgotten() -> None:
    """A session of thousands of steps kept all of its samplers."""
    sessions = Sessions(settings(2), lambda session_id: False, lambda: 0.0)
    session = sessions.create("ann", None, None)
    ids = [f"{session.id}:sample:{number}" for number in range(4)]
    for sampler_id in ids[:3]:
        session.add_sampler(Sampler(sampler_id, "base"), limit=3)
    sessions.sampler(ids[0], "ann")
    session.add_sampler(Sampler(ids[3], "base"), limit=3)
    for kept in (ids[0], ids[2], ids[3]):
        assert sessions.sampler(kept, "ann").id == kept
    with pytest.raises(HttpError, match="create a new client") as caught:
        sessions.sampler(ids[1], "ann")
    assert caught.value.status == 410
    with pytest.raises(HttpError, match="there is no sampling session") as caught:
        sessions.sampler(f"{session.id}:sample:9", "ann")
    assert caught.value.status == 404
    session.add_sampler(Sampler(ids[1], "base"), limit=3)  # a request that is sent again
    assert sessions.sampler(ids[1], "ann").id == ids[1]


def test_settings_out_of_range_are_refused() -> None:
    for values in (
        {"folder": "x"},
        {"session_timeout_s": 0},
        {"max_models": 0},
        {"max_model_bytes": 0},
        {"max_loaded_adapters": 1.5},
        {"max_pending": "x"},
        {"max_samplers": 0},
        {"max_answer_bytes": 100},
    ):
        with pytest.raises(RequestError):
            TinkerSettings(**values)  # type: ignore[arg-type]


class Engine:
    """Remembers what is loaded; loading and unloading take a turn of the loop."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.calls: list[str] = []

    async def load_adapter(self, name: str, source: object) -> None:
        await asyncio.sleep(0)
        assert name not in self.loaded
        self.loaded.append(name)
        self.calls.append(name)

    async def unload_adapter(self, name: str) -> None:
        await asyncio.sleep(0)
        self.loaded.remove(name)


class HangingEngine(Engine):
    """Does what it is asked, and after `hangs_after`, "load" or "unload", never says so."""

    hangs_after = ""

    async def load_adapter(self, name: str, source: object) -> None:
        await super().load_adapter(name, source)
        await self._hang("load")

    async def unload_adapter(self, name: str) -> None:
        await super().unload_adapter(name)
        await self._hang("unload")

    async def _hang(self, verb: str) -> None:
        if verb == self.hangs_after:
            await asyncio.Event().wait()


async def test_adapters_whose_loading_or_unloading_was_cut_off_are_neither_kept_nor_missed(tmp_path: Path) -> None:
    """A caller that left just then did not note what the engine had done: one stayed for good, one never came back."""
    engine: Any = HangingEngine()
    adapters, checkpoints = LoadedAdapters(engine, limit=1), Checkpoints(tmp_path)
    first, second = (
        Weights(name, checkpoints.snapshot(RUN, Info.new("", "base", LoraShape(1)), write)) for name in "ab"
    )

    async def use(weights: Weights) -> None:
        async with adapters.using(weights) as name:
            assert name in engine.loaded

    async def cut_off(weights: Weights, verb: str, loaded: list[str]) -> None:
        engine.hangs_after, task = verb, asyncio.create_task(use(weights))
        for _ in range(20):  # turns of the loop
            await asyncio.sleep(0)
        assert engine.loaded == loaded
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.hangs_after = ""

    await use(first)
    await cut_off(second, "unload", ["b"])
    await use(first)
    assert engine.loaded == ["a"]
    await cut_off(second, "load", ["a", "b"])
    await adapters.unload(second)
    assert engine.loaded == []


async def test_the_adapters_that_were_used_last_stay_loaded(tmp_path: Path) -> None:
    engine: Any = Engine()
    adapters, checkpoints = LoadedAdapters(engine, limit=2), Checkpoints(tmp_path)
    weights = [
        Weights(name, checkpoints.snapshot(RUN, Info.new("", "base", LoraShape(1)), write)) for name in ("a", "b", "c")
    ]

    async def use(each: Weights) -> None:
        async with adapters.using(each) as name:
            assert name in engine.loaded
            await asyncio.sleep(0)
            assert name in engine.loaded

    await asyncio.gather(*(use(each) for each in weights * 5))
    assert len(engine.loaded) == 2
    assert len(engine.calls) == 3  # each was loaded once for all who used it at the same time
    for each in (weights[0], weights[1], weights[2], weights[0]):
        await use(each)
    assert sorted(engine.loaded) == ["a", "c"]
    await asyncio.gather(adapters.unload(weights[0]), use(weights[2]), use(weights[1]))
    assert sorted(engine.loaded) == ["b", "c"]
    with pytest.raises(RequestError, match="no longer kept"):
        await use(weights[0])
