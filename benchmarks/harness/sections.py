"""Sections of a Markdown file that belong to one benchmark each, behind a mark that readers do not see.

A section goes from its mark to the next one, or to the end: whatever else writes the file keeps them by `kept`, at its
end. Pure functions of texts.
"""

from __future__ import annotations

import re

_MARK = "<!-- section: {} -->\n"
_ANY = re.compile(r"^<!-- section: .* -->$", re.MULTILINE)


def kept(text: str) -> str:
    """All sections of a file, with their marks; nothing where there are none."""
    found = _ANY.search(text)
    return text[found.start() :] if found else ""


def replaced(text: str, name: str, body: str) -> str:
    """The file with `body` as its section of that name, at the end if it is a new one."""
    section = _MARK.format(name) + body.rstrip("\n") + "\n"
    begin = text.find(_MARK.format(name))
    if begin < 0:
        return f"{text.rstrip()}\n\n{section}" if text.strip() else section
    after = _ANY.search(text, begin + 1)
    return text[:begin] + section + ("\n" + text[after.start() :] if after else "")
