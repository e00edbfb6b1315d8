"""`workbench import` and `workbench export`: SAEs from and to other libraries."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, open_workspace
from workbench.cli.output import print_json

# As in sae.formats.foreign, which loads torch.
Form = Literal["saelens", "dictionary_learning", "sparsify"]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("import")(import_)
    app.command()(export)


def import_(
    name: Annotated[str, typer.Option(help="Name the SAE gets in the workspace.")],
    source: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Folder of an SAE by SAELens, dictionary_learning or sparsify."),
    ] = None,
    release: Annotated[str | None, typer.Option(help="Release in SAELens' registry; needs the network.")] = None,
    sae_id: Annotated[str | None, typer.Option("--id", help="The SAE of the release.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook point it reads, where its files do not say.")] = None,
    model: Annotated[str | None, typer.Option(help="Model it reads, where its files do not say.")] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Bring an SAE of another library, or a published one, into the workspace.

    The format is recognised by the files. Decoder rows get unit norm where that changes no reconstruction.
    """
    from workbench.workspace import Workspace

    published = release is not None and sae_id is not None
    if (source is None) != published or (release is None) != (sae_id is None):
        raise InputError("say what to import: a folder, or --release and --id of a published SAE")
    workspace = Workspace(folder)
    if source is not None:
        sae = workspace.import_sae(name, source, hook=hook, model=model)
    else:
        assert release is not None
        assert sae_id is not None
        sae = workspace.import_pretrained(name, release, sae_id, hook=hook, model=model)
    made = {
        "name": name, "rule": sae.rule.name, "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": sae.hook_name,
        "model": sae.model_name, "path": str(workspace.path / "saes" / name),
    }  # fmt: skip
    if as_json:
        print_json(made)
        return
    print(f"Imported {name}: {sae.rule.name}, {sae.d_sae:,} features, at {sae.hook_name} of {sae.model_name}")
    if kept := sae.metadata.get("decoder_norms"):
        print(f"Its decoder rows keep their norms ({kept}): {sae.rule.name} compares features as they are.")
    print(f"Next: workbench evaluate {name} --corpus CORPUS --workspace {folder}")


def export(
    name: Annotated[str, typer.Argument(help="Name of an SAE of the workspace.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; new or empty.")],
    form: Annotated[Form, typer.Option("--format", help="The library that is to read it.")] = "saelens",
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write an SAE in the format of another library; what the format cannot express is refused by name."""
    open_workspace(folder).export_sae(name, target, form)
    if as_json:
        print_json({"name": name, "format": form, "path": str(target)})
    else:
        print(f"Exported {name} to {target} for {form}")
