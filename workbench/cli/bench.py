"""`workbench bench`: how fast a training step is on this machine, and how good what it trains."""

import contextlib
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.errors import InputError
from workbench.cli.options import DeviceOption, JsonOption
from workbench.cli.output import print_json, print_table
from workbench.disk.extras import require

if TYPE_CHECKING:
    import torch

QUALITY_SAMPLES, MIN_QUALITY_SAMPLES = 800_000, 20_000


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(bench)


def bench(
    sizes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SIZE...", help="demo, laptop, S, M, L or odd; what suits the device when left out."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times each arm's step is timed.")] = 9,
    quality: Annotated[
        bool, typer.Option("--quality", help="Instead: how many planted features SAEs find, in some minutes.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Rows that each SAE of --quality is trained on.")] = QUALITY_SAMPLES,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time a TopK SAE's training step beside its floor and the SAE libraries that are installed.

    Steps run in turn on the same batches: forward, backward and optimiser. The encoder's matrix product alone is the
    floor of every exact step. Libraries that join in where installed: sparsify (eai-sparsify), SAELens (sae-lens),
    dictionary_learning, llamascopium.

    With --quality, SAEs of several rules, and SAELens' BatchTopK, are trained on a small model of SynthSAEBench's kind
    (400 planted features in trees, 48 dimensions, 96 latents, L0 4) and measured by what they find of it.
    """
    import torch

    from workbench.bench import DEFAULT_SIZES, SIZES, measure
    from workbench.bench.arms import arms, batches
    from workbench.models.devices import choose_device

    unknown = [name for name in sizes or [] if name not in SIZES]
    if unknown:
        raise InputError(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    if rounds < 2:
        raise InputError(f"rounds must be at least 2, got {rounds}")
    place = choose_device(device)
    if quality:
        require("sae_lens", "the planted model of --quality")
        if sizes:
            raise InputError("--quality has one size: leave out " + ", ".join(sizes))
        _quality(place, samples, as_json)
        return
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "sizes": {},
    }  # fmt: skip
    for name in sizes or DEFAULT_SIZES.get(place.type, DEFAULT_SIZES["cpu"]):
        size = SIZES[name]
        left_out: dict[str, str] = {}
        data = batches(size, place)
        # Libraries print; standard output is for the table.
        with contextlib.redirect_stdout(sys.stderr):
            results = measure(size, arms(size, data[0]), data, rounds, left_out.__setitem__)
        report["sizes"][name] = {
            "size": asdict(size), "left_out": left_out, "arms": {arm: asdict(r) for arm, r in results.items()},
        }  # fmt: skip
        if not as_json:
            _print(f"{name}: batch {size.batch}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}", report, name)
    if as_json:
        print_json(report)


def _quality(place: "torch.device", samples: int, as_json: bool) -> None:
    """Trains, measures and prints."""
    from workbench.bench.quality import BATCH, compared
    from workbench.bench.synthetic import TINY

    if samples < MIN_QUALITY_SAMPLES:
        raise InputError(f"--samples must be at least {MIN_QUALITY_SAMPLES}, some steps of {BATCH} rows, got {samples}")
    # Libraries print; standard output is for the table.
    with contextlib.redirect_stdout(sys.stderr):
        found = dict(compared(TINY, samples, place))
    if as_json:
        print_json({"samples": samples, "size": asdict(TINY), "arms": found})
        return
    names = {
        "f1": "F1", "mcc": "MCC", "explained_variance": "explained variance", "l0": "L0", "dead": "dead",
        "split": "split", "absorbed": "absorbed",
    }  # fmt: skip
    rows = [[arm, *(measured[key] for key in names)] for arm, measured in found.items()]
    print_table(f"Planted features found, {samples} rows, {place.type}", ["SAE", *names.values()], rows)


def _print(title: str, report: dict[str, Any], name: str) -> None:
    from workbench.bench.arms import OURS

    entry = report["sizes"][name]
    ours = entry["arms"].get(OURS, {}).get("median")
    rows = []
    for arm, r in sorted(entry["arms"].items(), key=lambda item: item[1]["median"]):
        memory = None if r["peak_bytes"] is None else r["peak_bytes"] / 2**30
        times = r["median"] / ours if ours else None
        rows.append([arm, r["median"], r["p10"], r["p90"], round(r["tokens_per_second"]), times, memory])
    columns = ["step", "ms", "p10", "p90", "tokens/s", "times ours", "GiB"]
    print_table(f"{title}, {report['device']}, torch {report['torch']}", columns, rows)
    for arm, why in entry["left_out"].items():
        print(f"Left out: {arm} ({why})")
