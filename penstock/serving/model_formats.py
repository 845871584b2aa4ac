"""How a model writes tool calls and reasoning, found in its chat template or given in the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from penstock.api.protocols import Engine, Templated
from penstock.serving.settings import ServingSettings
from penstock.tools import (
    ReasoningFormat,
    format_named,
    reasoning_format_named,
    reasoning_format_of,
    renders_calls,
    renders_tools,
    tool_format_of,
)


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """`special_tokens` are the markers that the tokenizer treats as special, which are decoded only on request."""

    tools: str = "json"
    reasoning: ReasoningFormat | None = None
    template_knows_tools: bool = False
    template_knows_calls: bool = True  # also where there is no template
    special_tokens: Mapping[str, int] = field(default_factory=dict)

    def hides_markers(self, *texts: str) -> bool:
        """Whether one of these markers is a special token."""
        return any(text in self.special_tokens for text in texts)


def formats_of(engine: Engine, settings: ServingSettings) -> ModelFormats:
    """The formats of an engine's model; the defaults where it has no tokenizer with a template."""
    tokenizer = engine.tokenizer if isinstance(engine, Templated) else None
    template = _template_of(tokenizer)
    tools = settings.tool_format or tool_format_of(template)
    name = settings.reasoning_format or reasoning_format_of(template)
    reasoning = None if name in (None, "none") else reasoning_format_named(str(name))
    markers = [*format_named(tools).special_tokens, *((reasoning.start, reasoning.end) if reasoning else ())]
    knows_calls = template is None or renders_calls(template)
    return ModelFormats(tools, reasoning, renders_tools(template), knows_calls, _special_ids(tokenizer, markers))


def _template_of(tokenizer: object) -> str | None:
    """The template, or all of them as one text where there are several."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else None


def _special_ids(tokenizer: object, markers: Iterable[str]) -> dict[str, int]:
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    convert = getattr(tokenizer, "convert_tokens_to_ids", None)
    return {marker: int(convert(marker)) for marker in markers if convert is not None and marker in special}
