"""`workbench train`: SAEs on a harvest, by options or by a sweep file.

The options say what a sweep file says and go the same way (`workbench.saes.sweeps`).
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae.errors import InputError
from workbench.cli.crosscoders import as_document, evaluate_crosscoders, print_crosscoders
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    MODELS,
    MOST_TOKENS,
    ContextOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    NoBosOption,
    OnlyOption,
    Precision,
    SeparateOption,
    TextFieldOption,
    WorkspaceOption,
    given_again,
    open_workspace,
)
from workbench.cli.output import print_json, print_table
from workbench.cli.pipeline import (
    EVALUATION_TOKENS,
    check_can_evaluate,
    evaluate_saes,
    print_evaluations,
    print_sets,
)
from workbench.cli.ranks import is_first, refuse_ranks, started_by_torchrun
from workbench.cli.shared import sharing
from workbench.cli.training_settings import TrainingSettings
from workbench.show.progress import ProgressBar, format_bytes, format_seconds

if TYPE_CHECKING:
    from sae.config import TrainConfig
    from sae.training import StepMetrics, TrainedSAE
    from workbench.catalog.results import Result
    from workbench.harvest.plan import HarvestConfig
    from workbench.saes.evaluation import Evaluation
    from workbench.saes.replacement import Replacement
    from workbench.saes.sweeps import Sweep, SweepEstimate
    from workbench.workspace import Workspace

RULE_NAMES = (
    "topk, abstopk, batchtopk, mutual_choice, batch_abstopk, feature_choice, gradient_topk (needs a harvest with "
    "--gradients), jumprelu or relu"
)
"""Written out: asking the registry would load torch for --help."""


STREAMED_TOKENS = 2_000_000
"""Trained on where a model is the source and no number is given."""
STREAMING = {
    "model": "--model", "corpus": "--corpus", "text_field": "--text-field", "context_len": "--context",
    "dtype": "--dtype", "model_dtype": "--model-dtype", "separate": "--separate", "no_bos": "--no-bos",
    "buffer": "--buffer", "keep": "--keep",
}  # fmt: skip
"""Options that say what the model's rows are made from and what becomes of them."""

TargetOption = Annotated[
    str | None,
    typer.Option(
        help="Hook point to predict: trains transcoders. With a * for the layer in --hook and here, a set of them, one "
        "a layer."
    ),
]
HooksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hook",
        metavar="HOOK",
        help="Hook point; needed when the harvest has several. Repeat for a crosscoder of several.",
    ),
]
EachOption = Annotated[
    bool, typer.Option("--each", help="Several --hook are an SAE's each, in place of a crosscoder of all.")
]
RuleOption = Annotated[
    list[str],
    typer.Option("--rule", metavar="RULE", help=f"Selection rule: {RULE_NAMES}; repeat for several SAEs."),
]
KOption = Annotated[
    list[int], typer.Option("--k", metavar="K", help="Active features per token; repeat for several SAEs.")
]
SparsityOption = Annotated[
    list[float] | None,
    typer.Option(
        "--sparsity",
        metavar="COEFFICIENT",
        help="Penalty of relu and jumprelu, which have no k; repeat for several SAEs.",
    ),
]
SeedOption = Annotated[list[int], typer.Option("--seed", metavar="SEED", help="Seed; repeat for several SAEs.")]
SweepOption = Annotated[
    Path | None, typer.Option(help="TOML file of rules, settings, widths and seeds to train side by side.")
]
TrainedTokensOption = Annotated[
    int | None,
    typer.Option(help="Tokens to train on; one epoch of a harvest, 2,000,000 of a model.", min=1, max=MOST_TOKENS),
]
RateOption = Annotated[float | None, typer.Option(help="Peak learning rate; a default by width when left out.")]
BaselineOption = Annotated[bool, typer.Option(help="Also train the frozen-random-decoder baseline on the same stream.")]
TrackOption = Annotated[
    Literal["tensorboard", "wandb"] | None,
    typer.Option(help="Also keep the curves in a tracker, offline, in the run's folder."),
]
EvaluateOption = Annotated[
    bool, typer.Option("--evaluate", help="Evaluate the SAEs on held-out documents when they are trained.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(train)


@dataclass(frozen=True, kw_only=True)
class Training(TrainingSettings):
    """What `workbench train` is asked for."""

    harvest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[HARVEST]...",
            help="Name of a finished harvest; those of two models for a crosscoder of them; none with --model.",
        ),
    ] = None
    name: Annotated[str, typer.Option(help="Name of the SAE and of the run.")]
    hook: HooksOption = None
    target_hook: TargetOption = None
    each: EachOption = False
    model: Annotated[str | None, typer.Option(help=f"Train straight from a model, no harvest: {MODELS}.")] = None
    corpus: CorpusOption = "python-stdlib"
    text_field: TextFieldOption = "text"
    only: OnlyOption = None
    context_len: ContextOption = None
    dtype: Annotated[Precision, typer.Option(help="Precision of the rows; auto is the checkpoint's own.")] = "auto"
    model_dtype: Annotated[
        Precision, typer.Option(help="Precision the model runs in; auto is float32 on a CPU, else its own.")
    ] = "auto"
    separate: SeparateOption = False
    no_bos: NoBosOption = False
    buffer: Annotated[
        int | None, typer.Option(help="Rows that are shuffled together; by default 262,144, on a GPU 1M.", min=1)
    ] = None
    keep: Annotated[
        str | None, typer.Option(metavar="HARVEST", help="With --model: also write the rows as this harvest.")
    ] = None
    sweep: SweepOption = None
    rule: RuleOption
    k: KOption
    sparsity: SparsityOption = None
    d_sae: Annotated[int, typer.Option(help="Number of features.", min=1)] = 4096
    seed: SeedOption
    tokens: TrainedTokensOption = None
    lr: RateOption = None
    batch_size: Annotated[int, typer.Option(help="Tokens per step.", min=1)] = 4096
    skip: Annotated[bool, typer.Option("--skip", help="Give transcoders a linear path beside the features.")] = False
    baseline: BaselineOption = False
    estimate_only: Annotated[bool, typer.Option(help="Print memory and time, and stop.")] = False
    track: TrackOption = None
    evaluate_after: EvaluateOption = False
    folder: WorkspaceOption = DEFAULT_WORKSPACE
    device: DeviceOption = "auto"
    as_json: JsonOption = False

    @property
    def harvests(self) -> list[str]:
        """Names of the harvests, with what counts of them."""
        return [name if self.only is None else f"{name}:{self.only}" for name in self.harvest or ()]

    @property
    def placed(self) -> dict[str, Any]:
        """What is read and written, and where it is computed."""
        placed = {"hook": self.hook, "target_hook": self.target_hook, "each": self.each, "device": self.device}
        return placed if self.model is None else {**placed, "buffer_rows": self.buffer, "keep": self.keep}

    def source(self, context: typer.Context) -> "str | list[str] | HarvestConfig":
        """The harvest, or what the model's rows are made from. Raises InputError for neither, both, or options of the
        other."""
        if self.harvest:
            wrong = next((option for name, option in STREAMING.items() if given(context, name)), None)
            if wrong is not None:
                raise InputError(f"{wrong} does not go with the harvest {self.harvest[0]!r}: leave one of them out")
            return self.harvests[0] if len(self.harvests) == 1 else self.harvests
        if self.model is None:
            raise InputError("nothing to train on: name a harvest, or a model with --model, --corpus and --hook")
        from workbench.harvest.plan import HarvestConfig
        from workbench.text.chats import counting

        field = counting(self.text_field, self.only)
        return HarvestConfig(
            model=self.model, corpus=self.corpus, hooks=(), text_field=field, context_len=self.context_len,
            max_tokens=MOST_TOKENS, dtype=self.dtype, model_dtype=self.model_dtype, separate=self.separate,
            bos=not self.no_bos,
        )  # fmt: skip

    @property
    def makes_sets(self) -> bool:
        """Whether it makes sets of transcoders, one for every layer."""
        return any("*" in hook for hook in self.hook or ())

    @property
    def is_crosscoder(self) -> bool:
        """Whether several activations are read side by side."""
        return len(self.harvest or ()) > 1 or (len(self.hook or ()) > 1 and not self.each)

    def counted(self, n: int, n_sets: int = 1) -> str:
        """So many SAEs, transcoders, or transcoders in sets, in words."""
        if not self.makes_sets:
            kind = "crosscoder" if self.is_crosscoder else "SAE" if self.target_hook is None else "transcoder"
            return f"{n} {kind}{'s' * (n > 1)}"
        return f"{n_sets} sets of {n // n_sets} transcoders" if n_sets > 1 else f"a set of {n} transcoders"

    def asked(self, context: typer.Context) -> "Sweep":
        """What the sweep file says, else what the options say in its place.

        Raises:
            InputError: options that the file or the rules named leave no room for.
        """
        from workbench.saes.sweeps import parse_sweep, read_sweep

        if self.sweep is not None:
            refuse_with_sweep(context)
            asked = read_sweep(self.sweep)
            if self.tokens is not None and asked.tokens is not None:
                raise InputError(f"{self.sweep} says how many tokens: leave --tokens out")
            return asked
        shared: dict[str, Any] = {"d_sae": self.d_sae, "batch_size": self.batch_size, "skip": self.skip}
        shared |= ({} if self.lr is None else {"lr": self.lr}) | self.settings
        tables = rule_tables(context, self.rule, self.k, self.sparsity)
        return parse_sweep({**shared, "seed": self.seed, "rule": tables}, where="the command")

    def configs(self, asked: "Sweep", total: int) -> "list[TrainConfig]":
        """One configuration an SAE, the baseline last."""
        configs = asked.configs(self.name, total)
        if self.baseline:
            configs.append(replace(configs[0], name=f"{self.name}-random-decoder", frozen_decoder=True))
        return configs


@sharing(Training, rule=["topk"], k=[32], seed=[0])
def train(run: Training, context: typer.Context) -> None:
    """Train SAEs, transcoders or crosscoders on a harvest, or with --model straight from a model, several side by side.

    A model runs beside training and nothing of it is stored, unless --keep names a harvest to write on the way. The
    corpus is read again from its beginning when it ends before --tokens.

    Without --sweep, one SAE per --rule, --k (or --sparsity) and --seed. A sweep file holds training settings and, in
    [[rule]] tables, selection rules with theirs; a list of values makes an SAE for each. An SAE that fails leaves the
    others running.

    Interrupted, it goes on from the last checkpoint when the same command is repeated.
    """
    from workbench.workspace import Workspace

    source = run.source(context)
    workspace = open_workspace(run.folder) if run.harvest else Workspace(run.folder)
    asked = run.asked(context)
    epoch = workspace.open_harvest(run.harvests[0]).n_trainable_rows if run.harvest else STREAMED_TOKENS
    total = run.tokens or asked.tokens or epoch
    configs = run.configs(asked, total)
    if run.evaluate_after and run.harvest:
        check_can_evaluate(workspace, run.harvests)
    if run.estimate_only:
        refuse_ranks("--estimate-only")
    if run.estimate_only or (run.sweep is not None and not started_by_torchrun()):
        estimate = workspace.estimate_training(source, configs, **run.placed)
        if not run.as_json:
            print(describe_training(estimate, run.counted(estimate.saes, len(configs))))
        elif run.estimate_only:
            print_json(asdict(estimate))
        if run.estimate_only:
            return
    trained = train_with_progress(workspace, run, source, configs)
    if not is_first():
        return
    made = [result.config.name for result in trained if not result.error]
    sets = list(dict.fromkeys(name.rpartition(".")[0] for name in made)) if run.makes_sets else []
    found: dict[str, Evaluation] = {}
    together: dict[str, Replacement] = {}
    by_part: list[Result] = []
    if run.evaluate_after and made and run.is_crosscoder:
        by_part = evaluate_crosscoders(
            workspace, made, max_tokens=EVALUATION_TOKENS, device=run.device, quiet=run.as_json
        )
    elif run.evaluate_after and made:
        found = evaluate_saes(
            workspace, made, max_tokens=EVALUATION_TOKENS, device=run.device, reuse=True, quiet=run.as_json
        )
        settings: dict[str, Any] = {"max_tokens": EVALUATION_TOKENS, "device": run.device}
        together = {name: workspace.evaluate_transcoders(name, **settings) for name in sets}
    outcome = outcomes(workspace, run.name, made, found)
    if run.as_json:
        evaluations = {"evaluations": {sae: item.to_dict() for sae, item in found.items()}} if found else {}
        evaluations |= {"replacements": {name: item.to_dict() for name, item in together.items()}} if together else {}
        evaluations |= {"crosscoders": {one.name: as_document(one) for one in by_part}} if by_part else {}
        failed = {result.config.name: result.error for result in trained if result.error}
        print_json({"run": run.name, "saes": outcome, "failed": failed, **evaluations})
    elif made:
        print_outcome(outcome, found)
        print_sets(together)
        print_crosscoders(by_part)
        conclude(workspace, run, outcome, sets, asked_tokens=total)
    refuse_failures(workspace, run.name, trained)


def outcomes(
    workspace: "Workspace", run: str, saes: list[str], evaluations: "dict[str, Evaluation]"
) -> list[dict[str, Any]]:
    """What became of each SAE: its path, how long and how well it trained by the run's last report, and added nats
    where it was evaluated."""
    if not saes:
        return []
    last = workspace.run(run).metrics().groupby("name").last()
    found = []
    for sae in saes:
        row = last.loc[sae]
        numbers = {key: float(row[key]) for key in ("fvu", "l0", "dead_share", "seconds")}
        nats = {"added_nats": evaluations[sae].added_nats} if sae in evaluations else {}
        place = {"name": sae, "path": str(workspace.sae_folder(sae)), "tokens": int(row["tokens"])}
        found.append({**place, **numbers, **nats})
    return found


def print_outcome(outcome: list[dict[str, Any]], evaluations: "dict[str, Evaluation]") -> None:
    """How the SAEs came out: their evaluations, or the last reports of training."""
    if evaluations:
        print_evaluations(evaluations)
    else:
        rows = [[sae[key] for key in ("name", "fvu", "l0", "dead_share")] for sae in outcome]
        print_table("The last steps of training", ["", "FVU", "L0", "dead"], rows)


def conclude(
    workspace: "Workspace", run: Training, outcome: list[dict[str, Any]], sets: list[str], *, asked_tokens: int
) -> None:
    """Says what was trained, where it lies and what to do next; sets of transcoders go by their own names."""
    names = sets or [sae["name"] for sae in outcome]
    paths = [str(workspace.transcoder_folder(name)) for name in sets] or [sae["path"] for sae in outcome]
    tokens, seconds = outcome[0]["tokens"], max(sae["seconds"] for sae in outcome)
    if tokens > asked_tokens:
        print(f"Training takes whole batches: {tokens:,} tokens, where {asked_tokens:,} were asked for.")
    what = run.counted(len(outcome), len(sets))
    print(f"Trained {what} on {tokens:,} tokens in {format_seconds(seconds)}: {', '.join(paths)}")
    given = "" if run.evaluate_after else given_again(workspace.origin(outcome[0]["name"]).model)
    step = "compare" if run.evaluate_after else "evaluate"
    print(f"Next: workbench {step} {' '.join(names)}{given} --workspace {workspace.path}")


def refuse_failures(workspace: "Workspace", run: str, trained: "list[TrainedSAE]") -> None:
    """Raises InputError naming the SAEs that came to nothing, and why."""
    failed = {result.config.name: result.error for result in trained if result.error}
    if not failed:
        return
    problems = "; ".join(f"{sae}: {error}" for sae, error in failed.items())
    rest = "the others are finished" if len(failed) < len(trained) else f"the name {run!r} is free again"
    raise InputError(f"{len(failed)} of {len(trained)} SAEs failed ({problems}); {rest}")


def rule_tables(
    context: typer.Context, names: list[str], k: list[int], sparsity: list[float] | None
) -> list[dict[str, Any]]:
    """What a sweep file would hold in its [[rule]] tables. Raises InputError for a setting that no rule named has."""
    from sae.rules import CodeRule, ThresholdRule, rule_class, rule_names
    from workbench.saes.settings import check_keys

    check_keys(dict.fromkeys(names), rule_names(), "--rule", what="selection rule")
    with_k = [name for name in names if issubclass(rule_class(name), CodeRule)]
    penalised = [name for name in names if issubclass(rule_class(name), ThresholdRule)]
    if not with_k and penalised and given(context, "k"):
        raise InputError(f"{penalised[0]} has no k: set its penalty with --sparsity")
    if not penalised and sparsity is not None:
        raise InputError("--sparsity is for relu and jumprelu: set --k to make the other rules sparser")
    tables: list[dict[str, Any]] = []
    for name in names:
        table: dict[str, Any] = {"name": name}
        if name in with_k:
            table["k"] = k
        elif sparsity is not None:
            table["sparsity_coefficient"] = sparsity
        tables.append(table)
    return tables


IN_FILES = (*TrainingSettings.__annotations__, "rule", "k", "sparsity", "d_sae", "seed", "lr", "batch_size", "skip")
"""Parameters for which a sweep file has a key."""
FILE_KEYS = {"rule": '[[rule]] with name = "..."', "sparsity": "sparsity_coefficient = ..."}


def given(context: typer.Context, parameter: str) -> bool:
    """Whether an option was named on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def refuse_with_sweep(context: typer.Context) -> None:
    """Raises InputError for an option that a sweep file has a key for."""
    for parameter in IN_FILES:
        if given(context, parameter):
            option = next(one.opts[0] for one in context.command.params if one.name == parameter)
            key = FILE_KEYS.get(parameter, f"{parameter} = ...")
            raise InputError(f"{option} does not go with --sweep: write {key} into the file")


def train_with_progress(
    workspace: "Workspace", run: Training, source: "str | list[str] | HarvestConfig", configs: "list[TrainConfig]"
) -> "list[TrainedSAE]":
    """Trains behind a progress bar that shows the first SAE still running."""
    tracker = nullcontext() if run.track is None or not is_first() else workspace.tracker(run.name, run.track)
    with tracker as track, ProgressBar(
        "train", configs[0].total_tokens, enabled=not run.as_json and is_first()
    ) as bar:  # fmt: skip
        furthest = 0

        def on_metrics(metrics: "StepMetrics") -> None:
            nonlocal furthest
            if track is not None:
                track(metrics)
            # The first report at a step is that of the first SAE that still runs.
            if metrics.tokens > furthest:
                furthest = metrics.tokens
                bar.update(metrics.tokens, describe_metrics(metrics))

        return workspace.train_all(run.name, source, configs, **run.placed, on_metrics=on_metrics)


def describe_training(estimate: "SweepEstimate", what: str) -> str:
    """One line: what is trained, memory, time."""
    return (
        f"Estimate: {what}, {format_bytes(estimate.bytes)} of memory "
        f"({format_bytes(estimate.free_bytes)} free), about {format_seconds(estimate.seconds)}"
    )


def describe_metrics(metrics: "StepMetrics") -> str:
    """What the progress bar shows of an SAE in training."""
    return f"loss {metrics.loss:.3g}, FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}, dead {metrics.dead_share:.1%}"
