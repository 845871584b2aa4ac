"""The server over several replicas: the same answers, and metrics of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from penstock import ReplicatedEngine, ScriptedModel
from penstock.serving import app
from tests.tokenizers_for_tests import byte_level
from tests.unit.serving.service import CHAT, TEXT

URL = "/v1/chat/completions"


@pytest.fixture
def client() -> Iterator[TestClient]:
    tokenizer = byte_level()
    models = [ScriptedModel(tokenizer.encode(TEXT, add_special_tokens=False)) for _ in range(2)]
    engine = ReplicatedEngine(models, tokenizer, batch_timeout_ms=0, max_sequence_length=512, routing="round_robin")
    engine.start()
    with TestClient(app(engine)) as client:
        yield client
    engine.stop(drain=0)


def test_requests_over_http_are_shared_by_the_replicas(client: TestClient) -> None:
    answers = [client.post(URL, json=CHAT).json()["choices"][0]["message"]["content"] for _ in range(4)]
    assert len(set(answers)) == 1
    assert client.get("/ready").json() == {"status": "ready"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["max_model_len"] == 512
    samples = [
        sample for family in text_string_to_metric_families(client.get("/metrics").text) for sample in family.samples
    ]
    by_replica = {
        (sample.name, sample.labels["replica"]): sample.value for sample in samples if "replica" in sample.labels
    }
    for number in "01":
        assert by_replica["penstock:replica_routed_requests", number] == 2
        assert by_replica["penstock:replica_running", number] == 0
        assert by_replica["penstock:replica_up", number] == 1
    assert sum(sample.value for sample in samples if sample.name == "vllm:request_success_total") == 4
