"""Chats as plain Python: text parts, prefills, template arguments, and what is refused by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from penstock import LLM, InferenceEngine, RequestError, SamplingParams, ScriptedModel
from penstock.api.prompt import Chat, read_prompt
from penstock.engine.text.tokenizer_pool import encode_prompt
from tests.tokenizers_for_tests import byte_level

USER = {"role": "user", "content": "Hi"}
PREFILL = {"role": "assistant", "content": "Sure,"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last or m.role != 'assistant' %}|{% endif %}"
    "{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents | length }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no thinking>{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FEW = SamplingParams(max_tokens=1)


def tokenizer() -> Any:
    made = byte_level()
    made.chat_template = TEMPLATE
    return made


def chat_of(prompt: Any) -> Chat:
    chat = read_prompt(prompt).chat
    assert chat is not None
    return chat


def rendered(prompt: Any) -> str | None:
    return encode_prompt(tokenizer(), read_prompt(prompt))[0]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([USER], "[user]Hi|[assistant]"),
        ({"messages": [USER]}, "[user]Hi|[assistant]"),
        ({"messages": [USER], "add_generation_prompt": False}, "[user]Hi|"),
        ({"messages": [USER], "tools": [{"name": "f"}], "documents": [{}, {}]}, "[user]Hi|T1D2[assistant]"),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}, "[user]Hi|<no thinking>[assistant]"),
        ([USER, PREFILL], "[user]Hi|[assistant]Sure,"),
        ({"messages": [USER, PREFILL], "continue_final_message": False}, "[user]Hi|[assistant]Sure,[assistant]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "[user]a\nb|[assistant]",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": []}, USER], "[assistant]|[user]Hi|[assistant]"),
    ],
)
def test_a_conversation_is_rendered_as_its_caller_asks(prompt: Any, text: str) -> None:
    assert rendered(prompt) == text


def test_what_a_caller_changes_later_has_no_effect() -> None:
    tools = [{"name": "f"}]
    messages = [dict(USER)]
    chat = chat_of({"messages": messages, "tools": tools})
    messages[0]["content"] = "changed"
    tools[0]["name"] = "changed"
    assert (chat.messages[0]["content"], chat.tools) == ("Hi", [{"name": "f"}])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": [USER], "prompt": "x"}, "no key 'prompt'"),
        ({"messages": ["Hi"]}, 'chat message 0 must be a dict with "role"'),
        ([USER, {"role": "user"}], 'chat message 1 has no "content"'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "chat message 0 has a part that is not text"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "cannot set 'tokenize'"),
        ({"messages": [USER], "chat_template_kwargs": 3}, "must be a mapping"),
        ({"messages": [USER], "tools": 3}, "tools must be a list"),
        ({"messages": [USER], "continue_final_message": "yes"}, "continue_final_message must be"),
        (
            {"messages": [PREFILL], "continue_final_message": True, "add_generation_prompt": True},
            "set add_generation_prompt=False",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_in_plain_words(prompt: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_prompt(prompt)


def test_a_template_that_refuses_gives_its_reason() -> None:
    refusing = byte_level()
    refusing.chat_template = "{{ raise_exception('no system messages, please') }}"
    with pytest.raises(RequestError, match="the chat template refused these messages: no system messages, please"):
        encode_prompt(refusing, read_prompt([USER]))


def test_llm_passes_template_arguments_on() -> None:
    llm = LLM(ScriptedModel([5], vocab_size=600), tokenizer())
    (output,) = llm.chat([USER], FEW, tools=[{"name": "f"}], chat_template_kwargs={"enable_thinking": False})
    assert output.prompt == "[user]Hi|T1<no thinking>[assistant]"
    assert [output.prompt for output in llm.chat([[USER], [USER, PREFILL]], FEW)] == [
        "[user]Hi|[assistant]",
        "[user]Hi|[assistant]Sure,",
    ]
    llm.stop()


def warnings_of(prompt: Any, caplog: pytest.LogCaptureFixture, template: str | None = TEMPLATE) -> list[str]:
    served = byte_level()
    served.chat_template = template
    engine = InferenceEngine(ScriptedModel([5], vocab_size=600), served)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.generate(prompt, FEW).result(30)
    engine.stop()
    return [record.message for record in caplog.records]


def test_a_rendered_prompt_with_a_second_bos_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of("<s>[user]Hi|[assistant]", caplog)
    assert "two BOS tokens" in warning


def test_a_bare_string_to_a_model_with_a_template_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of("What is a penstock?", caplog)
    assert "pass [{" in warning


@pytest.mark.parametrize(
    ("prompt", "template"),
    [([USER], TEMPLATE), ("Hi", None), ([5, 6], TEMPLATE), ("a<end>b", TEMPLATE), ({"prompt": "Hi"}, TEMPLATE)],
)
def test_what_is_meant_so_is_not_warned_of(prompt: Any, template: str | None, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(prompt, caplog, template) == []
