"""What the pages of docs/methods say of the demo model, its GELU twin and others, on several draws: one table a number,
mean (least to greatest) over the draws, and the lead of one method over another on the same draw.

    python benchmarks/draws.py MEASUREMENT ... [--model demo] [--corpus python-stdlib] [--draws 4] [--out FILE]

A draw of text is every n-th document of a corpus, for calibration and for what is held out alike; a draw of prompts is
a seed. With `--out` every draw is written as it ends, a line of JSON, and one that is there, of the same model, text,
SAEs and settings, is not measured again.

    mlps         docs/methods/sparsity.md, 1: how sparse MLPs are by themselves
    coding       1: coding rates of the residual stream by layer
    costs        2: zeros at a given cost, PPL-p%
    prediction   2: calibration and corrupted input under top-k; cores, a low-rank predictor, dimensions of the stream
    attention    3: patterns of keys at every budget, sinks, on tasks with --task
    heads        3: heads one at a time and left whole; layers, with each query's best keys
    gates        3: sinks, gates and the stream's largest entry
    saes         4: terms a token, with --workspace and --sae
    codes        docs/methods/inference.md: codes by encoder and searches, with --workspace and --sae; a draw has its
                 own text and the next of the SAEs
    lenses       docs/methods/lenses.md
    transcoders  docs/methods/transcoders.md, the bundled set
    tasks        docs/methods/circuits.md: the code tasks
    dictionary   the same page: SAEs beside supervised dictionaries, with --workspace, --sae and --task; a draw has
                 prompts of its own and the next of the SAEs, with the next --baseline or NAME-random-decoder
    retrieval    the same page: heads masked on needle tests
    graphs       docs/methods/graphs.md: graphs of many prompts
    diffs        docs/methods/crosscoders.md: a crosscoder of the model and --beside; a draw is a seed of the crosscoder
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from drawn import StoredDraws, Value, measured_of, show

from circuits.passes import answer_logits
from circuits.patching import patch_activations
from sae import load_transcoders
from workbench import Workspace
from workbench.circuits.dictionary import dictionary_tables
from workbench.circuits.task import Task
from workbench.features.diff import diff_models
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.contexts import context_batches
from workbench.models.load import LoadedModel, load_model
from workbench.saes.evaluation import evaluate_sae
from workbench.saes.inference import measure_inference
from workbench.saes.replacement import evaluate_replacement
from workbench.sparsity.at_cost import at_costs
from workbench.sparsity.attention import STRUCTURED, best_of_heads, measure_attention
from workbench.sparsity.attention_heads import measure_heads
from workbench.sparsity.attention_patterns import pattern_named
from workbench.sparsity.attention_rank import looking_ranks
from workbench.sparsity.attention_tasks import task_costs
from workbench.sparsity.calibration import SAMPLE_TOKENS, calibrate, calibrate_on
from workbench.sparsity.coding_rate import CodingRates
from workbench.sparsity.core import measure_cores
from workbench.sparsity.dimensions import shared_dimensions
from workbench.sparsity.enforce import enforce
from workbench.sparsity.gates import COLUMNS as GATE_COLUMNS
from workbench.sparsity.measure import measure
from workbench.sparsity.methods import METHODS
from workbench.sparsity.ppl import ppl_sparsity
from workbench.sparsity.predictor import predictor_recall
from workbench.sparsity.reliability import reliability
from workbench.sparsity.sae_codes import measure_saes
from workbench.text.corpora import Corpus, Document, open_corpus
from workbench.text.python_source import Split

MEASURED_TOKENS, HELD_OUT, CONTEXT = 24_576, 2048, 256
CODE_TASKS = ("argument", "self-attribute", "docstring", "brackets", "induction")
DICTIONARY_TASKS, DICTIONARY_PROMPTS, CHANGES = ("brackets", "argument", "self-attribute"), 256, (1, 2, 4)
GRAPH_TASKS = ("self-attribute", "induction")


class Ask(NamedTuple):
    """What a measurement is given."""

    model: LoadedModel
    corpus: Corpus
    """The draw's part of the text."""
    draw: int
    options: argparse.Namespace

    def held(self, tokens: int = HELD_OUT) -> list[Any]:
        """Held-out contexts of the draw."""
        return list(context_batches(self.model, self.corpus, "heldout", max_tokens=tokens, context_len=CONTEXT))


class Part(Corpus):
    """Every `of`-th document of a corpus, from `number` on; of a corpus of one text its `number`-th part."""

    def __init__(self, whole: Corpus, number: int, of: int) -> None:
        self.name, self.text_field = whole.name, whole.text_field
        self.fingerprint = f"{whole.fingerprint}, {number} of {of}"
        self._whole, self._number, self._of = whole, number, of

    def documents(self, split: Split, start: int = 0) -> Iterator[Document]:
        first = list(islice(self._whole.documents(split), 2))
        if len(first) == 1:
            text = first[0].text
            cuts = [len(text) * place // self._of for place in (self._number, self._number + 1)]
            yield replace(first[0], text=text[cuts[0] : cuts[1]])
            return
        for count, document in enumerate(self._whole.documents(split)):
            if count % self._of == self._number:
                yield document


def mlps(ask: Ask) -> Iterator[Value]:
    found = measure(ask.model, ask.corpus, max_tokens=MEASURED_TOKENS)
    for table in (found.layers, found.residual[["layer", "max_abs", "ratio"]]):
        yield from _cells("mlps", table.set_index("layer"))


def coding(ask: Ask) -> Iterator[Value]:
    rates = CodingRates(ask.model)
    batches = context_batches(ask.model, ask.corpus, "train", max_tokens=MEASURED_TOKENS, context_len=CONTEXT)
    for batch in batches:
        with torch.no_grad(), rates.seeing(batch):
            ask.model.hf(batch.tokens, use_cache=False)
    found = rates.table().set_index("layer")
    found["heads_change"] = found["heads_attention"] - found["heads_before"]
    found["random_change"] = found["random_attention"] - found["random_before"]
    yield from _cells("coding", found)


def costs(ask: Ask) -> Iterator[Value]:
    calibration, held = calibrate(ask.model, ask.corpus, context_len=CONTEXT), ask.held()
    curves = enforce(ask.model, calibration, held)
    for point in curves.points:
        if point.method == "zero":
            yield Value("zeros", "zero", "none enforced", point.sparsity)
    graded = [method for method in METHODS.values() if len(method.levels) > 1]
    found = at_costs(ask.model, calibration, held, graded, curves.points, clean_loss=curves.clean_loss)
    for title, column in (("zeros", "sparsity"), ("FLOPs saved", "flops_saved"), ("met", "added_nats")):
        yield from _cells(title, found.pivot(index="cost", columns="method", values=column))
    for item in ppl_sparsity(ask.model, calibration, held):
        yield Value("PPL-p%", f"{item.p:.0%}", "zeros", item.sparsity)
        yield Value("PPL-p%", f"{item.p:.0%}", "CETT", item.cett)


def prediction(ask: Ask) -> Iterator[Value]:
    sample = list(context_batches(ask.model, ask.corpus, "train", max_tokens=SAMPLE_TOKENS, context_len=CONTEXT))
    calibration, held = calibrate_on(ask.model, sample), ask.held()
    yield from _cells(
        "reliability",
        reliability(ask.model, calibration, held, seed=ask.draw).set_index("level").T.rename_axis(columns=None),
    )
    cores = measure_cores(ask.model, calibration, held, seed=ask.draw)
    yield from _cells("cores", cores.cost.pivot(index="share", columns="core", values="added_nats"))
    overlap = cores.overlap.set_index("layer")
    for share, rows in overlap.groupby("share"):
        yield from _cells(f"overlap at {share}", rows[["own", "other", "corpus"]])
    found = predictor_recall(ask.model, calibration, sample, held)
    table = found.pivot(index="layer", columns="rank", values="recall").rename_axis(columns=None)
    frequent = found.groupby("layer")["frequent"].first()
    yield from _cells("recall", table.assign(frequent=frequent))
    yield from _cells("recall over the most often needed", table.sub(frequent, axis=0))
    for basis, rows in shared_dimensions(ask.model, held, seed=ask.draw).groupby("basis"):
        yield from _cells(f"dimensions, {basis}", rows.drop(columns="basis").set_index("layer"))


def attention(ask: Ask) -> Iterator[Value]:
    found = measure_attention(ask.model, ask.held())
    for rest, rows in found.curves.groupby("rest"):
        yield from _cells(str(rest), rows.pivot(index="budget", columns="pattern", values="added_nats"))
    kept = found.coverage.groupby(["budget", "pattern"])["kept"].mean().unstack()
    yield from _cells("kept", kept)
    for budget in found.coverage["budget"].unique():
        best = best_of_heads(found.coverage, int(budget))["best"].value_counts()
        for pattern in STRUCTURED:
            yield Value("best for heads", pattern, str(budget), float(best.get(pattern, 0)))
    heads = found.heads.assign(node=[f"a{row.layer}.h{row.head}" for row in found.heads.itertuples()])
    yield from _cells("looks", heads.set_index("node")[["sink", "sink_uniform", "keys_95"]])
    tasks = [Task(name, seed=ask.draw) for name in ask.options.task]
    for (task, rest), rows in task_costs(ask.model, found.settings, tasks).groupby(["task", "rest"]) if tasks else ():
        yield from _cells(f"{task}, {rest}", rows.pivot(index="budget", columns="pattern", values="kept"))


def heads(ask: Ask) -> Iterator[Value]:
    held = ask.held()
    found = measure_heads(ask.model, held, pattern_named("sink + local"), 16, seed=ask.draw)
    curve = found.curve.groupby(["whole", "order"])["added_nats"]
    yield from _cells("left whole", curve.mean().unstack())
    yield from _cells("left whole, least of the draws", curve.min().unstack())
    yield from _cells("left whole, greatest of the draws", curve.max().unstack())
    ranks = looking_ranks(ask.model, held)
    table = found.heads.merge(ranks, on=["layer", "head"])
    nodes = [f"a{row.layer}.h{row.head}" for row in table.itertuples()]
    columns = ["restricted_nats", "removed_nats", "uncovered", "dims_95"]
    yield from _cells("heads", table.assign(node=nodes).set_index("node")[columns])
    yield Value("heads", "of all", "cost less than 0.04", float((table["restricted_nats"] < 0.04).sum()))
    yield Value("heads", "of all", "look with one direction", float((table["dims_95"] == 1).sum()))
    best = measure_heads(ask.model, held, pattern_named("top-k keys"), 16, draws=1)
    for title, layers in (("sink + local", found.layers), ("top-k keys", best.layers)):
        yield from _cells(f"layers, {title}", layers.set_index("layer")[["alone_nats", "others_nats"]])


def gates(ask: Ask) -> Iterator[Value]:
    held = ask.held()
    looks = measure_attention(ask.model, held, budgets=(CONTEXT // 2,)).heads
    for place, sink in enumerate(looks["sink"].nlargest(3)):
        yield Value("heads", "attention on BOS", f"largest {place + 1}", float(sink))
    for column in set(GATE_COLUMNS) & set(looks):
        for end in ("min", "max"):
            yield Value("heads", column, end, float(looks[column].agg(end)))
    ratio = measure(ask.model, ask.corpus, max_tokens=MEASURED_TOKENS).residual["ratio"].max()
    yield Value("stream", "largest entry over the median", "of any layer", float(ratio))


def saes(ask: Ask) -> Iterator[Value]:
    space = Workspace(ask.options.workspace, create=False)
    loaded = {name: space.sae(name) for name in ask.options.sae}
    found = measure_saes(ask.model, loaded, ask.corpus, max_tokens=8192)
    for title, column in (("terms", "terms_mean"), ("reached", "reached")):
        yield from _cells(title, found.terms.pivot(index="error", columns="dictionary", values=column))
    yield from _cells(
        "codes", found.summary.set_index("sae")[["dead_share", "dense_share", "zipf_exponent", "zipf_r2"]]
    )


def codes(ask: Ask) -> Iterator[Value]:
    name = ask.options.sae[ask.draw % len(ask.options.sae)]
    sae = Workspace(ask.options.workspace, create=False).sae(name)
    found = measure_inference(ask.model, sae, ask.corpus, ks=(8, 16, 32), max_tokens=HELD_OUT).table()
    for key in ("l0", "fvu", "added_nats", "kl", "dead_share"):
        yield from _cells(key, found.pivot(index="k", columns="method", values=key))
    for key in ("fvu", "added_nats"):
        wide = found.pivot(index="k", columns="method", values=key).rename_axis(columns=None)
        lost = wide.sub(wide["encoder"], axis=0).div(-wide["encoder"], axis=0)
        yield from _cells(f"less than the encoder's: {key}", lost.drop(columns="encoder").T.rename_axis(columns=None))


def lenses(ask: Ask) -> Iterator[Value]:
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        for own in (False, True):
            layers = space.lens(f"own-{own}", ask.model, ask.corpus, own=own).table("layers")
            layers["lens"] = [f"{lens}, own" if own and lens != "logit" else lens for lens in layers["lens"]]
            for title in ("kl", "agrees", "noise"):
                rows = layers[~((layers["lens"] == "logit") & own)]
                yield from _cells(title, rows.pivot(index="layer", columns="lens", values=title))


def transcoders(ask: Ask) -> Iterator[Value]:
    bundled = load_transcoders(demo_transcoders_dir()).coders.values()
    coders = [coder.to(ask.model.device, torch.float32) for coder in bundled]
    for layer, item in enumerate(evaluate_sae(ask.model, coders, ask.corpus, max_tokens=16_384)):
        for key in ("fvu", "added_nats", "added_nats_mean", "added_nats_zero"):
            yield Value("layers", str(layer), key, float(getattr(item, key)))
    together = evaluate_replacement(ask.model, coders, ask.corpus, max_tokens=16_384).to_dict()
    for key in ("added_nats", "added_nats_mean", "added_nats_zero"):
        yield Value("together", "all", key, float(together[key]))


def tasks(ask: Ask) -> Iterator[Value]:
    for name in CODE_TASKS:
        prompts = Task(name, 128, seed=ask.draw).prompts(ask.model)
        logits = answer_logits(ask.model.bridge, prompts.clean, prompts.last)
        said = logits.argmax(dim=-1, keepdim=True)
        yield Value("tasks", name, "likeliest is right", (said == prompts.answers).any(dim=1).double().mean().item())
        before = Task(name).measure(prompts)(logits, prompts) > 0
        yield Value("tasks", name, "answer before wrong", before.double().mean().item())
        scores = patch_activations(ask.model.bridge, prompts)
        shares = scores.table().set_index("node")["score"] / (scores.clean - scores.corrupted)
        for node, share in shares[shares.abs() > 0.1].items():
            yield Value("patching", f"{name}: {node}", "share", float(share))


def dictionary(ask: Ask) -> Iterator[Value]:
    space = Workspace(ask.options.workspace, create=False)
    name = ask.options.sae[ask.draw % len(ask.options.sae)]
    baselines = ask.options.baseline or [f"{one}-random-decoder" for one in ask.options.sae]
    names = {"SAE": name, "frozen random decoder": baselines[ask.draw % len(baselines)]}
    loaded = {title: space.sae(one, device=str(ask.model.device)) for title, one in names.items()}
    for given in ask.options.task or DICTIONARY_TASKS:
        task = Task(given, DICTIONARY_PROMPTS, seed=ask.draw)
        prompts = task.prompts(ask.model)
        metric = task.measure(prompts, "logit_difference")
        tables = dictionary_tables(
            ask.model.bridge, prompts, loaded, metric=metric, changes=CHANGES, seed=ask.draw, batch_size=32
        )
        close, control = tables["approximation"].set_index("dictionary"), tables["control"]
        yield from _cells(f"{given}: approximation", close[["sufficiency", "necessity"]])
        yield from _cells(f"{given}: control", control.pivot(index="k", columns="dictionary", values="edited"))
        yield Value(f"{given}: control", "no edit", str(CHANGES[0]), float(control["unedited"].iloc[0]))
        for row in tables["attributes"].itertuples():
            for key in ("strength", "effect", "f1", "joined_f1", "joined"):
                yield Value(f"{given}: {row.attribute}", str(row.dictionary), key, float(getattr(row, key)))
            yield Value(f"{given}: {row.attribute}", str(row.dictionary), "occluded", float(bool(row.occluded_by)))


def retrieval(ask: Ask) -> Iterator[Value]:
    with tempfile.TemporaryDirectory() as folder:
        found = Workspace(Path(folder) / "w").retrieval("r", ask.model, seed=ask.draw)
        masks, scored, summary = (found.table(name) for name in ("masks", "heads", "summary"))
    for key, value in summary.iloc[0].items():
        yield Value("summary", str(key), "value", float(value))
    for (order, masked), recall in masks.groupby(["order", "masked"])["recall"]:
        for title in ("mean", "min", "max") if order == "random" else ("mean",):
            yield Value(
                "recall", f"{order}, {title}" if order == "random" else str(order), str(masked), recall.agg(title)
            )
    yield from _cells("heads", scored.set_index("node")[["retrieval", "evidence", "masked_recall"]])
    first = scored.set_index("node")["retrieval"].nlargest(2).index
    for place, node in enumerate(first):
        yield Value("first by copying", str(node), str(place + 1), 1.0)


def graphs(ask: Ask) -> Iterator[Value]:
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        for name in GRAPH_TASKS:
            found = space.graph_task(name, ask.model, Task(name, 16, seed=ask.draw))
            features, ranked = found.table("features"), found.table("heads").set_index("head")
            yield Value(name, "agreement", "Spearman", float(found.table("summary")["agreement"].iloc[0]))
            yield Value(name, "features", "in every graph", float((features["share"] == 1).sum()))
            for row in features[features["share"] == 1].itertuples():
                yield Value(name, f"f{row.layer}/{row.feature}", "influence", float(row.influence))
            places = ranked[["graph", "eap_ig"]].rank(ascending=False)
            yield from _cells(f"{name}: place", places[(places <= 8).any(axis=1)])


def diffs(ask: Ask) -> Iterator[Value]:
    options = ask.options
    with tempfile.TemporaryDirectory() as folder:
        found = diff_models(
            Workspace(Path(folder) / "w"), ask.model, options.beside, name="diff", corpus=options.corpus,
            tokens=options.tokens, epochs=options.epochs, d_sae=1024, seed=ask.draw, device=options.device,
        ).evaluation  # fmt: skip
        parts, groups, features = (found.table(name) for name in ("parts", "groups", "features"))
    columns = ["explained_variance", "ce_clean", "added_nats", "loss_recovered_zero", "l0"]
    yield from _cells("parts", parts.set_index("part")[columns])
    yield from _cells("groups", groups.set_index("group").select_dtypes("number"))
    yield from _cells("features", features.select_dtypes("number").quantile([0, 0.5, 1]))


MEASUREMENTS: dict[str, Callable[[Ask], Iterator[Value]]] = {
    function.__name__: function
    for function in (
        mlps, coding, costs, prediction, attention, heads, gates, saes, codes, lenses, transcoders, tasks,
        dictionary, retrieval, graphs, diffs,
    )
}  # fmt: skip


def _cells(table: str, frame: pd.DataFrame) -> Iterator[Value]:
    """Every number of a frame: its columns are rows of the printed table where they are methods, else columns."""
    turned = frame.columns.name is not None
    for row, values in frame.iterrows():
        for column, value in values.items():
            places = (str(column), str(row)) if turned else (str(row), str(column))
            if pd.notna(value):
                yield Value(table, *places, float(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="+", choices=list(MEASUREMENTS), metavar="MEASUREMENT")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--corpus", default="python-stdlib")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--task", action="append", default=[], help="of `attention` and `dictionary`")
    parser.add_argument("--workspace", type=Path, help="of `saes`, `codes` and `dictionary`")
    parser.add_argument("--sae", action="append", default=[], help="of `saes`, `codes` and `dictionary`")
    parser.add_argument(
        "--baseline", action="append", default=[], metavar="SAE",
        help="of `dictionary`: those with frozen random decoders, in the order of --sae; else NAME-random-decoder",
    )  # fmt: skip
    parser.add_argument("--beside", help="of `diffs`: the other model")
    parser.add_argument("--tokens", type=int, default=60_000, help="of `diffs`")
    parser.add_argument("--epochs", type=float, default=6.0, help="of `diffs`")
    parser.add_argument("--out", type=Path, help="every draw is written there, and taken from there")
    options = parser.parse_args()
    model, corpus = load_model(options.model, device=options.device, dtype="float32"), open_corpus(options.corpus)
    stored = StoredDraws(options.out, measured_of(model, corpus, options))
    for name in options.measurements:
        draws = []
        for draw in range(options.draws):
            values = stored.get(name, draw)
            if values is None:
                started = time.monotonic()
                values = list(MEASUREMENTS[name](Ask(model, Part(corpus, draw, options.draws), draw, options)))
                print(f"{options.model}, {name}, draw {draw}: {time.monotonic() - started:.0f} s", flush=True)
                stored.add(name, draw, values)
            draws.append(pd.DataFrame(values, columns=Value._fields).assign(draw=draw))
        show(options.model, name, pd.concat(draws, ignore_index=True))


if __name__ == "__main__":
    main()
