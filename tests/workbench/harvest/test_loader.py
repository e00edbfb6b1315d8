"""The shuffling loader: every usable row once an epoch, the same stream after a resume, flagged rows left out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import workbench.harvest.loader
from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from workbench.harvest.loader import ActivationLoader
from workbench.harvest.reading import Harvest

MakeHarvest = Callable[..., Harvest]
HOOK = "blocks.0.hook_resid_post"
ROWS = 960


def numbered(rows: int = ROWS) -> torch.Tensor:
    """Row r holds r, so a batch says which rows it is made of."""
    return torch.arange(rows, dtype=torch.float32)[:, None].repeat(1, 3)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen chunks of 64 rows in blocks of 16, which straddle the stored blocks of 40 rows."""
    monkeypatch.setattr(workbench.harvest.loader, "BLOCK_ROWS", 16)
    monkeypatch.setattr(workbench.harvest.loader, "CHUNK_BLOCKS", 4)


@pytest.fixture
def harvest(make_harvest: MakeHarvest) -> Harvest:
    return make_harvest({HOOK: numbered()}, block_contexts=5)


def usable_rows(harvest: Harvest) -> list[int]:
    return np.flatnonzero(harvest.flags == 0).tolist()


def rows_of(batch: torch.Tensor) -> list[int]:
    return batch[:, 0].long().tolist()


@pytest.mark.parametrize("n", [1, 7, 64, 500])
def test_an_epoch_gives_every_usable_row_once(n: int, harvest: Harvest) -> None:
    usable = usable_rows(harvest)
    loader = ActivationLoader(harvest, HOOK)
    stream = [row for _ in range(2 * len(usable) // n + 1) for row in rows_of(loader.next_batch(n))]
    first, second = stream[: len(usable)], stream[len(usable) : 2 * len(usable)]
    assert sorted(first) == sorted(second) == usable
    assert first != second, "each epoch has a permutation of its own"


def test_batches_do_not_depend_on_how_the_stream_is_cut(harvest: Harvest) -> None:
    whole = rows_of(ActivationLoader(harvest, HOOK).next_batch(2000))
    loader = ActivationLoader(harvest, HOOK)
    assert [row for n in (1, 99, 400, 1500) for row in rows_of(loader.next_batch(n))] == whole


def test_seeds_give_different_streams_and_the_same_seed_the_same(harvest: Harvest) -> None:
    streams = [rows_of(ActivationLoader(harvest, HOOK, seed=seed).next_batch(300)) for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]


def test_the_stream_is_pinned(harvest: Harvest) -> None:
    """A checkpoint of one version must go on in the next: the order is part of the format."""
    loader = ActivationLoader(harvest, HOOK, seed=3)
    epochs = [rows_of(loader.next_batch(len(usable_rows(harvest))))[:6] for _ in range(2)]
    assert epochs == [[747, 211, 538, 531, 450, 537], [589, 287, 281, 577, 581, 285]]


def test_a_later_epoch_mixes_other_blocks_into_a_chunk_and_orders_its_rows_anew(harvest: Harvest) -> None:
    loader = ActivationLoader(harvest, HOOK)
    epochs = [np.array(rows_of(loader.next_batch(len(usable_rows(harvest))))) for _ in range(2)]
    of_first_chunk = [set(rows[:48] // 16) for rows in epochs]
    assert [len(blocks) for blocks in of_first_chunk] == [4, 4], "a chunk is four blocks of 16 rows"
    assert of_first_chunk[0] != of_first_chunk[1]
    # Every block holds rows 1-7 and 9-15: the places in order of use say how rows were permuted.
    assert list(epochs[0][:48] % 16) != list(epochs[1][:48] % 16)


def test_chunks_without_a_usable_row_are_passed_over(harvest: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a chunk, so that every BOS is a chunk with nothing in it."""
    monkeypatch.setattr(workbench.harvest.loader, "BLOCK_ROWS", 1)
    monkeypatch.setattr(workbench.harvest.loader, "CHUNK_BLOCKS", 1)
    loader, usable = ActivationLoader(harvest, HOOK), usable_rows(harvest)
    assert sorted(rows_of(loader.next_batch(len(usable)))) == usable
    state = loader.state_dict()
    wanted = rows_of(loader.next_batch(50))
    fresh = ActivationLoader(harvest, HOOK)
    fresh.load_state_dict(state)
    assert rows_of(fresh.next_batch(50)) == wanted


def test_rows_of_a_batch_come_from_all_over(harvest: Harvest) -> None:
    rows = np.array(rows_of(ActivationLoader(harvest, HOOK).next_batch(56)))
    assert len(set(rows // 16)) >= 4
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.2


@pytest.mark.parametrize("before", [0, 1, 55, 56, 57, 833, 1000])
def test_a_resumed_stream_goes_on_exactly(before: int, harvest: Harvest) -> None:
    loader = ActivationLoader(harvest, HOOK, seed=5)
    if before:
        loader.next_batch(before)
    state = loader.state_dict()
    wanted = rows_of(loader.next_batch(700))
    fresh = ActivationLoader(harvest, HOOK, seed=0)
    fresh.next_batch(10)
    fresh.load_state_dict(state)
    assert rows_of(fresh.next_batch(700)) == wanted


def test_an_interrupt_while_reading_ahead_does_not_shift_the_stream(
    harvest: Harvest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C in a notebook does: here the moment after the next chunk has been asked for."""
    wanted = rows_of(ActivationLoader(harvest, HOOK).next_batch(400))
    loader = ActivationLoader(harvest, HOOK)
    submit = loader._thread.submit

    def interrupted(read: Any, epoch: int, number: int, buffer: int) -> Any:
        future = submit(read, epoch, number, buffer=buffer)
        if number == 0:
            return future
        loader._next = ((epoch, number), future)
        raise KeyboardInterrupt

    monkeypatch.setattr(loader._thread, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loader.next_batch(400)
    monkeypatch.setattr(loader._thread, "submit", submit)
    assert rows_of(loader.next_batch(400)) == wanted


def test_reading_ahead_leaves_the_chunk_in_use_and_earlier_batches_alone(harvest: Harvest) -> None:
    wanted = rows_of(ActivationLoader(harvest, HOOK).next_batch(1600))
    loader = ActivationLoader(harvest, HOOK)
    batches = []
    for _ in range(160):
        batches.append(loader.next_batch(10))
        if loader._next is not None:
            loader._next[1].result()
    assert [row for batch in batches for row in rows_of(batch)] == wanted


def test_moving_the_stream_while_it_reads_ahead_is_safe(harvest: Harvest) -> None:
    """Back to one place from every other one, at once: reads that were under way must not spill into its rows."""
    loader = ActivationLoader(harvest, HOOK)
    start = loader.state_dict()
    wanted = rows_of(loader.next_batch(130))
    for before in (1, 57, 60, 113, 300):
        loader.next_batch(before)
        loader.load_state_dict(start)
        assert rows_of(loader.next_batch(130)) == wanted
        loader.load_state_dict(start)


def test_the_state_of_another_stream_is_refused(harvest: Harvest, make_harvest: MakeHarvest) -> None:
    other = make_harvest({HOOK: numbered(80)}, name="other")
    with pytest.raises(InputError, match="the checkpoint reads other/blocks"):
        ActivationLoader(harvest, HOOK).load_state_dict(ActivationLoader(other, HOOK).state_dict())


@pytest.mark.parametrize("n", [1, 50, 300, 10_000])
def test_a_sample_is_fixed_distinct_usable_and_leaves_the_stream_alone(n: int, harvest: Harvest) -> None:
    loader = ActivationLoader(harvest, HOOK, seed=7)
    loader.next_batch(11)
    state = loader.state_dict()
    sample = rows_of(loader.sample(n))
    assert len(sample) == min(n, len(usable_rows(harvest)))
    assert len(set(sample)) == len(sample)
    assert set(sample) <= set(usable_rows(harvest))
    assert loader.state_dict() == state
    assert rows_of(ActivationLoader(harvest, HOOK, seed=0).sample(n)) == sample


def test_a_sample_is_spread_over_the_harvest(harvest: Harvest) -> None:
    sample = np.array(rows_of(ActivationLoader(harvest, HOOK).sample(200)))
    assert abs(sample.mean() / ROWS - 0.5) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches_have_the_stored_precision_and_values(dtype: torch.dtype, make_harvest: MakeHarvest) -> None:
    x = torch.randn(80, 5).to(dtype)
    harvest = make_harvest({HOOK: x})
    batch = ActivationLoader(harvest, HOOK).next_batch(68)
    assert batch.dtype == dtype
    usable = x[torch.from_numpy(harvest.flags == 0)].float()
    assert torch.equal(batch.float().sort(dim=0).values, usable.sort(dim=0).values)


def test_pairs_hold_the_gradient_of_the_same_row(make_harvest: MakeHarvest) -> None:
    x = numbered(80)
    harvest = make_harvest({HOOK: x, HOOK + ".grad": x * -1e-7}, gradients=True)
    loader = ActivationLoader(harvest, HOOK, with_gradients=True)
    activations, gradients = loader.next_pair(500)
    assert gradients.dtype == torch.float32
    torch.testing.assert_close(gradients, activations * -1e-7, rtol=1e-6, atol=0)
    # Of each context: not BOS, not the last position; of the last one, not the position before padding either.
    assert set(rows_of(activations)) == {r for r in range(80) if r % 8 not in (0, 7)} - {77, 78, 79}
    assert set(rows_of(ActivationLoader(harvest, HOOK).next_batch(68))) == {r for r in range(78) if r % 8}


def test_a_loader_without_gradients_says_so(make_harvest: MakeHarvest, harvest: Harvest) -> None:
    with pytest.raises(InputError, match="has no gradients: harvest again with --gradients"):
        ActivationLoader(harvest, HOOK, with_gradients=True)
    with pytest.raises(InputError, match="with_gradients=True"):
        ActivationLoader(harvest, HOOK).next_pair(3)


def test_a_harvest_without_usable_rows_is_an_input_error(make_harvest: MakeHarvest) -> None:
    with pytest.raises(InputError, match="holds only BOS and padding"):
        ActivationLoader(make_harvest({HOOK: numbered(3)}, context_len=3), HOOK)


@pytest.mark.gpu
def test_the_stream_is_the_same_on_a_gpu(harvest: Harvest) -> None:
    on_gpu = ActivationLoader(harvest, HOOK, device="cuda")
    on_cpu = ActivationLoader(harvest, HOOK)
    for n in (5, 600, 1500):
        batch = on_gpu.next_batch(n)
        assert batch.is_cuda
        assert torch.equal(batch.cpu(), on_cpu.next_batch(n))
    assert on_gpu.state_dict() == on_cpu.state_dict()


def drawn(ranks: Ranks, harvest: Harvest) -> list[torch.Tensor]:
    loader = ActivationLoader(harvest, HOOK, seed=3, ranks=ranks)
    return [loader.sample(50), *(loader.next_batch(70) for _ in range(30))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_ranks_read_a_part_each_and_all_get_the_same_rows(
    dtype: torch.dtype, on_ranks: Callable[..., list[Any]], make_harvest: MakeHarvest
) -> None:
    harvest = make_harvest({HOOK: numbered(952).to(dtype)}, block_contexts=5)
    expected = drawn(ALONE, harvest)
    for rows in on_ranks(3, drawn, harvest):
        assert all(torch.equal(one, other) for one, other in zip(rows, expected, strict=True))
