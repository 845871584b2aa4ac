"""A view of a live module shares its parameters and nothing else."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from penstock.errors import ConfigurationError
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


class Doubled(nn.Module):
    """Refers to a part of itself from a list and from a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.again = [self.child]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.again[0](x)
        return 2 * y


def test_a_module_that_refers_to_itself_is_copied_completely() -> None:
    owner = Doubled()
    view: Any = view_of(owner)
    assert view.again[0] is view.child is not owner.child
    x = torch.ones(1, 2)
    assert torch.equal(view(x), owner(x))


def raising(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("a view runs nothing of its owner's")


class Slow(Doubled):
    """Is copied by `copy.deepcopy`, because it defines how its state is restored."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@pytest.mark.parametrize("kind", [Doubled, Slow])
def test_a_view_has_no_hooks_and_no_forwards_of_instances_and_its_owner_keeps_them(kind: type[Doubled]) -> None:
    """The view of a module whose forward a trainer had replaced ran the owner's layers."""
    owner = kind()
    x = torch.ones(1, 2)
    expected = owner(x)
    owner.forward, owner.child.forward = raising, raising  # type: ignore[method-assign]
    owner.child.register_forward_pre_hook(raising)
    owner.register_forward_hook(raising)
    owner.compile()
    assert torch.equal(view_of(owner)(x), expected)
    assert owner.forward is owner.child.forward is raising
    assert owner.child._forward_pre_hooks
    assert owner._forward_hooks


def test_a_view_sees_through_compiled_parts_and_wrappers() -> None:
    owner = Doubled()
    x = torch.ones(1, 2)
    expected = owner(x)
    owner.child = torch.compile(owner.child)
    for wrapper in (owner, torch.compile(owner), nn.DataParallel(owner)):
        view: Any = view_of(wrapper)
        assert [type(part) for part in view.modules()] == [Doubled, nn.Linear]
        assert torch.equal(view(x), expected)
        assert view.child.weight is owner.child.weight


def test_weights_that_hooks_of_torch_compute_stay_computed() -> None:
    """Pruning and the older weight norms set the weight in a hook before each pass."""
    owner = Doubled()
    prune.random_unstructured(owner.child, "weight", 0.5)
    x = torch.ones(1, 2)
    view = view_of(owner)
    with torch.no_grad():
        owner.child.get_parameter("weight_orig").mul_(3.0)
        assert torch.equal(view(x), owner(x))


def test_a_module_that_is_not_on_one_device_is_refused_with_the_remedy() -> None:
    """Offloaded parameters are on the meta device between passes, and the hooks that load them are the owner's."""
    owner = Doubled()
    owner.child.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    with pytest.raises(ConfigurationError, match=r"several devices or offloaded \(cpu, meta\).*without device_map"):
        view_of(owner)


class FullyShardedDataParallel(nn.Module):
    """Has the name of PyTorch's, which needs a process group."""


def test_a_sharded_module_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="gather its full state dict into a module that is not sharded"):
        view_of(nn.Sequential(FullyShardedDataParallel()))
