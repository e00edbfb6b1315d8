"""Crosscoders: SAEs of several activations side by side - hook points of one model, or one hook point of two models
over the same tokens (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").

    z = sum over parts m of x^m W_enc^m + b        pre-activations (in x - b_dec, as for any SAE)
    a = rule(z)                                    one sparse code for all parts
    x_hat^m = a W_dec^m + b_dec^m                  reconstruction of every part

That is an SAE of the concatenated row [x^1, ..., x^M], and here it is one: `encode`, `decode` and training are an
SAE's. Before they are concatenated, the parts are multiplied by their scales, so that each has the mean norm
sqrt(width) up to one factor; the scales are folded into the weights when training ends:

    W_enc^m s_m,   W_dec^m / s_m,   b_dec^m / s_m

Decoder rows have unit norm in these scales: the norms of a row's blocks, times s_m, say how much of a feature belongs
to which part (`part_norms`), whatever the parts' own sizes are.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.model import SAE
from sae.rules import Rule
from sae.source import Part


class Crosscoder(SAE):
    """An SAE of several activations side by side.

    Args:
        parts: the activations, in the order in which they are concatenated.
        d_sae: number of features.
        rule: which features fire.
        metadata, device, dtype: as for an SAE.

    Attributes:
        parts: as given.

    Raises:
        InputError: as for an SAE, or fewer than two parts, or two of one name.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        d_sae: int,
        rule: Rule,
        *,
        metadata: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        names = [part.name for part in parts]
        if len(parts) < 2 or len(set(names)) < len(names):
            raise InputError(
                f"a crosscoder needs two parts or more, of different names, got {', '.join(names) or None}"
            )
        width = sum(part.width for part in parts)
        super().__init__(width, d_sae, rule, metadata=metadata, device=device, dtype=dtype)
        self._name_parts(parts)

    def _name_parts(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.hook_name = _joined(part.hook_name for part in parts)
        self.model_name = _joined(part.model_name for part in parts)

    def read_at(self, hook_name: str | None, model_name: str | None) -> None:
        """Says anew what its parts read.

        Args:
            hook_name: the hook point of all, or with commas between of each; what they have when None.
            model_name: the model of all, or of each, likewise.

        Raises:
            InputError: another number of hook points or models than there are parts, or two parts that would read the
                same.
        """
        hooks = self._each("hook points", hook_name, [part.hook_name for part in self.parts])
        models = self._each("models", model_name, [part.model_name for part in self.parts])
        read = list(zip(hooks, models, strict=True))
        twice = next((one for number, one in enumerate(read) if all(one) and one in read[:number]), None)
        if twice is not None:
            raise InputError(
                f"two parts of the crosscoder would both read {twice[0]} of {twice[1]}: name the model of every part, "
                "as --model BASE,TUNED, or its hook point, as --hook FIRST,SECOND"
            )
        named = zip(self.parts, hooks, models, strict=True)
        self._name_parts([replace(part, hook_name=hook, model_name=model) for part, hook, model in named])

    def _each(self, what: str, given: str | None, had: list[str]) -> list[str]:
        """One name for every part: what it had, or what was given for all or each."""
        if given is None:
            return had
        names = [name.strip() for name in given.split(",")]
        if len(names) not in (1, len(had)):
            raise InputError(
                f"the crosscoder has {len(had)} parts and {len(names)} {what} were named: name one, or each"
            )
        return names if len(names) > 1 else names * len(had)

    @classmethod
    @torch.no_grad()
    def of_scaled(cls, sae: SAE, parts: Sequence[Part]) -> Self:
        """The crosscoder of the parts' own activations, from the SAE of their scaled ones."""
        made = cls(parts, sae.d_sae, sae.rule, metadata=sae.metadata, device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        scale = made.scales().to(sae.W_dec)
        made.W_enc.copy_(sae.W_enc * scale[:, None])
        made.b_enc.copy_(sae.b_enc)
        made.W_dec.copy_(sae.W_dec / scale)
        made.b_dec.copy_(sae.b_dec / scale)
        for name, tensor in sae.state.items():
            made.get_buffer(name).copy_(tensor)
        return made

    def scales(self) -> Float[Tensor, "d_in"]:
        """The scale of every coordinate of a concatenated row."""
        return torch.cat([torch.full((part.width,), part.scale, dtype=torch.float64) for part in self.parts])

    def split(self, rows: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch width"], ...]:
        """Concatenated rows, or rows of the decoder, cut into the parts."""
        return rows.split([part.width for part in self.parts], dim=-1)

    def concatenate(self, rows: Sequence[Float[Tensor, "*batch width"]]) -> Float[Tensor, "*batch d_in"]:
        """The row to encode, of the parts' activations in their order.

        Raises:
            InputError: another number of parts, or another width of one.
        """
        found, expected = [row.shape[-1] for row in rows], [part.width for part in self.parts]
        if found != expected:
            raise InputError(f"the parts of this crosscoder have widths {expected}, got {found}")
        return torch.cat(list(rows), dim=-1)

    @torch.no_grad()
    def part_norms(self) -> Float[Tensor, "parts d_sae"]:
        """Norm of every feature's decoder row in each part, times the part's scale."""
        return block_norms(self.W_dec, self.parts) * torch.tensor(
            [[part.scale] for part in self.parts], device=self.W_dec.device, dtype=self.W_dec.dtype
        )

    def _described(self) -> dict[str, Any]:
        return {"crosscoder": super()._described(), "widths": [part.width for part in self.parts]}

    def extra_repr(self) -> str:
        """What `repr` shows of it."""
        parts = ", ".join(f"{part.name} ({part.width})" for part in self.parts)
        return f"parts={parts}, d_sae={self.d_sae}, rule={self.rule}"


def block_norms(W_dec: Float[Tensor, "d_sae d_in"], parts: Sequence[Part]) -> Float[Tensor, "parts d_sae"]:
    """Norm of every decoder row in each part's block."""
    blocks = W_dec.split([part.width for part in parts], dim=1)
    return torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks])


def parts_to_dict(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The parts as JSON; `parts_from_dict` is the inverse."""
    return [asdict(part) for part in parts]


def parts_from_dict(described: Any, where: str) -> list[Part]:
    """Parts from JSON. Raises InputError, which `where` begins, for what are none."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str, "hook_name": str, "model_name": str, "width": int, "scale": (int, float)
    }  # fmt: skip
    if not isinstance(described, list) or not all(isinstance(part, dict) for part in described):
        raise InputError(f"{where} has parts = {described!r}: expected a list of objects")
    for part in described:
        wrong = [key for key, kind in kinds.items() if not isinstance(part.get(key), kind)]
        if wrong or set(part) != set(kinds) or part["width"] < 1 or not part["scale"] > 0:
            raise InputError(f"{where} has the part {part}: expected {', '.join(kinds)}, width and scale above 0")
    return [Part(**part) for part in described]


def _joined(names: Any) -> str:
    return " + ".join(dict.fromkeys(name for name in names if name))
