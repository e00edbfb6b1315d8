"""Commands of the pipeline but for training: demo, harvest, evaluate."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.errors import InputError
from workbench.cli.crosscoders import as_document, evaluate_crosscoders, print_crosscoders
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DEMO_WORKSPACE,
    MODELS,
    ContextOption,
    CorpusOption,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    NoBosOption,
    OnlyOption,
    Precision,
    SeparateOption,
    TextFieldOption,
    WorkspaceOption,
    give_model,
    harvested,
    open_workspace,
)
from workbench.cli.output import print_json, print_table
from workbench.cli.ranks import is_first, refuse_ranks
from workbench.show.progress import ProgressBar, format_bytes, format_seconds
from workbench.text.python_source import Split

if TYPE_CHECKING:
    from workbench.harvest.run import HarvestEstimate
    from workbench.saes.evaluation import Evaluation
    from workbench.saes.replacement import Replacement
    from workbench.workspace import Workspace

EVALUATION_TOKENS = 65_536


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(demo)
    app.command()(harvest)
    app.command()(evaluate)


def demo(
    folder: WorkspaceOption = DEMO_WORKSPACE,
    tokens: Annotated[int, typer.Option(help="Tokens to harvest and train on.", min=20_000)] = 1_500_000,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on the bundled model of Python source; needs no network.

    Harvests the standard library of the running Python, trains a TopK SAE and a frozen-random-decoder
    baseline, evaluates both on held-out files, indexes the features and prints what some of them fire on.
    """
    from workbench.cli.run_demo import run_demo

    report = run_demo(folder, tokens=tokens, device=device, quiet=as_json)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print()


def harvest(
    name: Annotated[str, typer.Argument(help="Name of the harvest to make or resume.")],
    hook: Annotated[
        list[str],
        typer.Option(
            "--hook",
            metavar="HOOK",
            help="Hook point, such as blocks.2.hook_resid_post; a * for the layer is every layer; repeat for several.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help=f"{MODELS}; demo when left out.")] = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    only: OnlyOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens to harvest at most.", min=1)] = 2_000_000,
    context: ContextOption = None,
    split: Annotated[
        Split,
        typer.Option(help="Side of the corpus, by a hash of each document's name; SAEs are evaluated on heldout."),
    ] = "train",
    dtype: Annotated[Precision, typer.Option(help="Precision stored; auto is the checkpoint's own.")] = "auto",
    model_dtype: Annotated[
        Precision, typer.Option(help="Precision the model runs in; auto is float32 on a CPU, else its own.")
    ] = "auto",
    separate: SeparateOption = False,
    no_bos: NoBosOption = False,
    gradients: Annotated[bool, typer.Option(help="Also store gradients of the summed next-token loss.")] = False,
    estimate_only: Annotated[bool, typer.Option(help="Print rows, bytes and time, and stop.")] = False,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Record a model's activations on a corpus, at one or more hook points, in one pass.

    Interrupted, it goes on where it stopped when the same command is repeated.
    """
    from workbench.harvest.plan import HarvestConfig
    from workbench.harvest.run import HarvestEstimate, HarvestProgress
    from workbench.text.chats import counting
    from workbench.workspace import Workspace

    config = HarvestConfig(
        model=harvested(name, model), corpus=corpus, text_field=counting(text_field, only), hooks=tuple(hook),
        context_len=context, max_tokens=tokens, split=split, dtype=dtype, model_dtype=model_dtype,
        gradients=gradients, separate=separate, bos=not no_bos,
    )  # fmt: skip
    workspace = Workspace(folder)
    if estimate_only:
        refuse_ranks("--estimate-only")
        estimate = workspace.estimate_harvest(name, config, device=device)
        print_json(asdict(estimate)) if as_json else print(describe_estimate(estimate))
        return
    with ProgressBar("harvest", tokens, enabled=not as_json and is_first()) as bar:

        def on_estimate(estimate: HarvestEstimate) -> None:
            if not as_json:
                print(describe_estimate(estimate))

        def on_progress(progress: HarvestProgress) -> None:
            bar.update(progress.tokens)

        made = workspace.harvest(name, config, device=device, on_estimate=on_estimate, on_progress=on_progress)
    summary = {"name": made.name, "rows": made.n_rows, "hooks": list(made.hooks), "path": str(made.directory)}
    if as_json:
        print_json(summary)
    else:
        print(f"Harvested {made.n_rows:,} rows at {', '.join(made.hooks)} into {made.directory}")
        if made.n_rows + made.context_len <= tokens:
            print(f"The corpus ended before {tokens:,} tokens.")
        print(f"Next: workbench train {made.name} --name {suggested(hook, made.hooks)} --workspace {folder}")


def suggested(asked: Sequence[str], hooks: Sequence[str]) -> str:
    """What to train on a harvest: a set of transcoders between two hook points of every layer, else an SAE."""
    if len(asked) == 2 and all("*" in name for name in asked):
        return f"my-set --hook '{asked[0]}' --target-hook '{asked[1]}'"
    return "my-sae" if len(hooks) == 1 else f"my-sae --hook {hooks[0]}"


def describe_estimate(estimate: "HarvestEstimate") -> str:
    """One line: rows at most, since the corpus may end before, and for them bytes, free disk and time; another where
    short sequences follow each other in a context."""
    said = (
        f"Estimate: at most {estimate.rows:,} rows, {format_bytes(estimate.bytes)} "
        f"({format_bytes(estimate.free_bytes)} free), about {format_seconds(estimate.seconds)}"
    )
    if estimate.joins:
        said += "\nSequences shorter than a context follow each other in one: --separate keeps each in its own"
    return said


SKIP_SHARE = "skip share"
"""A row that only transcoders with a skip have."""
EVALUATION_COLUMNS = {
    "tokens": "tokens",
    "L0": "l0",
    "FVU": "fvu",
    "explained variance": "explained_variance",
    "  per token": "explained_variance_per_token",
    "  uncentred": "explained_variance_uncentred",
    "reconstruction bias": "reconstruction_bias",
    "CE clean": "ce_clean",
    "CE spliced": "ce_spliced",
    "added nats": "added_nats",
    "added nats (zero)": "added_nats_zero",
    "added nats (mean)": "added_nats_mean",
    "recovered (zero)": "loss_recovered_zero",
    "recovered (mean)": "loss_recovered_mean",
    "KL": "kl",
    "KL score": "kl_score",
    SKIP_SHARE: "skip_share",
    "dead": "dead_share",
}


TOGETHER = {
    "tokens": "tokens",
    "CE clean": "ce_clean",
    "CE replaced": "ce_replaced",
    "added nats": "added_nats",
    "added nats (zero)": "added_nats_zero",
    "added nats (mean)": "added_nats_mean",
    "KL": "kl",
    "KL (zero)": "kl_zero",
    "KL (mean)": "kl_mean",
}
"""Rows of what a set of transcoders costs with all its layers at once."""


def evaluate(
    saes: Annotated[
        list[str], typer.Argument(metavar="SAE...", help="Names of SAEs, transcoders or sets made from one model.")
    ],
    corpus: Annotated[str | None, typer.Option(help="Corpus; the harvest's own when left out.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field holding the text; the harvest's when left out.")] = None,
    only: OnlyOption = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.", min=2)] = EVALUATION_TOKENS,
    count_bos: Annotated[bool, typer.Option("--count-bos", help="Count BOS as SAEBench does; left out else.")] = False,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure SAEs on held-out documents: sparsity, reconstruction, and what splicing them costs the model.

    A transcoder's prediction takes the place of what it predicts; a set is measured layer by layer and all at once. A
    crosscoder is measured part by part.
    """
    from workbench.saes.comparison import evaluated_on

    workspace = open_workspace(folder)
    before = evaluated_on(workspace)
    kinds = {item.name: bool(item.parts) for item in workspace.saes()}
    crosscoders = [name for name in dict.fromkeys(saes) if kinds.get(name)]
    saes = [name for name in saes if name not in crosscoders]
    text: dict[str, Any] = {"corpus": corpus, "text_field": text_field, "only": only, "device": device}
    by_part = evaluate_crosscoders(workspace, crosscoders, quiet=as_json, max_tokens=tokens, **text)
    named = workspace.with_layers(saes)
    give_model(workspace, named, model, device)
    found: dict[str, Evaluation] = {}
    if named or not crosscoders:
        found = evaluate_saes(workspace, named, quiet=as_json, max_tokens=tokens, count_bos=count_bos, **text)
    sets = [name for name in dict.fromkeys(saes) if name not in found]
    together = {name: workspace.evaluate_transcoders(name, max_tokens=tokens, **text) for name in sets}
    if as_json:
        documents = {one.name: as_document(one) for one in by_part}
        print_json({name: item.to_dict() for name, item in (found | together).items()} | documents)
        return
    print_crosscoders(by_part)
    if found:
        print_evaluations(found)
    print_sets(together)
    for name, read in evaluated_on(workspace).items():
        if before.get(name, read) != read:
            print(f"{name}: this replaces the evaluation on {before[name]}.")


def check_can_evaluate(workspace: "Workspace", harvests: Sequence[str]) -> None:
    """Raises InputError, before anything is trained, for harvests of a model that would have to be given again."""
    from workbench.models.load_own import must_be_given

    for name in harvests:
        model = workspace.open_harvest(name).config["model"] or ""
        if must_be_given(model):
            raise InputError(
                f"--evaluate needs the model behind harvest {name!r}, made by Python that runs only when you name it: "
                f"leave it out, and then run workbench evaluate NAME --model {model}"
            )


def evaluate_saes(
    workspace: "Workspace", saes: Sequence[str], *, max_tokens: int, quiet: bool, **settings: Any
) -> "dict[str, Evaluation]":
    """`Workspace.evaluate` behind a progress bar, by name."""
    with ProgressBar("evaluate", max_tokens, enabled=not quiet) as bar:
        found = workspace.evaluate(saes, max_tokens=max_tokens, on_progress=bar.report_share, **settings)
    return dict(zip(saes, found, strict=True))


def print_sets(found: "dict[str, Replacement]") -> None:
    """What sets of transcoders cost with all their layers at once, one column a set; nothing where there is none."""
    rows = [[title, *(item.to_dict()[key] for item in found.values())] for title, key in TOGETHER.items()]
    if found:
        print_table("All layers at once", ["", *found], rows)


def print_evaluations(found: "dict[str, Evaluation]") -> None:
    """One row per metric of EVALUATION_COLUMNS, one column per SAE: it fits a narrow terminal."""
    rows = [[title, *(getattr(item, key) for item in found.values())] for title, key in EVALUATION_COLUMNS.items()]
    if not any(item.skip_share for item in found.values()):
        rows = [row for row in rows if row[0] != SKIP_SHARE]
    print_table("Held-out evaluation", ["", *found], rows)
    for note, names in _by_note(found).items():
        print(f"{', '.join(names)}: {note}.")


def _by_note(found: "dict[str, Evaluation]") -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, item in found.items():
        if item.note:
            names.setdefault(item.note, []).append(name)
    return names
