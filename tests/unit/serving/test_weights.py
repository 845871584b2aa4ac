"""Weight updates, pauses and sleep over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from penstock import InferenceEngine, SamplingParams
from penstock.errors import WeightsError
from penstock.serving import ServingSettings, app
from tests.drive import logprobs_by_transformers
from tests.tiny_models import build
from tests.unit.serving.service import CHAT, client_of

ADMIN = {"Authorization": "Bearer root"}
WITH_ADMIN = ServingSettings(admin_key="root")
URL = "/v1/chat/completions"


def status_and_code(response: Any) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def test_a_folder_becomes_the_weights_that_requests_are_answered_with(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "old")  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.save_pretrained(tmp_path / "new")  # type: ignore[operator]
    engine = InferenceEngine(tmp_path / "old", skip_tokenizer_init=True, batch_timeout_ms=0, kv_cache_tokens=4096)
    with TestClient(app(engine, WITH_ADMIN)) as client:
        update = client.post("/update_weights", json={"weight_dir": str(tmp_path / "new")}, headers=ADMIN)
        assert update.json() == {"status": "ok", "weight_version": 1}
        output = engine.generate(
            [5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
        ).result()
    (out,) = output.outputs
    assert out.weight_versions == [1] * 6
    assert out.token_logprobs == pytest.approx(logprobs_by_transformers(model, [5, 6, 7], out.token_ids), abs=1e-4)
    engine.stop(0)


def test_a_folder_has_the_name_that_service_clients_give_it_and_no_other(tmp_path: Path) -> None:
    """Both were ignored: the answer was 200 with a new version, and a borrowed module kept its old weights."""
    model, old = build("llama"), build("llama")
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    engine = InferenceEngine(old, skip_tokenizer_init=True, kv_cache_tokens=4096)
    with TestClient(app(engine, WITH_ADMIN)) as client:
        misspelled = client.post("/update_weights", json={"model_path": str(tmp_path)}, headers=ADMIN)
        assert misspelled.status_code == 400
        assert engine.weight_version == 0
        body = {"model_name": "m", "weight_type": "full", "weight_path": str(tmp_path)}
        assert client.post("/update_weights", json=body, headers=ADMIN).json()["weight_version"] == 1
    engine.stop(0)
    for ours, theirs in zip(old.parameters(), model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_the_engine_is_told_what_becomes_of_requests() -> None:
    with client_of(WITH_ADMIN) as client:
        for version, mode in enumerate(("abort", "wait", "keep"), 1):
            update = client.post(f"/update_weights?mode={mode}", headers=ADMIN)
            assert update.json()["weight_version"] == version
        assert status_and_code(client.post("/update_weights?mode=later", headers=ADMIN)) == (400, None)
        assert client.post(URL, json=CHAT).status_code == 200


def test_weights_that_do_not_fit_are_the_trainer_s_fault_and_change_nothing(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    engine = InferenceEngine(tmp_path, skip_tokenizer_init=True, kv_cache_tokens=4096)
    with TestClient(app(engine, WITH_ADMIN)) as client:
        refused = client.post("/update_weights", json={"weight_dir": str(tmp_path / "nowhere")}, headers=ADMIN)
        assert status_and_code(refused) == (400, "invalid_weights")
        assert engine.weight_version == 0
    engine.stop(0)


def test_mixed_weights_are_the_server_s_fault() -> None:
    with client_of(WITH_ADMIN) as client:
        client.app.state.model.fail_next(WeightsError("half of them", is_mixed=True))  # type: ignore[attr-defined]
        assert status_and_code(client.post("/update_weights", headers=ADMIN)) == (500, "mixed_weights")


def test_a_paused_server_is_not_ready_and_answers_after_it_was_resumed() -> None:
    with client_of(WITH_ADMIN) as client:
        assert client.post("/pause", params={"mode": "keep", "clear_cache": "false"}, headers=ADMIN).json() == {
            "status": "paused"
        }
        assert client.get("/is_paused", headers=ADMIN).json() == {"is_paused": True}
        assert client.get("/ready").json() == {"status": "paused"}
        assert client.post("/update_weights", json={"weight_dir": None}, headers=ADMIN).status_code == 200
        assert client.post("/resume", headers=ADMIN).json() == {"status": "resumed"}
        assert client.get("/is_paused", headers=ADMIN).json() == {"is_paused": False}
        assert client.post(URL, json=CHAT).status_code == 200


@pytest.mark.parametrize("level", ["1", "2", "cache", "weights", "all", "discard"])
def test_a_sleeping_server_wakes_up(level: str) -> None:
    with client_of(WITH_ADMIN) as client:
        assert client.post(f"/sleep?level={level}", headers=ADMIN).json() == {"status": "sleeping"}
        assert client.get("/is_sleeping", headers=ADMIN).json() == {"is_sleeping": True}
        assert client.post("/wake_up", headers=ADMIN).json() == {"status": "awake"}
        assert client.post(URL, json=CHAT).status_code == 200


def test_a_server_that_drops_its_weights_wakes_once_its_folder_is_there_again(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "moved"
    build("llama").save_pretrained(folder)  # type: ignore[operator]
    engine = InferenceEngine(folder, skip_tokenizer_init=True, kv_cache_tokens=4096)
    with TestClient(app(engine, WITH_ADMIN)) as client:
        before = engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=4, logprobs=0)).result()
        assert client.post("/sleep?level=weights", headers=ADMIN).status_code == 200
        folder.rename(elsewhere)
        assert status_and_code(client.post("/wake_up", headers=ADMIN)) == (400, "invalid_weights")
        assert client.get("/is_sleeping", headers=ADMIN).json() == {"is_sleeping": True}
        elsewhere.rename(folder)
        assert client.post("/wake_up", headers=ADMIN).json() == {"status": "awake"}
        after = engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=4, logprobs=0)).result()
    assert after.outputs == before.outputs
    engine.stop(0)


def test_calls_out_of_turn_are_conflicts() -> None:
    with client_of(WITH_ADMIN) as client:
        for path in ("/resume", "/wake_up"):
            assert status_and_code(client.post(path, headers=ADMIN)) == (409, "engine_state")
        assert status_and_code(client.post("/sleep?level=deep", headers=ADMIN)) == (400, None)


def test_nobody_but_the_administrator_changes_weights() -> None:
    paths = ("/update_weights", "/pause", "/resume", "/sleep", "/wake_up")
    with client_of(WITH_ADMIN) as client:
        assert {client.post(path).status_code for path in paths} == {401}
        assert client.get("/is_paused").status_code == 401
    with client_of() as client:
        assert {client.post(path, headers=ADMIN).status_code for path in paths} == {404}
