"""A prompt and its parameters as a request to an OpenAI-compatible server.

Pure functions. What the API cannot express is refused by name, before anything is sent. Called by `OpenAIEngine`.
"""

from __future__ import annotations

from typing import Any

from penstock.api.prompt import Chat, PromptInput
from penstock.backends.request_params import IGNORED, changed, plain_params
from penstock.errors import RequestError
from penstock.generation import Params
from penstock.sampling import SamplingParams

# Parameters that every server knows, and those that vLLM, SGLang and Penstock add; the latter are sent if they differ
# from their defaults. Each with its name in the API.
_STANDARD = {name: name for name in ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty")}
_EXTENSIONS = {
    name: name
    for name in (
        *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    )
}
# Sent in a form of their own, without effect on what a server generates, or derived from others.
_OTHERS = {
    *("max_tokens", "stop", "seed", "logit_bias", "detokenize"),
    *IGNORED,
}
_DEFAULTS = SamplingParams()

Body = dict[str, Any]  # JSON


def request_body(prompt: PromptInput, params: Params) -> Body:
    """The arguments of a chat completion, or of a completion; `extra_body` holds what the API itself lacks.

    Raises `RequestError`.
    """
    extensions: Body = {}
    standard: Body = {}
    if params is not None:
        plain = plain_params(params)
        extensions, standard = _extensions(plain), _standard(plain)
    if prompt.chat is None:
        content: Body = {"prompt": prompt.text if prompt.token_ids is None else prompt.token_ids}
    else:
        content = _chat(prompt.chat)
        extensions |= _template_arguments(prompt.chat)
    return {**content, **standard, "extra_body": extensions}


def _standard(params: SamplingParams) -> Body:
    """Always sent, so that a server's own defaults do not replace what the caller chose."""
    body = {theirs: getattr(params, ours) for ours, theirs in _STANDARD.items()}
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if params.seed is not None:
        body["seed"] = params.seed
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    return body


def _extensions(params: SamplingParams) -> Body:
    expressible = _STANDARD.keys() | _EXTENSIONS.keys() | _OTHERS
    for name in changed(params):
        if name not in expressible:
            raise RequestError(f"{name} cannot be sent to an OpenAI-compatible server: leave it out")
    values = {theirs: getattr(params, ours) for ours, theirs in _EXTENSIONS.items()}
    return {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}


def _chat(chat: Chat) -> Body:
    return {"messages": chat.messages, **({} if chat.tools is None else {"tools": chat.tools})}


def _template_arguments(chat: Chat) -> Body:
    body: Body = {}
    if chat.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not chat.add_generation_prompt:
        body["add_generation_prompt"] = False
    if chat.documents is not None:
        body["documents"] = chat.documents
    if chat.arguments:
        body["chat_template_kwargs"] = dict(chat.arguments)
    return body
