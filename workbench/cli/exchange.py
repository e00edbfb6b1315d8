"""`workbench import` and `workbench export`: SAEs from and to other libraries."""

from pathlib import Path
from typing import Annotated

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption
from workbench.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("import")(import_)
    app.command()(export)


def import_(
    name: Annotated[str, typer.Option(help="Name the SAE gets in the workspace.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of an SAE by SAELens, dictionary_learning or sparsify.")
    ] = None,
    release: Annotated[str | None, typer.Option(help="Release in SAELens' registry; needs the network.")] = None,
    sae_id: Annotated[str | None, typer.Option("--id", help="The SAE of the release.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook point it reads, where its files do not say.")] = None,
    model: Annotated[str | None, typer.Option(help="Model it reads, where its files do not say.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Bring an SAE of another library, or a published one, into the workspace.

    The format is recognised by the files. Decoder rows get unit norm where that changes no reconstruction.
    """
    from workbench.workspace import Workspace

    published = release is not None and sae_id is not None
    if (folder is None) != published or (release is None) != (sae_id is None):
        raise InputError("say what to import: a folder, or --release and --id of a published SAE")
    space = Workspace(workspace)
    if folder is not None:
        sae = space.import_sae(name, folder, hook=hook, model=model)
    else:
        assert release is not None
        assert sae_id is not None
        sae = space.import_pretrained(name, release, sae_id, hook=hook, model=model)
    made = {
        "name": name, "rule": sae.rule.name, "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": sae.hook_name,
        "model": sae.model_name, "path": str(space.path / "saes" / name),
    }  # fmt: skip
    if as_json:
        print_json(made)
        return
    print(f"Imported {name}: {sae.rule.name}, {sae.d_sae:,} features, at {sae.hook_name} of {sae.model_name}")
    if kept := sae.metadata.get("decoder_norms"):
        print(f"Its decoder rows keep their norms ({kept}): {sae.rule.name} compares features as they are.")
    print(f"Next: workbench evaluate {name} --corpus CORPUS --workspace {workspace}")


def export(
    name: Annotated[str, typer.Argument(help="Name of an SAE of the workspace.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    form: Annotated[str, typer.Option("--format", help="saelens, dictionary_learning or sparsify.")] = "saelens",
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write an SAE in the format of another library; what the format cannot express is refused by name."""
    from workbench.workspace import Workspace

    Workspace(workspace, create=False).export_sae(name, folder, form)
    if as_json:
        print_json({"name": name, "format": form, "path": str(folder)})
    else:
        print(f"Exported {name} to {folder} for {form}")
