"""The processes of SGLang's engine: its own functions, without the signal with which they end the program.

Where they fail, SGLang's processes send SIGQUIT to the one that started them, which is the program. The program's side
sees that they have ended. Runs in these processes only; named by `sglang_process`.
"""

from __future__ import annotations

import os


def run_scheduler(*arguments: object, **options: object) -> None:
    """SGLang's `run_scheduler_process`."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    _spare_parent()
    run_scheduler_process(*arguments, **options)


def run_detokenizer(*arguments: object, **options: object) -> None:
    """SGLang's `run_detokenizer_process`."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    _spare_parent()
    run_detokenizer_process(*arguments, **options)


def _spare_parent() -> None:
    """Let no signal that this process sends by psutil reach its parent."""
    import psutil

    parent, send_signal = os.getppid(), psutil.Process.send_signal

    def send(process: psutil.Process, number: int) -> None:
        if process.pid != parent:
            send_signal(process, number)

    psutil.Process.send_signal = send
