"""The stream from a model: the harvest's rows, each once an epoch, the same after a resume, and mixed as well."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench.harvest.plan
import workbench.harvest.stream
from sae.errors import InputError
from sae.ranks import Ranks
from workbench.harvest.keeping import KeptHarvest
from workbench.harvest.pairs import PairSource, targets_of
from workbench.harvest.passes import contexts
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.prefetch import Ahead
from workbench.harvest.reading import Harvest
from workbench.harvest.run import run_harvest
from workbench.harvest.stream import ModelRows, columns_of
from workbench.models.load import LoadedModel
from workbench.text.corpora import Corpus, open_corpus
from workbench.text.packing import PackedBatch
from workbench.text.packing_process import PackingProcess

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
CONTEXT = 16
SMALL = 128
"""Rows of a chunk: four batches of the model."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench.harvest.plan, "BATCH_TOKENS", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(workbench.harvest.plan, "BLOCK_ROWS", 96)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Documents of many lengths, an empty one, and one of several contexts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = [f"def f{i}(x{i}):\n    return {i} * x{i}\n" * (i % 5) for i in range(40)]
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join([*words, "value = [1, 2]\n" * 40]))
    return open_corpus(str(folder))


@pytest.fixture
def config(tiny_gpt2: Path) -> HarvestConfig:
    return HarvestConfig(str(tiny_gpt2), "c", HOOKS, context_len=CONTEXT, max_tokens=100 * CONTEXT)


@contextmanager
def stream(
    model: LoadedModel, corpus: Corpus, config: HarvestConfig, hooks: tuple[str, ...] = HOOKS, **settings: Any
) -> Iterator[ModelRows]:
    plan = HarvestPlan.of(model, config)
    slopes = hooks if config.gradients else ()
    with ModelRows(
        model, corpus, config, plan, columns_of(hooks, slopes), **{"buffer_rows": SMALL, **settings}
    ) as rows:
        yield rows


def usable(harvest: Harvest, hook: str = HOOKS[0]) -> torch.Tensor:
    flags = harvest.flags
    return harvest.vectors(hook).rows(np.flatnonzero(flags == 0))


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Sorted by all columns, the first before the second and so on."""
    return torch.from_numpy(rows.numpy()[np.lexsort(rows.numpy().T[::-1])])


@pytest.mark.parametrize("changes", [{}, {"separate": True}, {"max_tokens": 23 * CONTEXT}, {"max_tokens": 10**6}])
@pytest.mark.parametrize("n", [1, 37, 400])
def test_every_epoch_has_the_rows_of_the_harvest_once(
    n: int, changes: dict[str, Any], gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, **changes)
    wanted = usable(run_harvest(gpt2_model, corpus, config, tmp_path / "h"))
    with stream(gpt2_model, corpus, config) as rows:
        taken = torch.cat([rows.next_columns(n, 1)[0] for _ in range(2 * len(wanted) // n + 1)])
    first, second = taken[: len(wanted)], taken[len(wanted) : 2 * len(wanted)]
    assert torch.equal(in_order(first), in_order(wanted))
    assert torch.equal(in_order(second), in_order(wanted))
    assert not torch.equal(first, second), "each epoch has a permutation of its own"


def test_columns_of_a_row_belong_to_one_token(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, gradients=True)
    harvest = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    names = [*HOOKS, *(hook + ".grad" for hook in HOOKS)]
    wanted = torch.cat([usable(harvest, name) for name in names], dim=1)
    with stream(gpt2_model, corpus, config) as rows:
        taken = torch.cat(rows.next_columns(len(wanted), 4), dim=1)
        assert {hook: harvest.gradient_scale(hook) for hook in HOOKS} == rows.scales
    assert torch.equal(in_order(taken), in_order(wanted))


def test_seeds_give_different_streams_and_the_same_seed_the_same_however_it_is_cut(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig
) -> None:
    def taken(seed: int, cuts: tuple[int, ...]) -> torch.Tensor:
        with stream(gpt2_model, corpus, config, seed=seed) as rows:
            return torch.cat([rows.next_columns(n, 1)[0] for n in cuts])

    assert torch.equal(taken(0, (700,)), taken(0, (1, 99, 250, 350)))
    assert not torch.equal(taken(0, (700,)), taken(1, (700,)))


def test_batches_are_the_same_whenever_contexts_come(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed late, training goes on with the chunk that it has, and the model makes up for it at the end of that."""
    ready, asked = random.Random(0), []

    class Late(Ahead[PackedBatch]):
        def __init__(self, batches: Iterator[PackedBatch]) -> None:
            super().__init__(0)
            self._late = batches

        @property
        def is_ready(self) -> bool:
            asked.append(ready.random() < 0.2)
            return asked[-1]

        def __next__(self) -> PackedBatch:
            return next(self._late)

    @contextmanager
    def late(*given: Any, **settings: Any) -> Iterator[Iterator[PackedBatch]]:
        with contexts(*given, **settings) as batches:
            yield Late(batches)

    def taken() -> torch.Tensor:
        with stream(gpt2_model, corpus, config) as rows:
            return torch.cat([rows.next_columns(9, 1)[0] for _ in range(300)])

    wanted = taken()
    monkeypatch.setattr(workbench.harvest.stream, "contexts", late)
    assert torch.equal(taken(), wanted)
    assert set(asked) == {True, False}


def test_batches_are_the_same_when_a_process_goes_on_packing(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes over within a pass, and has the next ones whole; a resumed stream begins in the middle of one."""

    def taken(rows: ModelRows) -> torch.Tensor:
        return torch.cat([rows.next_columns(90, 1)[0] for _ in range(30)])

    with stream(gpt2_model, corpus, config) as rows:
        wanted, place, more = taken(rows), rows.state_dict(), taken(rows)
    asked: list[bool] = []

    class Later(PackingProcess):
        @property
        def is_ready(self) -> bool:
            if len(asked) == 3:
                self._connection.poll(60)
            asked.append(len(asked) > 2 and super().is_ready)
            return asked[-1]

    monkeypatch.setattr(workbench.harvest.stream, "packing_beside", lambda model: Later(model.tokenizer))
    with stream(gpt2_model, corpus, config) as rows:
        assert torch.equal(taken(rows), wanted)
        rows.next_columns(50, 1)
        rows.load_state_dict(place)
        assert torch.equal(taken(rows), more)
    assert set(asked) == {True, False}


@pytest.mark.parametrize("before", [0, 1, 119, 120, 121, 600, 2000])
def test_a_resumed_stream_goes_on_exactly(
    before: int, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig
) -> None:
    with stream(gpt2_model, corpus, config, seed=5) as rows:
        if before:
            rows.next_columns(before, 1)
        state = rows.state_dict()
        wanted = rows.next_columns(700, 2)
        rows.load_state_dict(state)
        again = rows.next_columns(700, 2)
    with stream(gpt2_model, corpus, config) as fresh:
        fresh.next_columns(10, 1)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state
        resumed = fresh.next_columns(700, 2)
    for found in (again, resumed):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_going_on_reads_no_document_before_its_place(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stream(gpt2_model, corpus, config) as rows:
        rows.next_columns(900, 1)
        state = rows.state_dict()
    read: list[int] = []
    documents = corpus.documents

    def recorded(split: Any, start: int = 0) -> Any:
        for document in documents(split, start):
            read.append(document.index)
            yield document

    monkeypatch.setattr(corpus, "documents", recorded)
    with stream(gpt2_model, corpus, config) as fresh:
        fresh.load_state_dict(state)
        fresh.next_columns(10, 1)
    assert min(read) == state["after"][0] > 10


def test_a_sample_is_fixed_and_leaves_the_stream_alone(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig
) -> None:
    with stream(gpt2_model, corpus, config, seed=1) as rows, stream(gpt2_model, corpus, config, seed=2) as others:
        sample = rows.sampled(50, 1)[0]
        assert len(sample) == 50
        assert torch.equal(others.sampled(50, 1)[0], sample)
        rows.next_columns(300, 1)
        state = rows.state_dict()
        wanted = rows.next_columns(40, 1)[0]
        rows.load_state_dict(state)
        assert torch.equal(rows.sampled(50, 1)[0], sample)
        assert rows.state_dict() == state
        assert torch.equal(rows.next_columns(40, 1)[0], wanted)
        assert len(rows.sampled(10_000, 1)[0]) <= SMALL


def test_the_model_runs_no_further_than_training_will_go(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    run_batch = workbench.harvest.stream.run_batch
    monkeypatch.setattr(
        workbench.harvest.stream, "run_batch", lambda *given: runs.append(given[2].tokens.size) or run_batch(*given)
    )
    with stream(gpt2_model, corpus, config, expected_rows=100) as rows:
        for _ in range(10):
            rows.next_columns(10, 1)
    assert sum(runs) == SMALL


def test_what_a_rule_learns_from_is_at_what_it_predicts(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig
) -> None:
    config = replace(config, gradients=True)
    names = ((HOOKS[0], HOOKS[1]), (HOOKS[0], ""))
    plan = HarvestPlan.of(gpt2_model, config)
    columns = columns_of(HOOKS, targets_of(names))
    with ModelRows(gpt2_model, corpus, config, plan, columns, buffer_rows=SMALL) as rows:
        state = rows.state_dict()
        transcoder, sae = PairSource(rows, names, plan.widths, rows.scales).next_rows(60, gradients=True)
        rows.load_state_dict(state)
        found = dict(zip(columns, rows.next_columns(60, len(columns)), strict=True))
    assert torch.equal(transcoder.x, found[HOOKS[0]])
    assert torch.equal(transcoder.target, found[HOOKS[1]])  # type: ignore[arg-type]
    assert torch.equal(transcoder.gradients * rows.scales[HOOKS[1]], found[HOOKS[1] + ".grad"])  # type: ignore[operator]
    assert torch.equal(sae.gradients * rows.scales[HOOKS[0]], found[HOOKS[0] + ".grad"])  # type: ignore[operator]
    assert sae.target is None


def test_values_that_are_not_finite_are_located(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch = workbench.harvest.stream.run_batch

    def broken(*given: Any) -> dict[str, torch.Tensor]:
        values = {name: value.clone() for name, value in run_batch(*given).items()}
        values[HOOKS[1]][19, 3] = float("inf")
        return values

    monkeypatch.setattr(workbench.harvest.stream, "run_batch", broken)
    with stream(gpt2_model, corpus, config) as rows, pytest.raises(InputError) as caught:
        rows.next_columns(1, 1)
    assert "a value too large for float32 at blocks.1.hook_mlp_out, row 19 (context 1, position 3)" in str(caught.value)


def test_the_state_of_another_stream_is_refused(gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig) -> None:
    with (
        stream(gpt2_model, corpus, config) as rows,
        stream(gpt2_model, corpus, config, HOOKS[:1]) as other,
        pytest.raises(InputError, match=r"the checkpoint reads .*blocks\.1\.hook_mlp_out, not "),
    ):
        other.load_state_dict(rows.state_dict())


def test_other_weights_and_other_chunks_are_another_stream(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig
) -> None:
    changed = replace(gpt2_model, info=replace(gpt2_model.info, weights_sha256="0" * 64))
    with stream(gpt2_model, corpus, config) as rows:
        state = rows.state_dict()
    for model, rows_of_a_chunk in ((changed, SMALL), (gpt2_model, 2 * SMALL)):
        with (
            stream(model, corpus, config, buffer_rows=rows_of_a_chunk) as other,
            pytest.raises(InputError, match="the checkpoint reads"),
        ):
            other.load_state_dict(state)


def test_a_corpus_without_tokens_is_an_input_error(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "documents", lambda split, start=0: iter(()))
    with stream(gpt2_model, corpus, config) as rows, pytest.raises(InputError, match="gave no tokens"):
        rows.next_columns(1, 1)


@pytest.mark.parametrize("taken", [1, 130, 700, 5000])
def test_a_kept_harvest_has_the_files_of_a_harvest_as_far_as_the_stream_went(
    taken: int, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    whole = run_harvest(gpt2_model, corpus, config, tmp_path / "whole")
    plan = HarvestPlan.of(gpt2_model, config)
    kept = KeptHarvest(tmp_path / "kept", gpt2_model, corpus, config, plan, expected_rows=taken)
    with kept, stream(gpt2_model, corpus, config, keeping=kept) as rows:
        rows.next_columns(taken, 1)
        kept.finish()
    found = Harvest.open(tmp_path / "kept")
    assert min(taken, whole.n_rows) <= found.n_rows <= whole.n_rows
    for ours, theirs in zip(found.blocks, whole.blocks, strict=False):
        if ours.n_rows == theirs.n_rows:
            assert ours == theirs, "names, sizes and checksums"
    assert torch.equal(usable(found, HOOKS[1]), usable(whole, HOOKS[1])[: len(usable(found, HOOKS[1]))])


def together(rows: torch.Tensor, n: int) -> float:
    """Mean share of a batch's other rows that come from a row's own context, rows being numbers of contexts."""
    batches = rows[: len(rows) // n * n].view(-1, n)
    same = torch.stack([torch.bincount(batch).square().sum() - n for batch in batches])
    return same.double().mean().item() / (n * (n - 1))


def test_a_batch_holds_no_more_of_one_context_than_chance_within_its_chunk(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is 8 contexts of 15 usable rows: of the 119 others of its chunk a row has 14 in its own context."""
    contexts = itertools.count()

    def numbered(model: LoadedModel, plan: HarvestPlan, batch: PackedBatch) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([[next(contexts)] * CONTEXT for _ in batch.tokens]).float()
        return {hook: numbers.view(-1, 1).expand(-1, width) for hook, width in plan.widths.items()}

    monkeypatch.setattr(workbench.harvest.stream, "run_batch", numbered)
    with stream(gpt2_model, corpus, replace(config, separate=False)) as rows:
        taken = rows.next_columns(110 * 10, 1)[0][:, 0].long()
    assert together(taken, 20) == pytest.approx(14 / 119, rel=0.15)


def streamed(
    ranks: Ranks, model: LoadedModel, corpus: Corpus, config: HarvestConfig, folder: Path, keeps: bool
) -> list[torch.Tensor]:
    """Rows of a stream of several ranks, over an epoch and a half, of which the first one keeps a harvest."""
    plan = HarvestPlan.of(model, config)
    with ExitStack() as stack:
        kept = None
        if keeps and ranks.leads:
            kept = stack.enter_context(KeptHarvest(folder, model, corpus, config, plan, expected_rows=2500))
        settings: dict[str, Any] = {"keeping": kept, "ranks": ranks}
        rows = stack.enter_context(stream(model, corpus, config, **settings))
        drawn = [column for _ in range(50) for column in rows.next_columns(49, 4 if config.gradients else 2)]
        if kept is not None:
            kept.finish()
    return drawn


@pytest.mark.parametrize("changes", [{}, {"gradients": True, "max_tokens": 23 * CONTEXT}])
def test_several_ranks_share_the_models_work_and_all_have_the_same_rows(
    changes: dict[str, Any],
    on_ranks: Callable[..., list[Any]],
    gpt2_model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    tmp_path: Path,
) -> None:
    given = gpt2_model, corpus, replace(config, **changes)
    (expected,) = on_ranks(1, streamed, *given, tmp_path / "one", True)
    found = on_ranks(3, streamed, *given, tmp_path / "three", True)
    for drawn in found:
        assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))
    one, three = Harvest.open(tmp_path / "one"), Harvest.open(tmp_path / "three")
    assert [block.hooks for block in one.blocks] == [block.hooks for block in three.blocks]
