"""A prompt read through an SAE: which features fire on which token, and what they do to the next one.

1. The text is tokenized and put after BOS, at most `MAX_CHARACTERS` characters and `MAX_TOKENS` tokens of it
   (`workbench.models.prompt_text`). Positions count from BOS, which is 0, as everywhere in circuits; without BOS the
   text's first token is 0.
2. One pass of the model gives the values at the SAEs' hook points and the last residual stream x, another the logits:
   log p of every next token, and so the loss of every token, -log p(token | what stands before it), in nats.
3. The SAE encodes every token but BOS; all its activations are kept, with their signs.
4. Features are ranked over the prompt, or at one token, by one of

       max              max_t |a_t|
       mean             mean_t |a_t|, tokens of the text on which it does not fire counted
       rare             max_t |a_t| log(1 / density): term frequency times inverse document frequency of text
                        retrieval, "reconstructed"; density is the index's share of tokens on which it fires

5. Direct logit attribution of feature f at token t to the next token y, with the final LayerNorm's scale frozen:

       a_t W_dec[f] W_out (U_eff[:, y] - mean U_eff) / scale(x_t)

   what f adds to the logit of y beyond what it adds to all logits, past the layers in between (Elhage et al. 2021,
   "A Mathematical Framework for Transformer Circuits"; W_out and U_eff as in index/logits.py). Summed over
   the features, with b_dec and the SAE's error in place of one more feature each, it is what the hook point itself
   contributes. Hook points that write nothing to the residual stream have none. A transcoder fires where it reads and
   contributes where it writes; its skip, where it has one, counts beside b_dec.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.model import SAE
from sae.shown import Shown
from workbench.features.index.logits import output_directions
from workbench.models.capture import capture
from workbench.models.hooks import read_hook, written_hook
from workbench.models.memory import check_prompt_fits
from workbench.models.prompt_text import encode_prompt, mean_loss, next_log_probabilities, row_texts, token_losses
from workbench.models.readout import final_scale, unembedding

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

PREDICTIONS = 10

Ranking = Literal["max", "mean", "rare"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)


@dataclass(frozen=True, repr=False)
class KnownFeatures(Shown):
    """What an index knows of every feature of the SAE, in their order."""

    names: list[str]
    """What to call it (`FeatureIndex.names`)."""
    density: Float[NDArray, "d_sae"]
    strongest: Float[NDArray, "d_sae"]
    """Largest |activation|; NaN for dead features."""


@dataclass(frozen=True)
class PromptReading:
    """A prompt with what fires on it. Positions count from BOS, which is 0 where the model has one."""

    sae: str
    model: str
    hook: str
    target_hook: str
    """The hook point it writes: the same, but for a transcoder."""
    d_sae: int
    text: str
    """What was read of the prompt."""
    truncated: bool
    first: int
    """Position of the text's first token: 1 after BOS, else 0."""
    tokens: list[int]
    """As the model reads them, BOS first."""
    texts: list[str]
    """Of each token, `BOS` of BOS; a character that several tokens share stands at the first of them."""
    losses: Float[NDArray, "n"]
    """Nats of each token given those before it; NaN for one that nothing predicts."""
    next_tokens: Int[NDArray, "n PREDICTIONS"]
    """Most likely tokens after each position, the likeliest first."""
    next_texts: list[list[str]]
    next_probabilities: Float[NDArray, "n PREDICTIONS"]
    position: Int[NDArray, "entries"]
    """Of every activation, in order."""
    feature: Int[NDArray, "entries"]
    activation: Float[NDArray, "entries"]
    known: KnownFeatures | None
    """From the index, where the SAE has one."""
    missing: str | None
    """Why there is no attribution, where there is none."""
    _directions: Float[Tensor, "active d_model"] | None = field(repr=False)
    _active: Int[NDArray, "active"] = field(repr=False)
    """Features that fire, in the order of `_directions`."""
    _scale: Float[Tensor, "n"] | None = field(repr=False)
    _loaded: "LoadedModel" = field(repr=False)

    def __repr__(self) -> str:
        cut = " (only its beginning was read)" if self.truncated else ""
        return (
            f"PromptReading({self.sae!r}): {self.n_read} tokens{cut}, {len(self._active)} features fire, "
            f"mean loss {self.mean_loss:.3f} nats"
        )

    @property
    def outcome(self) -> str:
        """What follows each position: the `next token`, or a `class`."""
        return self._loaded.outcome

    @property
    def n_read(self) -> int:
        """Tokens of the text, BOS not counted."""
        return len(self.tokens) - self.first

    @property
    def mean_loss(self) -> float:
        """Nats a token, over those that something predicts; NaN where nothing predicts any."""
        return mean_loss(self.losses)

    def activations(self, feature: int) -> Float[NDArray, "n"]:
        """One feature's activation on every token, 0 where it does not fire. Raises InputError for one there is not."""
        if not 0 <= feature < self.d_sae:
            raise InputError(f"feature {feature} does not exist: {self.sae} has features 0 to {self.d_sae - 1}")
        values = np.zeros(len(self.tokens))
        mine = self.feature == feature
        values[self.position[mine]] = self.activation[mine]
        return values

    def strongest(self, feature: int) -> float:
        """Largest |activation| of a feature in the index or on this prompt; 0 for one that never fires."""
        here = float(np.abs(self.activations(feature)).max())
        return float(np.nanmax([here, self.known.strongest[feature]])) if self.known else here

    @cached_property
    def maxima(self) -> Float[NDArray, "entries"]:
        """`strongest` of every activation's feature."""
        at = np.searchsorted(self._active, self.feature)
        here = np.zeros(len(self._active))
        np.maximum.at(here, at, np.abs(self.activation))
        return np.fmax(here, self.known.strongest[self._active])[at] if self.known else here[at]

    def features(self, by: Ranking = "max", *, max_density: float = 1.0) -> pd.DataFrame:
        """The features that fire on the prompt, best first.

        Args:
            by: see the module's description; `rare` needs an index.
            max_density: leaves out features that fire on a larger share of the index's tokens.

        Returns:
            Columns feature, name, activation (the strongest, with its sign), position (of it), token, attribution (at
            that position, to the model's likeliest next token, `next`; NaN where `missing` says why), mean (of
            |activation| over the text's tokens), fires (number of tokens), density, score (what it is ranked by).
            Name and density are empty without an index.

        Raises:
            InputError: an unknown ranking, or `rare` without an index.
        """
        if by not in RANKINGS:
            raise InputError(f"no ranking {by!r}: choose {', '.join(RANKINGS)}")
        entries = pd.DataFrame(
            {"feature": self.feature, "activation": self.activation, "position": self.position,
             "attribution": self.effects}
        )  # fmt: skip
        entries["strength"] = entries["activation"].abs()
        first = entries.sort_values(["strength", "position"], ascending=[False, True], kind="stable")
        table = first.drop_duplicates("feature").set_index("feature")
        grouped = entries.groupby("feature")["strength"]
        table["token"] = [self.texts[at] for at in table["position"]]
        table["next"] = [self.next_texts[at][0] for at in table["position"]]
        table["mean"] = grouped.sum() / self.n_read
        table["fires"] = grouped.size()
        table = self._described(table.reset_index(), max_density)
        table["score"] = self._score(table, by)
        columns = ["feature", "name", "activation", "position", "token", "attribution", "next", "mean", "fires",
                   "density", "score"]  # fmt: skip
        return table.sort_values(["score", "feature"], ascending=[False, True], ignore_index=True)[columns]

    def at(self, position: int, *, target: int | None = None, max_density: float = 1.0) -> pd.DataFrame:
        """The features that fire on one token, strongest first.

        Args:
            position: which token.
            target: next token whose logit is attributed; the model's likeliest when left out.
            max_density: as in `features`.

        Returns:
            Columns feature, name, activation, density, attribution (logits; NaN where `missing` says why).
        """
        self._check(position)
        mine = self.position == position
        table = pd.DataFrame({"feature": self.feature[mine], "activation": self.activation[mine]})
        wanted = int(self.next_tokens[position, 0]) if target is None else target
        table["attribution"] = self.attribution(position, wanted) if self.missing is None else np.nan
        table = self._described(table, max_density)
        order = table["activation"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order, ["feature", "name", "activation", "density", "attribution"]].reset_index(drop=True)

    @cached_property
    def effects(self) -> Float[NDArray, "entries"]:
        """Attribution of every activation to the likeliest next token at its position; NaN where `missing` says why."""
        found = np.full(len(self.position), np.nan)
        if self.missing is None:
            for position in np.unique(self.position).tolist():
                found[self.position == position] = self.attribution(position, int(self.next_tokens[position, 0]))
        return found

    def attribution(self, position: int, target: int) -> Float[NDArray, "active_here"]:
        """Direct logit attribution to `target` of the features that fire at `position`, in the order of `feature`.

        Raises:
            InputError: a position or token that does not exist, or a hook point without attribution.
        """
        self._check(position)
        if self._directions is None or self._scale is None:
            raise InputError(f"no attribution: {self.missing}")
        if not 0 <= target < self._unembedding.shape[1]:
            raise InputError(f"token {target} does not exist: the vocabulary has {self._unembedding.shape[1]} tokens")
        mine = self.position == position
        directions = self._directions[np.searchsorted(self._active, self.feature[mine])]
        readout = self._unembedding[:, target] - self._unembedding.mean(dim=1)
        return self.activation[mine] * ((directions @ readout) / self._scale[position - self.first]).cpu().numpy()

    def target(self, text: str) -> int:
        """The token id of a text that is exactly one token, or the number of a class. Raises InputError for another."""
        if self.outcome == "class":
            number, n_out = text.removeprefix("output").strip(), self._unembedding.shape[1]
            if not (number.isdecimal() and int(number) < n_out):
                raise InputError(f"{text!r} is no class: give the number of one, 0 to {n_out - 1}")
            return int(number)
        ids = self._loaded.encode(text)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens: attribution is to one; mind the space before a word")
        return int(ids[0])

    def _repr_html_(self) -> str:
        from workbench.features.prompt_page import reading_html

        return reading_html(self)

    @cached_property
    def _unembedding(self) -> Float[Tensor, "d_model vocab"]:
        return unembedding(self._loaded)

    def _check(self, position: int) -> None:
        if not 0 <= position < len(self.tokens):
            raise InputError(f"position {position} does not exist: the prompt has tokens 0 to {len(self.tokens) - 1}")

    def _described(self, table: pd.DataFrame, max_density: float) -> pd.DataFrame:
        """Adds name and density, and leaves out dense features."""
        if self.known is None:
            return table.assign(name="", density=np.nan)
        number = table["feature"].to_numpy()
        table = table.assign(name=[self.known.names[at] for at in number], density=self.known.density[number])
        if not 0 <= max_density <= 1:
            raise InputError(f"a share of tokens lies between 0 and 1, got a largest density of {max_density}")
        return table[table["density"] <= max_density]

    def _score(self, table: pd.DataFrame, by: Ranking) -> pd.Series:
        strength: pd.Series = table["activation"].abs()
        if by == "mean":
            return table["mean"]
        if by == "max":
            return strength
        if self.known is None:
            raise InputError(f"the ranking `rare` needs densities: make an index with `workbench index {self.sae}`")
        # A feature the index never saw fire is as rare as they come: less than once in its tokens.
        floor = float(np.min(self.known.density, where=self.known.density > 0, initial=1.0))
        return strength * np.log(1 / table["density"].clip(lower=floor))


def read_prompt(
    model: "LoadedModel", sae: SAE, text: str, *, name: str = "", known: KnownFeatures | None = None
) -> PromptReading:
    """Reads a prompt through an SAE; see the module's description.

    Args:
        model: the model the SAE reads.
        sae: the SAE, on any device.
        text: the prompt.
        name: the SAE's name.
        known: names and densities of its features, for ranking and reading.

    Raises:
        InputError: a text without tokens, one that memory does not hold, or an SAE of another model.
    """
    return read_through(model, {name: (sae, known)}, text)[0]


@torch.no_grad()
def read_through(
    model: "LoadedModel", saes: Mapping[str, tuple[SAE, KnownFeatures | None]], text: str
) -> list[PromptReading]:
    """Reads a prompt through several SAEs of a model in the same passes; arguments and errors as `read_prompt`.

    Args:
        saes: each by its name, with what is known of its features.
    """
    hooks = {name: read_hook(model, sae) for name, (sae, _) in saes.items()}
    ids, truncated = encode_prompt(model, text)
    row = model.begun(ids)
    # The effective unembedding, in float32, lies beside.
    more = 4 * model.info.d_model * model.info.d_vocab
    check_prompt_fits("reading a prompt", model, len(row), more=more)
    tokens = torch.tensor([row], device=model.device)
    read = slice(model.n_bos, None)
    last = model.checks.hooks.get(f"blocks.{model.info.n_layers - 1}.hook_resid_post", next(iter(hooks.values())))
    values = capture(model, tokens, list(dict.fromkeys([*hooks.values(), last]))).activations
    log_probabilities = next_log_probabilities(model.hf(tokens, use_cache=False).logits[0])
    n_out = log_probabilities.shape[1]
    likeliest = log_probabilities.topk(min(PREDICTIONS, n_out), dim=1)
    next_tokens = likeliest.indices.cpu().numpy()
    shared: dict[str, Any] = {
        "model": model.info.name, "text": model.text(ids), "truncated": truncated, "first": model.n_bos,
        "tokens": row, "texts": row_texts(model, row),
        "losses": token_losses(model, log_probabilities, tokens[0]).numpy(), "next_tokens": next_tokens,
        "next_texts": [[model.label_of(token, n_out) for token in one] for one in next_tokens.tolist()],
        "next_probabilities": likeliest.values.exp().cpu().numpy(), "_loaded": model,
    }  # fmt: skip
    readings = []
    for name, (sae, known) in saes.items():
        x = values[hooks[name].name][0, read]
        position, feature, activation = (
            part.cpu().numpy() for part in sae.encode(x.to(sae.W_dec.device, torch.float32)).entries()
        )
        active = np.unique(feature)
        directions, scale, missing = None, None, None
        try:
            directions = output_directions(model, sae)[torch.from_numpy(active).to(model.device)]
            scale = final_scale(model, values[last.name][0, read])
        except InputError as error:
            missing = str(error)
        readings.append(
            PromptReading(
                sae=name, hook=hooks[name].name, target_hook=written_hook(model, sae).name, d_sae=sae.d_sae,
                position=position + model.n_bos, feature=feature, activation=activation.astype(np.float64),
                known=known, missing=missing, _directions=directions, _active=active, _scale=scale, **shared,
            )
        )  # fmt: skip
    return readings
