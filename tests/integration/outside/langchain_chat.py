"""LangChain's integration tests of chat models, for `ChatOpenAI`; run by `test_langchain.py` in a process of its own.

Media are off: the model reads text.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAI(ChatModelIntegrationTests):
    """About 45 tests."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        address = os.environ["SERVER_URL"]
        return {"model": "gpt-a", "base_url": address, "api_key": "x", "max_retries": 0, "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "gpt-b"
