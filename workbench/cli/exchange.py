"""`workbench import`, `export`, `publish`: SAEs and sets of transcoders from and to other libraries and sites."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, given_again, open_workspace
from workbench.cli.output import print_json
from workbench.show.progress import ProgressBar, format_bytes

if TYPE_CHECKING:
    from sae.model import SAE
    from sae.transcoder_set import TranscoderSet
    from workbench.workspace import Workspace

# As in sae.formats.foreign, which loads torch; circuit-tracer's is of sets, Neuronpedia's of what was indexed.
Form = Literal["saelens", "dictionary_learning", "sparsify", "circuit_tracer", "neuronpedia"]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("import")(import_)
    app.command()(export)
    app.command()(publish)


def import_(
    name: Annotated[str, typer.Option(help="Name the SAE gets in the workspace.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of an SAE by SAELens, dictionary_learning or sparsify, one .pt file, or folder of "
            "circuit-tracer's or this project's set of transcoders; bundled: the demo model's set.",
        ),
    ] = None,
    release: Annotated[str | None, typer.Option(help="Release in SAELens' registry; needs the network.")] = None,
    sae_id: Annotated[
        str | None,
        typer.Option("--id", help="The SAE of the release; with a * for the layer, a set of its transcoders."),
    ] = None,
    hook: Annotated[str | None, typer.Option(help="Hook point it reads, where its files do not say.")] = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Hook point that a transcoder predicts, where its files do not say.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model it reads, where its files do not say; of a crosscoder's parts with commas between."),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", help="Of a .pt file: dictionary_learning's class, or ReLU or TopK."),
    ] = None,
    input_mean: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Of a .pt file: the mean in it that was taken from activations, or none."),
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Bring an SAE of another library, or a published one, into the workspace.

    The format is recognised by the files. Decoder rows get unit norm where that changes no reconstruction.
    """
    from workbench.saes.exchange import is_set
    from workbench.workspace import Workspace

    published = release is not None and sae_id is not None
    if (source is None) != published or (release is None) != (sae_id is None):
        raise InputError("say what to import: a folder, or --release and --id of a published SAE")
    workspace = Workspace(folder)
    if (source is not None and is_set(source)) or "*" in (sae_id or ""):
        if hook is not None or target_hook is not None:
            given = "--hook" if hook is not None else "--target-hook"
            raise InputError(
                f"a set of transcoders has a hook point in every layer, as its files say: leave out {given}"
            )
        where: dict[str, Any] = {"folder": source, "release": release, "ids": sae_id, "model": model}
        _say_set(workspace, name, workspace.import_transcoders(name, **where), as_json)
        return
    if source is not None:
        sae = workspace.import_sae(
            name, source, hook=hook, target_hook=target_hook, model=model, class_name=class_name, input_mean=input_mean
        )
    else:
        assert release is not None
        assert sae_id is not None
        sae = workspace.import_pretrained(name, release, sae_id, hook=hook, target_hook=target_hook, model=model)
    _say_sae(workspace, name, sae, folder, as_json)


def _say_sae(workspace: "Workspace", name: str, sae: "SAE", folder: Path, as_json: bool) -> None:
    """What came in, and what to do next."""
    from workbench.models.places import between

    target = {"target_hook": sae.written_hook} if sae.written_hook != sae.hook_name else {}
    made = {
        "name": name, "rule": sae.rule.name, "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": sae.hook_name, **target,
        "model": sae.model_name, "path": str(workspace.path / "saes" / name),
    }  # fmt: skip
    if as_json:
        print_json(made)
        return
    place = between(sae.hook_name, sae.written_hook)
    kind = f"a crosscoder of {' and '.join(part.name for part in sae.parts)}, " if sae.parts else ""
    print(f"Imported {name}: {kind}{sae.rule.name}, {sae.d_sae:,} features, at {place} of {sae.model_name}")
    if kept := sae.metadata.get("decoder_norms"):
        print(f"Its decoder rows keep their norms ({kept}): {sae.rule.name} compares features as they are.")
    given = given_again(workspace.origin(name).model)
    print(f"Next: workbench evaluate {name}{given} --corpus CORPUS --workspace {folder}")


def _say_set(workspace: "Workspace", name: str, made: "TranscoderSet", as_json: bool) -> None:
    """What came in, and what to do next."""
    from workbench.models.places import in_every_layer

    coders = made.coders.values()
    rules = ", ".join(dict.fromkeys(coder.rule.name for coder in coders))
    hooks = [in_every_layer(getattr(coder, which) for coder in coders) for which in ("hook_name", "target_hook_name")]
    said = {
        "name": name, "layers": len(made), "rule": rules, "d_in": made[0].d_in, "d_sae": made[0].d_sae,
        "hook": hooks[0], "target_hook": hooks[1], "model": made.model_name,
        "path": str(workspace.transcoder_folder(name)),
    }  # fmt: skip
    if as_json:
        print_json(said)
        return
    features = " to ".join(f"{size:,}" for size in sorted({min(c.d_sae for c in coders), max(c.d_sae for c in coders)}))
    print(
        f"Imported the set {name}: {len(made)} layers, {rules}, {features} features a layer, from {hooks[0]} to "
        f"{hooks[1]} of {made.model_name}"
    )
    given = given_again(made.model_name or "")
    print(f"Next: workbench graph TEXT --name GRAPH --transcoders {name}{given} --workspace {workspace.path}")


def export(
    name: Annotated[str, typer.Argument(help="Name of an SAE or a set of transcoders of the workspace.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; new or empty.")],
    form: Annotated[Form, typer.Option("--format", help="Who is to read it.")] = "saelens",
    model_id: Annotated[str | None, typer.Option(help="neuronpedia: its name of the model, as gpt2-small.")] = None,
    source_set: Annotated[
        str | None, typer.Option(help="neuronpedia: name of the source set; NAME if left out.")
    ] = None,
    creator: Annotated[str | None, typer.Option(help="neuronpedia: who made the SAE.")] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write an SAE in the format of another library, a set of transcoders in circuit_tracer's, or what the index of an
    SAE holds as the JSON lines that Neuronpedia imports.

    What the format cannot express is refused by name.
    """
    workspace = open_workspace(folder)
    settings = {"model_id": model_id, "source_set": source_set, "creator": creator}
    if form == "neuronpedia":
        with ProgressBar("export", 1, enabled=not as_json, unit="features") as bar:
            made = workspace.export_neuronpedia(name, target, **settings, on_progress=bar.report)
        if as_json:
            print_json({"name": name, "format": form, **asdict(made)})
        else:
            print(
                f"Exported {made.features:,} features, {made.activations:,} examples and {made.explanations:,} "
                f"explanations to {made.path}"
            )
        return
    wrong = next((key for key, value in settings.items() if value is not None), None)
    if wrong is not None:
        raise InputError(f"--{wrong.replace('_', '-')} is for --format neuronpedia: leave it out")
    caution = workspace.export_sae(name, target, form)
    if as_json:
        print_json({"name": name, "format": form, "path": str(target), "caution": caution})
        return
    print(f"Exported {name} to {target} for {form}")
    if caution:
        print(f"Beware: {caution}.")


def publish(
    name: Annotated[str, typer.Argument(help="Name of an SAE or a set of transcoders of the workspace.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face hub.")],
    path: Annotated[str | None, typer.Option(help="Folder in the repository; NAME when left out.")] = None,
    license: Annotated[str | None, typer.Option(help="License as the hub knows it, such as mit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    send: Annotated[bool, typer.Option("--send", help="Send it; without, show what would be sent.")] = False,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Put an SAE on the Hugging Face hub, in SAELens' format with a model card, or a set of transcoders in
    circuit-tracer's.

    Without --send nothing leaves this machine: the card and the files are shown.
    """
    made = open_workspace(folder).publish(name, repo, folder=path, license=license, private=private, send=send)
    if as_json:
        print_json(asdict(made))
        return
    if not send:
        print(made.card)
    for file, size in made.files.items():
        print(f"{'Sent' if send else 'Would send'} {file}: {format_bytes(size)}")
    print(made.url if send else f"Nothing was sent to {repo}: repeat with --send.")
