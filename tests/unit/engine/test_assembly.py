"""The parts around a loaded model: a cache of the size that its memory allows."""

from __future__ import annotations

import dataclasses

import pytest

from penstock.api.log import make_logger
from penstock.config import EngineConfig
from penstock.engine.assembly import assemble
from penstock.models.scripted import ScriptedModel
from penstock.scheduling.admission import Admission


class Sized(ScriptedModel):
    """A device with memory for 1,000 blocks of 16 tokens of 1 kB each."""

    def __init__(self, device: str, max_length: int = 1 << 20) -> None:
        super().__init__([5], max_length=max_length)
        self.spec = dataclasses.replace(self.spec, device=device, kv_bytes_per_token=1000)
        self.allocated: list[tuple[int, int, int]] = []

    def free_bytes(self) -> int:
        return 16 * 1000 * 1000

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.allocated.append((num_blocks, block_size, num_host_blocks))


@pytest.mark.parametrize(("device", "num_blocks"), [("cuda:0", 400), ("cpu", 100)])
def test_the_cache_takes_its_share_of_the_device_and_of_a_cpu_a_quarter_of_that(device: str, num_blocks: int) -> None:
    model = Sized(device)
    config = EngineConfig(skip_tokenizer_init=True, block_size=16, gpu_memory_utilization=0.4, memory_pool_size=None)
    parts = assemble(model, None, config, Admission(config), make_logger("CRITICAL"))
    assert model.allocated == [(num_blocks, 16, 0)]
    assert (parts.cache.num_blocks, parts.cache.block_size) == (num_blocks, 16)
    parts.close()


@pytest.mark.parametrize(("longest", "num_blocks"), [(32, 2 * 2 + 1), (33, 2 * 3 + 1), (None, 2 * 4 + 1)])
def test_the_cache_is_no_larger_than_full_rows_of_the_longest_sequences_can_use(
    longest: int | None, num_blocks: int
) -> None:
    model = Sized("cpu", max_length=64)
    config = EngineConfig(
        skip_tokenizer_init=True, block_size=16, max_batch_size=2, max_sequence_length=longest, memory_pool_size=None
    )
    parts = assemble(model, None, config, Admission(config), make_logger("CRITICAL"))
    assert model.allocated == [(num_blocks, 16, 0)]
    parts.close()
