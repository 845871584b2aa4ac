"""`OpenAIEngine`: an OpenAI-compatible server behind the `Engine` protocol.

Owns the connection to the server. Deadlines are kept by `StreamedEngine`, because the API has none; cancelling a
request closes its connection, which aborts it on the server.
"""

from __future__ import annotations

from typing import Any

from penstock.api.arguments import Arguments
from penstock.api.transcript import Transcript
from penstock.backends.addresses import api_url
from penstock.backends.engine_options import check_installed
from penstock.backends.openai_request import Body, request_body
from penstock.backends.streamed import StreamedEngine, StreamedRequest
from penstock.errors import ConfigurationError, PenstockError, described

CONNECT_S = 10.0


class OpenAIEngine(StreamedEngine[Body]):
    """Generates on the server at `url` (with or without /v1), with its first model unless `model` names another.

    `max_retries` repeats a request that the server refused with 408, 409, 429 or 5xx, or that did not reach it, after a
    growing, randomized pause; never after its first token. With `return_token_ids` the server is asked for token ids,
    which Penstock and vLLM return; without them the outputs hold text only. Priority is not sent. A namespace is sent
    as `cache_salt`. Raises `PackageMissing` without the `openai` package; `start` raises `ConfigurationError` if the
    server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        max_retries: int = 2,
        return_token_ids: bool = False,
    ) -> None:
        check_installed("openai", "openai is not installed: pip install 'penstock[client]'")
        super().__init__("penstock-openai")
        self.url = api_url(url)
        self.model = model
        self._api_key = api_key
        self._max_retries = max_retries
        self._return_token_ids = return_token_ids
        self._client: Any = None  # an `openai.AsyncOpenAI`

    def get_stats(self) -> dict[str, object]:
        """The address, the model, and how many requests run and have ended."""
        return {"url": self.url, "model": self.model, **super().get_stats()}

    def _prepare(self, arguments: Arguments) -> tuple[Body, int]:
        body = request_body(arguments.prompt, arguments.params)
        return body, body.get("n", 1)

    async def _open(self) -> None:
        import openai  # of the extra `client`

        self._client = client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key or "none",
            max_retries=self._max_retries,
            timeout=openai.Timeout(None, connect=CONNECT_S),
        )
        if self.model is None:
            try:
                self.model = (await client.models.list()).data[0].id
            except (openai.OpenAIError, LookupError) as error:
                raise ConfigurationError(f"no model can be found at {self.url}: {described(error)}") from None

    async def _close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _stream(self, request: StreamedRequest[Body]) -> None:
        async with await self._open_stream(request) as stream:
            async for chunk in stream:
                self._publish(request, _added(request, chunk))

    async def _open_stream(self, request: StreamedRequest[Body]) -> Any:
        """The stream of chunks; chat and text completions have chunks of different types."""
        body, extensions = dict(request.work), dict(request.work["extra_body"])
        if self._return_token_ids:
            extensions["return_token_ids"] = True
        if request.arguments.namespace:
            extensions["cache_salt"] = request.arguments.namespace
        body |= {"model": self.model, "stream": True, "extra_body": extensions}
        endpoint = self._client.completions if "prompt" in body else self._client.chat.completions
        return await endpoint.create(**body)

    def _error_of(self, error: BaseException) -> PenstockError:
        from penstock.backends.openai_errors import penstock_error

        return penstock_error(error, self.url)


def _added(request: StreamedRequest[Body], chunk: Any) -> list[Transcript]:
    """The transcripts to which a chunk added text, tokens or a finish reason."""
    added = []
    for choice in chunk.choices:
        ids = getattr(choice, "prompt_token_ids", None) or getattr(chunk, "prompt_token_ids", None)
        if ids and not request.channel.prompt_token_ids:
            request.channel.prompt_token_ids = list(ids)
        transcript = request.transcript(choice.index)
        text = choice.text if hasattr(choice, "text") else choice.delta.content
        tokens = getattr(choice, "token_ids", None) or []
        transcript.add(text or "", tokens)
        if choice.finish_reason is not None:
            transcript.end("", choice.finish_reason, getattr(choice, "stop_reason", None))
        if text or tokens or choice.finish_reason is not None:
            added.append(transcript)
    return added
