"""Which prompts a circuit method runs on, and what it measures there."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from circuits.metrics import METRICS, Metric
from circuits.prompts import PromptSet
from circuits.tasks import check_task, is_file, make_task, task_names
from sae.errors import InputError
from workbench.models.load import LoadedModel


@dataclass(frozen=True)
class Task:
    """A task with its settings, for whatever model it is run on."""

    name: str
    """A name in `names`, or the path of a JSONL file."""
    n: int = 32
    """Prompts to generate; a file is taken whole."""
    seed: int = 0
    metric: str | None = None
    """A name in `circuits.metrics.METRICS`; the task's usual one when None."""

    @staticmethod
    def names() -> list[str]:
        """Names of the tasks there are, those of other packages among them; see `circuits.tasks`."""
        return task_names()

    @property
    def title(self) -> str:
        """The name, or the file's name without its ending."""
        return Path(self.name).stem if is_file(self.name) else self.name

    def check(self) -> None:
        """Raises InputError for what can be told to be wrong before a model is loaded."""
        if self.n < 1:
            raise InputError(f"a task needs at least one prompt, got {self.n}")
        check_task(self.name)
        if self.metric is not None:
            _metric(self.metric)

    def prompts(self, model: LoadedModel) -> PromptSet:
        """The prompts, on the model's device.

        Raises:
            InputError: no prompts asked for, longer ones than the model's context, unequal ones for a model whose
                tokens see later ones, or as `circuits.tasks.make_task`.
        """
        self.check()
        n_ctx = model.info.n_ctx
        prompts = make_task(self.name, model.tokenizer, model.bos_id, self.n, self.seed, n_ctx=n_ctx)
        longest = prompts.clean.shape[1]
        if longest > n_ctx:
            instead = "shorten the prompts in the file"
            if not is_file(self.name):
                instead = "give shorter prompts in a .jsonl file in place of its name, or take induction, which fits"
            raise InputError(
                f"task {prompts.name}: the longest prompt has {longest} tokens and the model's context is {n_ctx}: "
                + instead
            )
        if not model.causal and int(prompts.last.min()) + 1 < longest:
            raise InputError(
                f"task {prompts.name}: this model lets tokens see later ones, so it would read the padding after "
                "shorter prompts: give prompts of one length"
            )
        return prompts.to(model.device)

    def measure(self, prompts: PromptSet, usual: str | None = None) -> Metric:
        """The metric: that asked for, else `usual`, else that of the prompts. Raises InputError for an unknown one."""
        return _metric(self.metric or usual or prompts.metric)


def fingerprint(prompts: PromptSet) -> str:
    """SHA-256 of the tokens of prompts and answers."""
    digest = hashlib.sha256()
    for tensor in (prompts.clean, prompts.corrupted, prompts.last, prompts.answers, prompts.wrong):
        digest.update(repr(tensor.tolist()).encode())
    return digest.hexdigest()


def attributes_fingerprint(prompts: PromptSet) -> str:
    """SHA-256 of the attributes' names and values."""
    return hashlib.sha256(repr(sorted(prompts.attributes.items())).encode()).hexdigest()


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}: choose {', '.join(METRICS)}")
    return METRICS[name]
