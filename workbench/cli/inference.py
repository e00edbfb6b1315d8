"""`workbench inference`: what an SAE's encoder loses."""

from typing import Annotated

import typer

from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    OnlyOption,
    SAEArgument,
    WorkspaceOption,
    give_model,
    open_workspace,
)
from workbench.cli.output import print_frame, print_json, records
from workbench.show.progress import ProgressBar

COLUMNS = {
    "k": "k",
    "method": "codes by",
    "l0": "L0",
    "fvu": "FVU",
    "added_nats": "+ nats",
    "kl": "KL",
    "dead_share": "dead",
    "threshold": "threshold",
}


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(inference)


def inference(
    sae: SAEArgument,
    k: Annotated[
        list[int],
        typer.Option(
            "--k", metavar="K", help="Features a token; 1/4, 1/2 and 1 of the encoder's L0 when left out; repeat."
        ),
    ] = [],  # noqa: B006
    method: Annotated[
        list[str],
        typer.Option(
            metavar="METHOD",
            help="encoder, 'encoder, refitted', l1, 'l1, refitted', iht, omp, 'omp, adaptive'; all when left out.",
        ),
    ] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Held-out tokens.", min=2)] = 4096,
    corpus: Annotated[str | None, typer.Option(help="Corpus; the harvest's own when left out.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field holding the text; the harvest's when left out.")] = None,
    only: OnlyOption = None,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure what an SAE's encoder loses: codes of its dictionary by searches (l1, IHT, OMP), at equal L0.

    The result is stored and can be queried as "inference.SAE".
    """
    workspace = open_workspace(folder)
    give_model(workspace, [sae], model, device)
    chosen = {"methods": method} if method else {}
    with ProgressBar("inference", tokens, enabled=not as_json) as bar:
        found = workspace.inference(
            sae, ks=k, max_tokens=tokens, corpus=corpus, text_field=text_field, only=only, device=device,
            on_progress=bar.report_share, **chosen,
        )  # fmt: skip
    lost = found.encoder_loses
    if as_json:
        print_json({"sae": sae, "l0": found.l0, "encoder_loses": lost, "codes": records(found.table())})
        return
    print_frame(f"Codes of {sae}'s dictionary", found.table(), as_json=False, titles=COLUMNS)
    if lost == lost:
        most = found.rows.loc[found.rows["method"] == "encoder", "k"].max()
        print(f"With {most} features a token its encoder loses {lost:.3f} of the variance against OMP.")
