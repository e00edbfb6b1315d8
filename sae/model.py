"""The SAE: encoder, selection rule, decoder.

    z = (x - b_dec) W_enc + b_enc        pre-activations
    a = rule(z)                          sparse code: of a token alone, never of its batch
    x_hat = a W_dec + b_dec              reconstruction

Decoder rows have unit norm, so an activation is the length of the feature's contribution in the units of x.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae import kernels
from sae.code import SparseCode
from sae.description import DenseConfig
from sae.errors import InputError
from sae.rules import GradientTopK, Rule, to_dict
from sae.shown import pairs
from sae.source import Part


class SAE(nn.Module):
    """A sparse autoencoder for activations of width `d_in`.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        rule: which features fire.
        hook_name: TransformerLens name of the hook point it reads.
        model_name: the model it was trained on.
        metadata: anything else to keep with it (JSON).

    Raises:
        InputError: sizes below one, or a rule that cannot work with `d_sae` features.
    """

    parts: tuple[Part, ...] = ()
    """The activations that a crosscoder reads side by side; an SAE reads one."""
    subtracts_b_dec: ClassVar[bool] = True
    """Whether the encoder multiplies x - b_dec, or x itself, as a transcoder's does."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        rule: Rule,
        *,
        hook_name: str = "",
        model_name: str = "",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise InputError(f"an SAE needs at least one input and one feature, got d_in {d_in} and d_sae {d_sae}")
        rule.check(d_sae)
        self.rule, self.hook_name, self.model_name = rule, hook_name, model_name
        self.metadata = dict(metadata or {})
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        # W_enc lies in memory as [d_sae, d_in]: its gradient is reduced feature by feature into whole rows.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in, **options).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **options))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in, **options))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **options))
        self._state_names = tuple(rule.new_state(d_sae))
        for name, tensor in rule.new_state(d_sae).items():
            self.register_buffer(name, tensor.to(**options))

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes: of the same activations, but for a transcoder."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.W_dec.dtype

    @property
    def cfg(self) -> DenseConfig:
        """What it says of itself, under SAELens' and SAEBench's names; made anew each time."""
        parts = self.hook_name.split(".")
        return DenseConfig(
            model_name=self.model_name, d_in=self.d_in, d_sae=self.d_sae,
            hook_layer=int(parts[1]) if len(parts) > 2 and parts[1].isdecimal() else None,
            hook_name=self.hook_name, architecture=self.rule.name, dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device), apply_b_dec_to_input=self.subtracts_b_dec,
            context_size=self.metadata.get("context_size"), prepend_bos=self.metadata.get("prepend_bos") is not False,
            dataset_path=self.metadata.get("dataset_path") or "",
        )  # fmt: skip

    @property
    def written_hook(self) -> str:
        """TransformerLens name of the hook point it writes: the one it reads, but for a transcoder."""
        return self.hook_name

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors the rule encodes by, such as thresholds; empty for most rules."""
        return {name: self.get_buffer(name) for name in self._state_names}

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "*batch d_in"], gradients: Float[Tensor, "*batch d_out"] | None = None
    ) -> SparseCode:
        """Active features of every token, arranged in x's leading dimensions.

        Args:
            gradients: of the model's loss at what it writes, for a gradient SAE; without them it encodes as plain TopK.

        Raises:
            InputError: no tensor, the last dimension is not d_in, or gradients the rule has no use for.
        """
        check_tensor(x, f"activations, a tensor of shape [..., {self.d_in}]")
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"this SAE reads activations of width {self.d_in}, got {x.shape[-1]}: "
                f"use those of its hook point {self.hook_name!r}"
            )
        flat = self.centred(x.reshape(-1, self.d_in).to(self._precision(x)))
        if gradients is None:
            return self.rule.encode(flat, self.W_enc, self.b_enc, self.state).arranged(x.shape[:-1])
        if not isinstance(self.rule, GradientTopK):
            raise InputError(f"the rule {self.rule.name} makes no use of gradients: encode without them")
        check_tensor(gradients, f"gradients, a tensor of shape [..., {self.d_out}]")
        if gradients.shape != (*x.shape[:-1], self.d_out):
            raise InputError(
                f"gradients have shape {list(gradients.shape)} and activations {list(x.shape)}: "
                "give the gradient at every activation"
            )
        return self.rule.encode_with_gradients(
            flat, self.W_enc, self.b_enc, self.W_dec, gradients.reshape(-1, self.d_out), self.state
        ).arranged(x.shape[:-1])

    def centred(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the encoder multiplies: x - b_dec, or x itself where b_dec belongs to another activation."""
        return x - self.b_dec if self.subtracts_b_dec else x

    def _precision(self, x: Tensor) -> torch.dtype:
        """Of the pre-activations' factors: the weights', but half precision only where a GPU multiplies in it."""
        half = self.W_enc.element_size() == 2
        return torch.float32 if half and not (x.is_cuda and x.element_size() == 2) else self.W_enc.dtype

    @torch.no_grad()
    def decode(self, code: SparseCode | Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstructions of the tokens of a code, or of a full matrix of activations.

        Raises:
            InputError: neither a code nor a tensor, or one of another number of features.
        """
        if not isinstance(code, SparseCode):
            check_tensor(code, f"a SparseCode, or a tensor of shape [..., {self.d_sae}]")
        if code.shape[-1] != self.d_sae:
            raise InputError(f"this SAE has {self.d_sae} features, got a code of {code.shape[-1]}")
        if isinstance(code, Tensor):
            return code.to(self.W_dec) @ self.W_dec + self.b_dec
        return kernels.decode(code, self.W_dec, self.b_dec).view(*code.shape[:-1], self.d_out)

    def predict(self, x: Float[Tensor, "*batch d_in"], code: SparseCode | None = None) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction of x, in x's shape and precision. No gradients: training has its own path.

        Args:
            code: of x, where it is known, or one that was edited.
        """
        return self.decode(self.encode(x) if code is None else code).to(x.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """As `predict`."""
        return self.predict(x)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what it computes: the rule's description and every tensor of it.

        Of each tensor the name, the shape and the values in float32, row by row: the same on every device, for every
        layout in memory and after saving and loading, and for names and metadata that say other things about it.
        """
        digest = hashlib.sha256(json.dumps(self._described(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.float().cpu().contiguous().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()

    def _described(self) -> dict[str, Any]:
        """What its tensors leave open of what it computes."""
        return to_dict(self.rule)

    def save(self, path: Path | str) -> None:
        """Writes a SAELens directory; see `sae.formats.saelens`."""
        from sae.formats.saelens import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Reads a SAELens directory, of an SAE or a transcoder; see `sae.formats.saelens`.

        Raises:
            InputError: nothing that can be read, or an SAE where a transcoder is asked for.
        """
        from sae.formats.saelens import load

        loaded = load(Path(path), device)
        if not isinstance(loaded, cls):
            raise InputError(f"{path} holds an SAE, which reconstructs what it reads: expected a {cls.__name__}")
        return loaded

    def _repr_html_(self) -> str:
        places = {"reads": self.hook_name, "writes": self.written_hook}
        if self.written_hook == self.hook_name:
            del places["writes"]
        weights = sum(tensor.numel() for tensor in self.parameters())
        return pairs(
            type(self).__name__,
            {
                **places, "of": self.model_name, "width": f"{self.d_in:,}", "features": f"{self.d_sae:,}",
                "rule": str(self.rule), "weights": f"{weights:,}, {str(self.dtype).removeprefix('torch.')}",
                "on": str(self.device),
            },
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What `repr` shows of it."""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, rule={self.rule}, hook_name={self.hook_name!r}"


def check_tensor(found: object, expected: str) -> None:
    """Raises InputError for what is not a torch tensor with a last dimension."""
    if not isinstance(found, Tensor):
        kind = type(found)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise InputError(f"expected {expected}, got a {name}: torch.as_tensor(...) makes a tensor of an array or list")
    if not found.dim():
        raise InputError(f"expected {expected}, got a single number")
