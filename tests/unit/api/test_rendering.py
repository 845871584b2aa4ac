"""Chats become text by the tokenizer's own template, and whatever it raises is a `RequestError`."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import RequestError
from penstock.api.prompt import read_prompt
from penstock.api.rendering import render_chat

PROMPT = {"messages": [{"role": "user", "content": "Hello"}], "documents": [], "chat_template_kwargs": {"depth": 2}}


class Rendering:
    """Renders in Python: it has no attribute `chat_template`."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return f"{messages[0]['content']} {sorted(options)}"


class Failing(Rendering):
    """A template that ends the program."""

    chat_template = "{{ exit() }}"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        raise SystemExit("no more")


class Untemplated(Rendering):
    """A base model's tokenizer."""

    chat_template = None


def render(tokenizer: object) -> str:
    chat = read_prompt(PROMPT).chat
    assert chat is not None
    return render_chat(tokenizer, chat)


def test_a_tokenizer_that_renders_without_a_template_gets_the_arguments_that_are_set() -> None:
    assert render(Rendering()) == "Hello ['add_generation_prompt', 'depth', 'tokenize']"


@pytest.mark.parametrize("tokenizer", [Untemplated(), object()])
def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(tokenizer: object) -> None:
    with pytest.raises(RequestError, match=r"no chat template: pass a string, or set tokenizer\.chat_template"):
        render(tokenizer)


def test_whatever_a_template_raises_refuses_the_chat() -> None:
    with pytest.raises(RequestError, match="the chat template refused these messages: no more"):
        render(Failing())
