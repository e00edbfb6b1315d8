"""Commands that run a model on text of one's own: prompt, steer."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    MOST_SEED,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    SAEArgument,
    WorkspaceOption,
    give_model,
    open_workspace,
)
from workbench.cli.output import print_frame, print_json, records
from workbench.show.html import marked, one_line, quoted

if TYPE_CHECKING:
    import pandas as pd

    from workbench.features.prompts import PromptReading
    from workbench.features.steering import Steering

SHOWN = 15
# As in workbench.features.prompts and .steering, which load torch.
Ranking = Literal["max", "mean", "rare"]
EditKind = Literal["add", "clamp", "ablate"]
Where = Literal["everywhere", "generated"]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(prompt)
    app.command()(steer)


def prompt(
    sae: SAEArgument,
    text: Annotated[str, typer.Argument(help="The prompt.")],
    by: Annotated[Ranking, typer.Option(help="Rank by this; rare is strong and seldom.")] = "max",
    token: Annotated[int | None, typer.Option(help="Features of this token alone, BOS being 0.", min=0)] = None,
    target: Annotated[str | None, typer.Option(help="Next token to attribute; the likeliest when left out.")] = None,
    max_density: Annotated[float, typer.Option(help="Leave out features that fire on a larger share.")] = 1.0,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show which features fire on a prompt, and at a token what they do to the next one."""
    if target is not None and token is None:
        raise InputError("--target needs --token: which token's features are attributed")
    workspace = open_workspace(folder)
    give_model(workspace, [sae], model, device)
    reading = workspace.prompt(sae, text, device=device)
    if token is not None:
        wanted = None if target is None else reading.target(target)
        table = reading.at(token, target=wanted, max_density=max_density)
    else:
        table = reading.features(by, max_density=max_density)
    if as_json:
        print_json(_reading_dict(reading, table))
        return
    if reading.truncated:
        print(f"Only the beginning was read: {reading.n_read:,} tokens")
    if token is None:
        title = f"{len(table):,} features fire on {reading.n_read} tokens"
        if not math.isnan(reading.mean_loss):
            title += f", loss {reading.mean_loss:.3f} nats"
    else:
        likely = "  ".join(
            f"{quoted(text)} {share:.2f}"
            for text, share in zip(reading.next_texts[token][:5], reading.next_probabilities[token], strict=False)
        )
        title = f"token {token} {quoted(reading.texts[token])}, {reading.outcome} {likely}"
    if reading.missing:
        print(f"No attribution: {reading.missing}")
    titles = {name: name for name in table.columns if name != "score" and not table[name].isna().all()}
    print_frame(title, table, as_json=False, titles=titles, top=SHOWN)


def steer(
    sae: SAEArgument,
    features: Annotated[
        list[str],
        typer.Argument(metavar="NUMBER[=STRENGTH]...", help="Features, each with a strength of its own where given."),
    ],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    kind: Annotated[EditKind, typer.Option(help="What to do to the feature.")] = "add",
    strength: Annotated[float, typer.Option(help="In units of the feature's maximum activation.")] = 1.0,
    where: Annotated[Where, typer.Option(help="At which positions.")] = "everywhere",
    keep_error: Annotated[bool, typer.Option(help="Keep what the SAE fails to reconstruct.")] = True,
    chat: Annotated[
        bool | None, typer.Option(help="The prompt is a chat message; where the model has a template when left out.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate; left out, 40 or as many as a short model has room for.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, the same for both texts.", min=0, max=MOST_SEED)] = 0,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with and without features added, clamped or ablated, from the same seed."""
    strengths = parse_strengths(features, strength)
    workspace = open_workspace(folder)
    give_model(workspace, [sae], model, device)
    found = workspace.steer(
        sae, strengths, prompt, kind=kind, where=where, keep_error=keep_error, chat=chat, device=device,
        new_tokens=tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    if as_json:
        print_json(_steering_dict(found))
        return
    if found.truncated:
        print(f"Only the beginning of the prompt was read: {len(found.texts) - found.first:,} tokens")
    for feature, name in found.names.items():
        print(f"feature {feature}: {one_line(name)}")
    if found.clean or found.steered:  # a model whose outputs are no tokens goes on with none
        print(f"clean    {one_line(found.clean)}")
        print(f"steered  {one_line(found.steered)}")
    if not math.isnan(found.clean_nats):
        print(f"under the unedited model {found.clean_nats:.2f} and {found.steered_nats:.2f} nats a token")
    said, (clean, steered) = f"on the prompt KL {found.mean_kl:.4f} nats", found.mean_losses
    print(said if math.isnan(clean) else f"{said}, loss {clean:.3f} to {steered:.3f}")
    columns = ["text", "clean", "steered", "difference"]
    # Tokens that differ in their spaces alone would look the same.
    table = found.next_tokens[columns].assign(text=found.next_tokens["text"].map(marked))
    print_frame(f"{found.outcome.capitalize()} after the prompt", table, as_json=False)


def parse_strengths(features: list[str], strength: float) -> dict[int, float]:
    """The strength of each feature. Raises InputError for one that is none, or that is given twice."""
    from workbench.features.steering import read_strength

    found: dict[int, float] = {}
    for text in features:
        feature, amount = read_strength(text, strength)
        if feature in found:
            raise InputError(f"feature {feature} is given twice: give each once, with its strength")
        found[feature] = amount
    return found


def _reading_dict(reading: "PromptReading", table: "pd.DataFrame") -> dict[str, Any]:
    return {
        "sae": reading.sae, "model": reading.model, "hook": reading.hook, "truncated": reading.truncated,
        "missing": reading.missing, "tokens": reading.texts, "first": reading.first, "losses": reading.losses.tolist(),
        "features": records(table),
    }  # fmt: skip


def _steering_dict(found: "Steering") -> dict[str, Any]:
    return {
        "sae": found.sae, "model": found.model, "edit": vars(found.edit), "units": found.units, "names": found.names,
        "prompt": found.prompt, "truncated": found.truncated, "first": found.first, "clean": found.clean,
        "steered": found.steered,
        "clean_nats": found.clean_nats, "steered_nats": found.steered_nats, "kl": found.kl.tolist(),
        "clean_loss": found.clean_loss.tolist(), "steered_loss": found.steered_loss.tolist(),
        "next_tokens": records(found.next_tokens),
    }  # fmt: skip
