"""`SGLangBackend`: SGLang behind `InferenceModule`. Called by it and by `penstock.backends`."""

from __future__ import annotations

import os
from typing import Any

from penstock.demo import MODEL_DIR
from penstock.scores import FloatArray
from penstock.training.backend import EngineBackend, Prompts, Responses


class SGLangBackend(EngineBackend):
    """Generates and scores with SGLang: `model_name` is a name, a folder, or None for the demo.

    `model_kwargs` are fields of SGLang's `ServerArgs`, such as `tp_size` and `mem_fraction_static`. There are
    probabilities, but no logits, no module of torch and no gradients; new weights come from a folder, by
    `engine.update_weights`. Raises `ConfigurationError`, which is an `ImportError` too where SGLang is not installed.
    """

    def __init__(self, model_name: str | os.PathLike[str] | None = None, **model_kwargs: Any) -> None:
        # Imported here: `backends` is written over this package, and most programs have no SGLang.
        from penstock.backends.sglang_engine import SGLangEngine

        engine = SGLangEngine(MODEL_DIR if model_name is None else model_name, **model_kwargs)
        super().__init__(engine)
        self._distributions = engine.distributions
        engine.start()

    async def adistributions(self, prompts: Prompts, responses: Responses) -> list[FloatArray | None]:
        return await self._rows(prompts, responses, self._distributions)
