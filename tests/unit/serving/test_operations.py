"""Health, readiness, metrics, models, administration, overload, request ids, the log."""

from __future__ import annotations

import json
import logging
import re
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from penstock import InferenceEngine, SamplingParams
from penstock.engine.requests import input_processor
from penstock.serving import ApiKey, ServingSettings, app
from penstock.serving.readiness import Readiness
from tests.http_sockets import PATIENCE_S, wait_until
from tests.unit.serving.service import CHAT, client_of, events

URL = "/v1/chat/completions"
ADMIN = {"x-api-key": "root"}
ENDLESS = {"step_s": 0.01, "max_sequence_length": 200_000}  # of an engine for requests that only an interruption ends


def samples_of(client: Any) -> dict[str, float]:
    """The values of /metrics, summed over labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def test_metrics_have_vllms_names_and_count() -> None:
    with client_of(step_s=0.01) as client:
        *chunks, _ = events(client.post(URL, json={**CHAT, "stream": True, "logprobs": True}))
        logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
        num_tokens = [len(entry["content"]) for entry in logprobs if entry]  # of each delta
        assert sum(num_tokens) == 6
        client.post(URL, json=CHAT)
        values = samples_of(client)
        assert values["vllm:generation_tokens_total"] == 12
        assert values["vllm:prompt_tokens_total"] == values["vllm:request_prompt_tokens_sum"] > 10
        assert values["vllm:request_success_total"] == 2
        assert values["vllm:time_to_first_token_seconds_count"] == values["vllm:e2e_request_latency_seconds_count"] == 2
        assert values["vllm:inter_token_latency_seconds_count"] == sum(num_tokens[1:]) + 5
        times = ("prefill", "decode", "inference", "queue")
        prefill, decode, inference, queue = (values[f"vllm:request_{name}_time_seconds_sum"] for name in times)
        assert prefill + decode == pytest.approx(inference)
        assert queue + inference == pytest.approx(values["vllm:e2e_request_latency_seconds_sum"])
        assert queue + prefill == pytest.approx(values["vllm:time_to_first_token_seconds_sum"])
        assert values["penstock:http_responses_total"] >= 2
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
            assert f"vllm:{name}" in values


def test_requests_that_end_early_are_counted_by_their_reason() -> None:
    """Regression: `vllm:request_success` had those that ended with stop or length only."""
    with client_of(step_s=0.05) as client:

        def is_counted() -> bool:  # once its step has ended, of a request whose deadline passed inside of a step
            assert client.post(URL, json={**CHAT, "max_tokens": 200, "deadline": 0.5}).status_code == 408
            text = client.get("/metrics").text
            assert 'request_success_total{finished_reason="abort"' in text
            return re.search(r'request_success_total\{finished_reason="deadline",\S* [1-9]', text) is not None

        wait_until(is_counted)


def test_a_model_says_how_long_its_sequences_may_be() -> None:
    with client_of(ServingSettings(served_model_name=("gpt-4o", "org/mine"))) as client:
        models = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["gpt-4o", "org/mine"]
        model = client.get("/v1/models/org/mine").json()
        assert model["max_model_len"] == model["context_length"] == 512
        assert isinstance(model["created"], int)
        assert (model["object"], model["owned_by"], model["root"]) == ("model", "penstock", "gpt-4o")
        assert client.get("/v1/models/scripted").status_code == 404
        assert client.post(URL, json={**CHAT, "model": "org/mine"}).json()["model"] == "org/mine"
        assert client.post(URL, json=CHAT).json()["model"] == "gpt-4o"


def test_the_model_of_the_package_has_a_name_of_its_own_rather_than_its_folders() -> None:
    engine = InferenceEngine()
    with TestClient(app(engine)) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == "penstock-demo"


def test_readiness_ends_when_work_waits_without_progress() -> None:
    now = [0.0]
    readiness = Readiness(10, clock=lambda: now[0])
    stats: dict[str, Any] = {"engine_status": "running", "queue": {"num_requests": 0}, "totals": {"steps": 5}}
    now[0] = 100
    assert readiness.reason(stats) is None  # idle is no stall
    stats["queue"]["num_requests"] = 1
    now[0] = 200
    assert readiness.reason(stats) is None  # the work may have come this moment
    now[0] = 209
    assert readiness.reason(stats) is None
    now[0] = 211
    assert readiness.reason(stats) == "stalled"
    stats["totals"] = {"steps": 6}
    assert readiness.reason(stats) is None
    assert readiness.reason({"engine_status": "loading"}) == "loading"


def test_draining_refuses_new_requests_and_can_be_ended() -> None:
    with client_of(ServingSettings(admin_key="root")) as client:
        assert client.get("/ready").status_code == 200
        assert client.post("/admin/drain", headers=ADMIN).json() == {"drained": True, "num_aborted": 0}
        assert client.get("/ready").json() == {"status": "draining"}
        assert client.get("/health").status_code == 200
        response = client.post(URL, json=CHAT)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        client.post("/admin/resume", headers=ADMIN)
        assert client.post(URL, json=CHAT).status_code == 200


class Background:
    """A request on a thread of its own."""

    def __init__(
        self, client: Any, body: dict[str, Any], headers: dict[str, str] | None = None, path: str = URL
    ) -> None:
        self.response: Any = None

        def run() -> None:
            self.response = client.post(path, json=body, headers=headers)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert self.response is not None
        return self.response


def wait_for_open_request(client: Any, state: str = "num_running") -> None:
    engine, pulse = client.app.state.server.engine, threading.Event()
    while engine.get_stats()["queue"][state] == 0:
        pulse.wait(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_an_administrator_aborts_a_request_and_its_client_is_told(stream: bool) -> None:
    with client_of(ServingSettings(admin_key="root"), **ENDLESS) as client:
        request = Background(client, {**CHAT, "max_tokens": 100_000, "stream": stream}, {"x-request-id": "mine"})
        wait_for_open_request(client)
        assert client.post("/admin/abort", json={"request_id": "mine"}, headers=ADMIN).status_code == 200
        response = request.wait()
        assert response.headers["x-request-id"] == "mine"
        if stream:
            *_, last = events(response)
            assert last["error"]["code"] == "request_aborted"
        else:
            assert response.status_code == 499
        assert client.post("/admin/abort", json={"request_id": "mine"}, headers=ADMIN).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_ends_a_request_that_is_still_encoded(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain, or an administrator, could end nothing before the engine had accepted it."""
    go = threading.Event()
    monkeypatch.setattr(input_processor, "encode_words", lambda *_: [go.wait(PATIENCE_S)][1:])
    with client_of(ServingSettings(admin_key="root")) as client:
        try:
            request = Background(client, {**CHAT, "bad_words": ["a"], "stream": stream})
            wait_for_open_request(client, "num_requests")
            drained = client.post("/admin/drain", json={"timeout_s": 0}, headers=ADMIN)
            assert drained.json() == {"drained": True, "num_aborted": 1}
            assert request.wait().status_code == 503
        finally:
            go.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_that_takes_too_long_ends_what_is_left_once(stream: bool) -> None:
    with client_of(ServingSettings(admin_key="root"), **ENDLESS) as client:
        request = Background(client, {**CHAT, "max_tokens": 100_000, "stream": stream})
        wait_for_open_request(client)
        drained = client.post("/admin/drain", json={"timeout_s": 0.05}, headers=ADMIN)
        assert drained.json() == {"drained": True, "num_aborted": 1}
        response = request.wait()
        assert response.status_code == (200 if stream else 503)
        error = events(response)[-1]["error"] if stream else response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "draining")
        assert "shutting down" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [URL, "/v1/messages", "/v1/responses"])
def test_a_request_that_the_engines_end_interrupts_is_the_servers_fault(path: str, stream: bool) -> None:
    """It was a 499, or in a stream an `invalid_request_error`, which clients take for a fault of their own."""
    with client_of(**ENDLESS) as client:
        length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body = {"input": "water"} if path == "/v1/responses" else {**CHAT, "model": client.app.state.server.names[0]}
        request = Background(client, {**body, length: 100_000, "stream": stream}, path=path)
        wait_for_open_request(client)
        client.app.state.server.engine.stop(drain=0)
        response = request.wait()
        assert response.status_code == (200 if stream else 503)
        assert "the engine was stopped" in response.text
        assert "invalid_request_error" not in response.text
        kinds = {URL: '"type":"server_error"', "/v1/messages": '"type":"api_error"'}
        assert kinds.get(path, "engine_closed") in response.text.replace(" ", "")


def test_a_fault_in_a_stream_is_its_last_frame() -> None:
    body = {**CHAT, "max_tokens": 100_000, "stream": True}
    with client_of(**ENDLESS) as client:
        engine = client.app.state.server.engine
        for deadline_s in (0.3, 3, 30):  # the machine may be slow to begin
            response = Background(client, {**body, "deadline": deadline_s}).wait()
            if response.status_code == 200 and len(events(response)) > 4:
                break
        *chunks, last = events(response)
        assert len(chunks) > 3
        assert last["error"]["code"] == "deadline_exceeded"
        assert not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
        assert engine.get_stats()["queue"]["num_requests"] == 0


def test_a_failed_step_is_a_500_and_the_server_serves_on() -> None:
    with client_of() as client:
        model = client.app.state.model
        model.fail_next(RuntimeError("boom"))
        response = client.post(URL, json=CHAT)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert client.post(URL, json=CHAT).status_code == 200


def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    with client_of(max_batch_size=1, max_queue_size=1) as client:
        model = client.app.state.model
        model.hold()
        requests = [Background(client, CHAT)]
        wait_until(lambda: model.plans == 1)  # its step begins once its place in the queue is free
        requests.append(Background(client, CHAT))
        wait_for_open_request(client, "num_queued_requests")
        for stream in (False, True):
            response = client.post(URL, json={**CHAT, "stream": stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "engine_overloaded"
        model.release()
        assert [request.wait().status_code for request in requests] == [200, 200]


def test_too_many_open_requests_are_a_429() -> None:
    with client_of(ServingSettings(max_concurrent_requests=1)) as client:
        model = client.app.state.model
        model.hold()
        request = Background(client, CHAT)
        wait_for_open_request(client)
        assert client.post(URL, json=CHAT).status_code == 429
        assert client.get("/health").status_code == 200
        model.release()
        assert request.wait().status_code == 200


def test_a_request_id_is_echoed_if_it_is_harmless() -> None:
    with client_of() as client:
        assert client.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        for value in ("", "a b", "x" * 200, 'a"b'):
            assert re.fullmatch(
                r"req-\w+", client.get("/version", headers={"x-request-id": value}).headers["x-request-id"]
            )


def test_the_log_has_a_line_per_request_and_nothing_of_its_text(caplog: pytest.LogCaptureFixture) -> None:
    with client_of() as client, caplog.at_level(logging.INFO, "penstock.serving"):
        body = {**CHAT, "messages": [{"role": "user", "content": "a secret word"}]}
        client.post(URL, json=body, headers={"x-request-id": "r1"})
        client.get("/made/up/secret")
        lines = [json.loads(record.message) for record in caplog.records]
    assert [(line["event"], line["status"], line["path"]) for line in lines] == [
        ("request", 200, URL),
        ("request", 404, "unknown"),
    ]
    assert lines[0]["request_id"] == "r1"
    assert lines[0]["completion_tokens"] == 6
    assert "secret" not in caplog.text
    assert "water" not in caplog.text


def test_the_log_names_route_and_key_of_refused_requests(caplog: pytest.LogCaptureFixture) -> None:
    """A key beyond its rate was logged without its name, at an unknown path."""
    key = ApiKey(name="app", key="app-key", requests_per_minute=1)  # type: ignore[arg-type]
    with client_of(ServingSettings(api_keys=(key,))) as client, caplog.at_level(logging.INFO, "penstock.serving"):
        for secret in ("app-key", "app-key", "wrong"):
            client.post(URL, json=CHAT, headers={"x-api-key": secret})
        client.post("/v1/made/up", json=CHAT)
        lines = [json.loads(record.message) for record in caplog.records]
        metrics = client.get("/metrics", headers={"x-api-key": "app-key"}).text
    assert [(line["status"], line["path"], line["key"]) for line in lines] == [
        (200, URL, "app"),
        (429, URL, "app"),
        (401, URL, ""),
        (401, "unknown", ""),
    ]
    assert f'penstock:http_responses_total{{path="{URL}",status="429"}} 1.0' in metrics


def test_the_openapi_document_describes_every_body() -> None:
    with client_of() as client:
        document = client.get("/openapi.json").json()
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
            reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]


def test_what_a_request_does_not_say_is_what_the_model_says() -> None:
    """Its `generation_config.json` counts, as it does in other servers."""
    with client_of() as client:
        server = client.app.state.server  # type: ignore[attr-defined]
        seen, generate = [], server.engine.generate

        def watched(prompt: Any, params: SamplingParams, **options: Any) -> Any:
            seen.append(params)
            return generate(prompt, params, **options)

        server.engine.default_params = lambda: SamplingParams(temperature=0.3, top_k=7, max_tokens=5)
        server.engine.generate = watched
        for body in (CHAT, {**CHAT, "temperature": 0.0, "stop": "x"}):
            assert client.post(URL, json=body).status_code == 200
        assert [(params.temperature, params.top_k, params.max_tokens) for params in seen] == [(0.3, 7, 6), (0.0, 7, 6)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (URL, CHAT),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {**CHAT, "model": "m"}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 2}}),
    ],
)
def test_a_model_that_is_greedy_by_itself_is_sampled_at_temperature_1(path: str, body: dict[str, Any]) -> None:
    """A client that sends no temperature got the same answer every time, and n choices were n copies."""
    with client_of(ServingSettings(served_model_name=("m",))) as client:
        server = client.app.state.server  # type: ignore[attr-defined]
        seen, generate = [], server.engine.generate

        def watched(prompt: Any, params: SamplingParams, **options: Any) -> Any:
            seen.append(params.temperature)
            return generate(prompt, params, **options)

        server.engine.default_params = lambda: SamplingParams(temperature=0.0)
        server.engine.generate = watched
        assert client.post(path, json=body).status_code == 200
        assert seen == [1.0]


@pytest.mark.parametrize(("path", "rest"), [(URL, {}), ("/v1/messages", {"max_tokens": 4})])
def test_a_chat_without_messages_is_refused_in_plain_words(path: str, rest: dict[str, int]) -> None:
    """It said "List should have at least 1 item after validation, not 0, got []"."""
    with client_of() as client:
        name = client.app.state.server.names[0]
        response = client.post(path, json={"model": name, "messages": [], **rest})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "messages is empty: pass at least one"


def test_refused_and_displaced_requests_are_metrics() -> None:
    with client_of(max_sequence_length=64) as client:
        long = {"messages": [{"role": "user", "content": "x" * 100}]}
        assert client.post(URL, json=long).status_code == 400
        assert client.post(URL, json={**long, "max_tokens": 5}).status_code == 400
        assert client.post(URL, json={**CHAT, "max_tokens": 1000}).status_code == 200  # cut to what fits
        text = client.get("/metrics").text
        assert re.search(r'penstock:refused_requests_total\{error="RequestTooLarge",model_name="[^"]*"\} 2\.0', text)
        assert "penstock:displaced_requests_total" in text
