"""The `penstock` command: the real one in processes of its own, its parts by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penstock import ConfigurationError, Delta, EngineConfig, InferenceEngine, SamplingParams, ScriptedModel
from penstock.cli import main
from penstock.cli.bench import EngineRuns
from penstock.cli.chat import Conversation
from penstock.cli.command import make_parser
from penstock.cli.doctor import as_text, formatted, label
from penstock.cli.generate import OrderedCompletions, read_prompt
from penstock.cli.measurements import (
    MAX_SPREAD,
    Measurements,
    Summary,
    disturbance,
    overall_ratio,
    percentiles,
    result_table,
    spread,
)
from penstock.cli.problems import Problem, find_problems
from penstock.cli.session import loading_line, started_engine, stream
from penstock.cli.workloads import WORKLOADS, Work, Workload, cache_tokens
from penstock.demo import MODEL_DIR
from penstock.models.baseline import Baseline

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TIMEOUT_S = 100  # importing PyTorch alone may take a minute


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "penstock", *args]


def penstock(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*args), input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, env=ENVIRONMENT, check=False
    )


def accept_ctrl_c() -> None:
    """Undo what a shell does for programs in the background, which ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs during the block and is killed at its end. It receives Ctrl-C even in the background."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command(*args), text=True, env=ENVIRONMENT, preexec_fn=accept_ctrl_c, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(text: str, stream: Any) -> None:
    """Read lines up to one that holds `text`."""
    assert any(text in line for line in stream), f"{text!r} did not come"


# Real processes.


def test_help_and_version_load_no_model_library() -> None:
    for option in ("--help", "--version", "bench --help"):
        code = (
            "import sys\nfrom penstock.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
            "    assert end.code == 0\nassert not {'torch', 'transformers'} & sys.modules.keys()"
        )
        completed = subprocess.run(
            [sys.executable, "-c", code, *option.split()], env=ENVIRONMENT, capture_output=True, check=False
        )
        assert completed.returncode == 0, completed.stderr
        assert b"penstock" in completed.stdout


def test_generate_reports_output_and_speed() -> None:
    options = ("--max-tokens", "5", "--n", "2", "--seed", "3", "--logprobs", "2", "--json", "--stats")
    completed = penstock("generate", "-", *options, stdin="import ")
    assert completed.returncode == 0, completed.stderr
    document = json.loads(completed.stdout)
    assert document["prompt"] == "import "
    assert [out["index"] for out in document["outputs"]] == [0, 1]
    assert all(len(out["token_ids"]) == len(out["logprobs"]) <= 5 for out in document["outputs"])
    assert document["usage"]["completion_tokens"] == sum(len(out["token_ids"]) for out in document["outputs"])
    assert document["stats"]["tokens_per_s"] > 0
    assert "first token after" in completed.stderr
    assert completed.stderr.count("\n") == 1  # no library's progress bar


def test_output_follows_a_schema_an_expression_or_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}')
    assert json.loads(penstock("generate", "x = ", "--json-schema", str(path)).stdout) in (
        *([a, b] for a in (1, 2) for b in (1, 2)),
    )
    assert re.fullmatch("[0-9]{3}\\n", penstock("generate", "x = ", "--regex", "[0-9]{3}").stdout)
    assert penstock("generate", "x = ", "--choice", "None", "--choice", "True").stdout in ("None\n", "True\n")


def test_ctrl_c_cancels_a_generation() -> None:
    with running("generate", "def f():", "--max-tokens", "1900", "--min-tokens", "1900") as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted: the generation was cancelled"


WAITING = """
import os, sys, threading
from penstock import InferenceEngine, ScriptedModel
from penstock.cli.session import interruptible, new_runner, started_engine, stream
is_held = threading.Event()

class Model(ScriptedModel):
    def execute(self, plan, masks=None):
        if self.plans == 2 and sys.argv[1] == "step":
            self.hold()  # this step never ends, and `engine.stop` waits for it
            is_held.set()
        return super().execute(plan, masks)

engine = InferenceEngine(Model([5]), skip_tokenizer_init=True)

def show(delta):
    if sys.argv[1] == "step":
        is_held.wait()
    print("begun", flush=True)
    if sys.argv[1] == "output":
        os.read(os.pipe()[0], 1)  # like a write to a pipe that nobody reads

with started_engine(engine), new_runner() as runner:
    try:
        runner.run(interruptible(stream(engine, [1], None, show)))
    except KeyboardInterrupt:
        print("cancelled", flush=True)
"""


@pytest.mark.parametrize("waits_for", ["step", "output"])
def test_a_second_ctrl_c_ends_the_process_at_once_where_the_first_one_waits(waits_for: str) -> None:
    """Ctrl-C waited for the running step, or for the reader of a pipe, and the next one did so too."""
    command = [sys.executable, "-c", WAITING, waits_for]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, preexec_fn=accept_ctrl_c, **pipes) as process:
        try:
            wait_for("begun", process.stdout)
            process.send_signal(signal.SIGINT)
            if waits_for == "step":
                wait_for("cancelled", process.stdout)
            assert_interrupted(process)
        finally:
            process.kill()


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    """Send Ctrl-C until the process ends: two that arrive at the same time are one."""
    assert process.stderr is not None
    for _ in range(10 * TIMEOUT_S):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(0.1) == 130
            break
    assert process.returncode == 130
    assert process.stderr.read().strip() == "interrupted"


def test_closed_stdout_ends_a_generation_quietly() -> None:
    with running("generate", "def f():", "--max-tokens", "1900") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr.read() == ""


def test_ctrl_c_cancels_an_answer_and_then_leaves_the_chat() -> None:
    long = ("--max-tokens", "1500", "--min-tokens", "1500")
    with running("chat", "--model", str(MODEL_DIR), "--system", "Write Python.", *long) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("def f():\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        wait_for("cancelled", process.stderr)
        process.stdin.write("/reset\n")
        process.stdin.flush()
        wait_for("started a new conversation", process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in process.stderr.read()


def test_bench_prints_one_line_with_the_ratio() -> None:
    completed = penstock("bench", "--workloads", "single", "--repeats", "2")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("\n") == 1
    document = json.loads(completed.stdout)
    single = document["workloads"]["single"]
    assert document["ratio"] == single["ratio"]
    if single["ratio_spread"] <= MAX_SPREAD:
        assert single["ratio"] > 0
        assert document["notes"] == []
    else:  # the machine was busy
        assert single["ratio"] is None
        assert "the run was disturbed" in completed.stderr
    assert document["kernels"]
    assert single["output_tokens"] == 64
    assert single["engine"]["first_token_s"]["p50"] > 0
    assert single["engine"]["inter_token_s"].keys() == {"p50", "p95", "p99"}
    assert "transformers tok/s" in completed.stderr


@pytest.mark.parametrize("model", [[], ["--model", str(MODEL_DIR)], ["--shape", "llama-15m"]])
def test_bench_loads_the_engine_from_a_folder(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It measured the engine on a borrowed module, without kernels and rewrites: no faster than transformers."""
    runs: list[tuple[str, bool, int]] = []

    def measure(self: EngineRuns, runner: object, warm_up: Work, work: Work, measurements: Measurements) -> None:
        engine = InferenceEngine(self.source, skip_tokenizer_init=True, **self.settings)
        with started_engine(engine):
            runs.append(
                (self.source, (Path(self.source) / "config.json").is_file(), len(engine.get_stats()["rewrites"]))
            )
        measurements.engine_s.append(1.0)

    monkeypatch.setattr(EngineRuns, "measure", measure)
    assert main(["bench", *model, "--workloads", "single", "--repeats", "1", "--skip-baseline"]) == 0
    assert len(runs) == 2  # the warm-up and the repeat
    assert all(is_folder and num_rewrites for _, is_folder, num_rewrites in runs)
    assert not model or "--shape" in model or runs[0][0] == str(MODEL_DIR)
    assert "--shape" not in model or not Path(runs[0][0]).exists()  # temporary


def test_bench_takes_turns_and_changes_places(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []

    def measure(self: EngineRuns, runner: object, warm_up: Work, work: Work, measurements: Measurements) -> None:
        turns.append("engine")
        measurements.engine_s.append(1.0)

    monkeypatch.setattr(EngineRuns, "measure", measure)
    monkeypatch.setattr(Baseline, "generate", lambda self, work: turns.append("transformers"))
    assert main(["bench", "--workloads", "single", "--repeats", "3"]) == 0
    sides = [side for side, _ in itertools.groupby(turns)]
    assert sides == ["engine", "transformers", "engine", "transformers", "engine", "transformers"]
    assert turns.count("engine") == 4
    assert json.loads(capsys.readouterr().out)["repeats"] == 3


def measured(engine_s: list[float], baseline_s: list[float]) -> Summary:
    return Measurements(engine_s, baseline_s).summary([([1] * 16, 64)])


def test_the_ratio_is_of_the_turns_of_a_repeat() -> None:
    """A machine that slows down from one repeat to the next slows both sides, and their ratio stays."""
    summary = measured([1.0, 2.0, 4.0], [2.0, 4.0, 8.2])
    assert summary["ratio"] == 2.0
    assert summary["ratio_spread"] == 0.012
    assert summary["engine"]["spread"] == 0.75
    assert disturbance("single", summary) is None


def test_a_disturbed_run_has_no_ratio_and_says_so() -> None:
    summary = measured([1.0, 1.0, 1.0], [2.0, 2.5, 3.0])
    assert summary["ratio"] is None
    assert summary["ratio_spread"] == 0.2
    assert "spread by 20%, more than 10%, so the run was disturbed" in (disturbance("single", summary) or "")
    once = measured([1.0], [2.0])
    assert once["ratio"] is None
    assert "use --repeats 3 or more" in (disturbance("single", once) or "")
    assert disturbance("single", measured([1.0, 1.0], [])) is None  # --skip-baseline
    console = Console(file=StringIO(), width=200)
    console.print(result_table({"single": summary}, "title"))
    assert "disturbed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_one_outlier_among_five_repeats_disturbs_nothing() -> None:
    assert measured([1.0] * 5, [2.0, 2.02, 1.98, 2.01, 9.0])["ratio"] == 2.01


def test_doctor_reports_every_section() -> None:
    completed = penstock("doctor", "--json")
    document = json.loads(completed.stdout)
    assert completed.returncode == 0, document["problems"]
    assert document["ok"]
    assert document["hardware"]["cores"] >= 1
    assert document["cache"]["tokens"] >= document["cache"]["longest_sequence"]
    assert document["speed"]["16_streams_tokens_per_s"] > 0


# Errors.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--model", "./nowhere", "x"], "there is no model folder ./nowhere"),
        (["generate", "--temperature", "-1", "x"], "temperature must be"),
        (["generate", "--logprobs", "1", "x"], "needs JSON output: add --json"),
        (["generate", "--json-schema", "./nowhere.json", "x"], "--json-schema nowhere.json: "),
        (["generate", "--regex", "", "x"], "regex must be a non-empty string"),
        (["bench", "--workloads", "single,huge"], "unknown: 'huge'; choose from single, prefill"),
        (["bench", "--workloads", ","], "the list is empty: choose from single, prefill"),
        (["bench", "--shape", "llama-15m", "--model", "m"], "exclude each other"),
        (["bench", "--rate", "3"], "add --url"),
    ],
)
def test_error_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("penstock: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_invalid_option_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--max-tokens", "many", "x"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--tempature", "1", "hi"], "unknown option --tempature: did you mean --temperature?"),
        (["generate", "hi", "--max-token=5"], ""),  # an abbreviation
        (["generate", "--maxtokens=5", "hi"], "unknown option --maxtokens: did you mean --max-tokens?"),
        (["chat", "--modle", "m"], "unknown option --modle: did you mean --model?"),
        (["--frobnicate", "doctor"], "unknown option --frobnicate ("),
        (["generate", "hello", "world"], "unexpected argument 'world': put a prompt of several words in quotes"),
    ],
)
def test_the_wrong_word_is_blamed(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--tempature 1 hi` blamed "hi" too, since "1" was taken for the prompt."""
    if not message:
        assert make_parser().parse_args(args).max_tokens == 5
        return
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(args)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_tokenizer_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message was a paragraph about sentencepiece, after all weights were read."""
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path)
    assert main(["generate", "--model", str(tmp_path), "x"]) == 2
    error = capsys.readouterr().err
    assert "holds no tokenizer (no tokenizer.json or tokenizer_config.json): save it there" in error
    assert "--tokenizer" in error
    other = ["--tokenizer", str(MODEL_DIR), "--max-tokens", "2"]
    assert main(["generate", "--model", str(tmp_path), "x", *other]) == 0
    assert capsys.readouterr().out


def test_an_unknown_name_without_network_is_one_sentence() -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")}
    completed = subprocess.run(
        command("generate", "--model", "nobody/nothing", "x"),
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert completed.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in completed.stderr
    assert completed.stderr.count("\n") == 1


def test_loading_shows_progress_on_a_terminal_and_nothing_elsewhere() -> None:
    master, slave = os.openpty()
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("NO_COLOR", "TERM")}
    with subprocess.Popen(
        command("generate", "x", "--max-tokens", "2"),
        stdout=subprocess.PIPE,
        stderr=slave,
        env=environment | {"TERM": "xterm"},
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal's other end was closed
            while chunk := os.read(master, 4096):
                shown += chunk
        process.communicate(timeout=TIMEOUT_S)
    os.close(master)
    assert process.returncode == 0
    assert b"loading the model" in shown
    assert b"0:00:0" in shown
    assert penstock("generate", "x", "--max-tokens", "2").stderr == ""


def test_the_size_of_a_folder_and_the_origin_of_a_download_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("penstock.cli.session.status_line", lambda text: lines.append(text) or contextlib.nullcontext())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    config = EngineConfig(download_dir=str(tmp_path))
    for model in (None, str(MODEL_DIR), "owner/model"):
        with loading_line(model, config):
            pass
    assert lines == ["loading the model", f"loading {MODEL_DIR} (11 MB)"]
    assert "loading owner/model from the hub" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "penstock doctor" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_DEBUG", "1")
    with pytest.raises(ConfigurationError):
        main(["generate", "--model", "./nowhere", "x"])


# Parts.


@pytest.mark.parametrize("ending", [asyncio.CancelledError, BrokenPipeError])
async def test_stream_without_a_reader_aborts_its_request(ending: type[BaseException]) -> None:
    def show(delta: Delta) -> None:
        raise ending

    endless = SamplingParams(max_tokens=30_000, detokenize=False)
    model = ScriptedModel([5], step_s=0.001)
    async with InferenceEngine(model, skip_tokenizer_init=True, max_sequence_length=None) as engine:
        with pytest.raises(ending):
            await stream(engine, [1, 2], endless, show)
        await engine.generate([3], SamplingParams(max_tokens=1, detokenize=False))
        assert engine.get_stats()["queue"]["num_running"] == 0
        assert engine.get_stats()["queue"]["num_finished_abort"] == 1


def test_prompt_comes_from_the_argument_or_from_stdin() -> None:
    assert read_prompt("x", StringIO("y")) == "x"
    assert read_prompt("-", StringIO("y\n")) == "y\n"
    assert read_prompt(None, StringIO("y")) == "y"


def test_completions_are_shown_one_after_the_other() -> None:
    completions = OrderedCompletions(2)
    pushed = [(0, "a", None), (1, "c", None), (0, "b", None), (1, "d\n", "stop"), (0, "", "length")]
    outputs = [completions.push(Delta("r", index, text, finish_reason=end)) for index, text, end in pushed]
    assert outputs == ["--- 1 of 2 ---\na", "", "b", "", "\n--- 2 of 2 ---\ncd\n"]


def test_single_completion_ends_with_one_line_break() -> None:
    assert OrderedCompletions(1).push(Delta("r", 0, "a", finish_reason="stop")) == "a\n"
    assert OrderedCompletions(1).push(Delta("r", 0, "a\n", finish_reason="stop")) == "a\n"


def test_conversation_holds_messages_with_their_answers() -> None:
    conversation = Conversation(has_template=True, system="Be brief.")
    conversation.add("one", "1")
    conversation.add("two", "")
    roles = [message["role"] for message in conversation.prompt("three")]  # type: ignore[union-attr,index]
    assert roles == ["system", "user", "assistant", "user"]
    assert conversation.drop_oldest()
    assert not conversation.drop_oldest()
    assert Conversation(has_template=False).prompt("def f") == {"prompt": "def f"}


def test_an_answer_that_ends_at_the_limit_says_how_to_get_more() -> None:
    """It stopped in the middle of a word, without a reason; and the built-in model warned of its chat template."""
    completed = penstock("chat", "--max-tokens", "3", stdin="def f\n")
    assert completed.returncode == 0
    assert "(ended after 3 tokens: --max-tokens N allows more)" in completed.stderr
    assert "chat template" not in completed.stderr


def test_slash_commands_are_executed() -> None:
    conversation = Conversation(has_template=True, turns=[("a", "b")])
    assert "with this system message" in (conversation.execute("/system Be kind.") or "")
    assert (conversation.system, conversation.turns) == ("Be kind.", [])
    assert conversation.execute("/exit") is None
    assert "/reset" in (conversation.execute("/unknown") or "")
    assert "completes" in (Conversation(has_template=False).execute("/system x") or "")


@pytest.mark.parametrize("name", WORKLOADS)
def test_repeats_have_the_same_lengths_and_different_ids(name: str) -> None:
    first, second = (WORKLOADS[name].draw(repeat, vocab_size=100) for repeat in (0, 1))
    assert [(len(prompt), count) for prompt, count in first] == [(len(prompt), count) for prompt, count in second]
    assert first != second
    assert WORKLOADS[name].draw(0, 100) == first
    assert all(0 <= token < 100 for prompt, _ in first for token in prompt)
    shared = WORKLOADS[name].shared
    assert all(prompt[:shared] == first[0][0][:shared] for prompt, _ in first)


@pytest.mark.parametrize("limit", [2, 3, 40, 576, 4096])
def test_workloads_fit_every_model(limit: int) -> None:
    for workload in WORKLOADS.values():
        assert workload.fitted(limit).max_length <= limit
        assert all(prompt and count for prompt, count in workload.fitted(limit).draw(0, vocab_size=2))
    assert WORKLOADS["single"].fitted(4096) == WORKLOADS["single"]
    assert WORKLOADS["prefix32"].fitted(288) == Workload("prefix32", 32, 256, 16, 16)


def test_cache_holds_the_largest_workload() -> None:
    assert cache_tokens([[([1] * 16, 1)], [([1] * 8, 8), ([1], 1)]], block_size=16) == 32


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentiles([float(i) for i in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([]) is None
    assert overall_ratio([2.0, 8.0]) == 4.0
    assert overall_ratio([]) is None
    assert overall_ratio([2.0, None]) is None  # a mean over the others would be of other workloads
    assert spread([1.0]) is None
    assert spread([1.0, 2.0, 3.0]) == 0.5


def test_problems_are_found_and_rated() -> None:
    report: dict[str, dict[str, Any]] = {
        "versions": {"torch": "2.5.1+cpu", "transformers": "5.23.0", "uvloop": "0.21"},
        "hardware": {"threads": 1, "cores": 8, "ram_free_bytes": 1 << 20, "nvidia_driver": True, "cuda_devices": []},
        "cache": {"tokens": 100, "longest_sequence": 2048},
        "model": {"dtype": "bfloat16"},
        "rates": {"matmul_gflop_per_s": 10.0, "matmul_float32_gflop_per_s": 100.0},
    }
    problems = find_problems(report)
    assert [problem.is_fatal for problem in problems] == [True, False, False, False, False, False]
    assert "BROKEN: torch 2.5.1+cpu is too old" in as_text(report, problems)
    assert find_problems({}) == []
    assert Problem("p", "r").as_json() == {"problem": "p", "remedy": "r", "broken": False}


def test_doctor_prints_units() -> None:
    assert formatted("size_bytes", 3 << 20) == "3.0 MiB"
    assert formatted("first_token_s", 0.0123) == "12.3 ms"
    assert formatted("memory_gb_per_s", 20.0) == "20.0 GB/s"
    assert (formatted("x", None), formatted("x", True), formatted("tokens", 65552)) == ("none", "yes", "65,552")
    assert label("16_streams_tokens_per_s") == "16 streams"


def test_closed_and_full_outputs_end_without_a_traceback() -> None:
    """A closed stdout used to abort inside the event loop, a full disk to show a traceback."""
    for where, code in ((">&-", 0), (">/dev/full", 2)):
        shell = f'"{sys.executable}" -m penstock generate x --max-tokens 2 {where}'
        completed = subprocess.run(["bash", "-c", shell], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert (completed.returncode, "Traceback" in completed.stderr) == (code, False), completed.stderr
