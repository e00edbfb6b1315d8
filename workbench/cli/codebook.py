"""`workbench codebook`: codebook features after the fact."""

from typing import Annotated

import typer

from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    MOST_SEED,
    MOST_TOKENS,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    given_again,
    open_workspace,
)
from workbench.cli.output import print_json
from workbench.show.progress import ProgressBar


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(codebook)


def codebook(
    harvest: Annotated[str, typer.Argument(help="Harvest whose rows it is fitted to.")],
    name: Annotated[str, typer.Option(help="Name it gets, as an SAE of the workspace.")],
    hook: Annotated[str | None, typer.Option(help="Hook point; may be left out where the harvest has one.")] = None,
    codes: Annotated[int, typer.Option(help="Number of codes, of all heads.", min=1)] = 4096,
    k: Annotated[int, typer.Option(help="Codes per token, of every head.", min=1)] = 32,
    heads: Annotated[
        int, typer.Option(help="Of a harvest of hook_z: how many, for a codebook for every head.", min=1)
    ] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens to fit on.", min=1, max=MOST_TOKENS)] = 1_500_000,
    seed: Annotated[int, typer.Option(help="Of the rows that codes start as.", min=0, max=MOST_SEED)] = 0,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit a codebook: every token gets the mean of its k nearest codes, each there or not.

    From there on it is an SAE like others: evaluate, compare, index, steer.
    """
    workspace = open_workspace(folder)
    unexplained = 1.0
    with ProgressBar("codebook", tokens, enabled=not as_json) as bar:

        def on_step(done: int, total: int, fvu: float) -> None:
            nonlocal unexplained
            unexplained = fvu
            bar.report_share(done, total)

        workspace.fit_codebook(
            name, harvest, hook=hook, n_codes=codes, k=k, total_tokens=tokens, heads=heads, seed=seed,
            device=device, on_step=on_step,
        )  # fmt: skip
    if as_json:
        print_json({"name": name, "codes": codes, "k": k, "heads": heads, "fvu_of_the_last_batch": unexplained})
        return
    a_token = f"{k} a token" if heads == 1 else f"{k} a token of each of {heads} heads"
    print(f"{name}: {codes:,} codes, {a_token}, FVU of the last batch {unexplained:.3f}.")
    given = given_again(workspace.origin(name).model)
    print(f"Next: workbench evaluate {name}{given} --workspace {folder}")
