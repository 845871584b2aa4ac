"""Requests between the queue and a replica that fails just then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import EngineClosed
from penstock.api.arguments import read_arguments
from penstock.api.log import engine_logger
from penstock.config import EngineConfig
from penstock.engine.loop.gate import EngineState
from penstock.engine.observe.metrics import Metrics
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.requests.request import new_request
from penstock.scheduling.admission import Admission
from penstock.scheduling.routing import by_prefix


def failing_replica() -> Any:
    """A replica that fails when it is given its first request."""

    def post(action: object, requests: object) -> None:
        replica.is_live = False
        raise EngineClosed("the engine failed")

    host = SimpleNamespace(post=post, try_post=lambda action: None)
    parts = SimpleNamespace(cache=SimpleNamespace(num_blocks=10))
    replica = SimpleNamespace(number=0, is_live=True, host=host, parts=parts, failure="a bug")
    return replica


def test_requests_that_the_last_replica_does_not_take_any_more_end_once() -> None:
    """The first of them ended twice, which is an AssertionError, and the others never."""

    async def main() -> None:
        config = EngineConfig(max_batch_size=8)
        admission, metrics = Admission(config), Metrics(True)
        dispatcher = Dispatcher([failing_replica()], config, admission, metrics, by_prefix, engine_logger(config))
        dispatcher.open()
        dispatcher.state = EngineState.PAUSED
        requests = [new_request(f"r{number}", read_arguments([1], None), 0) for number in range(3)]
        for request in requests:
            dispatcher.take_in(request, admission.reserve([request.place]))
        dispatcher.settle(EngineState.RUNNING)
        for request in requests:
            with pytest.raises(EngineClosed, match="all replicas have failed, the last one because a bug"):
                await asyncio.wait_for(request.channel.wait(), 60)
        assert admission.num_requests == dispatcher.num_requests == dispatcher.num_waiting == 0

    asyncio.run(main())
