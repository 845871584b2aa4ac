"""Paged attention over random ragged rows equals attention written out by hand for one query at a time."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
from torch import Tensor, nn

from penstock.kernels.paged import AttentionOptions
from penstock.models import torch_attention
from penstock.models.layout import StepLayout
from penstock.models.storage import LayerShape
from penstock.models.torch_attention import Groups, PagedAttention, SlotStorage, attention_groups
from penstock.sampling import SamplingParams
from penstock.step import Row

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def attend_by_hand(query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """One position: query [H, D], keys and values [L, K, D]; the query is the last position of the context."""
    if options.window is not None:
        keys, values = keys[-options.window :], values[-options.window :]
    out = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = keys[:, kv_head] @ query[head] * options.scaling
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.sinks is not None:
            scores = torch.cat([scores, options.sinks[head][None]])
        weights = torch.softmax(scores, 0)[: len(keys)]
        out.append(weights @ values[:, kv_head])
    return torch.stack(out)


def ragged_rows(rng: random.Random) -> list[Row]:
    """Six rows at random places of their sequences, blocks handed out in random order."""
    blocks = list(range(64))
    rng.shuffle(blocks)
    rows = []
    for number in range(6):
        end = rng.randint(1, 30)
        start = end - 1 if number % 2 else rng.randint(0, end - 1)
        table = array("i", [blocks.pop() for _ in range(-(-end // BLOCK))])
        rows.append(Row(number, [0] * end, start, end, table, True, SamplingParams(), end))
    return rows


OPTIONS = {
    "plain": AttentionOptions(0.3, None, None, None),
    "window": AttentionOptions(0.3, 5, None, None),
    "softcap": AttentionOptions(0.3, None, 2.0, None),
    "sinks": AttentionOptions(0.3, None, None, torch.linspace(-1, 2, HEADS)),
    "everything": AttentionOptions(0.3, 3, 2.0, torch.linspace(-1, 2, HEADS)),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_row_attends_to_its_own_context(kind: str, seed: int) -> None:
    options, rows = OPTIONS[kind], ragged_rows(random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    shape = LayerShape(KV_HEADS, DIM, DIM, torch.float32)
    storage = SlotStorage([shape], 64, BLOCK, torch.device("cpu"))
    for cache in (*storage.keys, *storage.values):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    layout = StepLayout.of(tuple(rows), BLOCK, torch.device("cpu"))
    count = len(layout.input_ids)
    query = torch.randn(HEADS, count, DIM, generator=generator)
    key, value = (torch.randn(KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    module = nn.Identity()
    output = PagedAttention(storage, layout, {id(module): 0}).attend(module, query, key, value, options)

    keys, values = storage.keys[0], storage.values[0]
    place = 0
    for row in rows:
        slots = [row.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(row.end)]
        assert torch.equal(keys[slots[row.start :]], key[:, place : place + row.num_tokens].transpose(0, 1))
        for position in range(row.start, row.end):
            context = slots[: position + 1]
            expected = attend_by_hand(query[:, place], keys[context], values[context], options)
            torch.testing.assert_close(output[place], expected, rtol=1e-5, atol=1e-5)
            place += 1


@pytest.mark.parametrize("side", range(2))
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", OPTIONS)
def test_nan_in_a_token_affects_only_the_queries_that_see_it(kind: str, number: float, side: int) -> None:
    """NaN survives the weight 0 of a masked position: it reached earlier tokens of its chunk, and padded rows.

    Three rows: one that ends at position 12 in chunks, broken at 7; one of the same length, and a short one, whose
    blocks somebody left NaN behind.
    """
    options = OPTIONS[kind]
    shape, module = LayerShape(KV_HEADS, DIM, DIM, torch.float32), nn.Identity()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(HEADS, 3, 12, DIM, generator=generator)
    clean = torch.randn(2, KV_HEADS, 3, 12, DIM, generator=generator)
    broken = clean.clone()
    broken[side, 1, 0, 7, 3] = number
    tables = (array("i", [0, 1, 2]), array("i", [3, 4, 5]), array("i", [6]))

    def outputs(key_value: Tensor, left_behind: float) -> list[Tensor]:
        storage = SlotStorage([shape], 7, BLOCK, torch.device("cpu"))
        for cache in (*storage.keys, *storage.values):
            cache.fill_(left_behind)
        output = []
        for parts in (((0, 0, 10), (1, 0, 11)), ((0, 10, 11), (1, 11, 12), (2, 0, 1)), ((0, 11, 12), (2, 1, 2))):
            rows = [Row(i, [0] * end, begin, end, tables[i], True, SamplingParams(), end) for i, begin, end in parts]
            layout = StepLayout.of(tuple(rows), BLOCK, torch.device("cpu"))
            q, k, v = (torch.cat([x[:, i, a:b] for i, a, b in parts], 1) for x in (query, *key_value))
            output.append(PagedAttention(storage, layout, {id(module): 0}).attend(module, q, k, v, options))
        return output

    expected, output = outputs(clean, 0.0), outputs(broken, torch.nan)
    window = options.window or 100
    for step, places in zip(range(3), (range(10), [10], [11]), strict=True):
        for index, position in enumerate(places):
            sees = 7 <= position < 7 + window
            assert bool(output[step][index, 3:].isfinite().all()) is not sees
            if not sees:
                assert torch.equal(output[step][index], expected[step][index])
        assert torch.equal(output[step][len(places) :], expected[step][len(places) :])


def test_values_may_have_another_size_than_keys() -> None:
    storage = SlotStorage([LayerShape(KV_HEADS, DIM, 3, torch.float32)], 2, BLOCK, torch.device("cpu"))
    row = Row(0, [0] * 5, 0, 5, array("i", [1, 0]), True, SamplingParams(), 5)
    layout, module = StepLayout.of((row,), BLOCK, torch.device("cpu")), nn.Identity()
    query, key, value = torch.randn(HEADS, 5, DIM), torch.randn(KV_HEADS, 5, DIM), torch.randn(KV_HEADS, 5, 3)
    output = PagedAttention(storage, layout, {id(module): 0}).attend(module, query, key, value, OPTIONS["plain"])
    expected = attend_by_hand(query[:, -1], key.transpose(0, 1), value.transpose(0, 1), OPTIONS["plain"])
    torch.testing.assert_close(output[-1], expected)


def test_copied_blocks_hold_what_their_sources_held() -> None:
    storage = SlotStorage([LayerShape(1, 2, 2, torch.float32)] * 2, 4, BLOCK, torch.device("cpu"))
    storage.keys[1][:BLOCK] = 7.0
    storage.copy_blocks([(0, 2)])
    assert storage.keys[1][2 * BLOCK : 3 * BLOCK].eq(7.0).all()
    assert storage.keys[1][BLOCK : 2 * BLOCK].eq(0.0).all()


def row(tokens: list[int], start: int, end: int, blocks: list[int]) -> Row:
    return Row(0, tokens, start, end, array("i", blocks), end >= len(tokens), SamplingParams(), len(tokens))


def layout(*rows: Row) -> StepLayout:
    return StepLayout.of(rows, BLOCK, torch.device("cpu"))


def test_decode_rows_of_similar_length_share_a_padded_group() -> None:
    (group,), prefills = attention_groups(layout(row([1] * 6, 5, 6, [5, 2]), row([1, 2], 1, 2, [0])), None)
    assert prefills == []
    assert group.tokens.tolist() == [0, 1]
    assert group.slots.tolist() == [[20, 21, 22, 23, 8, 9], [0, 1, 1, 1, 1, 1]]
    assert group.visible is not None
    assert group.visible[1, 0, 0].tolist() == [True, True, False, False, False, False]


def test_decode_rows_of_very_different_length_are_not_padded_together() -> None:
    groups, _ = attention_groups(layout(row([1] * 400, 399, 400, list(range(100))), row([1, 2], 1, 2, [100])), None)
    assert sorted(group.slots.shape[1] for group in groups) == [2, 400]


def test_a_window_leaves_only_its_last_positions() -> None:
    (group,), _ = attention_groups(layout(row([1] * 6, 5, 6, [5, 2])), 3)
    assert group.slots.tolist() == [[23, 8, 9]]
    _, (prefill,) = attention_groups(layout(row([1] * 6, 3, 6, [5, 2])), 3)
    assert prefill.slots.tolist() == [21, 22, 23, 8, 9]
    assert prefill.visible.int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_groups_are_made_once_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int | None] = []

    def groups(layout: StepLayout, window: int | None) -> Groups:
        windows.append(window)
        return attention_groups(layout, window)

    monkeypatch.setattr(torch_attention, "attention_groups", groups)
    storage = SlotStorage([LayerShape(KV_HEADS, DIM, DIM, torch.float32)] * 3, 2, BLOCK, torch.device("cpu"))
    modules = [nn.Identity() for _ in range(3)]
    attention = storage.attention(layout(row([1] * 6, 3, 6, [0, 1])), {id(m): i for i, m in enumerate(modules)})
    query, key = torch.randn(HEADS, 3, DIM), torch.randn(KV_HEADS, 3, DIM)
    for module, kind in zip(modules, ("plain", "window", "softcap"), strict=True):
        attention.attend(module, query, key, key, OPTIONS[kind])
    assert windows == [None, 5]
