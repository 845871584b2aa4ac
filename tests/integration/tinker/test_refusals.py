"""What the service refuses: the SDK raises its typed error, nothing hangs, and the server serves on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from pydantic import SecretStr
from safetensors.numpy import load_file
from tinker import types

from penstock.serving import ServingSettings
from penstock.serving.settings import ApiKey
from penstock.serving.tinker import endpoints
from penstock.training.lora.records import LoraShape
from penstock.training.lora.trainer import LoraTrainer
from tests.http_sockets import wait_until
from tests.integration.tinker.service import KEY, TEXT, Running, datum, logprobs, prompt, serving, step, supervised
from tests.tiny_models import build

ONES = [1.0] * (len(TEXT) - 1)
API = "/api/v1"
Failure = tinker.RequestFailedError


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}{API}", headers={"x-api-key": KEY}, verify=False) as client:
        yield client


def bad_datum(**inputs: Any) -> types.Datum:
    kinds = {"target_tokens": np.int64}
    fields = {name: np.asarray(value, dtype=kinds.get(name, np.float32)) for name, value in inputs.items()}
    return types.Datum(prompt(TEXT[:-1]), fields)


BAD_DATA: dict[str, tuple[str, types.Datum, str]] = {
    "loss": ("no_loss", supervised(), "'no_loss' is not known"),
    "length": ("cross_entropy", bad_datum(target_tokens=TEXT[1:-1]), r"target_tokens must be \[7\]"),
    "weights": ("cross_entropy", bad_datum(target_tokens=TEXT[1:], weights=[1.0]), "weights must have the shape"),
    "nan": ("cross_entropy", datum(TEXT, weights=[*ONES[1:], float("nan")]), "weights must hold finite numbers"),
    "infinity": (
        "importance_sampling",
        datum(TEXT, logprobs=ONES, advantages=[*ONES[1:], float("inf")]),
        "advantages must hold finite numbers",
    ),
    "overflow": ("ppo", datum(TEXT, logprobs=[-200.0] * 7, advantages=[-1.0] * 7), "not finite"),
    "missing": ("importance_sampling", supervised(), "lacks advantages, logprobs"),
    "unknown": ("cross_entropy", datum(TEXT, weights=ONES, rewards=ONES), "has rewards"),
    "token": ("cross_entropy", supervised([5, 6, 100_000]), "token ids from 0 to 159"),
    "negative": ("cross_entropy", supervised([5, 6, -3]), "token ids from 0 to 159"),
    "empty": ("cross_entropy", types.Datum(prompt([]), {"target_tokens": np.array([], dtype=np.int64)}), "no tokens"),
    "long": ("cross_entropy", supervised([5] * 600), "at most 512"),
    "image": (
        "cross_entropy",
        types.Datum(
            types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")]), {"target_tokens": np.array([1])}
        ),
        "takes tokens alone",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_and_the_step_that_would_have_used_it_too(
    training: tinker.TrainingClient, name: str
) -> None:
    """Both are sent before either is answered, so the step must not use the part of a batch that was fine."""
    loss, bad, message = BAD_DATA[name]
    before = logprobs(training, TEXT)
    futures = [
        training.forward_backward([supervised()], "cross_entropy"),
        training.forward_backward([bad], loss),  # type: ignore[arg-type]
        training.optim_step(types.AdamParams(learning_rate=0.1)),
    ]
    futures[0].result()
    with pytest.raises(Failure, match=message) as caught:
        futures[1].result()
    assert caught.value.category == "user"
    with pytest.raises(Failure, match="gradients are incomplete"):
        futures[2].result()
    np.testing.assert_array_equal(logprobs(training, TEXT), before)
    assert step(training, [supervised()]) > 0
    assert not np.array_equal(logprobs(training, TEXT), before)


def test_a_body_that_is_too_long_leaves_no_half_step(server: Running, client: tinker.ServiceClient) -> None:
    """The SDK cuts a batch into requests. One that is not read does not count as a part that was fine."""
    training = client.create_lora_training_client(server.model, rank=2).result()
    weights: Any = np.ones(600_000, dtype=np.float32)
    long = types.Datum(prompt([5] * 600_000), {"target_tokens": np.full(600_000, 5), "weights": weights})
    before = logprobs(training, TEXT)
    losses = training.forward_backward([supervised(), long], "cross_entropy")
    optim = training.optim_step(types.AdamParams(learning_rate=0.1))
    with pytest.raises(tinker.APIStatusError, match="this server's limit") as caught:
        losses.result()
    assert caught.value.status_code == 413
    with pytest.raises(Failure, match="never arrived"):
        optim.result()
    np.testing.assert_array_equal(logprobs(training, TEXT), before)


def test_settings_of_a_loss_are_checked(training: tinker.TrainingClient) -> None:
    data = [datum(TEXT, logprobs=ONES, advantages=ONES)]
    for config, message in (
        ({"clip": 0.1}, "has no setting 'clip'"),
        ({"clip_low_threshold": "much"}, "must be a number"),
        ({"clip_low_threshold": -1.0}, "finite number >= 0"),
    ):
        with pytest.raises(Failure, match=message):
            training.forward(data, "ppo", config).result()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": -1e-9}, "eps"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_steps_with_bad_values_are_refused(
    training: tinker.TrainingClient, values: dict[str, float], message: str
) -> None:
    with pytest.raises(tinker.BadRequestError, match=message):
        training.optim_step(types.AdamParams(**values)).result()
    step(training, [supervised()])


def test_other_optimizers_are_refused(server: Running, client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match="dimuon"):
        client.create_lora_training_client(server.model, optimizer=types.DimuonOptimizerConfig()).result()
    training = client.create_lora_training_client(server.model, rank=2).result()
    with pytest.raises(tinker.BadRequestError, match="no other optimizer than AdamW"):
        training.optim_step(types.DimuonParams(learning_rate=0.1)).result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_model": "nobody/nothing"}, "is not served here: this server has"),
        ({"rank": 0}, "rank must be an integer from 1 to 512"),
        ({"rank": 100_000}, "rank must be an integer from 1 to 512"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(
    server: Running, client: tinker.ServiceClient, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(tinker.BadRequestError, match=message):
        client.create_lora_training_client(**{"base_model": server.model, **options}).result()


PATHS = ("..", "../../etc", "a/b", "/etc/passwd", "", ".hidden", "a\\b", "a\0b", "x" * 200, "a b", "é")


@pytest.mark.parametrize("name", PATHS)
def test_names_that_are_no_names_reach_no_file(training: tinker.TrainingClient, name: str) -> None:
    for save in (training.save_state, training.save_weights_for_sampler):
        with pytest.raises(tinker.BadRequestError, match="cannot name saved weights"):
            save(name).result()
    training.save_state("fine").result()


@pytest.mark.parametrize(
    "path",
    [
        "tinker://../weights/x",
        "tinker://session-0:train:0/weights/..",
        "tinker://session-0:train:0/../../x",
        "tinker://session-0:train:0/snapshots/x",
        "tinker://session-0:train:0/weights/../../x",
        "tinker://weights/x",
        "tinker://",
    ],
)
def test_paths_that_are_no_paths_reach_no_file(client: tinker.ServiceClient, path: str) -> None:
    for create in (client.create_sampling_client, client.create_training_client_from_state):
        with pytest.raises(tinker.BadRequestError, match=r"is not a path of saved weights|cannot name saved weights"):
            create(path).result()


def test_unknown_paths_and_names_that_are_taken(client: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    for create in (client.create_sampling_client, client.create_training_client_from_state):
        with pytest.raises(tinker.NotFoundError, match="there are no saved weights"):
            create(f"tinker://{training.model_id}/weights/nothing").result()
    training.save_state("twice").result()
    with pytest.raises(Failure, match="exists: choose another name"):
        training.save_state("twice").result()
    before = logprobs(training, TEXT)
    step(training, [supervised()])
    path = training.save_state("twice", overwrite=True).result().path
    restored = client.create_training_client_from_state(path).result()
    assert not np.array_equal(logprobs(restored, TEXT), before)


@pytest.mark.filterwarnings("ignore:DEPRECATED")
def test_an_adapter_of_another_shape_is_not_loaded(server: Running, client: tinker.ServiceClient) -> None:
    small, large = (client.create_lora_training_client(server.model, rank=rank).result() for rank in (2, 3))
    attn = client.create_lora_training_client(server.model, rank=3, train_mlp=False).result()
    path = large.save_state("large").result().path
    before = logprobs(small, TEXT)
    for training, message in ((small, r"\[2, 32\] here"), (attn, "other layers")):
        with pytest.raises(Failure, match=message):
            training.load_state(path).result()
    np.testing.assert_array_equal(logprobs(small, TEXT), before)
    sampler = large.save_weights_for_sampler("no-state").result().path
    with pytest.raises(Failure, match=r"cannot be read"):
        client.create_training_client_from_state_with_optimizer(sampler).result()


BAD_SAMPLES: dict[str, tuple[list[int], dict[str, Any], dict[str, Any], str]] = {
    "empty": ([], {}, {}, "prompt is empty"),
    "token": ([5, 100_000], {}, {}, "vocabulary|100000"),
    "temperature": ([5], {"temperature": -1.0}, {}, "temperature"),
    "top_p": ([5], {"top_p": 0.0}, {}, "top_p"),
    "max_tokens": ([5], {"max_tokens": 0}, {}, "max_tokens"),
    "stop": ([5], {"stop": ["x"]}, {}, "stop"),
    "many stops": ([5], {"stop": [f"x{i}" for i in range(50_000)]}, {}, "50000 stop strings are more than this server"),
    "long stops": ([5], {"stop": ["x" * 100_000]}, {}, "100000 characters of stop strings are more than"),
    "stop ids": ([5], {"stop": list(range(50_000))}, {}, "50000 stop tokens are more than"),
    "long": ([5] * 600, {}, {}, "512"),
    "samples": ([5], {}, {"num_samples": 1000}, "num_samples"),
    "top": ([5], {}, {"topk_sample_logprobs": 100_000}, "topk_sample_logprobs"),
    "last": ([5, 6], {}, {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 9}, "prompt_logprobs_last_n"),
    "rows": ([5, 6, 7], {}, {"target_prompt_logprobs": types.TensorData([1], "int64", [1, 1])}, r"\[2, K\]"),
    "ids": ([5, 6], {}, {"target_prompt_logprobs": types.TensorData([100_000], "int64", [1, 1])}, "below 160"),
    "one token": ([5], {}, {"target_prompt_logprobs": types.TensorData([], "int64", [0, 1])}, "two tokens"),
    "none": ([5, 6], {}, {"target_prompt_logprobs": types.TensorData([-1], "int64", [1, 1])}, "at least one"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_cannot_be_drawn_are_refused(server: Running, client: tinker.ServiceClient, name: str) -> None:
    tokens, params, options, message = BAD_SAMPLES[name]
    base = client.create_sampling_client(base_model=server.model).result()
    parameters = types.SamplingParams(**{"max_tokens": 2, **params})
    with pytest.raises((tinker.BadRequestError, Failure), match=message):
        base.sample(prompt(tokens), **{"num_samples": 1, **options}, sampling_params=parameters).result()
    assert base.sample(prompt([5]), 1, types.SamplingParams(max_tokens=2)).result().sequences


@pytest.mark.parametrize("value", [1.5, 2**63, 2**70])
def test_ids_that_are_no_integers_of_64_bits_are_refused(server: Running, http: httpx.Client, value: float) -> None:
    """Fractions were cut, and larger numbers were an internal error."""
    session = http.post("/create_session", json={}).json()["session_id"]
    fields = {"session_id": session, "sampling_session_seq_id": 0, "base_model": server.model}
    sampler = http.post("/create_sampling_session", json=fields).json()["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": 1},
        "target_prompt_logprobs": {"data": [value], "dtype": "int64", "shape": [1, 1]},
    }
    request = {"request_id": http.post("/asample", json=body).json()["request_id"]}
    answer = http.post("/retrieve_future", json=request).json()
    assert "integers of 64 bits" in answer["error"]
    assert answer["category"] == "user"


def test_unknown_ids_are_told_from_bodies_that_are_wrong(http: httpx.Client) -> None:
    session = http.post("/create_session", json={}).json()["session_id"]
    assert http.post("/get_info", json={"model_id": f"{session}:train:9"}).status_code == 404
    assert http.post("/optim_step", json={"model_id": "x", "adam_params": {}}).status_code == 404
    assert http.post("/session_heartbeat", json={"session_id": "x"}).status_code == 404
    fields = {"session_id": session, "sampling_session_seq_id": 0}
    assert http.post("/create_sampling_session", json=fields).status_code == 400
    for path in ("/create_model", "/optim_step", "/save_weights", "/load_weights", "/asample", "/retrieve_future"):
        assert http.post(path, json={"model_id": 3}).status_code == 400
        assert http.post(path, json=[1]).status_code == 400
    assert "not known" in http.post("/retrieve_future", json={"request_id": "x"}).json()["error"]
    assert http.post("/cancel_future", json={"request_id": "x"}).status_code == 204


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"\xff\xff", {}, "no ForwardBackwardRequest"),
        (b"", {"content-type": "application/json"}, "protobuf message"),
        (b"", {"content-encoding": "zstd"}, "compressed"),
    ],
)
def test_bodies_that_are_no_messages(http: httpx.Client, body: bytes, headers: dict[str, str], message: str) -> None:
    fields = {"content-type": "application/x-protobuf", **headers}
    answer = http.post("/forward_backward", content=body, headers=fields)
    assert answer.status_code == 400
    assert message in answer.text


def test_a_request_that_is_sent_again_is_done_once(
    server: Running, client: tinker.ServiceClient, http: httpx.Client
) -> None:
    """The SDK repeats a request whose response was lost: a step must not be made twice."""
    training = client.create_lora_training_client(server.model, rank=2, seed=1).result()
    training.forward_backward([supervised()], "cross_entropy").result()
    body = {"model_id": training.model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    ids = [http.post("/optim_step", json=body).json()["request_id"] for _ in range(3)]
    assert len(set(ids)) == 1
    answers = [http.post("/retrieve_future", json={"request_id": ids[0]}).json() for _ in range(2)]
    assert answers[0] == answers[1]
    late = http.post("/save_weights", json={"model_id": training.model_id, "seq_id": 1, "path": "x"})
    assert late.json()["request_id"] == f"{training.model_id}:1"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = [{"name": name, "key": f"tml-{name}"} for name in ("ann", "bob")]
    settings = ServingSettings(api_keys=tuple(map(ApiKey.model_validate, keys)), admin_key=SecretStr("root"))
    with serving(tmp_path_factory.mktemp("guarded"), settings, session_timeout_s=60, max_models=4) as running:
        yield running


def test_what_belongs_to_one_key_is_not_there_for_another(guarded: Running) -> None:
    with pytest.raises(tinker.AuthenticationError):
        guarded.client("tml-eve").create_sampling_client(base_model=guarded.model).result()
    with guarded.client("tml-ann") as ann, guarded.client("tml-bob") as bob:
        training = ann.create_lora_training_client(guarded.model, rank=2).result()
        path = training.save_state("mine").result().path
        sampler = ann.create_sampling_client(model_path=path).result()
        sampler.compute_logprobs(prompt(TEXT)).result()
        assert guarded.engine.adapters
        models = httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": "tml-bob"}).json()["data"]
        assert len(models) == 1
        for create in (bob.create_sampling_client, bob.create_training_client_from_state):
            with pytest.raises(tinker.NotFoundError):
                create(path).result()
        address, fields = f"{guarded.url}{API}/get_info", {"model_id": training.model_id}
        assert httpx.post(address, json=fields, headers={"x-api-key": "tml-bob"}).status_code == 404
        assert httpx.post(address, json=fields, headers={"x-api-key": "tml-ann"}).status_code == 200


def test_a_silent_session_ends_with_its_models_and_the_server_serves_on(guarded: Running) -> None:
    named = set(guarded.engine.adapters)  # of earlier tests
    with guarded.client("tml-ann") as gone:
        training = gone.create_lora_training_client(guarded.model, rank=2).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        sampler.compute_logprobs(prompt(TEXT)).result()
        kept = training.save_state("kept").result().path
        assert set(guarded.engine.adapters) > named
        session_id = training.model_id.partition(":")[0]
        while not guarded.service.sessions.has_ended(session_id):  # a sign of life that the SDK sends may come between
            guarded.clock[0] += 61
            httpx.post(f"{guarded.url}{API}/create_session", json={}, headers={"x-api-key": "tml-ann"})
        with guarded.client("tml-ann") as present:
            present.create_sampling_client(base_model=guarded.model).result()
            attempts: list[Callable[[], object]] = [
                lambda: training.forward([supervised()], "cross_entropy").result(),
                lambda: training.optim_step(types.AdamParams()).result(),
                lambda: sampler.compute_logprobs(prompt(TEXT)).result(),
                lambda: gone.create_lora_training_client(guarded.model, rank=2).result(),
            ]
            for attempt in attempts:
                with pytest.raises(tinker.APIStatusError, match="has ended: create a new client") as caught:
                    attempt()
                assert caught.value.status_code == 410
            assert set(guarded.engine.adapters) <= named
            restored = present.create_training_client_from_state(kept).result()
            step(restored, [supervised()])


def test_a_poll_is_asked_again_until_there_is_an_answer(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it can be ended, as all are where the server shuts down."""
    monkeypatch.setattr(endpoints, "POLL_S", 0.02)
    release, headers = threading.Event(), {"x-api-key": "tml-ann"}
    with guarded.client("tml-ann") as client, httpx.Client(base_url=guarded.url, headers=headers) as http:
        training = client.create_lora_training_client(guarded.model, rank=1).result()
        guarded.service.thread.post("ann", release.wait)
        future = training.forward([supervised()], "cross_entropy")
        body = {"request_id": f"{training.model_id}:1"}
        wait_until(lambda: body["request_id"] in guarded.service.futures)
        answer = http.post(f"{API}/retrieve_future", json=body)
        assert (answer.status_code, answer.json()["queue_state"]) == (408, "active")
        monkeypatch.setattr(endpoints, "POLL_S", 30.0)
        with ThreadPoolExecutor(1) as pool:
            names = {"x-request-id": "poll"}
            poll = pool.submit(lambda: http.post(f"{API}/retrieve_future", json=body, headers=names, timeout=60))
            address, root = f"{guarded.url}/admin/abort", {"authorization": "Bearer root"}
            wait_until(lambda: httpx.post(address, json={"request_id": "poll"}, headers=root).status_code == 200)
            assert poll.result(30).status_code == 503
        release.set()
        assert future.result().metrics["loss:sum"] > 0


def test_a_key_that_has_sent_many_passes_does_not_hold_up_the_step_of_another(
    guarded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training thread served requests in the order of arrival."""
    monkeypatch.setattr(endpoints, "POLL_S", 0.02)
    first, last, thread = threading.Event(), threading.Event(), guarded.service.thread
    post, posted = thread.post, list[str]()

    def noted(owner: str, job: Callable[[], object]) -> None:
        post(owner, job)
        posted.append(owner)

    with guarded.client("tml-ann") as ann, guarded.client("tml-bob") as bob:
        many, one = (each.create_lora_training_client(guarded.model, rank=1).result() for each in (ann, bob))
        one.forward_backward([supervised()], "cross_entropy").result()
        thread.post("ann", first.wait)
        passes = [many.forward([supervised()], "cross_entropy") for _ in range(10)]
        body = {"request_id": f"{many.model_id}:10"}
        wait_until(lambda: body["request_id"] in guarded.service.futures)
        monkeypatch.setattr(thread, "post", noted)
        step = one.optim_step(types.AdamParams())
        wait_until(lambda: "bob" in posted)
        thread.post("bob", last.wait)
        first.set()
        step.result()
        poll = httpx.post(f"{guarded.url}{API}/retrieve_future", json=body, headers={"x-api-key": "tml-ann"})
        last.set()
        assert poll.status_code == 408
        assert all(each.result().metrics for each in passes)


def test_more_models_than_the_server_trains_are_refused(guarded: Running) -> None:
    with guarded.client("tml-ann") as client:
        for _ in range(2):
            client.create_lora_training_client(guarded.model, rank=1).result()
        with pytest.raises(tinker.BadRequestError, match="2 models are in training for this key"):
            client.create_lora_training_client(guarded.model, rank=1).result()
        with guarded.client("tml-bob") as other:
            other.create_lora_training_client(guarded.model, rank=1).result()
    with guarded.client("tml-ann") as client:
        client.create_lora_training_client(guarded.model, rank=1).result()


def test_models_that_are_too_large_together_are_refused(tmp_path: Path) -> None:
    """A few dozen adapters of the largest rank took all memory of the machine."""
    trainer = LoraTrainer(build("llama"))
    trainer.create(LoraShape(4)).save(tmp_path, optimizer=False)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert trainer.num_bytes(LoraShape(4)) == 4 * size  # with gradients and two moments
    with serving(tmp_path / "adapters", max_model_bytes=4 * size) as server, server.client() as client:
        with pytest.raises(tinker.BadRequestError, match="beyond this server's limit"):
            client.create_lora_training_client(server.model, rank=5).result()
        client.create_lora_training_client(server.model, rank=4).result()
        with pytest.raises(tinker.BadRequestError, match="close a session, or train a smaller rank"):
            client.create_lora_training_client(server.model, rank=1).result()


def test_models_that_could_not_be_made_do_not_count(guarded: Running) -> None:
    with guarded.client("tml-ann") as client:
        training = client.create_lora_training_client(guarded.model, rank=1).result()
        path = training.save_weights_for_sampler("no-optimizer").result().path
        for _ in range(3):
            with pytest.raises(Failure, match="cannot be read"):
                client.create_training_client_from_state_with_optimizer(path).result()
        client.create_lora_training_client(guarded.model, rank=1).result()


def test_saved_weights_outlive_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as client:
        training = client.create_lora_training_client(server.model, rank=2, seed=1).result()
        step(training, [supervised()])
        path, expected = training.save_state("kept").result().path, logprobs(training, TEXT)
        training.save_weights_and_get_sampling_client().result()
    with serving(tmp_path) as server, server.client() as client:
        restored = client.create_training_client_from_state_with_optimizer(path).result()
        np.testing.assert_array_equal(logprobs(restored, TEXT), expected)
    assert [folder.name for folder in tmp_path.glob("*/snapshots/*")] == []
