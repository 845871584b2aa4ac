"""The controller: modes, update functions, failures, and what it tells."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from penstock import ConfigurationError, ExecutionError, WeightsError
from penstock.backends.services import (
    SyncSettings,
    WeightSyncController,
    WeightUpdate,
    disk_update,
    holder_update,
    network_update,
)
from tests.http_sockets import running

TAG = "policy"


def ignore(update: WeightUpdate) -> None:
    pass


def test_sync_mode_blocks_after_each_batch_until_its_weights_arrive() -> None:
    controller = WeightSyncController({"sync_mode": "sync"}, update=ignore)
    assert controller.check_rollout_service_status(TAG) == "continue"
    controller.trajectory_pool_notify_batch_ready(TAG)
    assert controller.check_rollout_service_status(TAG) == "block"
    assert controller.train_worker_notify_weight_update("worker-0", TAG)
    assert controller.check_rollout_service_status(TAG) == "continue"
    assert controller.get_rollout_model_version(TAG) == 1


def test_batch_async_mode_lets_rollouts_run_ahead_by_the_threshold_and_no_further() -> None:
    controller = WeightSyncController(sync_mode="batch-async", staleness_threshold=2, update=ignore)
    statuses = []
    for _ in range(3):
        controller.trajectory_pool_notify_batch_ready(TAG)
        statuses.append(controller.check_rollout_service_status(TAG))
    assert statuses == ["continue", "continue", "block"]
    controller.train_worker_notify_weight_update("worker-0", TAG)
    assert controller.check_rollout_service_status(TAG) == "continue"


def test_fully_async_mode_never_waits_for_training_and_still_takes_every_new_version() -> None:
    """No code path asked for an update in this mode, so the weights stayed those of the start."""
    versions = list[int]()
    controller = WeightSyncController(sync_mode="fully-async", update=lambda update: versions.append(update.version))
    for _ in range(5):
        controller.trajectory_pool_notify_batch_ready(TAG)
        assert controller.check_rollout_service_status(TAG) == "continue"
    for _ in range(2):
        controller.train_worker_notify_weight_update("worker-0", TAG)
    assert versions == [1, 2]


def test_services_do_not_wait_for_each_other() -> None:
    """All services shared one lock."""
    controller = WeightSyncController(update=ignore)
    controller.trajectory_pool_notify_batch_ready("policy")
    assert controller.check_rollout_service_status("policy") == "block"
    controller.wait_for_weight_sync("judge")


def test_the_config_may_be_a_dict_config_with_a_section() -> None:
    config = DictConfig(
        {
            "weight": {
                "sync_mode": "batch-async",
                "staleness_threshold": 3,
                "sync_weight_path": "/w",
                "sync_method": "mock",
            }
        }
    )
    assert WeightSyncController(config).settings == SyncSettings("batch-async", 3, "/w")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sync_mode": "sometimes"}, "sync_mode must be one of sync, fully-async, batch-async"),
        ({"staleness_threshold": -1}, "staleness_threshold must be an integer >= 0"),
        ({"staleness_treshold": 1}, "did you mean 'staleness_threshold'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WeightSyncController(config)


def test_a_service_without_an_update_function_cannot_be_updated() -> None:
    with pytest.raises(ConfigurationError, match="nothing moves the weights of 'policy'"):
        WeightSyncController().sync_weight_to_rollout_service(TAG)


async def test_an_update_may_be_a_coroutine_function_in_both_ways() -> None:
    seen = list[WeightUpdate]()

    async def update(task: WeightUpdate) -> None:
        await asyncio.sleep(0)
        seen.append(task)

    controller = WeightSyncController({"sync_weight_path": "/w"})
    controller.set_update(TAG, update)
    assert await controller.async_weight_to_rollout_service(TAG)
    assert await asyncio.to_thread(controller.sync_weight_to_rollout_service, TAG)
    assert await controller.atrain_worker_notify_weight_update("worker-0", TAG)
    assert seen == [WeightUpdate(TAG, version, "/w") for version in (1, 2, 3)]


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_failed_update_is_told_to_the_trainer_and_to_every_request(is_async: bool) -> None:
    def fail(update: WeightUpdate) -> None:
        raise OSError("the disk is full")

    controller = WeightSyncController(update=fail)
    with pytest.raises(WeightsError, match="updating the weights of 'policy' failed: OSError: the disk is full"):
        await update(controller, is_async)
    with pytest.raises(WeightsError, match="the disk is full"):
        controller.check_rollout_service_status(TAG)
    with pytest.raises(WeightsError, match="the disk is full"):
        await controller.await_for_weight_sync(TAG)
    controller.set_update(TAG, ignore)
    controller.sync_weight_to_rollout_service(TAG)
    await controller.await_for_weight_sync(TAG)
    assert controller.get_rollout_model_version(TAG) == 1


async def update(controller: WeightSyncController, is_async: bool) -> None:
    if is_async:
        await controller.async_weight_to_rollout_service(TAG)
    else:
        controller.sync_weight_to_rollout_service(TAG)


async def test_weights_that_an_engine_calls_mixed_are_called_so_to_everyone() -> None:
    def fail(update: WeightUpdate) -> None:
        raise WeightsError("half of them", is_mixed=True)

    controller = WeightSyncController(update=fail)
    for call in (controller.async_weight_to_rollout_service, controller.await_for_weight_sync):
        with pytest.raises(WeightsError, match="half of them") as caught:
            await call(TAG)
        assert caught.value.is_mixed


async def test_a_cancelled_update_that_had_begun_counts_as_failed_because_weights_may_be_half_written() -> None:
    begun = asyncio.Event()

    async def hang(update: WeightUpdate) -> None:
        begun.set()
        await asyncio.Event().wait()

    controller = WeightSyncController(update=hang)
    task = asyncio.create_task(controller.async_weight_to_rollout_service(TAG))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(WeightsError, match="CancelledError"):
        controller.wait_for_weight_sync(TAG)
    controller.resume(TAG)
    controller.wait_for_weight_sync(TAG)


async def test_weights_are_moved_over_http_and_failures_of_the_server_are_told() -> None:
    bodies, keys = list[tuple[str, Any]](), list[str | None]()

    async def answer(request: Request) -> Response:
        keys.append(request.headers.get("Authorization"))
        bodies.append((request.url.path, await request.json()))
        if "bad" in str(bodies[-1][1].values()):
            return JSONResponse({"success": False, "message": "no such folder"})
        return Response(status_code=500 if "broken" in str(bodies[-1][1].values()) else 200)

    routes = [Route(path, answer, methods=["POST"]) for path in ("/update_weights", "/update_weights_from_disk")]
    with running(Starlette(routes=routes)) as server:
        url = f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        network, disk = network_update(url, "m", "lora", api_key="root"), disk_update(f"http://{url}/v1")
        network(WeightUpdate(TAG, 1, "/w"))
        disk(WeightUpdate(TAG, 1, "/w"))
        with pytest.raises(ExecutionError, match="no such folder"):
            disk(WeightUpdate(TAG, 1, "bad"))
        with pytest.raises(ExecutionError, match="answered 500"):
            disk(WeightUpdate(TAG, 1, "broken"))
    assert keys[:2] == ["Bearer root", None]  # no key could be sent, and so no update reached a server that needs one
    assert bodies[:2] == [
        ("/update_weights", {"model_name": "m", "weight_type": "lora", "weight_path": "/w"}),
        ("/update_weights_from_disk", {"model_path": "/w"}),
    ]


def test_a_holder_is_updated_by_its_own_path() -> None:
    calls = list[str]()

    class Holder:
        def save_weights_for_sampler(self, name: str) -> str:
            calls.append(name)
            return f"tinker://{name}"

        def set_current_sampling_path(self, path: str) -> None:
            calls.append(path)

        def update_sampling_client(self) -> None:
            calls.append("changed")

    controller = WeightSyncController(update=holder_update(Holder()))
    controller.sync_weight_to_rollout_service(TAG)
    assert calls == ["policy-1", "tinker://policy-1", "changed"]
