"""A mixture of experts as one wide sparse MLP, so that it has a place between its neurons and its output matrix.

The router gives token x the experts E(x) and their gates g_e. Expert e has neurons h_e = act(W_gate,e x) * (W_in,e x)
and writes g_e W_out,e h_e. Side by side,

    h = [g_1 h_1, g_2 h_2, ..., g_s h_s]       zero where an expert was not chosen
    y = W_out h (+ sum of g_e b_out,e),        W_out = [W_out,1, W_out,2, ..., W_out,s]

with the expert that every token goes through, where there is one, in the last columns; its gate g_s is a sigmoid of
its own or 1. That is the same sum in another order.

1. `widen` finds the blocks whose experts follow transformers' common form (`use_experts_implementation`) and gives
   their experts a module `out`, which holds no weights of its own and whose input is h.
2. A pass goes by way of `out` only while something is hooked to it; otherwise the module's own code runs, with its
   grouped products.
3. Whether a block is such an MLP is measured on a few random tokens: its output by both ways, and with h set to zero,
   where nothing but the experts' biases may be left. One that is not stays as it is and has no `mlp.hook_post`.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What families call the expert that every token goes through."""
TRIED = 4
"""Random tokens that a block is measured on."""


class WideOut(nn.Module):
    """W_out of a mixture: reads h [batch, pos, width], as the module's description says, and gives y without biases.

    Args:
        block: the module that holds router and experts.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        shared = next((getattr(block, name) for name in SHARED if getattr(block, name, None) is not None), None)
        # In a tuple, so that the weights stay where they are registered.
        self._parts = block.experts, shared, getattr(block, "shared_expert_gate", None)
        self._shape: torch.Size | None = None

    @property
    def in_features(self) -> int:
        """Width of h."""
        return self.n_experts * self.d_expert + self.d_shared

    @property
    def experts(self) -> Any:
        """The experts' module, called with (tokens [n, d_model], experts [n, k], gates [n, k])."""
        return self._parts[0]

    @property
    def n_experts(self) -> int:
        """Experts that the router chooses from."""
        return int(self._down.shape[0])

    @property
    def d_expert(self) -> int:
        """Neurons of each."""
        return int(self._down.shape[2])

    @property
    def d_shared(self) -> int:
        """Neurons of the expert that every token goes through; 0 without one."""
        shared = self._parts[1]
        return 0 if shared is None else int(shared.down_proj.weight.shape[1])

    @property
    def _down(self) -> Float[Tensor, "experts d_model d_expert"]:
        down: Tensor = self.experts.down_proj
        return down.transpose(1, 2) if self.experts.is_transposed else down

    @property
    def weight(self) -> Float[Tensor, "d_model width"]:
        """The matrices of all experts side by side, a copy."""
        wide = self._down.permute(1, 0, 2).flatten(1)
        shared = self._parts[1]
        return wide if shared is None else torch.cat([wide, shared.down_proj.weight], dim=1)

    def forward(self, h: Float[Tensor, "*place width"]) -> Float[Tensor, "*place d_model"]:
        """W_out h; without gradients, experts that no token of h needs are left out."""
        rows = h.reshape(-1, h.shape[-1])
        routed = rows[:, : self.n_experts * self.d_expert].unflatten(1, (self.n_experts, self.d_expert))
        y = rows.new_zeros(len(rows), self._down.shape[1])
        if torch.is_grad_enabled() and h.requires_grad:
            for expert, weight in enumerate(self._down):
                y = y + routed[:, expert] @ weight.T
        else:
            used = (routed != 0).any(dim=2)
            for expert in used.any(dim=0).nonzero()[:, 0].tolist():
                token = used[:, expert].nonzero()[:, 0]
                y.index_add_(0, token, routed[token, expert] @ self._down[expert].T)
        return (y + self._written_by_shared(rows)).view(*h.shape[:-1], -1)

    def neurons(
        self, x: Float[Tensor, "n d_model"], experts: Int[Tensor, "n k"], gates: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """h of some tokens."""
        of = self.experts
        wide = x.new_zeros(len(x), self.n_experts, self.d_expert)
        for expert in experts.unique().tolist():
            token, place = (experts == expert).nonzero(as_tuple=True)
            weights = of.gate_up_proj if of.has_gate else of.up_proj
            weight = weights[expert].T if of.is_transposed else weights[expert]
            bias = (of.gate_up_proj_bias if of.has_gate else of.up_proj_bias)[expert] if of.has_bias else None
            z = F.linear(x[token], weight, bias)
            h = of._apply_gate(z) if of.has_gate else of.act_fn(z)
            wide[token, expert] = (h * gates[token, place, None]).to(wide.dtype)
        return torch.cat([wide.flatten(1), self._shared_neurons(x)], dim=1)

    def _shared_neurons(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_shared"]:
        _, shared, gate = self._parts
        if shared is None:
            return x.new_zeros(len(x), 0)
        h = shared.act_fn(F.linear(x, shared.gate_proj.weight)) * F.linear(x, shared.up_proj.weight)
        return h if gate is None else torch.sigmoid(F.linear(x, gate.weight)) * h

    def _written_by_shared(self, h: Float[Tensor, "n width"]) -> Float[Tensor, "n d_model"]:
        shared = self._parts[1]
        if shared is None:
            return h.new_zeros(())
        return F.linear(h[:, -self.d_shared :], shared.down_proj.weight)

    def see_shape(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook on the block: experts get the tokens of all contexts as one list."""
        self._shape = args[0].shape[:-1] if args else None

    def run(
        self, out: nn.Module, x: Float[Tensor, "n d_model"], experts: Int[Tensor, "n k"], gates: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n d_model"]:
        """What the experts' module gives, by way of `out`, this module or the bridge's component around it."""
        h = self.neurons(x, experts, gates)
        shape = self._shape if self._shape is not None and self._shape.numel() == len(x) else x.shape[:1]
        y = out(h.view(*shape, -1)).reshape(len(x), -1)
        if self.experts.has_bias:
            y = y + (self.experts.down_proj_bias[experts] * gates[..., None]).sum(dim=1)
        # The block itself adds the shared expert, as it is without hooks.
        return (y - self._written_by_shared(h)).to(x.dtype)


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts module's own pass, or the wide one while something is hooked to `out` or what the bridge put there."""
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in self.out.modules())
    if not hooked:
        own: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return own
    wide: Tensor = self.wide[0].run(self.out, hidden_states, top_k_index, top_k_weights)
    return wide


def widen(hf: nn.Module) -> bool:
    """Gives every mixture of a model its `out`; see the module's description. Whether it has any."""
    found = False
    for block in list(_blocks(hf)):
        experts: Any = block.experts
        out = WideOut(block)
        experts.out, experts.wide = out, (out,)
        experts.forward = MethodType(_forward, experts)
        seen = block.register_forward_pre_hook(out.see_shape)
        if _is_wide(block, out):
            found = True
        else:
            seen.remove()
            del experts.out, experts.wide, experts.forward
    return found


def _blocks(hf: nn.Module) -> Iterator[nn.Module]:
    for module in hf.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "has_gate") and not experts.has_post_expert_norm:
            yield module


@torch.no_grad()
def _is_wide(block: nn.Module, out: WideOut) -> bool:
    """Whether the block's output is W_out h of h as it is taken here."""
    weight = out.experts.down_proj
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIED, out._down.shape[1], generator=generator).to(weight)

    def given(hook: Any) -> Tensor:
        with out.register_forward_pre_hook(hook):
            return _first(block(x))

    try:
        own = _first(block(x))
        wide, empty = given(lambda _, args: None), given(lambda _, args: (torch.zeros_like(args[0]),))
    except Exception:  # a block that asks for more than its tokens, or a shared expert of another make
        return False
    allowed = 0.02 if own.dtype.itemsize < 4 else 1e-4
    scale = own.float().abs().max()
    if not torch.isfinite(scale) or (wide - own).float().abs().max() > allowed * scale:
        return False
    # With biases the rest is theirs.
    return bool(out.experts.has_bias or empty.float().abs().max() <= allowed * scale)


def _first(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def add_out(adapter: Any) -> None:
    """Has a TransformerBridge's adapter put a component at `out`, whose input is `mlp.hook_post`."""
    from transformer_lens.model_bridge.generalized_components import LinearBridge, MoEBridge

    mlp = adapter.component_mapping["blocks"].submodules.get("mlp")
    if isinstance(mlp, MoEBridge):
        # First: some adapters wrap the experts themselves too, and take what lies in them.
        mlp.submodules = {"out": LinearBridge(name="experts.out", optional=True), **mlp.submodules}
        mlp.hook_aliases = {**mlp.hook_aliases, "hook_post": "out.hook_in"}
