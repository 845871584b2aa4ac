"""LoRA adapters over HTTP: chosen by the model's name, loaded and unloaded by an administrator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient

from penstock import InferenceEngine
from penstock.serving import ServingSettings, app
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level
from tests.unit.serving.service import CHAT, client_of

ADMIN = {"Authorization": "Bearer root"}
SETTINGS = ServingSettings(admin_key="root", served_model_name="base")
PROMPT = [5, 6, 7, 8]


def saved(base: Any, seed: int, folder: Path) -> tuple[str, list[int]]:
    """The folder of an adapter, and peft's own greedy tokens after `PROMPT`."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return str(folder), greedy(model)


def greedy(model: Any, num_tokens: int = 8) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture
def client() -> Iterator[TestClient]:
    engine = InferenceEngine(
        base := build("llama", vocab_size=512), byte_level(), batch_timeout_ms=0, kv_cache_tokens=4096, num_threads=1
    )
    with TestClient(api := app(engine, SETTINGS)) as made:
        api.state.base = base
        yield made
    engine.stop(0)


def answer(client: TestClient, model: str) -> Any:
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    body = {"model": model, "token_ids": PROMPT, "sampling_params": params}
    return client.post("/inference/v1/generate", json=body)


def post(client: TestClient, path: str, **body: Any) -> Any:
    return client.post(path, json=body, headers=ADMIN)


def ids(response: Any) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_an_adapter_is_loaded_served_by_its_name_replaced_in_place_and_unloaded(
    client: TestClient, tmp_path: Path
) -> None:
    base = client.app.state.base  # type: ignore[attr-defined]
    (first, own_first), (second, own_second) = (saved(base, seed, tmp_path / str(seed)) for seed in (1, 2))
    assert len({tuple(own) for own in (own_first, own_second, greedy(base))}) == 3
    assert answer(client, "poet").status_code == 404
    loaded = post(client, "/v1/load_lora_adapter", lora_name="poet", lora_path=first)
    assert loaded.status_code == 200
    assert ids(answer(client, "poet")) == own_first
    assert ids(answer(client, "base")) == greedy(base)
    models = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
    assert models == {"base": None, "poet": "base"}
    assert client.get("/v1/models/poet").json()["root"] == "poet"
    again = post(client, "/load_lora_adapter", lora_name="poet", lora_path=second)
    assert again.json()["generation"] > loaded.json()["generation"]
    assert ids(answer(client, "poet")) == own_second
    assert post(client, "/v1/unload_lora_adapter", lora_name="poet").status_code == 200
    gone = answer(client, "poet")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert ids(answer(client, "base")) == greedy(base)


def test_every_api_that_generates_takes_an_adapter_s_name(client: TestClient, tmp_path: Path) -> None:
    folder, _ = saved(client.app.state.base, 1, tmp_path)  # type: ignore[attr-defined]
    post(client, "/v1/load_lora_adapter", lora_name="poet", lora_path=folder)
    chat = [{"role": "user", "content": "hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 4, "temperature": 0},
        "/v1/embeddings": {"input": PROMPT},
        "/v1/chat/completions": {"messages": chat, "max_tokens": 4},
        "/v1/responses": {"input": "hi", "max_output_tokens": 4},
        "/v1/messages": {"messages": chat, "max_tokens": 4},
    }
    answers = {}
    for path, body in bodies.items():
        replies = [client.post(path, json=body | {"model": model}) for model in ("poet", "base")]
        assert [reply.status_code for reply in replies] == [200, 200], (path, replies[0].text)
        assert replies[0].json()["model"] == "poet"
        answers[path] = [reply.json() for reply in replies]
    poet, base = (reply["data"][0]["embedding"] for reply in answers["/v1/embeddings"])
    assert poet != base


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("load", {"lora_name": "a", "lora_path": "/nowhere"}, 400, "cannot be read"),
        ("load", {"lora_name": "base", "lora_path": "/nowhere"}, 400, "name of the model"),
        ("load", {"lora_name": "", "lora_path": "/nowhere"}, 400, "lora_name"),
        ("load", {"lora_name": "a"}, 400, "lora_path"),
        ("load", {"lora_name": "a", "lora_path": "/x", "rank": 4}, 400, "rank"),
        ("unload", {"lora_name": "a"}, 404, "no adapter"),
        ("unload", {}, 400, "lora_name"),
    ],
)
def test_what_cannot_be_loaded_or_unloaded_is_refused_and_nothing_changes(
    client: TestClient, path: str, body: dict[str, Any], status: int, word: str
) -> None:
    response = post(client, f"/v1/{path}_lora_adapter", **body)
    assert response.status_code == status
    assert word in response.json()["error"]["message"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base"]


def test_a_loaded_adapter_is_not_replaced_where_that_is_ruled_out(client: TestClient, tmp_path: Path) -> None:
    folder, own = saved(client.app.state.base, 1, tmp_path)  # type: ignore[attr-defined]
    post(client, "/v1/load_lora_adapter", lora_name="poet", lora_path=folder)
    refused = post(client, "/v1/load_lora_adapter", lora_name="poet", lora_path=folder, load_inplace=False)
    assert refused.status_code == 400
    assert "load_inplace" in refused.json()["error"]["message"]
    assert ids(answer(client, "poet")) == own


def test_nobody_but_the_administrator_loads_adapters() -> None:
    body = {"lora_name": "a", "lora_path": "/nowhere"}
    paths = [f"{prefix}/{verb}_lora_adapter" for prefix in ("", "/v1") for verb in ("load", "unload")]
    with client_of(SETTINGS) as client:
        assert {client.post(path, json=body).status_code for path in paths} == {401}
        assert post(client, paths[0], **body).status_code == 400  # a scripted model takes no adapters
        assert client.post("/v1/chat/completions", json=CHAT | {"model": "a"}).status_code == 404
    with client_of() as client:
        assert {client.post(path, json=body, headers=ADMIN).status_code for path in paths} == {404}
