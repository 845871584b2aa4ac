"""`ServingSettings`: every setting of the HTTP server, with a sentence each.

Values come from keywords, then environment variables (`PENSTOCK_SERVE_MAX_BODY_BYTES=4000000`), then a YAML file
(`ServingSettings.from_yaml(path)`), then the defaults. Frozen once made. Raises `ConfigurationError`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self, TypedDict, Unpack, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from penstock.config import explained, read_mapping
from penstock.sampling import RequestPriority
from penstock.values import split_names

Names = Annotated[tuple[str, ...], NoDecode]  # as one text: separated by commas
SECRETS = ("api_keys", "admin_key")  # settings whose values no message may show


class ApiKey(BaseModel):
    """A key and what its owner may do. The key itself is given in one of four ways.

    Requests of keys with different namespaces never share cached prefixes. The namespace is the name by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Name in logs and metrics.")
    key: SecretStr | None = Field(default=None, description="The key itself.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-fA-F]{64}$", description="The key's SHA-256 in hexadecimal."
    )
    file: Path | None = Field(default=None, description="A file that holds the key.")
    env: str | None = Field(default=None, description="An environment variable that holds the key.")
    namespace: str | None = Field(default=None, description="Isolates cached prefixes; None: the name.")
    max_priority: str = Field(
        default="normal", pattern="^(low|normal|high|critical)$", description="Highest priority class."
    )
    requests_per_minute: float | None = Field(default=None, gt=0, description="Rate limit; None is no limit.")
    max_concurrent: int | None = Field(default=None, ge=1, description="Maximum open requests; None is no limit.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if sum(source is not None for source in (self.key, self.sha256, self.file, self.env)) != 1:
            raise ValueError(f"key {self.name!r} needs exactly one of key, sha256, file and env")
        return self

    @property
    def priority_ceiling(self) -> RequestPriority:
        """The highest priority class."""
        return RequestPriority[self.max_priority.upper()]

    @property
    def cache_namespace(self) -> str:
        """The namespace of its requests."""
        return self.name if self.namespace is None else self.namespace


class ServingKeywords(TypedDict, total=False):
    """The keywords of `ServingSettings`; see there what each means."""

    served_model_name: tuple[str, ...]
    api_keys: tuple[ApiKey, ...]
    admin_key: SecretStr | None
    cors_origins: tuple[str, ...] | None
    max_body_bytes: int
    max_choices: int
    max_embeddings: int
    max_stop: int
    max_stop_characters: int
    max_bad_words: int
    max_logit_bias: int
    max_messages: int
    max_tools: int
    tool_format: str | None
    reasoning_format: str | None
    max_concurrent_requests: int
    max_stored_responses: int
    max_stored_bytes: int
    ping_interval_s: float
    stall_s: float
    tracing: bool
    drain_delay_s: float
    drain_timeout_s: float


class ServingSettings(BaseSettings):
    """The server's settings. Keyword arguments; unknown ones raise `ConfigurationError`."""

    model_config = SettingsConfigDict(env_prefix="PENSTOCK_SERVE_", frozen=True, extra="forbid")

    served_model_name: Names = Field((), description="Names under which the model is served; none: the model's folder.")
    api_keys: tuple[ApiKey, ...] = Field((), description="Keys. Once there is one, requests without a key are refused.")
    admin_key: SecretStr | None = Field(None, description="Key of /admin; None: there is no /admin.")
    cors_origins: Names | None = Field(
        None, description='Origins of web pages that may call; "*" is all. None: all if there are keys, else localhost.'
    )
    max_body_bytes: int = Field(2 << 20, ge=1, description="Maximum bytes of a request's body.")
    max_choices: int = Field(128, ge=1, description="Maximum completions of a request: prompts times n or best_of.")
    max_embeddings: int = Field(2048, ge=1, description="Maximum inputs of a request for embeddings.")
    max_stop: int = Field(16, ge=0, description="Maximum stop strings of a request.")
    max_stop_characters: int = Field(1 << 14, ge=0, description="Maximum characters of all stop strings of a request.")
    max_bad_words: int = Field(1024, ge=0, description="Maximum bad_words of a request.")
    max_logit_bias: int = Field(1024, ge=0, le=1 << 14, description="Maximum entries of logit_bias.")
    max_messages: int = Field(4096, ge=1, description="Maximum messages of a chat.")
    max_tools: int = Field(128, ge=0, description="Maximum tools of a chat.")
    tool_format: str | None = Field(None, description="How the model writes tool calls; None: what its template shows.")
    reasoning_format: str | None = Field(
        None, description='How the model writes its reasoning; None: what its template shows; "none": not at all.'
    )
    max_concurrent_requests: int = Field(1024, ge=1, description="Maximum open HTTP requests for generation.")
    max_stored_responses: int = Field(1024, ge=0, description="Responses kept for each API key; 0 keeps none.")
    max_stored_bytes: int = Field(64 << 20, ge=1, description="Maximum bytes of the responses kept for each API key.")
    ping_interval_s: float = Field(5.0, gt=0, description="A stream that was silent for so long sends a comment.")
    stall_s: float = Field(60.0, gt=0, description="Not ready once work has waited for so long without a step.")
    tracing: bool = Field(False, description="Trace every HTTP request with OpenTelemetry (penstock[otel]).")
    drain_delay_s: float = Field(0.0, ge=0, description="At SIGTERM, seconds during which requests are still accepted.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds that accepted requests have to finish.")

    def __init__(self, **values: Unpack[ServingKeywords]) -> None:
        with explained(type(self).model_fields, secrets=SECRETS):
            super().__init__(**values)

    _split = field_validator("served_model_name", "cors_origins", mode="before")(lambda value: split_names(value))
    _distinct = field_validator("served_model_name")(lambda names: tuple(dict.fromkeys(names)))

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [key.name for key in self.api_keys]
        if len(set(names)) < len(names):
            raise ValueError("two API keys have the same name")
        return self

    @property
    def trusts_host(self) -> bool:
        """Whether pages of the host that a request names are the operator's own."""
        return True

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Unpack[ServingKeywords]) -> ServingSettings:
        """Read a YAML mapping of field names; keywords and environment variables take precedence."""
        values = {
            name: value
            for name, value in read_mapping(path).items()
            if f"PENSTOCK_SERVE_{name.upper()}" not in os.environ
        }
        return cls(**cast(ServingKeywords, {**values, **overrides}))
