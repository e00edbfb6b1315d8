"""Block files and their journal: exact bytes, valid safetensors, and nothing half-written is ever taken for data."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae.errors import InputError
from workbench.harvest.blocks import ALIGNMENT, checksum, map_tensors, write_file
from workbench.harvest.journal import JOURNAL, Block, append_block, read_journal, recover_journal  # fmt: skip

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit_through_our_map_and_through_safetensors(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    # Every bit pattern of two bytes, so NaN payloads, infinities and subnormals of the half types are among them.
    tensor = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(dtype).view(64, -1)
    stored = write_file(tmp_path, "a/b.safetensors", {"x": tensor})
    path = tmp_path / "a/b.safetensors"
    for read in (map_tensors(path), load_file(path)):
        assert list(read) == ["x"]
        assert read["x"].dtype == dtype
        assert read["x"].shape == tensor.shape
        assert bits(read["x"]) == bits(tensor)
    assert (stored.bytes, stored.crc32) == (path.stat().st_size, checksum(path))
    assert (stored.dtype, stored.shape) == (str(dtype).removeprefix("torch."), list(tensor.shape))
    assert map_tensors(path)["x"].data_ptr() % ALIGNMENT == 0


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 9), names=st.sets(st.text("abcé", min_size=1), min_size=1))
def test_files_of_any_shape_are_valid_safetensors(
    rows: int, width: int, names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: torch.randn(rows, width).to(DTYPES[i % 3]) for i, name in enumerate(sorted(names))}
    write_file(folder, "x.safetensors", tensors)
    for read in (map_tensors(folder / "x.safetensors"), load_file(folder / "x.safetensors")):
        assert {name: bits(value) for name, value in read.items()} == {n: bits(v) for n, v in tensors.items()}


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_file(tmp_path, "x.safetensors", {"x": torch.ones(4, 4)})
    before = checksum(tmp_path / "x.safetensors")
    map_tensors(tmp_path / "x.safetensors")["x"].zero_()
    assert checksum(tmp_path / "x.safetensors") == before


@pytest.mark.parametrize("keep", [0, 5, 40, 100])
def test_a_truncated_file_is_a_clear_error(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(tmp_path, path.name, {"x": torch.ones(64, 4)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="missing or damaged") as error:
        map_tensors(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.safetensors" / "in the way").write_text("")
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path, "x.safetensors", {"x": torch.ones(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def write_block(folder: Path, number: int) -> Block:
    hooks = {"h": write_file(folder, f"blocks/h/{number:05}.safetensors", {"x": torch.full((4, 2), float(number))})}
    tokens = write_file(folder, f"tokens/{number:05}.safetensors", {"token": torch.zeros(4, dtype=torch.int32)})
    block = Block(number, 4 * number, 4, hooks, tokens, {number: f"döc\u2028{number}"}, {"h.grad": 2.0**-30})
    append_block(folder, block)
    return block


def test_the_journal_gives_blocks_back_as_they_were(tmp_path: Path) -> None:
    blocks = [write_block(tmp_path, number) for number in range(3)]
    assert read_journal(tmp_path) == blocks
    assert recover_journal(tmp_path) == blocks


def test_a_line_torn_anywhere_is_ignored_and_cut_off_before_going_on(tmp_path: Path) -> None:
    first = write_block(tmp_path, 0)
    whole = (tmp_path / JOURNAL).read_bytes()
    second = write_block(tmp_path, 1)
    line = (tmp_path / JOURNAL).read_bytes()[len(whole) :]
    for cut in (1, len(line) // 2, len(line) - 1):
        torn = whole + line[:cut]
        (tmp_path / JOURNAL).write_bytes(torn)
        assert read_journal(tmp_path) == [first]
        assert (tmp_path / JOURNAL).read_bytes() == torn, "reading must not disturb a process that is appending"
        assert recover_journal(tmp_path) == [first]
        assert (tmp_path / JOURNAL).read_bytes() == whole
        append_block(tmp_path, second)
        assert read_journal(tmp_path) == [first, second]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_going_on_starts_at_the_first_block_whose_files_are_not_whole(damage: str, tmp_path: Path) -> None:
    blocks = [write_block(tmp_path, number) for number in range(3)]
    file = tmp_path / blocks[1].hooks["h"].file
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert recover_journal(tmp_path) == blocks[:1]
    assert [json.loads(line)["number"] for line in (tmp_path / JOURNAL).read_text().splitlines()] == [0]
