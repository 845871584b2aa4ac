"""The text that llguidance compiles for a `StructuredOutputs`, and its refusals as typed errors.

Pure functions. Owns the settings under which nothing is silently left out of a schema, and the default white space.
Called by `GrammarCompiler`.
"""

from __future__ import annotations

import json
import re

from penstock.errors import GrammarError, text_of
from penstock.structured_outputs import StructuredOutputs

# As `json.dumps` separates: a space, or a line break with indentation. Runs of spaces or empty lines, in which small
# models loop, match nowhere.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,64}"
_GBNF_RULE = re.compile(r"^[\s]*[\w-]+\s*::=", re.MULTILINE)
_MAX_CHARACTERS = 500  # of a reason
_NAMES = {
    "json": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
}


def grammar_text(structured: StructuredOutputs) -> str:
    """The grammar in llguidance's own format. Raises `GrammarError` for what cannot be translated."""
    from llguidance import LLMatcher

    source = structured.source
    if structured.kind in ("json", "json_object"):
        return _schema_grammar(source, structured.whitespace_pattern or WHITESPACE)
    if structured.kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if structured.kind == "choice":
        assert structured.choice is not None
        # As one terminal: a rule may not have so many alternatives.
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_literal, structured.choice)))
    return LLMatcher.grammar_from_lark(_lark(source) if _GBNF_RULE.search(source) else source)


def refusal(structured: StructuredOutputs, reason: str) -> GrammarError:
    """The error for a constraint that llguidance refused for a reason."""
    if "failed to compile JSON schema" in reason:
        reason = reason.strip().split("\n")[0]  # a listing follows, of a grammar that the server may have written
    reason = reason.partition(" Enable 'coerce_one_of'")[0]  # an option that nobody here has
    words = "no text satisfies it" if "NoExtensionBias" in reason else shortened(reason)
    return GrammarError(f"the {_NAMES[structured.kind]} cannot be enforced: {words}")


def shortened(reason: str) -> str:
    """The reason without the parser's state, on one line and of limited length."""
    words = " ".join(reason.split("<state>")[0].split("<non-verbose/>")[0].split())
    return words if len(words) <= _MAX_CHARACTERS else f"{words[:_MAX_CHARACTERS]}..."


def _schema_grammar(schema: str, whitespace: str) -> str:
    """A schema may carry options for its compiler (`x-guidance`); these replace any that would loosen it."""
    from llguidance import LLMatcher

    text = schema if schema.lstrip().startswith("{") else '{"allOf": [true]}'  # the schema `true`
    return LLMatcher.grammar_from_json_schema(
        text,
        overrides={
            "whitespace_pattern": whitespace,
            "whitespace_flexible": True,
            "item_separator": ",",
            "key_separator": ":",
            "coerce_one_of": False,
            "lenient": False,
        },
    )


def _literal(choice: str) -> str:
    """A string in Lark's notation, which is JSON's, but for one character that JSON does not escape."""
    return json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lark(gbnf: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(gbnf)
    except (Exception, RecursionError) as error:
        raise GrammarError(f"the GBNF grammar cannot be read: {shortened(text_of(error))}") from None
