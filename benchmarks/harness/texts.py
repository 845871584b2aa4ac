"""Tasks on source files of Python's standard library: to edit a file, or to continue it. Used by `speculation.py`.

Owns the texts and the script that prescribes them. The same number gives the same text on every run.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from penstock import SamplingParams

RENAMED, DROPPED, INSERTED = 3, 0.03, 0.03  # identifiers, and fractions of the lines
SMALLEST, LARGEST = 3000, 9000  # bytes of a file


@dataclass(frozen=True)
class Script:
    """A logits processor that forces token `tokens[i]` at output position i.

    All logits are computed and sampled as usual, with speculation and without. It depends on its arguments only.
    """

    tokens: list[int]

    def __call__(self, output: list[int], logits: Any) -> Any:
        logits[self.tokens[len(output)]] = 1e9
        return logits


def files() -> list[str]:
    """Texts of medium length, in an order independent of their names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    chosen = [path for path in paths if SMALLEST < path.stat().st_size < LARGEST and "site-packages" not in path.parts]
    random.Random(0).shuffle(chosen)
    return [path.read_text(errors="ignore") for path in chosen]


def edited(text: str, seed: int) -> str:
    """The text with some identifiers renamed, lines deleted and comments added, as after a refactoring."""
    rng = random.Random(seed)
    names = sorted(set(re.findall(r"\b[a-z_]{5,}\b", text)))
    for name in rng.sample(names, min(RENAMED, len(names))):
        text = re.sub(rf"\b{name}\b", f"{name}_new", text)
    lines = []
    for line in text.split("\n"):
        chance = rng.random()
        if chance >= DROPPED:
            lines.append(line)
        if chance > 1 - INSERTED:
            lines.append(f"    # note {rng.randrange(100)}: checked by hand")
    return "\n".join(lines)


def scripted(prompt: list[int], output: list[int]) -> tuple[list[int], SamplingParams]:
    """A request whose output is prescribed."""
    params = SamplingParams(
        temperature=0.0, max_tokens=len(output), ignore_eos=True, detokenize=False, logits_processors=[Script(output)]
    )
    return prompt, params


def edits(tokenizer: Any, max_tokens: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Requests with a file of 500 to 1,500 tokens as prompt and its edited version, cut to `max_tokens`, as output."""
    for number, text in enumerate(files()):
        prompt = tokenizer.encode(text)
        if 500 <= len(prompt) <= 1500:
            yield scripted(prompt, tokenizer.encode(edited(text, number))[:max_tokens])


def continuations(tokenizer: Any, num_tokens: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Requests with the beginning of a file as prompt and the next part as output, endlessly."""
    encoded = [tokenizer.encode(text) for text in files()]
    usable = [tokens for tokens in encoded if len(tokens) >= 200 + num_tokens]
    for number in count():
        tokens = usable[number % len(usable)]
        yield scripted(tokens[:200], tokens[200 : 200 + num_tokens])


def samples(tokenizer: Any, num_tokens: int, temperature: float) -> Iterator[tuple[list[int], SamplingParams]]:
    """Requests with the beginning of a file as prompt, whose output the model samples."""
    encoded = [tokenizer.encode(text)[:200] for text in files()]
    for number in count():
        params = SamplingParams(
            temperature=temperature, max_tokens=num_tokens, seed=number, ignore_eos=True, detokenize=False
        )
        yield encoded[number % len(encoded)], params
