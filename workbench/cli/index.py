"""Commands over the feature index: index, feature."""

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    WorkspaceOption,
    give_model,
    open_workspace,
)
from workbench.cli.output import print_frame, print_json, records, write_page, writing
from workbench.show.html import one_line, quoted
from workbench.show.progress import ProgressBar, format_bytes, format_seconds

if TYPE_CHECKING:
    from workbench.features.index.feature import Feature
    from workbench.features.index.query import FeatureIndex
    from workbench.features.index.search import By
    from workbench.workspace import Workspace

SHOWN = 30
FOUND = {"sae": "SAE", "feature": "feature", "name": "name", "where": "found in", "hits": "in examples",
         "firings": "firings"}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("index")(make_index)
    app.command()(feature)


def make_index(
    sae: Annotated[str, typer.Argument(help="Name of an SAE, or of a set of transcoders: every layer is indexed.")],
    harvest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HARVEST",
            help="Harvest to index; the SAE's own when left out, its model over its corpus where it has none. Of a "
            "crosscoder of two models repeat it, one a part.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows at most; all of a harvest when left out, 2,000,000 without one.", min=1)
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    model: GivenModelOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Index an SAE's features: where they fire, how strongly, with which others, and what they do to the logits.

    Interrupted, it goes on where it stopped when the same command is repeated.
    """
    workspace = open_workspace(folder)
    names = workspace.with_layers([sae])
    give_model(workspace, names, model, device)
    made = {}
    for name in names:
        with ProgressBar("index", 1, enabled=not as_json) as bar:
            found = workspace.build_index(name, harvest=harvest, max_rows=rows, device=device, on_progress=bar.report)
        made[name] = found
        if as_json:
            continue
        took = f" in {format_seconds(sum(found.seconds.values()))}" if found.seconds else ", indexed before"
        said = f"{found.activations:,} activations on {found.tokens:,} tokens, {format_bytes(found.bytes)}{took}"
        print(said if names == [sae] else f"{name}: {said}")
        if found.missing:
            print(f"Without logit effects: {found.missing}")
        if found.note:
            print(f"{name}: {found.note}")
    if as_json:
        print_json(asdict(made[sae]) if names == [sae] else {name: asdict(found) for name, found in made.items()})
    else:
        print(f"Next: workbench feature {names[0]} --search return, or workbench app --workspace {folder}")


def feature(
    sae: Annotated[str | None, typer.Argument(help="Name of an indexed SAE; searches go through all without.")] = None,
    number: Annotated[int | None, typer.Argument(help="Feature to show.")] = None,
    search: Annotated[str | None, typer.Option(help="List features with this text in label, tokens or texts.")] = None,
    words: Annotated[str | None, typer.Option(help="List features about these words, best first.")] = None,
    member_of: Annotated[str | None, typer.Option("--list", help="The features of a list instead of one.")] = None,
    label: Annotated[str | None, typer.Option(help="Label the feature; an empty text removes its label.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page here.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table of all features here, as Parquet.")] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Show a feature, search for features, label them, and export them as HTML, JSON or Parquet."""
    given = {"--search": search, "--words": words, "--list": member_of, "--table": table, "--label": label,
             "--html": html}  # fmt: skip
    _refuse_unclear([option for option, value in given.items() if value is not None], number)
    workspace = open_workspace(folder)
    if search is not None or words is not None:
        _search(workspace, sae, search or words or "", "text" if words is None else "words", as_json)
        return
    if sae is None:
        raise InputError("name the SAE: `workbench feature NAME ...`; a search goes through all without")
    with closing(workspace.index(sae)) as index:
        if label is not None and number is not None:
            _label(workspace, index, number, label)
        if table is not None:
            with writing(table):
                index.write_table(table)
        chosen = _chosen(workspace, index, number, member_of)
    _give(chosen, member_of, table, html, as_json)


def _refuse_unclear(given: list[str], number: int | None) -> None:
    """Raises InputError for options that ask for nothing, or for what cannot be done at once."""
    lists = [option for option in given if option in ("--search", "--words", "--list")]
    if number is None and "--label" in given:
        raise InputError("--label needs the number of the feature to label")
    if number is None and not lists and "--table" not in given:
        raise InputError("name a feature's number, or use --search, --words, --list or --table")
    if "--search" in lists and "--words" in lists:
        raise InputError("search for a text or for words, not for both at once: leave --search or --words out")
    if lists and number is not None:
        raise InputError(f"{lists[0]} asks for several features: leave the number {number} out")
    if lists and lists[0] != "--list" and given[1:]:
        raise InputError(f"{lists[0]} lists features and does nothing else: leave {', '.join(given[1:])} out")
    if number is None and not lists and "--html" in given:
        raise InputError("--html needs a feature's number, or a --list")


def _label(workspace: "Workspace", index: "FeatureIndex", number: int, label: str) -> None:
    """Labels a feature that there is; an empty text removes its label."""
    from workbench.catalog.notes import Notes

    index.feature(number)
    Notes(workspace.path).set_label(index.sae, number, label)


def _give(chosen: "list[Feature]", member_of: str | None, table: Path | None, html: Path | None, as_json: bool) -> None:
    """Writes the page of the features chosen, and prints them, or the names of the files that were written."""
    from workbench.features.index.page import document

    if html is not None:
        write_page(html, document(chosen, member_of))
    if as_json:
        described = [item.to_dict() for item in chosen]
        print_json(described if member_of is not None else next(iter(described), None))
    else:
        _say(chosen, table, html)


def _say(chosen: "list[Feature]", table: Path | None, html: Path | None) -> None:
    """Names the files that were written, and prints the features where no page holds them."""
    for path in (table, html):
        if path is not None:
            print(f"Wrote {path}")
    if html is None:
        for item in chosen:
            _print(item)


def _search(workspace: "Workspace", sae: str | None, text: str, by: "By", as_json: bool) -> None:
    """Features of one SAE or of all that say a text or are about words, and how many more there are."""
    from workbench.features.index.query import search_features
    from workbench.features.index.search import said

    found = search_features(workspace, text, saes=None if sae is None else workspace.with_layers([sae]), by=by)
    if as_json:
        print_json(records(found.table))
    elif not found.n:
        print(f"No feature has {text!r} in its label, tokens or examples")
    else:
        shown = replace(found, table=found.table.head(SHOWN))
        print_frame(f"{said(shown)} with {text!r}".capitalize(), shown.table, as_json, titles=FOUND)


def _chosen(
    workspace: "Workspace", index: "FeatureIndex", number: int | None, member_of: str | None
) -> "list[Feature]":
    """The features of a list, else the one of a number, else none."""
    from workbench.features.index.query import listed_features

    if member_of is not None:
        return listed_features(workspace, member_of)
    return [] if number is None else [index.feature(number)]


def _print(item: "Feature") -> None:
    """A feature as text: headline, logits, strongest examples, neighbours."""
    stats = item.stats
    name = f"{item.sae} {item.feature}: {one_line(item.name)}"
    print(name)
    if item.dead:
        print(f"  dead: fires on none of {item.n_tokens:,} tokens")
    else:
        signs = f", {stats.negative:,} of them negative" if item.signed else ""
        print(
            f"  fires on {stats.density:.3%} of {item.n_tokens:,} tokens ({stats.firings:,}{signs}), "
            f"from {stats.minimum:.3g} to {stats.maximum:.3g}"
        )
    for title, effects in (("promotes", item.promotes), ("suppresses", item.suppresses)):
        if effects:
            print(f"  {title} " + "  ".join(f"{quoted(effect.text)} {effect.effect:+.2f}" for effect in effects[:6]))
    for group in [group for group in item.groups if group.title in ("strongest", "most negative")]:
        for example in group.examples[:8]:
            at = example.peak
            before, after = "".join(example.tokens[max(0, at - 10) : at]), "".join(example.tokens[at + 1 : at + 6])
            print(f"  {example.activation:8.2f}  {one_line(f'{before}[[{example.tokens[at]}]]{after}')}")
    for near in item.neighbours[:4]:
        print(f"  near {near.feature:6d}  {near.cosine:+.2f}  {one_line(near.name)}")
    for other in item.coactivations[:4]:
        print(f"  with {other.feature:6d}  phi {other.phi:.2f}  {one_line(other.name)}")
    for told in item.explanations:
        if told.explanation:
            score = f" (detection {told.score:.2f}, chance 0.50)" if told.score is not None else ""
            print(f"  explained by {told.model}: {one_line(told.explanation)}{score}")
    for note in item.notes:
        print(f"  note: {one_line(note)}")
