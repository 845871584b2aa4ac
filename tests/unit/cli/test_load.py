"""Load on a server: what is sent and when, and what is recorded."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import httpx
import pytest

from penstock import ConfigurationError
from penstock.cli import main
from penstock.cli.load import Clients, Exchange, Load, Server, base_url
from penstock.cli.load_report import check_plot, load_table, remarks, save_plots, summarize

SERVER = Server("http://server/v1", "m", {"Authorization": "Bearer k"})
Handler = Callable[[httpx.Request], httpx.Response]


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def answer(*chunks: bytes) -> httpx.Response:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            await asyncio.sleep(0)
            yield chunk

    return httpx.Response(200, content=stream())


def text(word: str = "x") -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": word}}])


USAGE = event(choices=[], usage={"completion_tokens": 7, "prompt_tokens": 3})
DONE = b"data: [DONE]\n\n"


async def exchanges_with(handler: Handler, load: Load, server: Server = SERVER) -> list[Exchange]:
    return list(await Clients(server, load, transport=httpx.MockTransport(handler)).run())


def test_arrivals_are_a_poisson_process_of_the_given_rate() -> None:
    arrivals = Load(4000, rate=20.0).arrivals()
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert fmean(gap > 1 / 20 for gap in gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert arrivals == Load(4000, rate=20.0).arrivals() != Load(4000, rate=20.0, seed=1).arrivals()


async def test_every_request_has_a_connection_of_its_own() -> None:
    """A shared pool walks all its connections whenever a request ends: with 500 of them it stood still for seconds."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
        body = text() + USAGE + DONE
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await reader.read()  # kept alive until the client closes it
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        load = Load(3, concurrency=1)  # one after the other: a pool would use the first connection again
        exchanges = await Clients(Server(f"http://127.0.0.1:{port}/v1", "m", {}), load).run()
    assert [exchange.error for exchange in exchanges] == [None] * 3
    assert connections == 3


def test_without_a_rate_all_requests_are_sent_at_once() -> None:
    assert Load(3).arrivals() == [0.0, 0.0, 0.0]


def test_no_two_prompts_begin_alike() -> None:
    prompts = [Load(100, prompt_words=5).prompt(number) for number in range(100)]
    assert len({prompt.split()[0] for prompt in prompts}) == 100
    assert {len(prompt.split()) for prompt in prompts} == {5}


async def test_a_request_is_what_the_api_asks_for_and_its_answer_is_recorded() -> None:
    bodies: list[dict[str, object]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer k"
        bodies.append(json.loads(request.content))
        return answer(event(choices=[{"delta": {"role": "assistant"}}]), text(), b": ping\n\n", text(), USAGE, DONE)

    (exchange,) = await exchanges_with(handler, Load(1, max_tokens=9, ignore_eos=True))
    assert (exchange.num_tokens, exchange.num_prompt_tokens, len(exchange.chunks_s)) == (7, 3, 2)
    assert exchange.is_complete
    (body,) = bodies
    assert body["messages"] == [{"role": "user", "content": Load(1).prompt(0)}]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["stream"]) == (9, 9, True, True)


async def test_reasoning_and_completions_count_as_text() -> None:
    thought = event(choices=[{"delta": {"reasoning_content": "hm"}}])
    completed = event(choices=[{"text": "x"}])
    server = Server("http://server/v1", "m", {}, "completions")
    (exchange,) = await exchanges_with(lambda request: answer(thought, completed, USAGE, DONE), Load(1), server)
    assert len(exchange.chunks_s) == 2


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (lambda: httpx.Response(429, json={"error": {"message": "Retry in 1.2 s."}}), "HTTP 429"),
        (lambda: httpx.Response(404, json={"error": {"message": "no such model"}}), "HTTP 404: no such model"),
        (lambda: httpx.Response(502, text="<html>"), "HTTP 502"),
        (lambda: answer(text()), "the stream ended without [DONE]"),
        (lambda: answer(event(error={"message": "it broke"})), "it broke"),
        (lambda: answer(b"data: {\n\n"), "JSONDecodeError"),
    ],
)
async def test_every_failure_is_an_error_of_its_request_alone(
    response: Callable[[], httpx.Response], error: str
) -> None:
    answers = iter([response(), answer(text(), USAGE, DONE)])
    failed, complete = await exchanges_with(lambda request: next(answers), Load(2, concurrency=1))
    assert error in str(failed.error)
    assert "Retry in" not in str(failed.error)  # its number would make every refusal a kind of error of its own
    assert complete.is_complete


async def test_clients_that_leave_are_no_errors_and_no_answers() -> None:
    exchanges = await exchanges_with(
        lambda request: answer(*[text()] * 8, USAGE, DONE), Load(20, max_tokens=8, disconnecting=1.0)
    )
    assert all(exchange.is_cut and exchange.error is None for exchange in exchanges)
    assert len({len(exchange.chunks_s) for exchange in exchanges}) > 1


async def test_concurrency_limits_the_requests_in_flight() -> None:
    running, peak = 0, 0

    def handler(request: httpx.Request) -> httpx.Response:
        async def stream() -> AsyncIterator[bytes]:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            for _ in range(20):
                await asyncio.sleep(0)
            running -= 1
            yield DONE

        return httpx.Response(200, content=stream())

    await exchanges_with(handler, Load(12, concurrency=3))
    assert peak == 3


def exchange(sent_s: float, *chunks_s: float, due_s: float = 0.0, **fields: object) -> Exchange:
    made = Exchange(due_s, sent_s, chunks_s[-1], list(chunks_s), num_tokens=len(chunks_s), num_prompt_tokens=10)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_the_summary_by_hand() -> None:
    summary = summarize(
        [
            exchange(0.0, 0.5, 0.6, 0.8),
            exchange(1.0, 1.1, 2.0),
            exchange(1.0, 9.0, 20.0, is_slow=True),
            exchange(1.0, 1.5, is_cut=True),
            exchange(1.0, 1.5, error="HTTP 429"),
        ]
    )
    assert (summary["requests"], summary["completed"], summary["cut_by_client"]) == (5, 3, 1)
    assert summary["errors"] == {"HTTP 429": 1}
    assert (summary["duration_s"], summary["output_tokens"], summary["output_tok_s"]) == (2.0, 5, 2.5)
    assert summary["first_token_s"] == {"p50": 0.1, "p95": 0.5, "p99": 0.5}
    assert summary["inter_chunk_s"] == {"p50": 0.2, "p95": 0.9, "p99": 0.9}
    assert summary["per_token_s"] == {"p50": 0.15, "p95": 0.9, "p99": 0.9}
    assert load_table(summary, "title").row_count == 4


def test_a_generator_that_is_late_says_so() -> None:
    summary = summarize([exchange(1.0, 2.0, due_s=0.5)])
    assert any("0.50 s late" in line for line in remarks(summary, is_open=True))
    assert remarks(summary, is_open=False) == []


def test_nothing_answered_is_a_summary_too() -> None:
    summary = summarize([])
    assert summary["first_token_s"] is None
    assert load_table(summary, "title").row_count == 4


@pytest.mark.parametrize(
    ("name", "says"), [("load.txt", "must end with one of"), ("load", "must end"), ("none/load.png", "no folder")]
)
def test_a_plot_that_cannot_be_saved_is_refused_beforehand(tmp_path: Path, name: str, says: str) -> None:
    """The command ended with a traceback after the whole load, and without its report."""
    pytest.importorskip("matplotlib")
    check_plot(tmp_path / "load.PNG")
    with pytest.raises(ConfigurationError, match=says):
        check_plot(tmp_path / name)


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_plots(tmp_path / "load.png", [exchange(0.0, 0.5, 0.6, 0.8), exchange(0.0, 1.0, error="x")], "title")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    save_plots(tmp_path / "empty.png", [], "nothing was answered")


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "h:1", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_is_read_with_and_without_v1(url: str) -> None:
    assert base_url(url) == "http://h:1/v1"


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "::::", "http://h:99999999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not an address"):
        base_url(url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "must be above 0"),
        (["--disconnecting", "2"], "must be from 0 to 1"),
        (["--requests", "0"], "at least 1"),
        (["--rate", "nan"], "must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--url", "h", *words])
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9", "--requests", "1"]) == 2
    assert "no server answers at http://127.0.0.1:9/v1" in capsys.readouterr().err
