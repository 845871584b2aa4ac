from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from penstock import GrammarError, StructuredOutputs
from penstock.constraints.compiler import GrammarCompiler
from tests.letters import LetterTokenizer
from tests.tokenizers_for_tests import byte_level

YES, NO = StructuredOutputs(choice=["yes"]), StructuredOutputs(choice=["no"])


def test_a_grammar_is_compiled_once_and_kept_while_it_is_among_the_latest() -> None:
    tokenizer = byte_level()
    compiler = GrammarCompiler(len(tokenizer), {2}, max_grammars=2)
    assert compiler.find(YES, None) is None
    grammar = compiler.compile(YES, None, tokenizer)
    assert compiler.find(StructuredOutputs(choice=["yes"]), None) is grammar
    assert compiler.compile(YES, None, tokenizer) is grammar
    assert compiler.find(YES, "</think>") is None
    compiler.compile(NO, None, tokenizer)
    assert compiler.find(YES, None) is grammar
    compiler.compile(StructuredOutputs(regex="a"), None, tokenizer)
    assert compiler.find(NO, None) is None
    assert compiler.find(YES, None) is grammar


@pytest.mark.parametrize("tokenizer", [LetterTokenizer(), None])
def test_a_tokenizer_of_another_kind_is_refused_with_a_reason(tokenizer: Any) -> None:
    with pytest.raises(GrammarError, match="need a tokenizer of the Rust library"):
        GrammarCompiler(100, {2}).compile(YES, None, tokenizer)


def test_a_tokenizer_keeps_its_truncation_and_padding() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=3)
    before = (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding)
    GrammarCompiler(len(tokenizer), {2}).compile(YES, None, tokenizer)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before


def test_the_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_llguidance(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "llguidance":
            raise ModuleNotFoundError(name)
        return original(name, *args, **options)

    importers = tuple(f"penstock.constraints.{name}" for name in ("grammar", "matching", "probes"))
    for name in [name for name in sys.modules if name.startswith(("llguidance", *importers))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_llguidance)
    with pytest.raises(GrammarError, match=r"pip install 'penstock\[structured\]'"):
        GrammarCompiler(100, {2}).compile(YES, None, byte_level())
