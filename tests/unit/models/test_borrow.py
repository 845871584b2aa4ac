"""A view of a live module shares its numbers and nothing else."""

from __future__ import annotations

import copy

import torch

from penstock.models.borrow import view_of, weight_bytes
from penstock.models.checks import probe
from tests.tiny_models import build


def test_a_view_shares_every_parameter() -> None:
    module = build("llama")
    view = view_of(module)
    mine, theirs = dict(module.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)


def test_changes_of_the_view_leave_the_owner_as_it_was() -> None:
    module = build("llama").train()
    config = copy.deepcopy(module.config.to_dict())
    probe(view_of(module), torch.device("cpu"), verify=True)
    assert module.training
    assert module.config.to_dict() == config
    assert module.config._attn_implementation == "eager"
    module(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_change_in_place_shows_in_the_view() -> None:
    module = build("llama")
    view = view_of(module)
    with torch.no_grad():
        module.lm_head.weight.zero_()
        assert view(torch.tensor([[1, 2]])).logits.abs().max() == 0


def test_tied_weights_count_once() -> None:
    tied, apart = build("llama", tie_word_embeddings=True), build("llama", tie_word_embeddings=False)
    assert weight_bytes(apart) - weight_bytes(tied) == 160 * 32 * 4
