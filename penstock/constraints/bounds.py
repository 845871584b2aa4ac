"""Deterministic bounds on a grammar's terminals, which the limits of llguidance do not cover.

Before each mask llguidance looks for text that is forced. Across several terminals its own limits bound the work;
within one terminal it is the terminal's whole length, at about a microsecond per character and step, for which every
row of the step waits. So a literal or a repetition of a hundred thousand characters is refused when it is compiled.
Pure functions. Called by `GrammarCompiler`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from penstock.constraints.schema_bounds import check_schema
from penstock.errors import GrammarError
from penstock.structured_outputs import StructuredOutputs

MAX_TERMINAL = 10_000  # characters that one literal, or one regular expression with its repetitions, has at least
MAX_TEXT = 1 << 17  # characters of a regular expression or a grammar: a megabyte takes seconds to compile
_MAX_DEPTH = 200  # of a schema
_ANNOTATIONS = frozenset({"title", "description", "$comment", "default", "examples", "$id", "$schema"})
_LARK_TERMINAL = re.compile(r"^[ \t]*(_?[A-Z][A-Z0-9_]*)[^:\n]*:", re.MULTILINE)
_LARK_COUNT = re.compile(r"\{\s*(\d+)|~\s*(\d+)")
_LARK_NAME = re.compile(r"\b_?[A-Z][A-Z0-9_]*\b")
_COUNT = re.compile(r"\{(\d+)(?:,\d*)?\}")
_BRACED = re.compile(r"\\[pPxuU]\{[^}]*\}")
_GROUP = re.compile(r"\((\?(P?<\w+>|[\w-]*:?))?")


def check_bounds(structured: StructuredOutputs) -> None:
    """Raise `GrammarError` for a terminal that is too long."""
    if structured.choice is not None:
        for choice in structured.choice:
            _check("a choice", len(choice))
    elif structured.regex is not None:
        _check_size("the regular expression", structured.regex)
        _check("the regular expression", expanded_length(structured.regex))
    elif structured.grammar is not None:
        _check_size("the grammar", structured.grammar)
        for name, length in _lark_lengths(structured.grammar).items():
            _check(f"the terminal {name}", length)
    else:
        schema = json.loads(structured.source)
        for keyword, length in _schema_lengths(schema):
            _check(keyword, length)
        check_schema(schema)
        if structured.whitespace_pattern is not None:
            _check("whitespace_pattern", expanded_length(structured.whitespace_pattern))


def expanded_length(pattern: str) -> int:
    """About the shortest text that a regular expression matches, of alternatives the longest; linear in time."""
    frames, last, place = [[0, 0]], 0, 0  # per open group: its longest alternative, and the current one
    while place < len(pattern):
        character, frame = pattern[place], frames[-1]
        if count := _COUNT.match(pattern, place):
            factor = max(1, min(int(count[1][:9]), MAX_TERMINAL + 1))
            frame[1], last = frame[1] + last * (factor - 1), last * factor
            place = count.end()
            continue
        if group := _GROUP.match(pattern, place):
            frames.append([0, 0])
            place = group.end()
            continue
        if character == "|":
            frame[0], frame[1], last = max(frame), 0, 0
        elif character == ")" and len(frames) > 1:
            last = max(frames.pop())
            frames[-1][1] += last
        elif character not in "*+?^$":
            frame[1], last = frame[1] + 1, 1
        place = _end_of_atom(pattern, place)
    return max(max(frame) for frame in frames)


def _end_of_atom(pattern: str, place: int) -> int:
    """Where the escape, class or character that begins at `place` ends."""
    if pattern[place] == "\\":
        braced = _BRACED.match(pattern, place)
        return braced.end() if braced else place + 2
    if pattern[place] != "[":
        return place + 1
    place += 2 if pattern[place : place + 2] == "[^" else 1
    place += pattern[place : place + 1] == "]"  # a member of the class where it comes first
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1


def _schema_lengths(schema: object, depth: int = 0) -> Iterator[tuple[str, int]]:
    """The keyword and length of every literal and every pattern of a schema."""
    if depth > _MAX_DEPTH:
        raise GrammarError(f"the JSON schema is nested too deeply: at most {_MAX_DEPTH} levels")
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield "a key", len(key)
            if key in _ANNOTATIONS and isinstance(value, str):
                continue
            if isinstance(value, str):
                yield key, max(len(value), expanded_length(value) if key == "pattern" else 0)
            elif key == "patternProperties" and isinstance(value, dict):
                yield from ((key, expanded_length(pattern)) for pattern in value)
            yield from _schema_lengths(value, depth + 1)
    elif isinstance(schema, list):
        for item in schema:
            yield from [("a string", len(item))] if isinstance(item, str) else _schema_lengths(item, depth + 1)


def _lark_lengths(grammar: str) -> dict[str, int]:
    """About the length of each terminal: its text, those it names, and all of that times its counts."""
    heads = list(_LARK_TERMINAL.finditer(grammar))
    ends = [*(head.start() for head in heads[1:]), len(grammar)]
    bodies = {head[1]: grammar[head.end() : end] for head, end in zip(heads, ends, strict=False)}
    lengths: dict[str, int] = {}
    for _ in range(len(bodies).bit_length() + 16):  # doubling is seen after a few passes
        for name, body in bodies.items():
            factor = 1
            for count in _LARK_COUNT.finditer(body):
                factor = min(factor * max(1, int((count[1] or count[2])[:9])), MAX_TERMINAL + 1)
            length = sum(lengths.get(reference, 0) for reference in _LARK_NAME.findall(body))
            lengths[name] = min(max(1, length) * factor, MAX_TERMINAL + 1)
    return lengths | {f"/{name}/": length for name, length in _lark_expressions(grammar)}


def _lark_expressions(grammar: str) -> Iterator[tuple[str, int]]:
    for match in re.finditer(r'/((?:\\.|[^/\\\n])+)/|"((?:\\.|[^"\\\n])*)"', grammar):
        if match[1] is not None:
            yield match[1][:20], expanded_length(match[1])
        else:
            yield match[2][:20], len(match[2])


def _check(what: str, length: int) -> None:
    if length > MAX_TERMINAL:
        raise GrammarError(
            f"{what} describes text of more than {MAX_TERMINAL} characters at a stretch, which would slow down every "
            "request of a step: shorten it, or repeat it fewer times"
        )


def _check_size(what: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise GrammarError(f"{what} has {len(text)} characters, which would take long to compile: at most {MAX_TEXT}")
