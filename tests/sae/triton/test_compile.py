"""The main kernels compile for sm_90 without a GPU, at the benchmark's shapes, and keep their values in registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is installed on Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

TYPES = {
    "select": {
        "Z": "*fp32", "U": "*fp32", "bias": "*fp32", "values": "*fp32", "indices": "*i64", "groups": "*i32",
        "candidates": "*i64", "stride": "i32", "n_columns": "i32", "k": "i32", "beta": "fp32",
    },
    "decode": {
        "values": "*fp32", "indices": "*i64", "offsets": "*i64", "W_dec": "*bf16", "b_dec": "*bf16", "x": "*bf16",
        "out": "*bf16", "errors": "*fp32", "n": "i32", "d": "i32", "k": "i32",
    },
    "window": {
        "token": "*i32", "value": "*fp32", "feature": "*i32", "R": "*bf16", "X": "*bf16", "scale": "*fp32",
        "W_dec": "*bf16", "window_dec": "*fp32", "window_enc": "*fp32",
        "d_sae": "i32", "d": "i32",
    },
    "collect": {
        "counter": "*i32", "places": "*i32", "first": "i32", "width": "i32", "d_sae": "i32", "slots": "i32",
    },
    "budget": {
        "budgets": "*i64", "starts": "*i64", "places": "*i32", "first": "i32", "stride": "i32", "n": "i32",
        "d_sae": "i32",
    },
    "fused": {
        "offsets": "*i32", "token": "*i32", "value": "*fp32", "R": "*bf16", "X": "*bf16", "scale": "*fp32",
        "aux_slot": "*i32", "shadow_dec": "*bf16", "shadow_enc": "*bf16", "since_fired": "*i64",
        "n_tokens": "i32", "d_sae": "i32", "d": "i32", "beta1": "fp32", "beta2": "fp32",
        "rest1": "fp32", "rest2": "fp32", "eps": "fp32",
    },
}  # fmt: skip


def resources(kernel, types: dict[str, str], constants: dict[str, object], warps: int, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of a kernel compiled for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    # Widths divisible by 16 and aligned pointers, as at run time.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("d", "stride", "width")
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


WIDTHS = [768, 2304, 4096]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("ptxas") is None and not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this triton has no ptxas")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return tmp_path


def test_select_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.select import STREAM, TILE, WARPS, _select_kernel

    constants = {
        "N_GROUPS": 1024, "UNROLL": STREAM // 1024, "CAPACITY": 128, "GROUPS_AT_ONCE": TILE // 64, "MEMBERS": 64,
        "ABSOLUTE": False, "GRADIENT": False,
    }  # fmt: skip
    used = resources(_select_kernel, TYPES["select"], constants, WARPS, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0


def test_feature_choice_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.batch import _budget_kernel

    used = resources(_budget_kernel, TYPES["budget"], {"BLOCK": 8192}, 16, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0


def test_batch_collection_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.batch import _collect_kernel

    used = resources(_collect_kernel, TYPES["collect"], {"ABSOLUTE": False, "BLOCK": 4096}, 8, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0


def test_decode_stays_in_registers(folder: Path) -> None:
    from sae.kernels.triton.sparse import ENTRIES, SLICE, _decode_kernel

    constants = {"RAGGED": False, "BIAS": False, "RESIDUAL": True, "ENTRIES": ENTRIES, "SLICE": SLICE}
    used = resources(_decode_kernel, TYPES["decode"], constants, 1, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0


@pytest.mark.parametrize("d", WIDTHS)
def test_window_sums_stay_in_registers(d: int, folder: Path) -> None:
    from sae.kernels.triton.features import ENTRIES, WINDOW, _window_kernel, row_slice

    constants = {"WINDOW": WINDOW, "ENTRIES": ENTRIES, "SLICE": row_slice(d)}
    used = resources(_window_kernel, TYPES["window"], constants, 1, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_fused_update_stays_in_registers(d: int, aux: bool, folder: Path) -> None:
    from sae.kernels.triton.features import ENTRIES, WINDOW, row_slice
    from sae.kernels.triton.update import _fused_kernel

    constants = {
        "DECODER": True, "AUX": aux, "WINDOW": WINDOW, "ENTRIES": ENTRIES,
        "SLICE": row_slice(d),
    }  # fmt: skip
    used = resources(_fused_kernel, TYPES["fused"], constants, 1, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] == 0
