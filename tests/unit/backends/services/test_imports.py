"""Importing the clients is quick, and needs no SDK."""

from __future__ import annotations

import subprocess
import sys

SDKS = ("openai", "httpx", "vllm", "sglang", "tinker", "weaver", "omegaconf", "transformers", "torch")


def test_importing_the_clients_and_engines_loads_no_sdk() -> None:
    code = f"import sys, penstock.backends; print([name for name in {SDKS} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_sdk_that_is_missing_is_named_with_the_command_that_installs_it() -> None:
    code = """
import sys
sys.modules["tinker"] = sys.modules["weaver"] = None
from penstock.backends import TinkerServiceHolder, WeaverServiceHolder
for holder in (TinkerServiceHolder("m"), WeaverServiceHolder("m")):
    try:
        holder.get_service_client()
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'penstock[tinker]'" in result.stdout
    assert "pip install nex-weaver" in result.stdout
