"""A started engine whose model gives scripted replies, a model that stops at a step of the test's choice, and what an
engine's end leaves behind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock import InferenceEngine, ScriptedModel
from penstock.constraints.masks import Masks
from penstock.models.scripted_replies import ScriptedReplies
from penstock.step import StepPlan, StepResult
from tests.tokenizers_for_tests import byte_level

PATIENCE_S = 60.0


class HoldingModel(ScriptedModel):
    """Holds its step number `hold_at`, from 1 on, until `release()`, which may come before the step.

    What a test does once `is_held` is set comes after the steps before this one, and before its end.
    """

    def __init__(self, *args: Any, hold_at: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.hold_at = hold_at
        self.is_held, self._may_go_on = threading.Event(), threading.Event()

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        if self.plans + 1 == self.hold_at:
            self.is_held.set()
            self._may_go_on.wait()
        return super().execute(plan, masks)

    def release(self) -> None:
        self._may_go_on.set()
        super().release()


@contextmanager
def replying_engine(replies: Any, template: str | None = None, max_length: int = 4096) -> Iterator[InferenceEngine]:
    """An engine with these replies, over a tokenizer with this chat template; stopped at the end."""
    tokenizer = byte_level()
    if template is not None:
        tokenizer.chat_template = template
    model = ScriptedReplies(
        *(replies, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode),
        eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        vocab_size=len(tokenizer),
        max_length=max_length,
    )
    engine = InferenceEngine(model, tokenizer, batch_timeout_ms=0)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain=0)


def join_threads(before: set[threading.Thread]) -> None:
    """Wait for the end of all threads that were not there before, and of those that these start as they end."""
    while new := set(threading.enumerate()) - before:
        for thread in filter(threading.Thread.is_alive, new):  # one that is being started cannot be joined yet
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), thread.name
