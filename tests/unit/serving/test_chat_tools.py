"""Tool calls and reasoning in chats: deltas that SDKs put together, finish reasons, the same streamed and at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.errors import RequestError
from penstock.outputs import CompletionOutput, Delta
from penstock.sampling import SamplingParams
from penstock.serving import ServingSettings
from penstock.serving.chat_message import delta_of, message_of
from penstock.serving.chat_task import prepare, tool_use
from penstock.serving.messages import plain_messages
from penstock.serving.model_formats import ModelFormats
from penstock.tools import reasoning_format_named
from tests.unit.serving.service import events, replying
from tests.unit.serving.split_engine import split_client

URL = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    for name in ("weather", "time")
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {"city": "Bern"}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = TEMPLATE + "{# <think> #}"
QUESTION = {"messages": [{"role": "user", "content": "how is it there?"}], "tools": TOOLS, "temperature": 0}


def assembled(chunks: list[Any]) -> tuple[dict[str, Any], list[str]]:
    """The message that a client puts together from the first choice, and its finish reasons."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name in ("content", "reasoning_content"):
                message[name] += choice["delta"].get(name) or ""
            for part in choice["delta"].get("tool_calls", ()):
                if "id" in part:
                    assert part["index"] == len(message["tool_calls"])
                    message["tool_calls"].append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                else:
                    assert "name" not in part["function"]
                message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
    return message, reasons


@pytest.mark.parametrize("reply", [CALL, f"Let me see.\n{CALL}", f"{CALL}\n{TIME}", "It rains.", CALL[:-30]])
def test_calls_are_the_same_streamed_and_at_once(reply: str) -> None:
    with replying([reply], TEMPLATE) as client:
        whole = client.post(URL, json=QUESTION).json()["choices"][0]
        *chunks, done = events(client.post(URL, json={**QUESTION, "stream": True}))
    assert done == "[DONE]"
    message, reasons = assembled(chunks)
    calls = [call["function"] for call in whole["message"].get("tool_calls", ())]
    assert [{"name": call["name"], "arguments": call["arguments"]} for call in message["tool_calls"]] == calls
    assert message["content"] == (whole["message"]["content"] or "")
    assert reasons == [whole["finish_reason"]] == ["tool_calls" if calls else "stop"]
    if reply == CALL:
        assert whole["message"]["content"] is None
        assert json.loads(calls[0]["arguments"]) == {"city": "Zürich"}


def test_a_call_that_a_stop_string_cuts_off_ends_with_stop() -> None:
    """Regression: it ended with `tool_calls`, and agents read the half of its arguments that was there."""
    with replying([CALL], TEMPLATE) as client:
        for stop, reason, arguments in (
            ("rich", "stop", '{"city": "Zü'),
            ("</tool", "tool_calls", '{"city": "Zürich"}'),
        ):
            body = {**QUESTION, "stop": stop}
            choice = client.post(URL, json=body).json()["choices"][0]
            assert choice["finish_reason"] == reason
            assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
            *chunks, _ = events(client.post(URL, json={**body, "stream": True}))
            assert assembled(chunks)[1] == [reason]


def test_a_call_that_is_cut_off_ends_with_length() -> None:
    """Whether or not anything of it was sent, before the cut or because of it."""
    with replying([CALL], TEMPLATE) as client:
        total = client.post("/tokenize", json={"prompt": CALL, "add_special_tokens": False}).json()["count"]
        num_calls = []
        for max_tokens in range(4, total, 6):
            body = {**QUESTION, "max_tokens": max_tokens}
            whole = client.post(URL, json=body).json()["choices"][0]
            message, reasons = assembled(events(client.post(URL, json={**body, "stream": True}))[:-1])
            assert [whole["finish_reason"]] == reasons == ["length"]
            num_calls.append(len(message["tool_calls"]))
            assert num_calls[-1] == len(whole["message"].get("tool_calls", ()))
    assert num_calls[0] == 0
    assert num_calls[-1] == 1


def test_only_one_call_comes_where_only_one_is_allowed() -> None:
    with replying([f"{CALL}\n{TIME}"], TEMPLATE) as client:
        body = {**QUESTION, "parallel_tool_calls": False}
        assert len(client.post(URL, json=body).json()["choices"][0]["message"]["tool_calls"]) == 1
        message, _ = assembled(events(client.post(URL, json={**body, "stream": True}))[:-1])
        assert [call["name"] for call in message["tool_calls"]] == ["weather"]


def test_without_tools_or_with_none_a_call_is_text() -> None:
    with replying([CALL], TEMPLATE) as client:
        for changes in ({"tools": None}, {"tool_choice": "none"}, {"tools": []}):
            choice = client.post(URL, json={**QUESTION, **changes}).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [TOOLS[0], TOOLS[0]]},
        {"tools": "weather"},
        {"tools": TOOLS * 100},
        {"tool_choice": "sometimes"},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": None, "tool_choice": "required"},
    ],
)
def test_tools_that_are_none_are_a_400(changes: dict[str, Any]) -> None:
    with replying([CALL], TEMPLATE) as client:
        response = client.post(URL, json={**QUESTION, **changes})
        assert response.status_code == 400
        assert "tool" in response.json()["error"]["message"]


def test_the_answer_to_a_call_goes_into_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        *QUESTION["messages"],  # type: ignore[misc]
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    with replying({"": "It is sunny."}, TEMPLATE) as client:
        body = {**QUESTION, "messages": messages}
        assert client.post(URL, json=body).json()["choices"][0]["message"]["content"] == "It is sunny."
        ids = client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert '"arguments": {"city": "Bern"}' in text  # an object, as templates expect
        assert "None" not in text


def test_a_template_without_tools_gets_them_in_the_system_message() -> None:
    with replying(["x"]) as client:
        for messages in (QUESTION["messages"], [{"role": "system", "content": "Be brief."}, *QUESTION["messages"]]):  # type: ignore[misc]
            ids = client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
            text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
            assert text.count("<|system|>") + text.count("system") >= 1
            assert '"weather"' in text


def test_a_template_without_calls_gets_earlier_ones_in_the_assistants_text() -> None:
    """Regression: the model read an empty message of its own before the result of a call that it had not made."""
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    call = {"id": "c", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "c", "content": "It rains."}
    for content, lines in ((None, ""), ("Let me see.", "Let me see.\n")):
        history = [{"role": "assistant", "content": content, "tool_calls": [call]}, result]
        body = {"messages": [*QUESTION["messages"], *history], "tools": TOOLS}  # type: ignore[misc]
        with replying(["x"], "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}") as client:
            ids = client.post("/tokenize", json=body).json()["tokens"]
            text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        expected = f'<|assistant|>{lines}{{"name": "weather", "arguments": {{"city": "Bern"}}}}<|tool|>It rains.'
        assert text.endswith(expected)


def test_reasoning_has_both_of_its_names() -> None:
    with replying(["<think>\nhm, rain\n</think>\n\nIt rains."], THINKING) as client:
        body = {"messages": QUESTION["messages"]}
        message = client.post(URL, json=body).json()["choices"][0]["message"]
        assert message["reasoning_content"] == message["reasoning"] == "hm, rain"
        assert message["content"] == "It rains."
        *chunks, _ = events(client.post(URL, json={**body, "stream": True}))
        streamed, reasons = assembled(chunks)
        assert (streamed["reasoning_content"], streamed["content"]) == ("hm, rain", "It rains.")
        assert reasons == ["stop"]
        usage = client.post(URL, json=body).json()["usage"]["completion_tokens_details"]
        assert 0 < usage["reasoning_tokens"] < 15
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last, _ = events(client.post(URL, json={**body, **options}))
        assert last["usage"]["completion_tokens_details"] == usage
        deltas = [choice["delta"] for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"]]
        assert all(delta.get("reasoning_content") == delta.get("reasoning") for delta in deltas)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_of_an_earlier_turn_reaches_templates_under_both_names(name: str) -> None:
    (message,) = plain_messages([{"role": "assistant", "content": "It rains.", name: "hm"}])
    assert (message["reasoning_content"], message["reasoning"]) == ("hm", "hm")


def test_the_settings_name_the_formats() -> None:
    settings = ServingSettings(tool_format="pythonic", reasoning_format="none")
    with replying(['[weather(city="Bern")]'], THINKING, settings) as client:
        (call,) = client.post(URL, json=QUESTION).json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}


FORMATS = ModelFormats("hermes", reasoning_format_named("qwen3"), template_knows_tools=True)
TEXTS = [CALL, f"a {CALL} b", f"<think>\nso {CALL}\n</think>\n{CALL}{TIME}", "<tool_call>no</tool_call>", "<think>only"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_of_splitting_a_text_gives_the_same_message(text: str) -> None:
    """Arguments were lost where several tokens came in one step."""
    task = prepare({"messages": []}, SamplingParams(), FORMATS, use=tool_use(TOOLS, "auto"))
    whole = message_of(task.reader("").read_whole(CompletionOutput(text=text, finish_reason="stop")))
    calls = [call["function"] for call in whole.get("tool_calls", ())]  # type: ignore[attr-defined, index]
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        reader = task.reader("")
        deltas = [Delta("a", text=piece) for piece in pieces[:-1]] + [Delta("a", text=pieces[-1], finish_reason="stop")]
        chunks = [
            {"choices": [{"delta": delta_of(piece), "finish_reason": None}]} for d in deltas for piece in reader.read(d)
        ]
        message, _ = assembled(chunks)
        assert message["content"] == (whole["content"] or "")
        assert message["reasoning_content"] == whole.get("reasoning", "")
        assert [{"name": c["name"], "arguments": c["arguments"]} for c in message["tool_calls"]] == calls


def test_stop_strings_and_structures_sleep_while_the_model_reasons() -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}]}
    assert prepare(prompt, SamplingParams(stop="a"), FORMATS).params.reasoning_end == "</think>"
    assert prepare(prompt, SamplingParams(), FORMATS).params.reasoning_end is None
    assert prepare(prompt, SamplingParams(stop="a"), FORMATS, thinks=False).params.reasoning_end is None
    assert prepare(prompt, SamplingParams(stop="a"), ModelFormats()).params.reasoning_end is None
    task = prepare(prompt, SamplingParams(stop="a"), FORMATS)
    assert task.begins_after_reasoning("<|assistant|><think>\n\n</think>\n\n")
    assert not task.begins_after_reasoning("<|assistant|><think>\n")
    assert task.without_reasoning().params.reasoning_end is None


def test_several_tools_may_be_allowed_in_the_shapes_of_both_apis() -> None:
    """Chats refused this choice."""
    nested = [{"type": "function", "function": {"name": "time"}}]
    flat = [{"type": "function", "name": "time"}]
    for mode in ("auto", "required"):
        for choice in ({"allowed_tools": {"mode": mode, "tools": nested}}, {"mode": mode, "tools": flat}):
            use = tool_use(TOOLS, {"type": "allowed_tools", **choice})
            assert ([tool.name for tool in use.tools], use.choice.mode) == (["time"], mode)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"mode": "auto"}, "needs tools"),
        ({"allowed_tools": 5}, "needs tools"),
        ({"mode": "auto", "tools": ["time"]}, "needs tools"),
        ({"mode": "auto", "tools": [{"name": "rain"}]}, "'rain', which is none of the tools"),
        ({"mode": "auto", "tools": [{"function": 5}]}, "None, which is none of the tools"),
        ({"mode": "none", "tools": []}, "needs a mode"),
        ({"tools": [{"name": "time"}]}, "needs a mode"),
        ({"mode": "required", "tools": []}, "there are no tools"),
    ],
)
def test_a_bad_choice_of_several_tools_is_refused(choice: dict[str, Any], words: str) -> None:
    """What was wrong in it left tools out."""
    with pytest.raises(RequestError, match=words):
        tool_use(TOOLS, {"type": "allowed_tools", **choice})


def test_a_required_call_is_a_grammar_and_a_named_one_ends_with_stop() -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}]}
    named = {"type": "function", "function": {"name": "time"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop"), ("auto", "tool_calls")):
        task = prepare(prompt, SamplingParams(), FORMATS, use=tool_use(TOOLS, choice))
        demand = task.params.structured_outputs
        assert (demand is None) is (choice == "auto")
        assert choice is not named or "weather" not in str(demand)
        reader = task.reader("")
        reader.read_whole(CompletionOutput(text=TIME))
        assert [reader.finish_reason(end) for end in ("stop", "length", None)] == [reason, "length", None]


def test_no_effort_turns_reasoning_off_in_chats_too() -> None:
    """Regression: `reasoning_effort: "none"` had an effect in the Responses API only."""
    with split_client() as (client, engine):
        engine.chunks = ["yes"]
        for effort, is_on in (("none", False), ("low", True)):
            client.post(URL, json={"messages": QUESTION["messages"], "reasoning_effort": effort})
            assert engine.prompts[-1]["chat_template_kwargs"] == {"reasoning_effort": effort, "enable_thinking": is_on}
