"""Reads the sections of a config, a mapping or an omegaconf `DictConfig`, into the fields of a dataclass.

A misspelled key is refused with the key that was meant; keys that resemble none are left to other programs that read
the same config.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields

from penstock.errors import ConfigurationError, described, shown


def read_section(config: object, section: str, record: type) -> dict[str, object]:
    """The values of the record's fields in `config[section]`, or in `config` itself where it has no such section.

    A `section` of "" is the top level.

    Raises `ConfigurationError` for a misspelled key, and for values that cannot be read.
    """
    try:
        values = _mapping(config, "the config")
        if isinstance(values.get(section), Mapping):
            values = _mapping(values[section], section)
        keys = [str(key) for key in values]
        names = [field.name for field in fields(record)]
        _check_spelling(keys, names, section)
        return {name: values[name] for name in names if name in keys and values[name] is not None}
    except ConfigurationError:
        raise
    except Exception as error:  # omegaconf: a missing value, or an interpolation that leads nowhere
        raise ConfigurationError(f"{section or 'the config'} cannot be read: {described(error)}") from error


def _mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} must be a mapping or a DictConfig, not {shown(value)}")
    return value


def _check_spelling(keys: list[str], names: list[str], section: str) -> None:
    for key in keys:
        if key not in names and (matches := difflib.get_close_matches(key, names, n=1, cutoff=0.85)):
            raise ConfigurationError(f"{section or 'the config'} has no key {key!r}: did you mean {matches[0]!r}?")
