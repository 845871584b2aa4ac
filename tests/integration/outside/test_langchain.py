"""LangChain's own integration tests of chat models, with scripted answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.serving import ServingSettings
from tests.integration.outside.suites import Exclusion, failures, server, unlisted

ROOT = Path(__file__).resolve().parents[3]
EXCLUSIONS: tuple[Exclusion, ...] = ()
SETTINGS = (
    *("filterwarnings=", "python_files=langchain_chat.py", "xfail_strict=false"),
    "asyncio_default_test_loop_scope=session",  # its client outlives the loop of one test
)
OPTIONS = tuple(word for setting in SETTINGS for word in ("-o", setting))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


JOKE = json.dumps({"setup": "Why do cats purr?", "punchline": "Because they can."})
# By the last of these texts that the conversation contains.
REPLIES = {
    "": "Hello there, you are welcome.",
    "What is the value of magic_function(3)?": call("magic_function", input=3),
    "magic_function_no_args()": call("magic_function_no_args"),
    "<tools>greeting_generator": call("greeting_generator", answer_style="pirate"),
    "<tools>magic_function,get_weather": call("magic_function", input=3),
    "<tools>unicode_customer": call("unicode_customer", customer_name="你好, こんにちは", description="一"),
    "<tools>Joke": call("Joke", **json.loads(JOKE)),
    "What is 3 + 4": "7",
    "joke about cats": JOKE,
    "weather in San Francisco": call("get_weather", location="San Francisco, CA"),
    "It's sunny.": "It is sunny in San Francisco.",
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}"
    "{% if tools %}<tools>{{ tools | map(attribute='function.name') | join(',') }}{% endif %}<|assistant|>"
)


def test_langchains_own_tests_pass(tmp_path: Path) -> None:
    with server(REPLIES, ServingSettings(served_model_name=("gpt-a", "gpt-b")), TEMPLATE) as url:
        arguments = [*OPTIONS, "tests/integration/outside/langchain_chat.py"]
        num_passed, messages = failures(ROOT, arguments, {"SERVER_URL": f"{url}/v1"}, tmp_path / "report.xml")
    assert unlisted(messages, EXCLUSIONS) == {}
    assert num_passed >= 35
