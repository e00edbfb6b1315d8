"""Rows to index an SAE on where it was trained straight from a model and no harvest holds any: the same model over the
beginning of the same corpus, kept only while the index is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.origin import Origin
from workbench.harvest.plan import HarvestConfig
from workbench.harvest.reading import Harvest
from workbench.harvest.run import HarvestProgress, run_harvest
from workbench.models.model import LoadedModel
from workbench.text.corpora import open_corpus

ROWS = 2_000_000
"""Of an index that no number is given for."""


@dataclass(frozen=True)
class OwnPass:
    """What is run for an index.

    Args:
        origin: the SAE's, which was trained straight from a model.
        sae: it.
        max_rows: rows at most; ROWS when None.
    """

    origin: Origin
    sae: SAE
    max_rows: int | None

    @property
    def rows(self) -> int:
        """Rows at most, BOS and padding counted."""
        return self.max_rows or ROWS

    @property
    def settings(self) -> dict[str, Any]:
        """What the index records of it, as of a harvest."""
        stream = self.origin.record["stream"]
        return {"harvest": None, "corpus": stream["corpus"], "model": stream["model"], "rows": self.rows}

    def run(self, folder: Path, model: LoadedModel, on_progress: Callable[[int, int], None] | None) -> Harvest:
        """Makes the rows in a folder, or goes on making them.

        Raises:
            InputError: a corpus or model that is another one now, or too little disk.
        """
        self.origin.check_model(model, "this SAE")
        stream = self.origin.record["stream"]
        recorded = {**stream["config"], "hooks": (self.sae.hook_name,), "max_tokens": self.rows, "gradients": False}
        config = HarvestConfig(**recorded)
        corpus = open_corpus(config.corpus, text_field=config.text_field)
        if corpus.fingerprint != stream["corpus"]["fingerprint"]:
            raise InputError(
                f"corpus {config.corpus} has changed since the SAE was trained on it: harvest {self.sae.hook_name} "
                "and name the harvest with --harvest"
            )

        def report(progress: HarvestProgress) -> None:
            if on_progress is not None:
                # Encoding them is the other half.
                on_progress(progress.tokens, 2 * progress.total_tokens)

        return run_harvest(model, corpus, config, folder, on_progress=report)


def own_pass(origin: Origin, sae: SAE, max_rows: int | None) -> OwnPass | None:
    """The pass that an SAE trained straight from a model is indexed on; None for others, and where a harvest was kept
    on the way."""
    return OwnPass(origin, sae, max_rows) if "stream" in origin.record else None
