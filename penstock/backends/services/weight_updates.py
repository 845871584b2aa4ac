"""Functions that move weights into a service, for `WeightSyncController`: over HTTP, or through a service holder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from penstock.backends.addresses import server_root
from penstock.backends.services.weight_sync import Update, WeightUpdate
from penstock.errors import ExecutionError


class SamplerHolder(Protocol):
    """A service holder that serves what it has trained."""

    def save_weights_for_sampler(self, name: str) -> str:
        """Save the trained weights; their path."""
        ...

    def set_current_sampling_path(self, path: str) -> None:
        """Sample with these weights from the next `update_sampling_client` on."""
        ...

    def update_sampling_client(self) -> None:
        """Change to the current path."""
        ...


def holder_update(holder: SamplerHolder) -> Update:
    """Save what the holder has trained, and sample with it."""

    def update(task: WeightUpdate) -> None:
        holder.set_current_sampling_path(holder.save_weights_for_sampler(f"{task.model_tag}-{task.version}"))
        holder.update_sampling_client()

    return update


def network_update(base_url: str, model: str, weight_type: str = "full", *, api_key: str = "") -> Update:
    """Ask a server to load the weights at `sync_weight_path`: POST /update_weights, with this key if it needs one."""

    def update(task: WeightUpdate) -> None:
        body = {"model_name": model, "weight_type": weight_type, "weight_path": task.path}
        _post(base_url, "update_weights", body, api_key)

    return update


def disk_update(base_url: str, *, api_key: str = "") -> Update:
    """Ask an SGLang server to load the folder at `sync_weight_path`: POST /update_weights_from_disk."""

    def update(task: WeightUpdate) -> None:
        _post(base_url, "update_weights_from_disk", {"model_path": task.path}, api_key)

    return update


def _post(base_url: str, route: str, body: Mapping[str, object], api_key: str) -> None:
    """Post, and wait for as long as the update takes."""
    import httpx  # of the extra `client`

    url = f"{server_root(base_url)}/{route}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    response = httpx.post(url, json=body, headers=headers, timeout=httpx.Timeout(None, connect=10.0))
    if response.status_code >= 400:
        raise ExecutionError(f"{url} answered {response.status_code}: {response.text[:500]}")
    values = response.json() if "json" in response.headers.get("content-type", "") else {}
    if isinstance(values, dict) and values.get("success") is False:  # SGLang's form of a failure, with status 200
        raise ExecutionError(f"{url} failed: {values.get('message')}")
