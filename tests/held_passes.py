"""A real model whose forward pass waits where a test wants it to, so that what the test does comes before its end."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import nn

from penstock import InferenceEngine, RequestHandle, SamplingParams

PATIENCE_S = 60.0


def watched(model: nn.Module, on_forward: Callable[[], None]) -> nn.Module:
    """The model with a class of its own, whose passes call a function first, in a view of it as well."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        on_forward()
        return kind.forward(self, *args, **options)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


class HeldPasses:
    """Holds a pass of a model that an engine is going to borrow; those that load it do not count.

    An engine that serves one request publishes the tokens of all passes before the one that is held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plan: Iterator[bool] = iter(())
        self._is_held, self._may_go_on = threading.Event(), threading.Event()
        self._is_held.set()
        watched(model, self._on_forward)

    def arm(self, number: int) -> None:
        """Hold the pass of this number, from 1 on, counted after the one that is held now, which goes on."""
        self._go_on([False] * (number - 1) + [True], threading.Event())

    def release(self) -> None:
        """Let the pass go on that is held, once it is, and hold no other."""
        self._go_on([], self._is_held)

    def _go_on(self, plan: list[bool], is_held: threading.Event) -> None:
        assert self._is_held.wait(PATIENCE_S), "no pass is held"
        held, self._may_go_on = self._may_go_on, threading.Event()
        self._plan, self._is_held = iter(plan), is_held  # before the pass goes on, after which others follow
        held.set()

    def _on_forward(self) -> None:
        if next(self._plan, False):
            may_go_on = self._may_go_on
            self._is_held.set()
            may_go_on.wait(PATIENCE_S)


class Served:
    """A started engine over a live model, whose passes can be held."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, **settings: Any) -> None:
        self.passes = HeldPasses(model)
        self.engine = InferenceEngine(model, tokenizer, **settings)

    async def __aenter__(self) -> Self:
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.engine.__aexit__(*error)

    async def begin(self, prompt: Any, params: SamplingParams, count: int, **options: Any) -> RequestHandle:
        """A request that has so many tokens, read by now, and gets no more before `passes` go on."""
        self.passes.arm(count + 1)
        handle = self.engine.generate(prompt, params, **options)
        await read(handle, count)
        return handle


async def read(handle: RequestHandle, count: int) -> None:
    """Read until at least `count` tokens came."""
    num_read = 0
    while num_read < count:
        num_read += len((await anext(handle)).token_ids)
