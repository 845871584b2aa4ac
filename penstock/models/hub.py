"""Whether the Hugging Face hub can be reached: asked once and briefly before a load.

huggingface_hub retries each file of a model five times, half a minute for every file. A hub that does not answer here
is not asked again: files come from the cache, and a model that is not there is refused at once. Imports no torch.
Called by the engine before it imports torch, and by `loading` and `checkpoint`.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, text_of
from penstock.models.folder import check_source

TIMEOUT_S = 2.5  # unless HF_HUB_ETAG_TIMEOUT is set
VALID_S = 30.0  # all files of one load ask; a network may come back
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_lock = threading.Lock()
_last_probe: tuple[float, str, str] | None = None  # when, the endpoint, and why it cannot be reached ("" if it can)


def check_available(source: str, config: EngineConfig) -> str:
    """`check_source(source)`. Raises `ConfigurationError` also for what is neither here nor, now, on the hub."""
    source = check_source(source)
    if Path(source).is_dir() or is_cached(source, config) or not (reason := unreachable()):
        return source
    raise ConfigurationError(
        f"cannot load the model {source!r}: there is no such folder, the hub's cache does not hold it, and {reason}: "
        "check the name, or pass a folder"
    )


def unreachable() -> str:
    """Why the hub cannot be asked, as a clause; "" if it can. An HTTP answer of any status counts as reachable."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    global _last_probe
    with _lock:
        last = _last_probe
        if last is None or last[1] != constants.ENDPOINT or time.monotonic() - last[0] > VALID_S:
            reason = _probe(constants.ENDPOINT)
            last = _last_probe = (time.monotonic(), constants.ENDPOINT, reason)
        return last[2]


def is_cached(source: str, config: EngineConfig, *, weights: bool = False) -> bool:
    """Whether the hub's cache holds the config of a model, or of an adapter; with `weights`, also weights."""
    groups = (_CONFIGS, _WEIGHTS) if weights else (_CONFIGS,)
    return all(any(_cached(source, name, config) for name in names) for names in groups)


def _cached(source: str, name: str, config: EngineConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(source, name, cache_dir=config.download_dir, revision=config.revision)
    except HFValidationError:
        return False
    return isinstance(path, str)


def _probe(endpoint: str) -> str:
    """Send one request, through the hub library's own client and so through its proxies.

    On a thread of its own: the client's timeout does not limit the look-up of the host's name.
    """
    timeout_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT_S)
    reason = [f"{endpoint} did not answer within {timeout_s:g} s"]

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            get_session().head(endpoint, timeout=timeout_s)
            reason[0] = ""
        except Exception as error:
            reason[0] = f"{endpoint} cannot be reached ({text_of(error)})"

    thread = threading.Thread(target=ask, name="penstock-hub", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return reason[0]
