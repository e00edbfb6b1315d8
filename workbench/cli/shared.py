"""Options that several commands have in common, written once as the fields of a dataclass; groups that take a text.

    @dataclass(frozen=True, kw_only=True)
    class Run:
        model: ModelOption = "demo"
        device: DeviceOption = "auto"

    @app.command()
    @sharing(Run, device="cpu")
    def patch(run: Run, site: SiteOption = "head") -> None: ...

The command has the options --site, --model and --device, the last with another default than the rest.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

import typer.core

Command = Callable[..., None]


def sharing(kind: type, *, omit: Collection[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Gives a command the fields of a dataclass as options after its own, and their values as its first argument.

    Args:
        omit: fields that the command does not offer; they keep their defaults.
        defaults: other defaults for this command.
    """
    hints = get_type_hints(kind, include_extras=True)
    shared = [field for field in dataclasses.fields(kind) if field.name not in omit]
    # What the class adds to those it is made from is nearer to the command: it comes first.
    shared.sort(key=lambda field: field.name not in kind.__annotations__)

    def decorate(command: Command) -> Command:
        _, *own = inspect.signature(command).parameters.values()

        def with_shared(**given: Any) -> None:
            together = {field.name: given.pop(field.name) for field in shared}
            command(kind(**together), **given)

        offered = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
                default=defaults.get(field.name, inspect.Parameter.empty if field.default is dataclasses.MISSING
                                     else field.default),
            )
            for field in shared
        ]  # fmt: skip
        own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        # Arguments, which have no default, come first in the help as on the command line; of them the shared ones.
        arguments = [one for one in (*offered, *own) if one.default is inspect.Parameter.empty]
        parameters = [*arguments, *(one for one in (*own, *offered) if one not in arguments)]
        with_shared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_shared.__annotations__ = {one.name: one.annotation for one in parameters}
        with_shared.__name__, with_shared.__doc__ = command.__name__, command.__doc__
        return with_shared

    return decorate


def text_first(command: str) -> type[typer.core.TyperGroup]:
    """A group whose first argument may be a text, for one of its commands whose name is then left out."""

    class TextFirst(typer.core.TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if args and args[0] not in self.commands and not args[0].startswith("-"):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return TextFirst
