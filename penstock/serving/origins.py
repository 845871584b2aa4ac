"""Which web pages may call: what CORS tells browsers, and what is refused to pages that do not ask.

A page can send some requests without asking first. Where there are no keys, this would let any page use a server that
only this machine can reach; such requests are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from penstock.serving.errors import HttpError
from penstock.serving.settings import ServingSettings

LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def allowed_origins(settings: ServingSettings) -> tuple[str, ...] | None:
    """The origins in the settings; without any, all if there are keys, else None for pages of this machine."""
    if settings.cors_origins is None and settings.api_keys:
        return ("*",)
    return settings.cors_origins


def check_origin(settings: ServingSettings, headers: Mapping[str, str]) -> None:
    """Raise a 403 for a page of another site, where no key stops it."""
    origin = headers.get("origin")
    if origin is None or settings.api_keys:
        return
    if settings.trusts_host and origin.partition("://")[2] == headers.get("host"):
        return
    origins = allowed_origins(settings)
    is_allowed = re.fullmatch(LOCAL, origin) is not None if origins is None else "*" in origins or origin in origins
    if not is_allowed:
        raise HttpError(403, "pages of this origin may not call: add it to cors_origins", code="origin_not_allowed")
