"""The SDK of Weaver, unmodified, under `WeaverServiceHolder`: it speaks to a service that an engine of this process is.

The package is fetched when the tests run. Its service is not public, so the routes are those that the SDK calls.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from penstock import EngineOverloaded, ExecutionError, InferenceEngine, RequestError, SamplingParams
from penstock.backends import (
    RemoteApiInferenceServiceClient,
    WeaverServiceHolder,
    WeightSyncController,
)
from penstock.backends.services import holder_update
from tests.http_sockets import running
from tests.integration.outside.suites import download
from tests.scripted_engine import replying_engine
from tests.tokenizers_for_tests import byte_level

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def weaver(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The SDK, imported from its wheel; what it needs is installed for other reasons."""
    cache = Path(request.config.cache.mkdir("outside"))  # type: ignore[union-attr]
    wheel = cache / "nex_weaver-1.19.2-py3-none-any.whl"
    if not wheel.exists():
        download("nex-weaver==1.19.2", cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(wheel))
        import weaver

        # The thread that says that the session lives is waited for when it is closed.
        patch.setattr(weaver, "ServiceClient", functools.partial(weaver.ServiceClient, heartbeat_interval=0.01))
        patch.setenv("WEAVER_API_KEY", "sk-x")
        yield weaver
    for name in [name for name in sys.modules if name.partition(".")[0] == "weaver"]:
        del sys.modules[name]


class WeaverService:
    """What the SDK calls, over an engine; keeps the bodies by path."""

    def __init__(self, engine: InferenceEngine, tokenizer: str) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.bodies: dict[str, list[Any]] = {}
        self.failure: JSONResponse | None = None  # the answer to a sample, instead of one

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/api/v1/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request) -> JSONResponse:
        path, body = request.path_params["path"], json.loads(await request.body() or b"{}")
        name = path.rpartition("/")[2]
        self.bodies.setdefault(name, []).append(body)
        if name in ("sessions", "sampling-sessions", "models"):
            return JSONResponse({"id": f"{name}-1", "tokenizer_path": self.tokenizer})
        if name == "samples" and self.failure is not None:
            return self.failure
        responses: dict[str, Any] = {
            "export-sampler": {"model_path": f"weaver://run/{body.get('path')}"},
            "logprobs": {"result": {"prompt_logprobs": [None, -0.5, -0.25]}},
        }
        response = {"result": await self.sampled(body)} if name == "samples" else responses.get(name, {})
        return JSONResponse({"id": "operation-1", "status": "done", "response": response})

    async def sampled(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sequences of the engine for the body of a sample."""
        given = body["sampling_params"]
        ids = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
        params = SamplingParams(max_tokens=given["max_tokens"], temperature=given["temperature"], n=body["num_samples"])
        output = await self.engine.generate(ids, params)
        sequences = [
            {"tokens": each.token_ids, "logprobs": each.token_logprobs, "stop_reason": each.finish_reason}
            for each in output.outputs
        ]
        return {"sequences": sequences, "weight_version": f"step-{len(self.bodies.get('optimizer-steps', ()))}"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[WeaverService]:
    byte_level().save_pretrained(str(tmp_path))
    with replying_engine(["The answer is 4."]) as engine:
        yield WeaverService(engine, str(tmp_path))


def test_the_sdk_takes_the_arguments_that_are_passed(weaver: Any) -> None:
    from weaver.sampling_client import SamplingClient
    from weaver.training_client import TrainingClient

    client = weaver.ServiceClient.func
    inspect.signature(client).bind(base_url=None)
    inspect.signature(client.create_sampling_client).bind(None, base_model="m", model_path="p")
    inspect.signature(client.create_model).bind(None, base_model="m", training_mode="lora", lora_config={"rank": 8})
    inspect.signature(SamplingClient.sample).bind(None, prompt=1, sampling_params=2, num_samples=3)
    inspect.signature(SamplingClient.compute_logprobs).bind(None, prompt=1)
    inspect.signature(TrainingClient.forward_backward).bind(None, [], "importance_sampling", loss_fn_config=None)
    inspect.signature(TrainingClient.save_weights_for_sampler).bind(None, name="x")


@contextmanager
def client_of(service: WeaverService) -> Iterator[tuple[RemoteApiInferenceServiceClient, WeaverServiceHolder]]:
    """A client of a served service, with its holder."""
    with running(service.app()) as server:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        section = {"backend": "weaver", "base_url": url, "model": "m", "tokenizer": service.tokenizer, "max_tokens": 40}
        client = RemoteApiInferenceServiceClient({"inference_service": section, "temperature": 0.7})
        holder = WeaverServiceHolder("m", base_url=url, tokenizer_path=service.tokenizer)
        client.set_service_holder(holder)
        yield client, holder
        holder.close()


@pytest.mark.usefixtures("weaver")
def test_records_hold_what_the_service_sampled(service: WeaverService) -> None:
    with client_of(service) as (client, holder):
        controller = WeightSyncController(update=holder_update(holder))
        client.set_weight_sync_controller(controller, "policy")
        for response in (client.completion("2+2?"), client.generate(HELLO, n=2, max_tokens=12)):
            assert response["nexrl_train"]["response_tokens"] == [*byte_level().encode("The answer is 4.")[1:], 2]
            assert response["nexrl_train"]["response_logprobs"] == [0.0] * 12
            assert response["nexrl_train"]["weight_version"] == "step-0"
        assert service.bodies["samples"][0]["prompt"]["chunks"][0]["tokens"] == byte_level().encode("2+2?")
        assert [body["sampling_params"]["max_tokens"] for body in service.bodies["samples"]] == [40, 12]
        assert holder.compute_logprobs([5, 6, 7]) == [None, -0.5, -0.25]
        holder.optim_step(1e-3)
        assert controller.train_worker_notify_weight_update("worker-0", "policy")
        assert holder.get_current_sampling_path() == "weaver://run/policy-1"
        assert service.bodies["optimizer-steps"][0]["payload"]["adam_params"]["learning_rate"] == 1e-3
        assert client.completion("2+2?")["nexrl_train"]["weight_version"] == "step-1"
        assert service.bodies["sampling-sessions"][-1]["model_path"] == "weaver://run/policy-1"
    assert "terminate" in service.bodies


@pytest.mark.usefixtures("weaver")
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"code": "bad", "message": "no"}}, RequestError),
        (429, {"error": {"code": "full", "message": "later"}}, EngineOverloaded),
        (500, {"error": {"code": "broken", "message": "oh"}}, ExecutionError),
        (200, {"id": "operation-1", "status": "error", "error": {"message": "oh"}}, ExecutionError),
    ],
)
def test_errors_of_the_sdk_have_the_types_of_the_package(
    service: WeaverService, status: int, body: dict[str, Any], error: type[Exception]
) -> None:
    service.failure = JSONResponse(body, status)
    with client_of(service) as (client, _):
        with pytest.raises(error):
            client.completion("2+2?")
        service.failure = None
        assert client.completion("2+2?")["choices"][0]["text"].startswith("The answer is 4.")
