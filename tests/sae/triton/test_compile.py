"""The main kernels compile for sm_90 without a GPU, at the benchmark's shapes, and keep their values in registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is installed on Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# Pointers that are not to fp32, and numbers.
NAMES = {
    "*bf16": "R X x out centred shadow_dec shadow_enc",
    "*i32": "ranks maxima groups counter places token row cells feature offsets firings aux_slot",
    "*i64": "part_indices indices candidates budgets starts since_fired",
    "i32": "stride n_columns n_groups k n units d_sae first width slots n_tokens size",
    "fp32": "beta beta1 beta2 rest1 rest2 eps",
}
TYPES = {name: kind for kind, names in NAMES.items() for name in names.split()}
# What the width changes: kernels of multiples of 256 columns are the same, those of others read shorter pieces.
WIDTHS = [768, 1000]


def compiled(kernel: Any, constants: dict[str, Any], warps: int, types: dict[str, str], aligned: bool = True) -> Any:
    """A kernel compiled for sm_90.

    Args:
        types: of arguments that differ from `TYPES`.
        aligned: whether the width, in units of its alignment, can be divided by 16 once more.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    # Widths divisible by 16 and aligned pointers, as at run time.
    divisible = {"stride", "width", "n", "n_columns"} | ({"units"} if aligned else set())
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in divisible
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def check(
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    folder: Path,
    types: dict[str, str] | None = None,
    aligned: bool = True,
) -> str:
    """Compiles, requires that nothing spills, and returns the PTX."""
    made = compiled(kernel, constants, warps, types or {}, aligned)
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    code = subprocess.run([str(tool), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in code
    # The compiler may reserve a few bytes of stack that it then does not use.
    assert not re.findall(r"\b(?:LDL|STL)\b.*", code)
    ptx: str = made.asm["ptx"]
    return ptx


def columns(d: int) -> dict[str, Any]:
    """How kernels are told the width of rows."""
    from sae.kernels.triton.sparse import alignment

    return {"ALIGN": alignment(d)}


def by_feature(d: int, nested: bool = False) -> dict[str, Any]:
    """Constants of the kernels that go through the entries of a feature."""
    from sae.kernels.triton.features import ENTRIES, row_slice
    from sae.kernels.triton.sizes import SIZES

    return {"NESTED": nested, "WINDOW": SIZES.window, "ENTRIES": ENTRIES, "SLICE": row_slice(d), **columns(d)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("ptxas") is None and not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this triton has no ptxas")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return tmp_path


@pytest.mark.parametrize(("absolute", "gradient"), [(False, False), (True, False), (False, True)])
def test_select_stays_in_registers(absolute: bool, gradient: bool, folder: Path) -> None:
    from sae.kernels.triton.select import GROUPS, GROUPS_OF_A_WARP, LANES, RUN, TILE, _maxima_kernel, _select_kernel

    ranked = {"LANES": LANES, "MEMBERS": 64, "RUN": RUN, "ABSOLUTE": absolute, "GRADIENT": gradient}
    ptx = check(_maxima_kernel, ranked, LANES // 128, folder)
    chooses = {name: value for name, value in ranked.items() if name != "LANES"}
    assert not re.search(r"ld\.global\S*\.b32\s*\{\s*%r\d+\s*\}", ptx)
    # The last two: of the largest k, and of the most candidates of a row, from which BatchTopK's threshold is taken.
    sizes = [(GROUPS, 128), (2 * GROUPS, 1024), (4 * GROUPS, 2048)]
    for groups, capacity in sizes[:2] if gradient else sizes:
        chosen = {"N_GROUPS": groups, "CAPACITY": capacity, "GROUPS_AT_ONCE": TILE // 64, "AGAIN": groups // 4}
        chosen["RANKED"] = gradient
        check(_select_kernel, {**chosen, **chooses}, groups // GROUPS_OF_A_WARP, folder)


def test_a_merge_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.select import _merge_kernel

    for slots, warps in ((64, 1), (1024, 4)):
        check(_merge_kernel, {"PARTS": 2, "SLOTS": slots}, warps, folder)


def test_feature_choice_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.batch import MAX_TOKENS, PIECE, _budget_kernel, budget_warps

    for tokens in (4096, 8192, MAX_TOKENS):
        check(_budget_kernel, {"BLOCK": tokens, "PIECE": PIECE}, budget_warps(tokens), folder)


def test_batch_collection_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton import candidates, nth
    from sae.kernels.triton.candidates import BITS, RUN_PIECE, RUNS, WORDS

    types = dict.fromkeys(("starts", "counts", "features", "reach", "ends"), "*i32")
    types |= {"out_indices": "*i64", "offsets": "*i64"} | dict.fromkeys(("n_runs", "blocks", "n_entries"), "i32")
    types |= {"words": "*i32", "n_words": "i32", "wanted": "i32"}
    check(candidates._reached_kernel, {"ABSOLUTE": False, "BITS": BITS, "WORDS": WORDS}, 4, folder, types)
    for room, warps in ((1024, 4), (4096, 8)):
        check(candidates._append_kernel, {"BITS": BITS, "WORDS": room}, warps, folder, types)
    check(candidates._holds_kernel, {}, 1, folder, {**types, "holds": "*i1"})
    for number in range(nth.PASSES):
        check(nth._count_kernel, {"PASS": number, "BLOCK": nth.BLOCK, "BINS": nth.BINS}, 8, folder, types)
    check(nth._nth_kernel, {"BINS": nth.BINS}, 8, folder, types)
    for kernel in (candidates._reach_kernel, candidates._best_kernel):
        check(kernel, {"RUNS": RUNS, "PIECE": RUN_PIECE}, 4, folder, types)


def test_thresholds_stay_in_registers(folder: Path) -> None:
    from sae.kernels.triton.dense import COLUMNS, ROWS, _activate_kernel, _mask_kernel
    from sae.kernels.triton.threshold import RUN, _run_kernel

    types = {"counter": "*i64", "starts": "*i32", "counts": "*i32", "features": "*i32", "A": "*bf16", "G": "*bf16"}
    types |= {"n_rows": "i32", "half_window": "fp32"}
    check(_run_kernel, {"BLOCK": RUN}, RUN // 256, folder, types)
    check(_activate_kernel, {"BLOCK": COLUMNS}, 4, folder, types)
    check(_mask_kernel, {"ROWS": ROWS, "BLOCK": COLUMNS}, 4, folder, types)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_decode_stays_in_registers_and_reads_rows_by_vectors(d: int, ragged: bool, folder: Path) -> None:
    from sae.kernels.triton.sparse import ENTRIES, SLICE, _decode_kernel

    constants = {"RAGGED": ragged, "BIAS": False, "RESIDUAL": True, "ENTRIES": ENTRIES, "SLICE": SLICE, **columns(d)}
    types = {"W_dec": "*bf16", "b_dec": "*bf16", "offsets": "*i64"}
    ptx = check(_decode_kernel, constants, 1, folder, types, aligned=d % 256 == 0)
    assert not re.search(r"ld\.global\S*\.b16", ptx)


@pytest.mark.parametrize("cells", [3, 10, 16])
def test_nested_residuals_stay_in_registers(cells: int, folder: Path) -> None:
    from sae.kernels.triton.nested import ENTRIES, _nested_kernel
    from sae.kernels.triton.sparse import SLICE

    constants = {
        "RAGGED": False, "CELLS": cells, "ROOM": 4 if cells == 3 else 16, "MAIN": 2, "ENTRIES": ENTRIES,
        "SLICE": SLICE, **columns(768),
    }  # fmt: skip
    types = {"W_dec": "*bf16", "residual": "*bf16", "offsets": "*i64"}
    ptx = check(_nested_kernel, constants, 1, folder, types)
    assert not re.search(r"ld\.global\S*\.b16", ptx)


def test_centring_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.sparse import CENTRE_ROWS, SLICE, SPREAD, _centre_kernel, _spread_kernel

    check(_centre_kernel, {"LESS": False, "ROWS": CENTRE_ROWS, "COLUMNS": SLICE, **columns(768)}, 4, folder)
    types = {"parts": "*fp64", "d": "i32", "blocks": "i32"}
    check(_spread_kernel, {"ROWS": 32, "COLUMNS": SPREAD}, 4, folder, types)


def test_entries_order_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.order import BLOCK, _ordered_kernel

    types = {"ordered": "*i16", "order": "*i64", "starts": "*i64"}
    types |= dict.fromkeys(("n_entries", "blocks", "lowest"), "i32")
    for ragged in (False, True):
        constants = {"RAGGED": ragged, "TOKENS": 2**13, "ENTRIES": 2**18, "BLOCK": BLOCK}
        check(_ordered_kernel, constants, 2, folder, types)


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_window_sums_and_products_stay_in_registers(d: int, threshold: bool, folder: Path) -> None:
    from sae.kernels.triton.features import _product_kernel, _window_kernel

    for kernel in (_window_kernel, _product_kernel):
        constants = {name: value for name, value in by_feature(d).items() if name in kernel.arg_names}
        constants["THRESHOLD"] = threshold
        ptx = check(kernel, constants, 1, folder, {"W_dec": "*bf16"}, aligned=d % 256 == 0)
        assert not re.search(r"ld\.global\S*\.b16", ptx)


@pytest.mark.parametrize("aux", [False, True])
def test_gradients_stay_in_registers(aux: bool, folder: Path) -> None:
    from sae.kernels.triton.features import _gradient_kernel

    check(_gradient_kernel, {"DECODER": True, "AUX": aux, **by_feature(768)}, 1, folder, {"W_dec": "*bf16"})


@pytest.mark.parametrize("d", [2304, 4096])
def test_kernels_of_other_widths_are_those_that_are_compiled_here(d: int) -> None:
    assert by_feature(d) == by_feature(WIDTHS[0])


@pytest.mark.parametrize(("aux", "nested", "sliced"), [(False, False, False), (True, False, True), (True, True, False)])
@pytest.mark.parametrize("d", WIDTHS)
def test_fused_update_stays_in_registers(d: int, aux: bool, nested: bool, sliced: bool, folder: Path) -> None:
    from sae.kernels.triton.update import _fused_kernel

    constants = {"DECODER": True, "AUX": aux, "SLICED": sliced, "LAZY": sliced, **by_feature(d, nested)}
    ptx = check(_fused_kernel, constants, 1, folder, aligned=d % 256 == 0)
    assert not re.search(r"ld\.global\S*\.b16", ptx)


def test_updates_from_memory_stay_in_registers(folder: Path) -> None:
    from sae.kernels.triton.bias import FEATURES, SLICE, STEP, _combine_kernel, _weighted_kernel
    from sae.kernels.triton.parameters import _divided_kernel
    from sae.kernels.triton.update import _normalise_kernel, _rows_kernel, _vector_kernel

    check(_rows_kernel, {"DECODER": True, "LAZY": True, "SLICE": 1024, **columns(2304)}, 8, folder)
    for weighted in (False, True):
        constants = {"WEIGHTED": weighted, "ROWS": FEATURES, "STEP": STEP, "SLICE": SLICE, **columns(2304)}
        check(_weighted_kernel, constants, 2, folder, {"M": "*bf16", "n_rows": "i32"})
    types = dict.fromkeys(("n_parts", "n_less", "d"), "i32")
    check(_combine_kernel, {"STEP": 64, "COLUMNS": 32}, 4, folder, types)
    check(_vector_kernel, {"BLOCK": 1024}, 4, folder)
    check(_divided_kernel, {"CHOSEN": True, "SLICE": 1024, **columns(2304)}, 4, folder, {"features": "*i64"})
    check(_normalise_kernel, {"LAZY": True, "SLICES": 9, "ROOM": 16, "SLICE": 1024, **columns(2304)}, 4, folder)
