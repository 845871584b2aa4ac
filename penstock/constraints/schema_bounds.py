"""Deterministic bounds on what compiling a JSON schema costs, which the limits of llguidance do not cover.

Its compiler takes seconds for an object of thousands of properties, for multiples of a large number, and for a text
that must match many patterns at once; nothing can interrupt it. Such schemas are refused
before they are compiled. Pure functions. Called by `check_bounds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from urllib.parse import unquote

from penstock.errors import GrammarError

MAX_PARTS = 6_500  # objects, lists and their other items, in a whole schema
MAX_ENUMERATED = 30_000  # values of all `enum` together
MAX_PROPERTIES = 1_000  # of one object
MAX_CONJUNCTION = 7  # patterns that one text has to match at once: the time grows exponentially
MAX_NAME_PATTERNS = 50  # of one `patternProperties`: each is compared with each
MAX_DIVISOR = 30_000  # of `multipleOf`, without its factors of ten
_PATTERNS = ("pattern", "format", "multipleOf")
_MAX_LENGTHS = {"properties": MAX_PROPERTIES, "required": MAX_PROPERTIES, "patternProperties": MAX_NAME_PATTERNS}
_LISTS_OF_WORDS = frozenset({"required", "type"})


def check_schema(schema: object) -> None:
    """Raise `GrammarError` for a schema that would take long to compile. It is not nested too deeply for recursion."""
    num_parts = num_enumerated = num_patterns = 0
    for key, value in _entries(schema):
        if key == "enum" and isinstance(value, list):
            num_enumerated += len(value)
        elif isinstance(value, dict):
            num_parts += 1
            num_patterns += sum(name in value for name in _PATTERNS)
        elif isinstance(value, list):
            num_parts += 1 if key in _LISTS_OF_WORDS else 1 + sum(not isinstance(item, dict | list) for item in value)
        if key in _MAX_LENGTHS and isinstance(value, dict | list):
            _check(key, len(value), _MAX_LENGTHS[key])
        if key == "multipleOf":
            _check("multipleOf", _divisor(value), MAX_DIVISOR)
    _check("the schema's number of parts", num_parts, MAX_PARTS)
    _check("enum", num_enumerated, MAX_ENUMERATED)
    if num_patterns > MAX_CONJUNCTION:
        _check("the number of patterns for one text", _Conjunctions(schema, num_patterns).of(schema), MAX_CONJUNCTION)


def _entries(schema: object) -> Iterator[tuple[str, object]]:
    """Every object, list and keyword's value of a schema, with its keyword if it has one."""
    pending: list[tuple[str, object]] = [("", schema)]
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [("", item) for item in value if isinstance(item, dict | list)]


def _divisor(value: object) -> int:
    """The digits of a number as one integer, without zeros at its ends; 0 for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    digits = "".join(map(str, Decimal(str(value)).as_tuple().digits)).strip("0")
    return int(digits[:18] or "0")


class _Conjunctions:
    """Counts the patterns that one text has to match at once; at least as many as there are.

    `num_patterns` is the number in the whole schema, which stands for what a reference that is not a path leads to.
    """

    def __init__(self, root: object, num_patterns: int) -> None:
        self._root = root
        self._num_patterns = num_patterns
        self._known: dict[str, int] = {}

    def of(self, schema: object) -> int:
        """The largest number of patterns for one text in a schema."""
        if isinstance(schema, list):
            return max(map(self.of, schema), default=0)
        if not isinstance(schema, dict):
            return 0
        parts, reference = schema.get("allOf"), schema.get("$ref")
        count = sum(name in schema for name in _PATTERNS)
        count = max([count, *(self.of(value) for key, value in schema.items() if key != "allOf")])
        count += sum(map(self.of, parts)) if isinstance(parts, list) else 0
        return count + (self._of_reference(reference) if isinstance(reference, str) else 0)

    def _of_reference(self, reference: str) -> int:
        if reference not in self._known:
            self._known[reference] = 0  # a schema that refers to itself describes another text there
            target = _target(self._root, reference)
            self._known[reference] = self._num_patterns if target is None else self.of(target)
        return self._known[reference]


def _target(root: object, reference: str) -> object:
    """What a JSON pointer (`#/$defs/name`) leads to; None for other references and for missing places."""
    name = root.get("$id", root.get("id")) if isinstance(root, dict) else None
    reference = reference.removeprefix(name.rstrip("#")) if isinstance(name, str) else reference
    if not reference.startswith("#"):
        return None
    value = root
    for name in unquote(reference[1:]).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and len(name) < 7 and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _check(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise GrammarError(f"{what} is {number}, which would take long to compile: at most {limit} can be enforced")
