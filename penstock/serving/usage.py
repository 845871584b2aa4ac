"""Counts of tokens as OpenAI's APIs report them."""

from __future__ import annotations

from penstock.serving.generation import Usage


def usage_json(usage: Usage) -> dict[str, object]:
    """A `usage` object of chats and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
