"""Sections of a Markdown file, each owned by one benchmark and preceded by an invisible mark.

A section extends from its mark to the next one, or to the end. Another writer of the file preserves them, with
`sections_of`, at its end. Pure functions of text.
"""

from __future__ import annotations

import re

_MARK = "<!-- section: {} -->\n"
_ANY = re.compile(r"^<!-- section: .* -->$", re.MULTILINE)


def sections_of(text: str) -> str:
    """All sections of a file, with their marks; an empty string if there are none."""
    match = _ANY.search(text)
    return text[match.start() :] if match else ""


def replaced(text: str, name: str, body: str) -> str:
    """The file with `body` as its section of that name, at the end if it is new."""
    section = _MARK.format(name) + body.rstrip("\n") + "\n"
    start = text.find(_MARK.format(name))
    if start < 0:
        return f"{text.rstrip()}\n\n{section}" if text.strip() else section
    next_mark = _ANY.search(text, start + 1)
    return text[:start] + section + ("\n" + text[next_mark.start() :] if next_mark else "")
