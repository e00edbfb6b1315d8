"""Options of `workbench train` that are fields of `sae.TrainConfig`, named as these: what a sweep file says by key.

One that is left out keeps TrainConfig's default. What an SAE is named by (`--rule`, `--k`, `--sparsity`, `--seed`) may
be repeated and stands with the command.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import MOST_TOKENS

PANEL = "Training settings"


def numbers(text: str | None, kind: type, option: str) -> list[Any] | None:
    """`512,2048` as whole numbers, `0.9,0.999` as numbers. Raises InputError for what is none."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} is {text!r}: expected {what} with commas between") from None


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How SAEs are trained, where it is not the default."""

    anneal_from_k: Annotated[
        int | None,
        typer.Option(
            "--anneal-from", metavar="K", rich_help_panel=PANEL,
            help="k (of jumprelu: target) of the first step; falls to its own over the first 70% of the steps.",
        ),
    ] = None  # fmt: skip
    multi_k: Annotated[
        float | None,
        typer.Option(rich_help_panel=PANEL, help="Weight of the error at 4 k, so that codes stay useful beyond k."),
    ] = None
    matryoshka: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTH,...", rich_help_panel=PANEL,
            help="Widths of nested prefixes that each reconstruct; the whole is added.",
        ),
    ] = None  # fmt: skip
    aux: Annotated[
        Literal["none", "aux_k", "aux_zipf"] | None,
        typer.Option(rich_help_panel=PANEL, help="Loss that revives dead features; the rule's own when left out."),
    ] = None
    aux_coefficient: Annotated[
        float | None, typer.Option(rich_help_panel=PANEL, help="Its weight; 1/32 when left out.")
    ] = None
    dead_after_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_TOKENS, metavar="TOKENS", rich_help_panel=PANEL,
            help="A feature that has not fired for so long is dead; a tenth of the tokens, at most 10M, when left out.",
        ),
    ] = None  # fmt: skip
    warmup: Annotated[
        float | None, typer.Option(rich_help_panel=PANEL, help="Share of the steps over which the learning rate rises.")
    ] = None
    decay: Annotated[
        float | None,
        typer.Option(rich_help_panel=PANEL, help="Share of the steps over which it falls to zero at the end."),
    ] = None
    sparsity_warmup: Annotated[
        float | None, typer.Option(rich_help_panel=PANEL, help="Share of the steps over which --sparsity rises.")
    ] = None
    betas: Annotated[
        str | None,
        typer.Option(metavar="BETA,BETA", rich_help_panel=PANEL, help="Adam's; 0.9,0.999 when left out."),
    ] = None
    clip_grad_norm: Annotated[
        float | None,
        typer.Option(metavar="NORM", rich_help_panel=PANEL, help="Largest norm of all gradients together."),
    ] = None
    b_dec_init: Annotated[
        Literal["geometric_median", "mean", "zero"] | None,
        typer.Option(rich_help_panel=PANEL, help="What the decoder's bias starts at; geometric_median."),
    ] = None
    normalize_input: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize", rich_help_panel=PANEL,
            help="Whether inputs are scaled to a mean norm of sqrt(d_in) in training; they are by default.",
        ),
    ] = None  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What was given, as the keys of a sweep file. Raises InputError for lists that are none."""
        found = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        found["matryoshka"] = numbers(self.matryoshka, int, "--matryoshka")
        found["betas"] = numbers(self.betas, float, "--betas")
        return {key: value for key, value in found.items() if value is not None}
