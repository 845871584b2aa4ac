"""`/v1/embeddings`: inputs of every form, both encodings, dimensions, limits, errors in the API's shape."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from penstock.serving import ServingSettings, app
from tests.http_sockets import wait_until
from tests.tokenizers_for_tests import byte_level
from tests.unit.serving.service import client_of
from tests.unit.testing.echo import EchoEngine

URL = "/v1/embeddings"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(ServingSettings(max_embeddings=4)) as client:
        yield client


def vectors(client: TestClient, **body: Any) -> list[list[float]]:
    """The embeddings of a request that succeeds, in the order of its inputs."""
    response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(entry["object"], entry["index"]) for entry in data] == [("embedding", i) for i in range(len(data))]
    return [entry["embedding"] for entry in data]


def expected(ids: list[int], size: int = 8) -> list[float]:
    """What the scripted model documents, as a mean of unit length."""
    mean = [sum(math.cos((token + 1) * (j + 1)) for token in ids) / len(ids) for j in range(size)]
    length = math.sqrt(sum(value * value for value in mean))
    return [value / length for value in mean]


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text)


def test_inputs_of_every_form_give_the_same_vectors(client: TestClient) -> None:
    first, second = "water falls", "it rains"
    both = [pytest.approx(expected(ids_of(text)), abs=1e-6) for text in (first, second)]
    assert vectors(client, input=[first, second]) == both
    assert vectors(client, input=[ids_of(first), ids_of(second)]) == both
    assert vectors(client, input=first) == vectors(client, input=ids_of(first)) == both[:1]


def test_base64_holds_the_same_numbers_as_float32(client: TestClient) -> None:
    (numbers,) = vectors(client, input="water")
    (text,) = vectors(client, input="water", encoding_format="base64")
    assert list(struct.unpack("<8f", base64.b64decode(text))) == pytest.approx(numbers, abs=1e-7)  # type: ignore[arg-type]
    assert vectors(client, input="water", encoding_format="float") == [numbers]


def test_dimensions_pooling_and_normalize_shape_the_vector(client: TestClient) -> None:
    ids = ids_of("water")
    assert vectors(client, input=ids, dimensions=3) == [pytest.approx(expected(ids, 3), abs=1e-6)]
    assert vectors(client, input=ids, pooling="last") == [pytest.approx(expected(ids[-1:]), abs=1e-6)]
    raw = [math.cos(ids[-1] + 1), math.cos(2 * (ids[-1] + 1))]
    last = vectors(client, input=ids, pooling="last", normalize=False, dimensions=2)
    assert last == [pytest.approx(raw, abs=1e-6)]


def test_usage_counts_the_prompts_tokens(client: TestClient) -> None:
    answer = client.post(URL, json={"input": ["water", "it rains"], "user": "u"}).json()
    count = len(ids_of("water")) + len(ids_of("it rains"))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert answer["object"] == "list"
    assert answer["model"] == client.get("/v1/models").json()["data"][0]["id"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": ""}, "the input is empty"),
        ({"input": []}, "the input is empty"),
        ({"input": ["water", ""]}, "the input is empty"),
        ({"input": [[1], []]}, "the input is empty"),
        ({"input": ["a"] * 5}, "5 inputs are more than this server allows (4)"),
        ({"input": "water", "dimensions": 9}, "dimensions=9 is more than the 8 that this model has"),
        ({"input": "water", "dimensions": 0}, "dimensions"),
        ({"input": "water", "dimensions": 2.5}, "dimensions"),
        ({"input": "water", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "water", "pooling": "max"}, "pooling"),
        ({"input": [1, -1]}, "token ids must be at least 0"),
        ({"input": [10**6]}, "outside the model's vocabulary"),
        ({"input": [1] * 600}, "the limit is 512"),
        ({"input": "water \ud800"}, "not valid JSON"),
    ],
)
def test_a_request_that_cannot_be_served_is_a_400(client: TestClient, body: dict[str, Any], message: str) -> None:
    response = client.post(URL, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]


def test_a_prompt_may_fill_the_context_and_a_longer_one_says_so(client: TestClient) -> None:
    assert len(vectors(client, input=[1] * 512)) == 1
    error = client.post(URL, json={"input": [1] * 513}).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_an_unknown_model_is_a_404(client: TestClient) -> None:
    response = client.post(URL, json={"input": "water", "model": "text-embedding-9"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_more_inputs_than_the_queue_holds_are_served() -> None:
    with client_of(max_queue_size=3) as client:
        assert len(vectors(client, input=["water"] * 20)) == 20


def test_a_full_queue_is_a_429() -> None:
    with client_of(max_queue_size=1, max_batch_size=1) as client:
        engine, model = client.app.state.server.engine, client.app.state.model  # type: ignore[attr-defined]
        model.hold()
        handles = [engine.generate("water")]
        wait_until(lambda: model.plans == 1)  # its step begins once its place in the queue is free
        handles.append(engine.generate("water"))
        response = client.post(URL, json={"input": ["a", "b"]})
        assert response.status_code == 429
        assert "retry-after" in response.headers
        assert all(not handle.done() for handle in handles)


def test_an_engine_that_gives_no_embeddings_is_a_404() -> None:
    engine = EchoEngine()
    with TestClient(app(engine)) as client:
        response = client.post(URL, json={"input": "water"})
    engine.stop(0)
    assert response.status_code == 404
    assert "gives no embeddings" in response.json()["error"]["message"]


def test_a_deadline_that_passes_is_a_408(client: TestClient) -> None:
    with client_of(step_s=0.2) as slow:
        response = slow.post(URL, json={"input": "water", "deadline": 0.05})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
