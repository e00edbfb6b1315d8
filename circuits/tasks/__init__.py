"""Prompt sets of known tasks, made for the tokenizer at hand; one file a task, and a door for tasks of one's own.

A task is a function of (tokenizer, bos_id, n, seed) that returns a `PromptSet`. `make_task` knows it by name:

1. the tasks of this package, `TASKS`;
2. what was registered in this process by `register_task`;
3. entry points of the group `interp_workbench.tasks` of every installed package, in its pyproject.toml

       [project.entry-points."interp_workbench.tasks"]
       rhyme = "my_package.tasks:rhyme"

The last are there in every process: for the command line and the app too. A task is imported when it is first made.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from sae import plugins
from sae.errors import InputError

if TYPE_CHECKING:
    from circuits.prompts import PromptSet

TaskMaker = Callable[..., "PromptSet"]
"""Of (tokenizer, bos_id, n, seed)."""
TASKS: dict[str, str] = {
    "induction": "circuits.tasks.induction:induction",
    "ioi": "circuits.tasks.ioi:ioi",
    "greater-than": "circuits.tasks.greater_than:greater_than",
    "docstring": "circuits.tasks.docstring:docstring",
    "conjunction": "circuits.tasks.conjunction:conjunction",
    "brackets": "circuits.tasks.code:brackets",
    "argument": "circuits.tasks.code:argument",
    "self-attribute": "circuits.tasks.code:self_attribute",
}
"""Where each task of this package is defined."""
FITTING = ("induction",)
"""Those whose prompts are as long as a short context allows."""
GROUP = "interp_workbench.tasks"
"""Entry points of other packages' tasks."""
_registered: dict[str, TaskMaker] = {}


def register_task(name: str, task: TaskMaker) -> None:
    """Makes a task known by name in this process: to `make_task` and to all that take a task's name.

    The same function under the same name may come again, as when a notebook's cell is run twice.

    Raises:
        InputError: a name that is taken or that could be a file's, or an object that cannot be called.
    """
    if not callable(task):
        raise InputError(f"task {name!r} is a {type(task).__name__}: register a function (tokenizer, bos_id, n, seed)")
    if not name or is_file(name):
        raise InputError(f"a task cannot be called {name!r}: names ending in .jsonl are files")
    known = _registered.get(name)
    again = known is not None and _place(known) == _place(task)
    if not again and (known is not None or name in TASKS or plugins.is_elsewhere(GROUP, name, task)):
        raise InputError(f"there is a task {name!r} already: choose another name")
    _registered[name] = task


def is_file(name: str) -> bool:
    """Whether a task's name is the path of a JSONL file."""
    return name.endswith(".jsonl")


def task_names() -> list[str]:
    """Names that `make_task` takes: this package's tasks, then other packages' and those registered here."""
    return list(dict.fromkeys([*TASKS, *sorted(plugins.found(GROUP)), *_registered]))


def check_task(name: str) -> None:
    """Raises InputError for a name that is neither a task's nor a file's, before anything is imported."""
    if not is_file(name) and name not in task_names():
        raise InputError(f"unknown task {name!r}: choose {', '.join(task_names())}, or give a .jsonl file")


def make_task(
    name: str, tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0, *, n_ctx: int | None = None
) -> "PromptSet":
    """A task by name, or a user's task from the path of a JSONL file (all of its prompts).

    Args:
        n_ctx: the longest prompt that the model takes; those of FITTING are made as short.

    Raises:
        InputError: an unknown name; a registered task that two packages define, that cannot be imported or that gives
            something else than prompts; or a task that the tokenizer cannot express.
    """
    from circuits.prompts import PromptSet
    from circuits.tasks.user import user_task

    if is_file(name):
        return user_task(name, tokenizer, bos_id)
    fitted = {"n_ctx": n_ctx} if name in FITTING else {}
    made = _maker(name)(tokenizer, bos_id, n, seed, **fitted)
    if not isinstance(made, PromptSet):
        raise InputError(f"task {name!r} gives a {type(made).__name__}: it has to return a circuits.prompts.PromptSet")
    return made


def _maker(name: str) -> TaskMaker:
    check_task(name)
    if name in _registered and not plugins.is_elsewhere(GROUP, name, _registered[name]):
        return _registered[name]
    loaded = plugins.load(GROUP, name, "task", taken={*TASKS, *_registered})
    if loaded is None:
        maker: TaskMaker = resolve_name(TASKS[name])
        return maker
    task, package = loaded
    if not callable(task):
        raise InputError(
            f"the task {name!r} of {package} is a {type(task).__name__} and should be a function "
            "(tokenizer, bos_id, n, seed)"
        )
    return task


def _place(task: TaskMaker) -> tuple[str, str]:
    return getattr(task, "__module__", ""), getattr(task, "__qualname__", repr(task))
