"""Requests made up by schemathesis from the served OpenAPI document: no answer is a 5xx, and none keeps it waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.serving import ServingSettings
from tests.integration.outside.suites import server

# Draining, pausing and sleep would end the run; these routes answer nobody without the admin key.
ADMIN_PATHS = "^/(admin|update_weights|pause|resume|is_paused|sleep|wake_up|is_sleeping|(v1/)?(un)?load_lora_adapter)"
# A body can follow the schema and still be refused: fields exclude each other, and the model has limits of its own.
EXCLUDED_CHECK = "positive_data_acceptance"
OPTIONS = (
    *("--max-time", "25", "--request-timeout", "10", "--max-response-time", "5", "--seed", "7"),
    *("--checks", "all", "--exclude-checks", EXCLUDED_CHECK, "--continue-on-failure"),
    *("--exclude-path-regex", ADMIN_PATHS),
    *("--generation-database", "none", "--no-color"),
)


@pytest.mark.slow
def test_no_request_is_a_server_error_or_keeps_its_client_waiting(tmp_path: Path) -> None:
    with server(["The water falls."], ServingSettings(), max_length=600) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *OPTIONS]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
