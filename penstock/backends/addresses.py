"""Addresses of servers, as callers write them."""

from __future__ import annotations


def server_root(url: str) -> str:
    """The address without a trailing slash or /v1, and with a scheme: "localhost:8000" is "http://localhost:8000"."""
    with_scheme = url if "://" in url else f"http://{url}"
    return with_scheme.rstrip("/").removesuffix("/v1").rstrip("/")


def api_url(url: str) -> str:
    """The address of the API, which ends in /v1."""
    return f"{server_root(url)}/v1"
