"""Harvesting a real (tiny) model: right values in the right rows; no way of stopping it loses or changes any."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

import workbench.harvest.plan
import workbench.harvest.run
from sae.errors import InputError
from sae.ranks import Ranks
from workbench.disk.locks import FILE as LOCK
from workbench.harvest.blocks import map_tensors
from workbench.harvest.plan import DATABASE_BYTES, HarvestConfig
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DATABASE, DESCRIPTION
from workbench.harvest.run import HarvestProgress, estimate, run_harvest
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import Corpus, open_corpus
from workbench.text.packing import FLAG_NO_GRADIENT, FLAG_PADDING, pack

HOOKS = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post")
CONTEXT, BLOCK_ROWS = 16, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight contexts, in batches of three: six to a block."""
    monkeypatch.setattr(workbench.harvest.plan, "BLOCK_ROWS", BLOCK_ROWS)
    monkeypatch.setattr(workbench.harvest.plan, "BATCH_TOKENS", {"cpu": 48, "cuda": 48})


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).read_text(encoding="utf-8")
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(
            text[700 * number : 700 * number + 500 + 13 * number], encoding="utf-8"
        )
    return folder


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return open_corpus(str(corpus_folder))


@pytest.fixture
def config(gpt2_model: LoadedModel, corpus: Corpus) -> HarvestConfig:
    return HarvestConfig(gpt2_model.info.name, corpus.name, HOOKS, context_len=CONTEXT, max_tokens=700)


def files_of(folder: Path) -> dict[str, bytes]:
    """What must be the same however a harvest came about: blocks, token columns and journal."""
    files = [folder / "journal.jsonl", *folder.glob("blocks/*/*"), *folder.glob("tokens/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def tables_of(folder: Path) -> dict[str, list[Any]]:
    with duckdb.connect(str(folder / DATABASE), read_only=True) as connection:
        names = [row[0] for row in connection.execute("SHOW TABLES").fetchall()]
        return {name: connection.execute(f"FROM {name} ORDER BY ALL").fetchall() for name in names}


def assert_same(one: Path, other: Path) -> None:
    assert files_of(one) == files_of(other)
    tables, others = tables_of(one), tables_of(other)
    assert tables == others
    assert not list(other.rglob("*.tmp*"))
    assert not (other / LOCK).exists()


def test_rows_hold_the_models_values(
    tiny_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, model=tiny_model.info.name)
    harvest = run_harvest(tiny_model, corpus, config, tmp_path / "h")
    assert harvest.n_rows == 688, "43 whole contexts fit into 700 tokens"
    packed = list(pack(corpus.documents("train"), tiny_model.tokenizer, tiny_model.bos_id, CONTEXT, 3))
    tokens = np.concatenate([batch.tokens for batch in packed])[:43]
    hooks = [resolve_hook(tiny_model, name) for name in HOOKS]
    for name in HOOKS:
        stored = harvest.vectors(name).rows(np.arange(688))
        assert stored.dtype == torch.float32, "the checkpoint's own precision"
        expected = capture(tiny_model, torch.from_numpy(tokens).long(), hooks).activations[name].reshape(688, -1)
        torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)


def test_tables_say_what_every_row_is(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    harvest = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    tables = tables_of(harvest.directory)
    batch = next(pack(corpus.documents("train"), gpt2_model.tokenizer, gpt2_model.bos_id, CONTEXT, 43))
    columns = zip(batch.doc.flat, batch.pos.flat, batch.tokens.flat, batch.flags.flat, strict=True)
    assert tables["tokens"] == [
        (row, row // CONTEXT, *[int(value) for value in rest], None) for row, rest in enumerate(columns)
    ]
    names = {document.index: document.name for document in corpus.documents("train")}
    for doc, name, n_tokens in tables["documents"]:
        assert names[doc] == name
        assert n_tokens == int(((batch.doc == doc) & (batch.flags == 0)).sum())
    assert dict(tables["vocabulary"]) == dict(enumerate(gpt2_model.token_texts))
    meta = {key: json.loads(value) for key, value in tables["meta"]}
    assert meta["config"]["hooks"] == list(HOOKS)
    assert meta["model"]["weights_sha256"] == gpt2_model.info.weights_sha256
    assert meta["corpus"] == {"name": corpus.name, "fingerprint": corpus.fingerprint}


def test_a_corpus_that_ends_early_ends_the_harvest(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    harvest = run_harvest(gpt2_model, corpus, replace(config, max_tokens=10**6), tmp_path / "h")
    batches = pack(corpus.documents("train"), gpt2_model.tokenizer, gpt2_model.bos_id, CONTEXT, 10**6)
    batch = next(batches)
    assert harvest.n_rows == batch.tokens.size
    assert np.array_equal(harvest.flags, batch.flags.flatten())
    assert batch.flags[-1, -1] == FLAG_PADDING


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_to_the_stored_precision(
    dtype: str, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    full = run_harvest(gpt2_model, corpus, config, tmp_path / "full")
    half = run_harvest(gpt2_model, corpus, replace(config, dtype=dtype), tmp_path / "half")
    rows = np.arange(full.n_rows)
    for name in HOOKS:
        stored = half.vectors(name).rows(rows)
        assert stored.dtype == getattr(torch, dtype)
        assert torch.equal(stored, full.vectors(name).rows(rows).to(getattr(torch, dtype)))


def test_gradients_are_those_of_the_summed_next_token_loss(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, gradients=True, max_tokens=10**6)
    harvest = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    batches = list(pack(corpus.documents("train"), gpt2_model.tokenizer, gpt2_model.bos_id, CONTEXT, 10**6))
    tokens, flags = torch.from_numpy(batches[0].tokens).long(), torch.from_numpy(batches[0].flags)
    hooks = [resolve_hook(gpt2_model, name) for name in HOOKS]
    counted = flags != FLAG_PADDING
    expected = capture(gpt2_model, tokens, hooks, gradients=True, counted=counted).gradients
    without = harvest.flags & (FLAG_NO_GRADIENT | FLAG_PADDING) != 0
    for name in HOOKS:
        stored = harvest.vectors(name + ".grad").rows(np.arange(harvest.n_rows)) / harvest.gradient_scale(name)
        torch.testing.assert_close(stored, expected[name].reshape(stored.shape), rtol=1e-3, atol=1e-5)
        # What is flagged is exactly what has no gradient.
        assert np.array_equal((stored == 0).all(dim=1).numpy(), without)


def test_gradients_survive_float16(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, gradients=True, hooks=HOOKS[:1])
    full = run_harvest(gpt2_model, corpus, config, tmp_path / "full")
    half = run_harvest(gpt2_model, corpus, replace(config, dtype="float16"), tmp_path / "half")
    name, rows = HOOKS[0], np.arange(full.n_rows)
    true = full.vectors(name + ".grad").rows(rows) / full.gradient_scale(name)
    stored = half.vectors(name + ".grad").rows(rows).float() / half.gradient_scale(name)
    error = (stored - true).norm(dim=1) / true.norm(dim=1).clamp_min(1e-30)
    assert error.max() < 2**-10


KILLED_AT_EVERY_STEP = """
import itertools, os, signal, sys
from pathlib import Path
import torch
import workbench.harvest.plan as plan
import workbench.harvest.run as harvest
from workbench.text.corpora import open_corpus
from workbench.models.load import load_model

torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
plan.BLOCK_ROWS, plan.BATCH_TOKENS = 128, {"cpu": 48}
model, corpus = load_model(sys.argv[1], device="cpu"), open_corpus(sys.argv[2])
config = plan.HarvestConfig(sys.argv[1], sys.argv[2], ("blocks.1.hook_resid_post",), context_len=16, max_tokens=300)

def attempt(folder, kill_at):
    '''Harvests in a process that is killed before its `kill_at`-th step towards the disk; its exit code.'''
    process = os.fork()
    if process == 0:
        steps = itertools.count(1)
        def counted(function):
            def step(*arguments):
                if next(steps) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return step
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        harvest.run_harvest(model, corpus, config, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

out = Path(sys.argv[3])
assert attempt(out / "whole", None) == 0
point = 1
while attempt(out / str(point), point) == -signal.SIGKILL:
    attempt(out / str(point), point)  # killed once more, wherever that is by now
    assert attempt(out / str(point), None) == 0
    point += 1
print(point - 1)
"""


def test_a_harvest_killed_before_any_step_towards_the_disk_ends_in_the_same_bytes(
    tiny_gpt2: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(tiny_gpt2), str(corpus_folder), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    # harvest.json, an empty journal, three blocks of two files and a journal line each, harvest.duckdb.
    assert points == 3 + 3 + 3 * (3 + 3 + 1) + 3
    for point in range(1, points + 1):
        assert_same(tmp_path / "whole", tmp_path / str(point))


def stop_after(rows: int, error: BaseException) -> Callable[[HarvestProgress], None]:
    def on_progress(progress: HarvestProgress) -> None:
        if progress.tokens >= rows:
            raise error

    return on_progress


@pytest.mark.parametrize("rows", [0, 100, 300, 600])
def test_ctrl_c_keeps_whole_blocks_and_goes_on_to_the_same_bytes(
    rows: int, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    run_harvest(gpt2_model, corpus, config, tmp_path / "whole")
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_harvest(gpt2_model, corpus, config, folder, on_progress=stop_after(rows, KeyboardInterrupt()))
    kept = Harvest(folder)
    assert not kept.finished
    assert kept.n_rows == rows // 96 * 96, "every full block was stored"
    seen: list[HarvestProgress] = []
    run_harvest(gpt2_model, corpus, config, folder, on_progress=seen.append)
    assert [seen[0].tokens, seen[-1].tokens, seen[0].total_tokens] == [kept.n_rows, 688, 688]
    assert_same(tmp_path / "whole", folder)


def test_damage_to_an_unfinished_harvest_is_harvested_again(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    run_harvest(gpt2_model, corpus, config, tmp_path / "whole")
    folder = tmp_path / "h"
    run_harvest(gpt2_model, corpus, config, folder)
    (folder / DATABASE).unlink()
    block = folder / "blocks" / HOOKS[0] / "00002.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"number": 8, "first')
    run_harvest(gpt2_model, corpus, config, folder)
    assert_same(tmp_path / "whole", folder)


def test_a_finished_harvest_is_given_back_without_running_the_model(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*") if path.is_file()}
    monkeypatch.setattr(workbench.harvest.run, "run_batch", None)
    again = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    assert again.n_rows == first.n_rows
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hooks": HOOKS[:1]}, "config.hooks was"),
        ({"max_tokens": 500}, "config.max_tokens was 700, now 500"),
        ({"dtype": "float16"}, "dtype was float32, now float16"),
        ({"gradients": True}, "config.gradients was False, now True"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(
    changes: dict[str, Any], named: str, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    before = files_of(tmp_path / "h")
    with pytest.raises(InputError, match=named):
        run_harvest(gpt2_model, corpus, replace(config, **changes), tmp_path / "h")
    assert files_of(tmp_path / "h") == before


def test_a_changed_corpus_is_refused(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_harvest(gpt2_model, corpus, config, tmp_path / "h", on_progress=stop_after(100, KeyboardInterrupt()))
    corpus.fingerprint = "something else"
    with pytest.raises(InputError, match=r"corpus.fingerprint was .*, now something else"):
        run_harvest(gpt2_model, corpus, config, tmp_path / "h")


def test_a_second_process_is_refused(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    refused = []

    def on_progress(progress: HarvestProgress) -> None:
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()}"):
            run_harvest(gpt2_model, corpus, config, tmp_path / "h")
        refused.append(progress)

    run_harvest(gpt2_model, corpus, config, tmp_path / "h", on_progress=on_progress)
    assert refused


@pytest.fixture
def own_model(tiny_gpt2: Path) -> LoadedModel:
    """A model of the test's own, whose weights it may spoil."""
    return load_model(str(tiny_gpt2), device="cpu")


def first_row_with(token: int, model: LoadedModel, corpus: Corpus) -> int:
    batch = next(pack(corpus.documents("train"), model.tokenizer, model.bos_id, CONTEXT, 43))
    return int(np.flatnonzero(batch.tokens == token)[0])


def rare_token(model: LoadedModel, corpus: Corpus) -> int:
    """A token that comes up only in the second half of the harvest."""
    batch = next(pack(corpus.documents("train"), model.tokenizer, model.bos_id, CONTEXT, 43))
    return next(int(t) for t in batch.tokens.flat if np.flatnonzero(batch.tokens == t)[0] > 400)


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (float("nan"), "auto", "NaN at"),
        (float("inf"), "float32", "a value too large for float32 at"),
        (1e6, "float16", "a value too large for float16 at"),
    ],
)
def test_values_that_are_not_finite_stop_the_harvest_and_are_located(
    value: float,
    dtype: str,
    problem: str,
    own_model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    tmp_path: Path,
) -> None:
    # Before attention, which would spread it over the context.
    hook = "blocks.0.hook_resid_pre"
    token = rare_token(own_model, corpus)
    row = first_row_with(token, own_model, corpus)
    own_model.hf.get_parameter("transformer.wte.weight")[token, 3] = value
    with pytest.raises(InputError) as error:
        run_harvest(own_model, corpus, replace(config, dtype=dtype, hooks=(hook,)), tmp_path / "h")
    message = str(error.value)
    assert message.startswith(f"{problem} {hook}, row {row} (context {row // CONTEXT}, position {row % CONTEXT}): ")
    assert ("--dtype bfloat16" in message) == (dtype == "float16")
    assert len(message.splitlines()) == 1
    kept = Harvest(tmp_path / "h")
    assert kept.n_rows == row // 96 * 96
    for block in kept.blocks:
        assert torch.isfinite(map_tensors(kept.directory / block.hooks[hook].file)["x"]).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs more rights than this user has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_loses_nothing(
    small_disk: Path, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, hooks=HOOKS[:1])
    run_harvest(gpt2_model, corpus, config, tmp_path / "whole")
    folder, filler = small_disk / "h", small_disk / "filler"

    def fill_the_disk(at: int, leave: int) -> Callable[[HarvestProgress], None]:
        def on_progress(progress: HarvestProgress) -> None:
            if progress.tokens >= at and not filler.exists():
                # Free space means nothing while the writer's thread is at work.
                while Harvest(folder).n_rows < progress.tokens // 96 * 96:
                    time.sleep(0.01)
                filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - leave))

        return on_progress

    with pytest.raises(
        InputError, match=r"the disk is full at block \d of .* rows before it are kept: make room"
    ) as error:
        run_harvest(gpt2_model, corpus, config, folder, on_progress=fill_the_disk(200, leave=8192))
    assert len(str(error.value).splitlines()) == 1
    kept = Harvest(folder)
    assert kept.n_rows == 192
    assert not list(folder.rglob("*.tmp"))
    filler.unlink()
    with pytest.raises(InputError, match="the vectors are kept: make room and repeat the command") as error:
        run_harvest(gpt2_model, corpus, config, folder, on_progress=fill_the_disk(688, leave=65536))
    assert len(str(error.value).splitlines()) == 1
    assert Harvest(folder).n_rows == 688
    filler.unlink()
    run_harvest(gpt2_model, corpus, config, folder)
    assert_same(tmp_path / "whole", folder)


def test_a_limit_on_file_sizes_is_one_clear_line(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(InputError, match="cannot write: File too large at block 0") as error:
            run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(error.value).splitlines()) == 1
    run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    run_harvest(gpt2_model, corpus, config, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "h")


def test_the_estimate_says_what_the_harvest_will_take(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    before = estimate(gpt2_model, corpus, config, tmp_path / "h")
    assert not (tmp_path / "h").exists(), "an estimate writes nothing"
    assert before.seconds > 0
    with pytest.raises(KeyboardInterrupt):
        run_harvest(gpt2_model, corpus, config, tmp_path / "h", on_progress=stop_after(400, KeyboardInterrupt()))
    half_way = estimate(gpt2_model, corpus, config, tmp_path / "h")
    harvest = run_harvest(gpt2_model, corpus, config, tmp_path / "h")
    after = estimate(gpt2_model, corpus, config, tmp_path / "h")
    assert before.rows == half_way.rows == after.rows == harvest.n_rows
    # The files' headers are all that comes on top of the rows, in blocks and in the database.
    stored = sum(s.bytes for b in harvest.blocks for s in b.files())
    assert before.bytes == stored - headers(harvest) + DATABASE_BYTES * harvest.n_rows
    assert after.seconds == 0
    with pytest.raises(InputError, match="harvest 'h' exists with other settings"):
        estimate(gpt2_model, corpus, replace(config, max_tokens=600), tmp_path / "h")


def headers(harvest: Harvest) -> int:
    files = [harvest.directory / stored.file for block in harvest.blocks for stored in block.files()]
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def test_too_little_disk_is_said_before_anything_is_written(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    huge = replace(config, max_tokens=10**14)
    for attempt in (estimate, run_harvest):
        with pytest.raises(InputError, match=r"are free: harvest fewer tokens"):
            attempt(gpt2_model, corpus, huge, tmp_path / "h")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hooks": ()}, "at least one hook point"),
        ({"context_len": 65}, "is not between 2 .* and 64"),
        ({"context_len": 1}, "is not between 2 .* and 64"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose auto, float32"),
        ({"max_tokens": 15}, "do not fill one context of 16"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(
    changes: dict[str, Any],
    problem: str,
    gpt2_model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=problem) as error:
        run_harvest(gpt2_model, corpus, replace(config, **changes), tmp_path / "h")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "h").exists()


def test_a_harvest_begun_when_special_tokens_were_text_goes_on_so(gpt2_model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x<|endoftext|>" * 20)
    corpus = open_corpus(str(tmp_path / "corpus.txt"))
    config = HarvestConfig(gpt2_model.info.name, corpus.name, HOOKS, context_len=CONTEXT, max_tokens=CONTEXT)
    today = run_harvest(gpt2_model, corpus, config, tmp_path / "today")
    description = json.loads((tmp_path / "today" / DESCRIPTION).read_text())
    assert description.pop("special_tokens") == "tokens"
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / DESCRIPTION).write_text(json.dumps(description))
    before = run_harvest(gpt2_model, corpus, config, tmp_path / "before")
    assert (today.split_special_tokens, before.split_special_tokens) == (False, True)
    assert today.flags.tolist() == [1, 0] * (CONTEXT // 2), "every second token is the text of BOS"
    assert before.flags.tolist() == [1] + [0] * (CONTEXT - 1)


@pytest.mark.gpu
def test_a_harvest_on_a_gpu_holds_the_same_values(
    tiny_gpt2: Path, gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    config = replace(config, gradients=True)
    on_cpu = run_harvest(gpt2_model, corpus, config, tmp_path / "cpu")
    on_gpu = run_harvest(load_model(str(tiny_gpt2), device="cuda"), corpus, config, tmp_path / "gpu")
    rows = np.arange(on_cpu.n_rows)
    for name in HOOKS:
        torch.testing.assert_close(
            on_gpu.vectors(name).rows(rows), on_cpu.vectors(name).rows(rows), rtol=1e-3, atol=1e-4
        )
        gradients = [h.vectors(name + ".grad").rows(rows) / h.gradient_scale(name) for h in (on_gpu, on_cpu)]
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


def of_ranks(
    ranks: Ranks, model: LoadedModel, corpus: Corpus, config: HarvestConfig, folder: Path, stops: bool = False
) -> str:
    """A harvest by several ranks, or one of them that ends in the midst of it; how it ended."""

    def on_progress(progress: HarvestProgress) -> None:
        if stops and progress.tokens > 250:
            raise RuntimeError("killed")

    try:
        run_harvest(model, corpus, config, folder, on_progress=on_progress)
    except RuntimeError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("gradients", [False, True])
def test_several_ranks_make_the_files_of_one(
    on_ranks: Callable[..., list[Any]],
    gradients: bool,
    gpt2_model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    tmp_path: Path,
) -> None:
    given = gpt2_model, corpus, replace(config, gradients=gradients)
    on_ranks(1, of_ranks, *given, tmp_path / "one" / "h")
    assert on_ranks(2, of_ranks, *given, tmp_path / "two" / "h") == ["finished"] * 2
    assert_same(tmp_path / "one" / "h", tmp_path / "two" / "h")
    # The first rank's blocks are recorded up to there, perhaps the other's beyond.
    assert on_ranks(2, of_ranks, *given, tmp_path / "three" / "h", True)[0] == "killed"
    assert not (tmp_path / "three" / "h" / DATABASE).exists()
    on_ranks(3, of_ranks, *given, tmp_path / "three" / "h")
    assert_same(tmp_path / "one" / "h", tmp_path / "three" / "h")


def test_a_harvest_goes_on_with_the_blocks_that_are_missing(
    gpt2_model: LoadedModel, corpus: Corpus, config: HarvestConfig, tmp_path: Path
) -> None:
    """As two ranks leave it of which one was slower, whatever goes on from there."""
    whole = run_harvest(gpt2_model, corpus, config, tmp_path / "whole").directory
    folder = tmp_path / "parts" / "whole"
    shutil.copytree(whole, folder)
    (folder / DATABASE).unlink()
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text(lines[0])
    (folder / "journal.1.jsonl").write_text("".join([lines[1], lines[3], lines[5]]))
    for number in (2, 4, 6, 7):
        for file in folder.glob(f"*/**/{number:05}.safetensors"):
            file.unlink()
    run_harvest(gpt2_model, corpus, config, folder)
    assert_same(whole, folder)
    assert not list(folder.glob("journal.*.jsonl"))
