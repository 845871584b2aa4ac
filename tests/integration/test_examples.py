"""Every example runs by itself and prints what it is about; README's code runs too, and its map is the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import pytest

from penstock import RequestPriority

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = {"grpo": 150, "ppo": 150, "trl_trainers": 60}
MOST_LINES_OF_OTHERS = 40
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
README = DOCUMENTS[0].read_text(encoding="utf-8")


def output_of(script: Path) -> str:
    """What a script prints, run as a user would run it, without a terminal and without arguments."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def streams_two_answers(out: str) -> None:
    assert out.count("you> ") == 2
    assert out.endswith("\n4 messages\n")


def serves_higher_classes_first(out: str) -> None:
    ended = re.findall(r"^ *\d+\. (\w+)-\d$", out, re.MULTILINE)
    assert len(ended) == 15
    assert ended == sorted(ended, key=lambda name: -RequestPriority[name])
    assert "missed its deadline: LOW-3 with " in out


def leaves_no_request(out: str) -> None:
    ways = ["asyncio.timeout", "break", "handle.cancel()", "deadline", "requests left"]
    assert [line.partition(":")[0] for line in out.splitlines()] == ways
    assert "handle.cancel(): cancelled\n" in out
    assert out.endswith("requests left: 0\n")


def calls_back_for_each(out: str) -> None:
    submitted = re.findall(r"^\[worker\] submitted (\S+)$", out, re.MULTILINE)
    ended = re.findall(r"^\[penstock-callbacks\] (\S+) ended with \d+ tokens", out, re.MULTILINE)
    assert len(submitted) == 3
    assert sorted(ended) == sorted(submitted)
    assert re.search(r"^\[MainThread\] \d+ pieces: ", out, re.MULTILINE)


def learns_its_lesson(out: str) -> None:
    printed = dict(line.split(": ", 1) for line in out.splitlines())
    assert printed["after"].strip() == printed["target"].strip() != printed["before"].strip()


def completes_fifty(out: str) -> None:
    assert re.search(r"^50 prompts, \d+ tokens, \d+ tokens/s$", out, re.MULTILINE)


def tells_what_each_level_does(out: str) -> None:
    assert re.findall(r"^(\w+): (?:parallel|speculative|standard), \d+ tokens/s$", out, re.MULTILINE) == [
        *("basic", "aggressive", "latency_optimized", "memory_optimized")
    ]
    assert "compile_model                  on: fused_layers" in out


def goes_on_from_the_likeliest(out: str) -> None:
    levels = re.findall(r"^level \d: (.*)$", out, re.MULTILINE)
    assert len(levels) == 6
    assert all(max(map(float, level.split())) < 0 for level in levels)
    assert "\ndef fibonacci(n):\n" in out


def calls_a_tool(out: str) -> None:
    assert re.fullmatch(r"add \{.*\}\nadd is called with \{'a': [123], 'b': [456]\}\n", out)


def follows_every_constraint(out: str) -> None:
    printed = dict(line.split(": ", 1) for line in out.splitlines())
    assert re.fullmatch(r"Function\(name='[a-z_]{3,20}', arguments=\[.*\], is_async=(True|False)\)", printed["model"])
    assert printed["choice"] in ("yes", "no")
    assert re.fullmatch(r"20\d{2}-(0[1-9]|1[0-2])", printed["regex"])
    assert "uniqueItems" in printed["refused"]


def keeps_what_it_said(out: str) -> None:
    assert re.search(r"^> another reply, [1-9]\d* tokens of its prompt cached$", out, re.MULTILINE)
    records = re.findall(r"^(\d+) prompt ids, (\d+) after it, (\d+) sampled$", out, re.MULTILINE)
    assert len(records) == 2
    assert all(0 < int(sampled) < int(after) for _, after, sampled in records)


def scores_and_updates(out: str) -> None:
    printed = dict(line.split(": ", 1) for line in out.splitlines())
    assert re.match(r"\[\(\d+, 4096\), \(\d+, 4096\)\] ", printed["generated"])
    assert printed["cached"].startswith("True ")
    assert printed["tool calls"] in ("[0]", "[1]")
    assert float(printed["divergence after an update"]) > 0


def trains_with_both(out: str) -> None:
    updates = re.findall(r"^(\w+): (\d) updates, (.*)$", out, re.MULTILINE)
    assert [(name, number) for name, number, _ in updates] == [("GRPOTrainer", "4"), ("RLOOTrainer", "4")]
    found = re.fullmatch(r"log probabilities within (\S+)", updates[0][2])
    assert found is not None
    assert 0 < float(found[1]) < 2e-5


CHECKS: dict[str, Callable[[str], None]] = {
    "batch": completes_fifty,
    "callbacks": calls_back_for_each,
    "cancel": leaves_no_request,
    "conversation": keeps_what_it_said,
    "inference_module": scores_and_updates,
    "optimizer": tells_what_each_level_does,
    "own_module": learns_its_lesson,
    "priorities": serves_higher_classes_first,
    "stream": streams_two_answers,
    "structured_output": follows_every_constraint,
    "tool_calling": calls_a_tool,
    "tree_search": goes_on_from_the_likeliest,
    "trl_trainers": trains_with_both,
}
# What uvicorn serves: a path, a body to post there, and how the answer begins. test_web_examples.py has the rest.
SERVICES = {
    "fastapi_service": ("/chat", '{"messages": [{"role": "user", "content": "Write close."}]}', '{"text":"'),
    "mounted_server": ("/llm/v1/completions", '{"prompt": "def close(", "max_tokens": 4}', '{"id":"cmpl-'),
    "openai_server": (
        "/v1/chat/completions",
        '{"model": "demo", "messages": [{"role": "user", "content": "Write close."}], "max_tokens": 4}',
        '{"id":"chatcmpl-',
    ),
    "web_service": ("/", "Write the function close.", 'event: text\ndata: "'),
}
HELPERS = {"asgi", "disconnect", "fastapi_app", "shutdown", "sse", "training_plot"}  # other examples import them
TRAINING = {"grpo", "ppo"}  # test_training_examples.py runs them


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES} == CHECKS.keys() | SERVICES.keys() | HELPERS | TRAINING


@pytest.mark.parametrize("name", CHECKS)
def test_example_prints_what_it_is_about(name: str) -> None:
    """000-58, for the example of `InferenceModule`."""
    CHECKS[name](output_of(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("name", SERVICES)
def test_command_in_a_service_serves_it(name: str) -> None:
    path, body, beginning = SERVICES[name]
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    command = re.search(r"`uvicorn (.*?)`", source)
    assert command, "it does not say how to serve it"
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--port", "0", *command[1].split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        url = f"http://127.0.0.1:{port_of(server)}{path}"
        answer = httpx.post(
            url, content=body, headers={"content-type": "application/json"}, timeout=60, trust_env=False
        )
        assert (answer.status_code, answer.text[: len(beginning)]) == (200, beginning)
    finally:
        server.terminate()
        log = server.communicate(timeout=60)[1]
    assert "Application shutdown complete." in log


def port_of(server: subprocess.Popen[str]) -> int:
    """Where a server says that it runs, once it does."""
    assert server.stderr is not None
    log: list[str] = []
    for line in server.stderr:
        log.append(line)
        if address := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            return int(address[1])
    raise AssertionError("".join(log))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_what_it_shows(example: Path) -> None:
    source = example.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES.get(example.stem, MOST_LINES_OF_OTHERS)
    assert source.startswith('"""')


def test_readme_names_every_example() -> None:
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if f"(examples/{path.name})" not in README] == []


def first_code(markdown: str) -> str:
    found = re.search(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    assert found, "there is no Python in it"
    return found[1]


def test_readmes_first_code_streams_in_fifteen_lines(tmp_path: Path) -> None:
    code = first_code(README)
    assert len(code.splitlines()) <= 15
    script = tmp_path / "first.py"
    script.write_text(code, encoding="utf-8")
    assert output_of(script).strip()


def names_on_the_map(markdown: str) -> set[str]:
    """The names under `penstock/` in the tree that README draws, each with a sentence behind it."""
    tree = re.search(r"^penstock/\n((?:  \S+ +\S.*\n)+)", markdown, re.MULTILINE)
    assert tree, "there is no map"
    return {line.split()[0] for line in tree[1].splitlines()}


def names_in(folder: Path) -> set[str]:
    return {path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != "__pycache__"}


def test_readmes_map_is_the_package() -> None:
    assert names_on_the_map(README) == names_in(ROOT / "penstock")


def broken_links(document: Path) -> Iterable[str]:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    return [link for link in targets if "://" not in link and not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []
