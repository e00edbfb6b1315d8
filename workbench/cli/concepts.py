"""Command over concepts: which features fire on what is known about tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    SAEArgument,
    WorkspaceOption,
    give_model,
    open_workspace,
)
from workbench.cli.output import print_frame, print_json, records
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from workbench.features.concepts.poles import Poles
    from workbench.features.concepts.report import ConceptReport

# As in workbench.features.concepts.truth, which loads torch.
Language = Literal["auto", "python", "text"]
CONCEPT_TITLES = {
    "concept": "concept",
    "positives": "tokens",
    "feature": "feature",
    "sign": "sign",
    "best_feature": "best feature",
    "neuron": "neuron",
    "neuron_sign": "its sign",
    "best_neuron": "best neuron",
    "sae_k1": "k = 1",
    "sae_k4": "k = 4",
    "sae_k16": "k = 16",
    "neurons_k16": "neurons, k = 16",
    "difference_in_means": "diff. in means",
    "linear_probe": "linear probe",
}
FEATURE_TITLES = {
    "feature": "feature",
    "sign": "sign",
    "concept": "concept",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "correlation": "correlation",
    "firings": "firings",
}


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(concepts)


def concepts(
    sae: SAEArgument,
    harvest: Annotated[
        str | None, typer.Option(help="Harvest whose tokens are used; the SAE's own when left out.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Your own concepts: CSV or Parquet with the columns row and concept.")
    ] = None,
    language: Annotated[Language, typer.Option(help="How documents are read.")] = "auto",
    tokens: Annotated[
        int | None, typer.Option(help="About so many, of documents evenly spaced; all when left out.", min=1)
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            metavar="HOOK",
            help="Hook point of the harvest whose neurons are scored too; mlp.hook_post of the SAE's layer, if there.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Features to list, best first.", min=1)] = 20,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Name an SAE's features by what is known about tokens, beside what single neurons and plain probes reach.

    Half of the documents choose thresholds and fit probes; every score is F1 on the other half. The result is stored
    and can be queried as "concepts.SAE".
    """
    workspace = open_workspace(folder)
    give_model(workspace, [sae], model, device)
    given = None if table is None else read_table(table)
    with ProgressBar("concepts", 1, enabled=not as_json) as bar:
        report = workspace.concepts(
            sae, harvest=harvest, table=given, language=language, max_tokens=tokens, neurons=neurons, device=device,
            on_progress=bar.report,
        )  # fmt: skip
    by_concept = report.table()
    poles = report.poles()
    by_feature = report.alignment.best_concepts().sort_values(["f1", "feature"], ascending=[False, True])
    if as_json:
        print_json(
            {
                "sae": sae,
                "documents": report.n_documents,
                "unparsed": report.n_unparsed,
                "concepts": records(by_concept),
                "features": records(by_feature),
                "neurons": records(neurons_of(report)),
                "poles": poles and poles.summary(),
            }
        )
        return
    unparsed = f", {report.n_unparsed} left out as invalid source" if report.n_unparsed else ""
    print(
        f"{report.alignment.n_tokens:,} held-out tokens; {report.n_documents} documents{unparsed}, "
        "half of them held out\n"
    )
    show(f"Features of {sae} and the concept of each, by held-out F1", by_feature.head(top), FEATURE_TITLES)
    say_poles(poles)
    show(
        "Held-out F1 by concept: the best feature, "
        + ("" if report.neurons is None else f"the best neuron of {report.neurons_hook}, ")
        + "k-sparse probes on features, probes on raw activations",
        by_concept,
        CONCEPT_TITLES,
    )
    print(f"Next: workbench sql 'SELECT * FROM \"concepts.{sae}\".pairs LIMIT 10' --workspace {folder}")


def say_poles(poles: "Poles | None") -> None:
    """One line about what the two signs of features tell, under a rule with signs."""
    if poles is None:
        return
    from workbench.features.concepts.poles import HOLDS

    print(
        f"Of {len(poles.table):,} features that fire, {poles.both():.1%} hold a concept by either sign (F1 {HOLDS} "
        f"or more), {poles.two():.1%} two different ones; {poles.chance():.1%} would with the signs paired at random\n"
    )


def neurons_of(report: "ConceptReport") -> "pd.DataFrame":
    """The report's table of neurons, the best first."""
    found = report.neuron_table()
    return found if found.empty else found.sort_values(["f1", "neuron"], ascending=[False, True])


def show(title: str, found: "pd.DataFrame", titles: dict[str, str]) -> None:
    """Prints the columns in `titles`; a sign only where values have two."""
    there = {key: heading for key, heading in titles.items() if key in found}
    shown = {key: heading for key, heading in there.items() if not key.endswith("sign") or (found[key] < 0).any()}
    print_frame(title, found, as_json=False, titles=shown)


def read_table(path: Path) -> "pd.DataFrame":
    """A user's concepts. Raises InputError when the file cannot be read."""
    import pandas as pd

    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"cannot read the concepts in {path}: {reason}; give CSV or Parquet with the columns row and concept"
        ) from None
