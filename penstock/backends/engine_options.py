"""Checks of the options with which another engine is started. Raises `ConfigurationError` and `PackageMissing`."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping

from penstock.errors import ConfigurationError, PackageMissing
from penstock.values import nearest


def check_installed(package: str, remedy: str) -> None:
    """Raise `PackageMissing` with the remedy if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise PackageMissing(remedy)


def check_names(engine: str, options: Mapping[str, object], names: Collection[str]) -> None:
    """Raise `ConfigurationError` for an option that the engine does not have, with the nearest one that it has."""
    if unknown := options.keys() - set(names):
        raise ConfigurationError(f"{engine} has no option {min(unknown)!r}{nearest(min(unknown), names)}")
