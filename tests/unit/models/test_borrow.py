"""A view of a live module shares its parameters and nothing else."""

from __future__ import annotations

import copy

import torch
from torch import nn

from penstock.models.borrow import view_of, weight_bytes
from penstock.models.checks import probe
from tests.tiny_models import build


def test_a_view_shares_every_parameter() -> None:
    module = build("llama")
    view = view_of(module)
    mine, theirs = dict(module.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)


def test_changes_of_the_view_leave_the_owner_unchanged() -> None:
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


def test_buffers_of_the_checkpoint_are_shared_and_derived_ones_are_not() -> None:
    """Rotary frequencies that the owner's forward pass rewrote were used for every request."""
    module = build("llama")
    module.register_buffer("offset", torch.zeros(1))
    view = view_of(module)
    assert dict(view.named_buffers())["offset"] is dict(module.named_buffers())["offset"]
    frequencies, view_frequencies = (part.get_buffer("model.rotary_emb.inv_freq") for part in (module, view))
    assert view_frequencies is not frequencies
    assert torch.equal(view_frequencies, frequencies)


class Merging(nn.Linear):
    """As loralib's layers: leaving training mode writes to the weights."""

    def train(self, mode: bool = True) -> nn.Module:
        if not mode:
            with torch.no_grad():
                self.weight.add_(1.0)
        return super().train(mode)


def test_a_view_is_in_eval_mode_without_calling_eval() -> None:
    """A layer that merges its adapter in `eval()` did so for the view, into the owner's weights."""
    module = nn.Sequential(Merging(2, 2))
    before = module[0].weight.clone()
    view = view_of(module)
    assert not any(part.training for part in view.modules())
    assert all(part.training for part in module.modules())
    assert torch.equal(module[0].weight, before)


def test_a_module_that_refers_to_itself_and_has_hooks_is_copied_completely() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(2, 2)
            self.again = [self.child]
            self.forward = self.child.forward  # type: ignore[method-assign]
            self.child.register_forward_hook(self.double)

        def double(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return output * 2

    owner = Owner()
    view = view_of(owner)
    assert view.again[0] is view.child is not owner.child
    assert view.forward.__self__ is view.child
    x = torch.ones(1, 2)
    assert torch.equal(view.child(x), owner.child(x))
    assert (view.calls, owner.calls) == (1, 1)
