"""Two small tokenizers of the two families that nearly all models use, made in-process.

`byte_level` is of the GPT-2 kind: every byte has a token. `byte_fallback` is of the Llama kind: words begin with "▁",
characters outside the vocabulary become <0x..> tokens, and decoding strips one leading space.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """Water falls from the upper lake into the penstock, and the penstock carries it down to the turbine.
The turbine turns, the generator turns with it, and the lamps of the valley are lit before the evening.
If the gate closes too fast, the water strikes like a hammer; so the keeper closes it slowly, turn by turn.
In 1895 there were 10 lamps, in 1905 there were 4,096: "More light!" they said, and more light they got.
L'eau de la vallée, das Wasser über den Wäldern, вода в реке, 水从山上流下来。
"""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens; a new one with each call."""
    return _wrap(_byte_level_json())


def byte_fallback() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback and Llama's decoder, of about 500 tokens; a new one with each call."""
    return _wrap(_byte_fallback_json())


def streamed_text(tokenizer: Any, ids: list[int], skip_special_tokens: bool = True) -> str:
    """What a stream must show: the decoded text, but for byte runs that are not UTF-8, whose characters show too."""
    decoded = str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))
    if "<0x00>" not in tokenizer.get_vocab() or "\ufffd" not in decoded:
        return decoded
    left_out = {0, 1, 2, 476, 477, 478} if skip_special_tokens else set[int]()
    visible = [id for id in ids if id < len(tokenizer) and id not in left_out]
    runs: list[bytes | str] = []
    for token in tokenizer.convert_ids_to_tokens(visible):
        if not token.startswith("<0x"):
            runs.append(token.replace("▁", " "))
        elif runs and isinstance(runs[-1], bytes):
            runs[-1] += bytes.fromhex(token[3:5])
        else:
            runs.append(bytes.fromhex(token[3:5]))
    return "".join(run if isinstance(run, str) else _characters_of(run) for run in runs).removeprefix(" ")


def _characters_of(run: bytes) -> str:
    """The characters of a run, and U+FFFD for each byte that belongs to none."""
    return run.decode(errors="surrogateescape").translate({0xDC00 + byte: "\ufffd" for byte in range(128, 256)})


def in_context(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, now of a class of which nothing is known, since it could decode in its own way."""
    tokenizer.__class__ = _OwnDecode
    return tokenizer


class _OwnDecode(PreTrainedTokenizerFast):
    def decode(self, token_ids: Any, **options: Any) -> str:  # type: ignore[override]
        return str(super().decode(token_ids, **options))


def _wrap(text: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def _byte_level_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return _finish(tokenizer)


@cache
def _byte_fallback_json() -> str:
    # Byte tokens must be ordinary entries of the vocabulary, so they are added to what was trained.
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(TEXT.replace("水从山上流下来", "").split(), trainer)
    state: dict[str, Any] = json.loads(trained.to_str())
    for byte in range(256):
        state["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(state["model"]["vocab"]))
    state["model"].update(byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> str:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    tokenizer.add_special_tokens([AddedToken("<end>"), AddedToken("<|user|>"), AddedToken("<|assistant|>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("two words", normalized=False)])
    return tokenizer.to_str()
