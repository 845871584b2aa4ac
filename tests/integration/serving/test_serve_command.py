"""`penstock serve` as a process: its first lines, scripted answers, signals, refusals to start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from peft import LoraConfig, get_peft_model

from penstock.cli import main
from tests.tiny_models import build

ROOT = Path(__file__).resolve().parents[3]
ANSWERS = "replies: {weather: It rains in the valley., '': I do not know.}\nstep_s: 0.05\n"


@contextmanager
def process(*options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server with these options; killed at the end if it still runs."""
    command = [sys.executable, "-m", "penstock", "serve", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    server = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()


def url_of(server: subprocess.Popen[str]) -> str:
    """The address that it prints; the rest of its output is read and forgotten."""
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r"at (https?://\S+)/v1", line):
            threading.Thread(target=drained, args=(server.stderr,), daemon=True).start()
            return match[1]
    raise AssertionError(f"no address; exit code {server.wait()}")


def drained(stream: IO[str]) -> list[str]:
    return list(stream)


def ask(url: str, question: str, **headers: str) -> Any:
    body = json.dumps({"messages": [{"role": "user", "content": question}]}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]


@pytest.fixture
def answers(tmp_path: Path) -> str:
    (tmp_path / "answers.yaml").write_text(ANSWERS)
    return f"scripted:{tmp_path / 'answers.yaml'}"


def test_it_serves_scripted_answers_and_drains_at_a_signal(answers: str, tmp_path: Path) -> None:
    sections = "serving: {port: 0, served_model_name: mine}\nengine: {max_sequence_length: 5000}\n"
    (tmp_path / "server.yaml").write_text(sections)
    with process(
        "--model", answers, "--config", str(tmp_path / "server.yaml"), *("--api-key", "k1", "--drain-timeout-s", "5")
    ) as server:
        url, key = url_of(server), {"authorization": "Bearer k1"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url, "weather")
        assert ask(url, "how is the weather?", **key) == "It rains in the valley."
        assert ask(url, "who are you?", **key) == "I do not know."
        (model,) = json.loads(get(f"{url}/v1/models"))["data"]
        assert (model["id"], model["max_model_len"]) == ("mine", 5000)
        results: list[str] = []
        body = json.dumps({"prompt": "weather", "max_tokens": 4000, "stream": True, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, key)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            asking = threading.Thread()
            while open_requests(get(f"{url}/metrics")) < 2:
                if not asking.is_alive():  # it has not begun, or was answered before anybody looked
                    asking = threading.Thread(target=lambda: results.append(ask(url, "the weather again", **key)))
                    asking.start()
            server.send_signal(signal.SIGTERM)
            lines = [line for line in response.read().decode().split("\n\n") if line]
        assert [line for line in lines if "error" in line] == lines[-1:]  # outlasted the drain, and was told once
        asking.join(60)
        assert set(results) == {"It rains in the valley."}  # the last one finished meanwhile
        assert not asking.is_alive()
        assert server.wait(60) == 0


def test_it_serves_several_replicas(answers: str) -> None:
    with process("--model", answers, "--port", "0", "--replicas", "2", "--routing", "round_robin") as server:
        url = url_of(server)
        assert [ask(url, "how is the weather?") for _ in range(2)] == ["It rains in the valley."] * 2
        metrics = get(f"{url}/metrics").decode()
        for number in "01":
            assert re.search(rf'^penstock:replica_routed_requests{{.*replica="{number}"}} 1.0$', metrics, re.MULTILINE)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_it_says_what_it_waits_for_and_a_second_ctrl_c_ends_it(answers: str) -> None:
    """It was silent for half a minute, and the second Ctrl-C printed a traceback of uvicorn's."""
    limits = ("--max-sequence-length", "4096", "--drain-timeout-s", "600")
    with process("--model", answers, "--port", "0", *limits) as server:
        assert server.stderr is not None
        url = next(match[1] for line in server.stderr if (match := re.search(r"at (https?://\S+)/v1", line)))
        body = json.dumps({"prompt": "weather", "max_tokens": 4000, "stream": True, "ignore_eos": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            server.send_signal(signal.SIGINT)
            waiting = next(line for line in server.stderr if "waiting" in line)
            assert "waiting for 1 open request, for at most 600 s; Ctrl-C again" in waiting
            server.send_signal(signal.SIGINT)
            *_, last = (line for line in response.read().decode().split("\n\n") if line)
        error = json.loads(last.strip().removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "draining")
        rest = drained(server.stderr)
        assert server.wait(60) == 0
        assert any("aborting 1 open request" in line for line in rest)
        assert not [line for line in rest if "Traceback" in line or "CancelledError" in line]


def test_adapters_of_the_command_line_are_served_from_the_start(tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "poet")
    options = ("--model", str(tmp_path / "model"), "--skip-tokenizer-init", "true", "--port", "0")
    with process(*options, "--adapter", f"poet={tmp_path / 'poet'}") as server:
        models = json.loads(get(f"{url_of(server)}/v1/models"))["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("model", None), ("poet", "model")]


def get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"x-api-key": "k1"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def open_requests(text: bytes) -> float:
    match = re.search(rb"penstock:open_requests\{.*\} (\S+)", text)
    return float(match[1]) if match else 0.0


def failure(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What a server that does not start prints."""
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_one_line(answers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("replies: 5")
    (tmp_path / "none.yaml").write_text("engine: {replicas: 0}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, adapter = str(listener.getsockname()[1]), ("--port", "0", "--adapter", "poet=/nowhere")
        errors = {
            f"cannot listen on 127.0.0.1:{port}": failure(capsys, "--model", answers, "--port", port),
            "reachable by others": failure(capsys, "--model", answers, "--host", "0.0.0.0"),
            "needs replies": failure(capsys, "--model", f"scripted:{tmp_path / 'bad.yaml'}"),
            "TLS needs both": failure(capsys, "--ssl-certfile", "x.pem"),
            "ssl_keyfile=/nowhere": failure(
                *(capsys, "--model", "/no-model", "--port", "0"),
                "--ssl-certfile",
                "/nowhere",
                "--ssl-keyfile",
                "/nowhere",
            ),
            "bad.yaml: [SSL]": failure(
                *(capsys, "--model", answers, "--port", "0"),
                *("--ssl-certfile", str(tmp_path / "bad.yaml"), "--ssl-keyfile", str(tmp_path / "bad.yaml")),
            ),
            "max_batch_size": failure(capsys, "--model", answers, "--max-batch-size", "many"),
            "NAME=FOLDER": failure(capsys, "--model", answers, "--adapter", "poet"),
            "takes no adapters": failure(capsys, "--model", answers, *adapter),
            "name of the model": failure(capsys, "--model", answers, *adapter, "--served-model-name", "poet"),
            "set replicas to 2 or more": failure(capsys, "--model", answers, "--routing", "load"),
            "replicas must be an integer": failure(capsys, "--model", answers, "--config", str(tmp_path / "none.yaml")),
            "unknown section": failure(capsys, "--config", str(tmp_path / "bad.yaml")),
        }
    for text, output in errors.items():
        assert text in output
        assert output.count("\n") == 1, output
