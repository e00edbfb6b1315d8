"""Steering: what a model says when features are turned up, held or taken out.

At the hook point that the SAE writes, with x the value there, a the activation of feature f on a token, s its strength
and m its maximum, summed over the features that are edited,

    x' = base + sum_f (a' - a) W_dec[f]

    add       a' = a + s m        activation addition (Turner et al. 2023, arXiv 2308.10248) along a decoder row
    clamp     a' = s m            feature clamping (Templeton et al. 2024, "Scaling Monosemanticity")
    ablate    a' = 0              on every token where it fires

    base = x with the SAE's error kept: only the features' part changes, and an edit of strength 0 changes nothing
    base = SAE(x) without it: the model reads the edited code alone

A transcoder reads its code at one hook point and writes at another of the same pass: x is the value that it predicts,
and SAE(x) its prediction, the skip included.

1. `everywhere` edits every position but BOS; `generated` those that predict a generated token, that is the prompt's
   last position and everything after it.
2. Both texts are sampled with the same Gumbel noise, token = argmax(logits / temperature + noise) (the Gumbel-max
   trick), so that they part only where the edit makes them; temperature 0 takes the likeliest token.
3. Side effects are measured on the prompt: KL(p || p') of the next token at every edited position and the loss of the
   prompt's tokens, in nats, clean and edited; and on the two texts: nats a token under the unedited model.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits.splice import splice_between
from sae.errors import InputError
from sae.model import SAE
from workbench.models.hooks import read_hook, written_hook
from workbench.models.memory import check_prompt_fits
from workbench.models.prompt_text import (
    chat_text,
    encode_prompt,
    mean_loss,
    next_log_probabilities,
    row_texts,
    token_losses,
)

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

EditKind = Literal["add", "clamp", "ablate"]
Where = Literal["everywhere", "generated"]
KINDS: tuple[EditKind, ...] = get_args(EditKind)
PLACES: tuple[Where, ...] = get_args(Where)
NEW_TOKENS, MAX_NEW_TOKENS = 40, 256
MOST_STRENGTH = 1_000_000
SHIFTS = 12


@dataclass(frozen=True)
class Edit:
    """A change of one feature, or of several in the same way; see the module's description."""

    feature: int
    kind: EditKind = "add"
    strength: float = 1.0
    """In units of the feature's maximum; not looked at when the feature is ablated."""
    where: Where = "everywhere"
    keep_error: bool = True
    also: tuple[tuple[int, float], ...] = ()
    """Further features, each with its strength."""

    @property
    def strengths(self) -> dict[int, float]:
        """The strength of every feature that is edited."""
        return {self.feature: self.strength, **dict(self.also)}

    def check(self, d_sae: int) -> None:
        """Raises InputError for a feature, kind, place or strength that does not exist, or a feature given twice."""
        for feature in self.strengths:
            if not 0 <= feature < d_sae:
                raise InputError(f"feature {feature} does not exist: this SAE has features 0 to {d_sae - 1}")
        if len(self.strengths) <= len(self.also):
            raise InputError("a feature is given twice: give each once, with its strength")
        if self.kind not in KINDS:
            raise InputError(f"no edit {self.kind!r}: choose {', '.join(KINDS)}")
        if self.where not in PLACES:
            raise InputError(f"no place {self.where!r}: choose {', '.join(PLACES)}")
        for strength in self.strengths.values():
            if not abs(strength) <= MOST_STRENGTH:
                raise InputError(f"a strength of {strength} cannot be added: give one up to {MOST_STRENGTH:,}")


def read_strength(text: str, strength: float) -> tuple[int, float]:
    """Feature and strength of `NUMBER=STRENGTH`, or of `NUMBER` with the one given. Raises InputError for neither."""
    number, _, own = text.partition("=")
    try:
        return int(number), float(own) if own else strength
    except ValueError:
        raise InputError(f"{text!r} is no feature: give its number, or NUMBER=STRENGTH such as 7=-1.5") from None


@dataclass(frozen=True)
class Steering:
    """A prompt continued with and without an edit. Positions count from BOS, which is 0 where the model has one."""

    sae: str
    model: str
    edit: Edit
    units: dict[int, float]
    """Of every edited feature the maximum, in the units of the hook point's values; 1 where it is not known."""
    names: dict[int, str]
    """What they are called, where that is known."""
    prompt: str
    """As it was read: in the model's chat template where one was asked for."""
    truncated: bool
    first: int
    """Position of the prompt's first token: 1 after BOS, else 0."""
    texts: list[str]
    """Of the tokens, as in `workbench.features.prompts.PromptReading`."""
    clean: str
    steered: str
    clean_nats: float
    """Mean loss of the clean continuation's tokens under the unedited model; NaN when nothing was generated."""
    steered_nats: float
    """The same of the steered continuation."""
    kl: Float[NDArray, "n"]
    """KL divergence of the edited distribution from the clean one, nats, after every token."""
    clean_loss: Float[NDArray, "n"]
    """Nats of each token; NaN for one that nothing predicts."""
    steered_loss: Float[NDArray, "n"]
    next_tokens: pd.DataFrame
    """The tokens whose probability after the prompt changes most, or the classes: token, text, clean, steered
    (probabilities) and difference, the largest change first; no rows where the edit changes nothing."""
    outcome: str = "next token"
    """What these are; `class` of a model of classes."""

    def __repr__(self) -> str:
        return (
            f"Steering({self.sae!r}, {self.edit}): KL {self.mean_kl:.4f} nats, "
            f"loss {self.mean_losses[0]:.3f} -> {self.mean_losses[1]:.3f}\n"
            f"clean:   {self.clean!r}\nsteered: {self.steered!r}"
        )

    @property
    def mean_kl(self) -> float:
        """Mean KL over the prompt's tokens, in nats."""
        return float(self.kl[self.first :].mean())

    @property
    def mean_losses(self) -> tuple[float, float]:
        """Nats a token of the prompt without and with the edit."""
        return mean_loss(self.clean_loss), mean_loss(self.steered_loss)

    def _repr_html_(self) -> str:
        from workbench.features.steering_page import steering_html

        return steering_html(self)


@torch.no_grad()
def steer(
    model: "LoadedModel",
    sae: SAE,
    edit: Edit,
    prompt: str,
    *,
    unit: float | Mapping[int, float] = 1.0,
    name: str = "",
    names: Mapping[int, str] | None = None,
    chat: bool | None = None,
    new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steering:
    """Continues a prompt with and without an edit and measures what it does; see the module's description.

    Args:
        model: the model the SAE reads.
        sae: the SAE, on any device.
        edit: what to do to which features.
        prompt: the text to go on from; BOS is put before it.
        unit: a feature's maximum, what strengths are multiples of; by feature, or one for all.
        name, names: of the SAE and of features, to say in the result.
        chat: whether the prompt is a user's message in the model's chat template; where it has one when None.
        new_tokens: tokens to generate, 0 to `MAX_NEW_TOKENS`; when None `NEW_TOKENS`, or as many as a short model has
            room for after the prompt, and none where outputs are no tokens.
        temperature: 0 takes the likeliest token, 1 samples from the model's own distribution.
        seed: of the sampling noise, the same for both texts.

    Raises:
        InputError: an edit that does not exist, sampling settings out of range, a prompt without tokens or one that
            memory does not hold, a chat with a model that has no template, or an SAE of another model.
    """
    edit.check(sae.d_sae)
    units = units_of(edit, unit)
    text = chat_text(model, prompt, chat)
    whole, cut = encode_prompt(model, text)
    new_tokens = _continuation(model, len(whole), new_tokens)
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise InputError(f"a temperature of {temperature} samples nothing: give 0 or more")
    ids = whole[: model.info.n_ctx - model.n_bos - new_tokens]
    truncated = cut or len(ids) < len(whole)
    check_prompt_fits("steering a prompt", model, len(ids) + model.n_bos, attention=True)
    tokens = torch.tensor([model.begun(ids)], device=model.device)
    with edited(model, sae, edit, units, first=None if edit.where == "everywhere" else tokens.shape[1] - 1):
        after = next_log_probabilities(model.bridge(tokens)[0])
    before = next_log_probabilities(model.bridge(tokens)[0])
    clean_loss, steered_loss = (token_losses(model, row, tokens[0]).numpy() for row in (before, after))
    noise = _gumbel(new_tokens, model.info.d_vocab, seed) if temperature else None
    clean = _generate(model, tokens, new_tokens, temperature, noise)
    steered = _generate(model, tokens, new_tokens, temperature, noise, (sae, edit, units))
    kl = (before.exp() * (before - after)).sum(dim=1).clamp_min(0)
    return Steering(
        sae=name, model=model.info.name, edit=edit, units=units, names=dict(names or {}), prompt=model.text(ids),
        truncated=truncated, first=model.n_bos, texts=row_texts(model, tokens[0].tolist()),
        clean=model.text(clean), steered=model.text(steered), clean_nats=_nats(model, tokens, clean),
        steered_nats=_nats(model, tokens, steered), kl=kl.cpu().numpy(), clean_loss=clean_loss,
        steered_loss=steered_loss, next_tokens=_shifts(model, before[-1], after[-1]),
        outcome=model.outcome,
    )  # fmt: skip


def most_new_tokens(model: "LoadedModel") -> int:
    """Tokens that can follow a prompt of one; none where a model's outputs are no tokens."""
    return max(0, min(MAX_NEW_TOKENS, model.info.n_ctx - model.n_bos - 1)) if model.gives_tokens else 0


def _continuation(model: "LoadedModel", n_tokens: int, asked: int | None) -> int:
    """Tokens to generate after a prompt of so many.

    Raises:
        InputError: more asked for than there is room for, or any of a model whose outputs are no tokens.
    """
    n_ctx, most = model.info.n_ctx, most_new_tokens(model)
    if asked and not model.gives_tokens:
        raise InputError("this model's outputs are no tokens, so it continues no text: steer with --tokens 0")
    if asked is None:
        left = n_ctx - model.n_bos - n_tokens
        # Of a prompt as long as a long context, the end gives way.
        return min(NEW_TOKENS, max(left, n_ctx // 8), most)
    if not 0 <= asked <= most:
        raise InputError(f"cannot generate {asked} tokens with {model.info.name}: give --tokens 0 to {most}")
    return asked


def units_of(edit: Edit, unit: float | Mapping[int, float]) -> dict[int, float]:
    """What a strength of 1 stands for, of every feature that is edited."""
    return {feature: unit[feature] if isinstance(unit, Mapping) else unit for feature in edit.strengths}


@contextmanager
def edited(
    model: "LoadedModel",
    sae: SAE,
    edit: Edit,
    unit: float | Mapping[int, float] = 1.0,
    *,
    first: int | None = None,
) -> Iterator[None]:
    """Forward passes of `model.bridge` over one sequence with the edit in place.

    Args:
        unit: a feature's maximum, as in `steer`.
        first: position, BOS being 0, from which on the edit applies; everywhere when left out. BOS is never edited.

    Raises:
        InputError: a hook point the model does not have, or one of another width.
    """
    read, write, units = read_hook(model, sae), written_hook(model, sae), units_of(edit, unit)

    def function(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        return apply_edit(sae, edit, units, x, y, from_row=0 if first is None else max(0, first - model.n_bos))

    with splice_between(model.bridge, read.name, write.name, function, bos_id=model.bos_id):
        yield


def apply_edit(
    sae: SAE,
    edit: Edit,
    units: Mapping[int, float],
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"],
    *,
    from_row: int = 0,
) -> Float[Tensor, "n d_out"]:
    """Edited values of `y`, in its precision; rows before `from_row` come back as they are.

    With the error kept, rows whose activations the edit leaves alone come back bitwise the same.

    Args:
        units: the features' maxima.
        x: what the SAE reads.
        y: the values where it writes: x again, but for a transcoder.
    """
    new = y.clone()
    rows = x[from_row:].to(sae.W_dec.device, torch.float32)
    code = sae.encode(rows)
    token, feature, value = code.entries()
    changed = y[from_row:].to(rows) if edit.keep_error else sae.predict(rows, code)
    for number, strength in edit.strengths.items():
        mine, wanted = feature == number, strength * units[number]
        a = rows.new_zeros(len(rows)).index_put((token[mine],), value[mine].float())
        change = {"add": torch.full_like(a, wanted), "clamp": wanted - a, "ablate": -a}[edit.kind]
        changed = changed + change[:, None] * sae.W_dec[number].float()
    new[from_row:] = changed.to(new)
    return new


def _generate(
    model: "LoadedModel",
    tokens: Int[Tensor, "1 pos"],
    n: int,
    temperature: float,
    noise: Float[Tensor, "n vocab"] | None,
    change: tuple[SAE, Edit, Mapping[int, float]] | None = None,
) -> list[int]:
    """`n` tokens that follow, fewer where the model ends the text; keys and values of what was read are kept.

    Models whose cache does not give what the whole pass gives read the whole text for every token.
    """
    found: list[int] = []
    cache: Any = None
    read = tokens
    while len(found) < n:
        with ExitStack() as stack:
            if change is not None:
                sae, edit, units = change
                # A pass over the prompt edits from its last token on, one with a cache its single token.
                first = tokens.shape[1] - 1 if cache is None and edit.where == "generated" else None
                stack.enter_context(edited(model, sae, edit, units, first=first))
            if model.checks.cached:
                options = {"return_type": "logits_and_cache", "use_cache": True}
                logits, cache = model.bridge(read, past_key_values=cache, **options)
            else:
                logits = model.bridge(read)
        scores = logits[0, -1].float()
        if noise is not None:
            scores = scores / temperature + noise[len(found)].to(scores)
        token = int(scores.argmax())
        if token == model.tokenizer.eos_token_id:
            break
        found.append(token)
        new = torch.tensor([[token]], device=tokens.device)
        read = new if model.checks.cached else torch.cat([read, new], dim=1)
    return found


def _gumbel(n: int, vocab: int, seed: int) -> Float[Tensor, "n vocab"]:
    """Standard Gumbel noise, drawn on the CPU so that every device samples the same text."""
    uniform = torch.rand(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()


def _nats(model: "LoadedModel", tokens: Int[Tensor, "1 pos"], continuation: list[int]) -> float:
    """Mean loss of a continuation's tokens under the unedited model."""
    if not continuation:
        return float("nan")
    new = torch.tensor([continuation], device=tokens.device)
    log_probabilities = next_log_probabilities(model.hf(torch.cat([tokens, new], dim=1), use_cache=False).logits[0])
    predicted = log_probabilities[tokens.shape[1] - 1 : -1]
    return -float(predicted.gather(1, new[0, :, None]).mean())


def _shifts(model: "LoadedModel", before: Float[Tensor, "vocab"], after: Float[Tensor, "vocab"]) -> pd.DataFrame:
    """The tokens whose probability changes most."""
    clean, steered = before.exp(), after.exp()
    difference = steered - clean
    chosen = difference.abs().topk(min(SHIFTS, len(difference))).indices
    chosen = chosen[difference[chosen] != 0]
    return pd.DataFrame(
        {
            "token": chosen.cpu().numpy(), "text": [model.label_of(token, len(before)) for token in chosen.tolist()],
            "clean": clean[chosen].cpu().numpy(), "steered": steered[chosen].cpu().numpy(),
            "difference": difference[chosen].cpu().numpy(),
        }
    )  # fmt: skip
