"""What a family's tiny model is tried with: every number is compared with one from the bare module.

A trial gives nothing where all is right, raises InputError where the project refuses, and AssertionError where a number
is off by more than `OFF` of its size. The numbers beside them come from the Hugging Face module with forward hooks of
this file's own; neither the TransformerBridge nor the project's capture is in them.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuits.attribution import logit_attribution
from circuits.blocks import norm_before
from circuits.dfa import direct_feature_attribution
from circuits.eap import attribute_edges
from circuits.effective_weights import effective_weights, logit_scale
from circuits.heads import COLUMNS, head_scores, pattern_sums, repeated_tokens
from circuits.norms import measured_norm
from circuits.passes import taking
from circuits.prompts import PromptSet, from_ids
from circuits.splice import splice
from sae import SAE, InputError, TopK
from workbench.features.prompts import read_prompt
from workbench.features.steering import Edit, steer
from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.guards import agree, random_tokens
from workbench.models.load import LoadedModel
from workbench.models.places import KINDS, HookSpec
from workbench.saes.evaluation import evaluate_sae
from workbench.sparsity.calibration import calibrate_on
from workbench.sparsity.enforce import enforce
from workbench.sparsity.methods import method_named
from workbench.text.corpora import open_corpus

OFF = 1e-3
TEXT = "def area(width, height):\n    return width * height\n\n\n"


def tiny_sae(model: LoadedModel, hook: str, width: int) -> SAE:
    """A random SAE at a hook point; nothing in it is zero."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(width, 64, TopK(6), hook_name=hook)
    with torch.no_grad():
        W_dec = torch.nn.functional.normalize(torch.randn(64, width, generator=generator), dim=1)
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.T)
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
    return sae


def prompts_of(model: LoadedModel) -> PromptSet:
    """A clean and a corrupted prompt of random tokens, a right and a wrong answer."""
    tokens = random_tokens(model)[:, 1:]
    return from_ids("random", tokens.tolist(), tokens.flip(1).tolist(), [[7]], [[9]], model.bos_id)


def hook_points(model: LoadedModel) -> str:
    """Which kinds are there; in how many layers, where not in all."""
    layers = model.info.n_layers
    there = Counter(hook.kind for hook in model.checks.hooks.values())
    if set(there) == set(KINDS) and set(there.values()) == {layers}:
        return "all"
    return ", ".join(kind if n == layers else f"{kind} ({n} of {layers})" for kind, n in there.items())


@torch.no_grad()
def splicing(model: LoadedModel) -> None:
    """At every hook point the identity changes nothing, and zeros do what they do in the bare module."""
    tokens = random_tokens(model)
    clean = model.bridge(tokens)
    for name, hook in model.checks.hooks.items():
        with splice(model.bridge, name, lambda x: x):
            if not agree(model.bridge(tokens), clean):
                raise AssertionError(f"putting back what is at {name} changes the pass")
        with splice(model.bridge, name, torch.zeros_like):
            spliced = model.bridge(tokens)
        if torch.equal(spliced, clean):
            raise AssertionError(f"zeros at {name} change nothing")
        if hook.kind == "resid_mid":
            # No module of the bare model hands the stream on from there.
            continue
        with changed(model, hook, torch.zeros_like):
            _same(f"zeros at {name}", spliced, model.hf(tokens, use_cache=False).logits)


def evaluation(model: LoadedModel) -> None:
    """Losses with and without an SAE in place are those of the bare module."""
    sae = _last_sae(model)
    hook = model.checks.hooks[sae.hook_name]
    with _corpus() as corpus:
        found = evaluate_sae(model, [sae], corpus, max_tokens=128, context_len=32)[0]
        batches = list(context_batches(model, corpus, "heldout", max_tokens=128, context_len=32))

    def loss(replace: bool) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:

            def read(x: Tensor, ordinary: Tensor = batch.ordinary) -> Tensor:
                return torch.where(ordinary[..., None], sae(x), x)

            with changed(model, hook, read if replace else lambda x: x):
                total += _loss(model, batch)
        return float(total) / sum(int(batch.counted.sum()) for batch in batches)

    _same("the losses", torch.tensor([found.ce_clean, found.ce_spliced]), torch.tensor([loss(False), loss(True)]))


@torch.no_grad()
def prompt(model: LoadedModel) -> None:
    """A feature's attribution is what taking it out does to a logit, with the last norm's scale as it is."""
    sae = _last_sae(model)
    reading = read_prompt(model, sae, TEXT)
    if reading.missing is not None:
        raise InputError(reading.missing)
    position, target = 4, 123
    found = torch.from_numpy(reading.attribution(position, target))
    features = reading.feature[reading.position == position]
    tokens = torch.tensor([reading.tokens])
    last = model.checks.hooks[f"blocks.{model.info.n_layers - 1}.hook_resid_post"]
    x = _seen(model, tokens, last)[0, position]
    norm, unembed = model.component("ln_final"), model.component("unembed")
    assert norm is not None
    assert unembed is not None

    def centred(vector: Tensor) -> Tensor:
        return vector - vector.mean() if measured_norm(model.structure.ln_final, x).centred else vector

    gain = (norm(x) - norm(torch.zeros_like(x))) / centred(x)
    flat = unembed(torch.zeros_like(x))
    effects = [
        logit_scale(model.structure)
        * (unembed(gain * centred(reading.activations(int(f))[position] * sae.W_dec[f])) - flat)
        for f in features
    ]
    _same("attribution", found, torch.stack([effect[target] - effect.mean() for effect in effects]).double())


@torch.no_grad()
def steering(model: LoadedModel) -> None:
    """A feature is turned up while the model writes; the text without it is the bare module's."""
    found = steer(model, _last_sae(model), Edit(0, strength=2.0), TEXT, new_tokens=3)
    tokens = model.begun(model.encode(TEXT))
    start = len(tokens)
    for _ in range(3):
        tokens.append(int(model.hf(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    if found.clean != model.text(tokens[start:]):
        raise AssertionError(f"steering goes on with {found.clean!r}, the module with {model.text(tokens[start:])!r}")


@torch.no_grad()
def heads(model: LoadedModel) -> None:
    """Scores are those of the module's own patterns, and effective weights give queries, keys and values."""
    rows = repeated_tokens(range(5, 500), model.bos_id or 0, n=2, length=8)
    found = head_scores(model.bridge, rows).values[..., : len(COLUMNS) - 1]
    # Made anew: what runs attention fast decides so when it is made, and hands on no pattern.
    hf: Any = model.hf
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(hf.config), attn_implementation="eager").eval()
    eager.load_state_dict(hf.state_dict())
    patterns = eager(rows, use_cache=False, output_attentions=True).attentions
    sums = [pattern_sums(pattern.double(), rows) for pattern in patterns]
    _same("head scores", found, torch.stack([total / count for total, count in sums]))
    for layer in range(model.info.n_layers):
        for part in ("q", "k", "v"):
            _reads(model, rows, layer, part)


def _reads(model: LoadedModel, rows: Tensor, layer: int, part: Any) -> None:
    try:
        read = effective_weights(model.bridge, part, layer)
    except InputError:
        return
    block = model.bridge.blocks[layer]
    found: dict[str, Tensor] = {}
    stream, projected = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.{part}.hook_out"
    with taking(model.bridge, [stream, projected], found):
        model.bridge(rows)
    x, norm = found[stream], norm_before(block, "attn")
    if norm is not None:
        x = x / measured_norm(norm, x[0, 0]).scale(x)[..., None]
    _same(f"effective {part} of layer {layer}", x @ read.W.flatten(1) + read.b.flatten(), found[projected].flatten(2))


@torch.no_grad()
def attribution(model: LoadedModel) -> None:
    """The terms of the writers add up to the module's logit difference."""
    prompts = prompts_of(model)
    found = logit_attribution(model.bridge, prompts)
    logits = model.hf(prompts.clean, use_cache=False).logits[:, -1].double()
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    _same("the sum of terms", found.values.sum(dim=1), logits[:, 7] - logits[:, 9], found.values.abs().sum())


def edges(model: LoadedModel) -> None:
    """Edges that leave the input add up to the gradient there times what differs, by the module's own backward pass."""
    prompts = prompts_of(model)
    found = attribute_edges(model.bridge, prompts, variant="eap")
    first = model.checks.hooks["blocks.0.hook_resid_pre"]
    streams: list[Tensor] = []

    def probe(x: Tensor) -> Tensor:
        streams.append(x.detach().requires_grad_())
        return streams[-1]

    values = []
    with changed(model, first, probe):
        for tokens in (prompts.clean, prompts.corrupted):
            logits = model.hf(tokens, use_cache=False).logits[0, -1]
            values.append(logits[7] - logits[9])
    (gradient,) = torch.autograd.grad(values[0], streams[0])
    wanted = (gradient * (streams[0] - streams[1])).detach()
    _same("the input's edges", torch.tensor(found.nodes()["input"]), wanted.sum(), wanted.abs().sum())
    _same("the metric", torch.tensor([found.clean, found.corrupted]), torch.stack(values).detach())


@torch.no_grad()
def sources(model: LoadedModel) -> None:
    """A feature on a layer's heads, split by head and source, is what the SAE makes of the module's own."""
    hooks = [hook for hook in model.checks.hooks.values() if hook.kind == "z"]
    if not hooks:
        raise InputError("no hook point on heads")
    sae, tokens = tiny_sae(model, hooks[-1].name, hooks[-1].width), random_tokens(model)
    found = direct_feature_attribution(model.bridge, sae, tokens[0], 0)
    z = _seen(model, tokens, hooks[-1])[0, -1]
    terms = (z - sae.b_dec) * sae.W_enc[:, 0]
    _same("the pre-activation", torch.tensor(found.pre_activation), terms.sum() + sae.b_enc[0], terms.abs().sum())


def sparsity(model: LoadedModel) -> None:
    """The MLPs' zeros are counted, and leaving out what is zero costs nothing beside the module's own loss."""
    with _corpus() as corpus:
        held = list(context_batches(model, corpus, "heldout", max_tokens=64, context_len=32))
    point = enforce(model, calibrate_on(model, held), held, methods=[method_named("zero")]).points[0]
    losses = sum(float(_loss(model, batch)) for batch in held) / sum(int(batch.counted.sum()) for batch in held)
    _same("the loss", torch.tensor(point.loss), torch.tensor(losses))


TRIALS: dict[str, Callable[[LoadedModel], str | None]] = {
    "hook points": hook_points, "splicing": splicing, "evaluation": evaluation, "prompt": prompt,
    "steering": steering, "heads": heads, "DLA": attribution, "EAP": edges, "DFA": sources, "MLP sparsity": sparsity,
}  # fmt: skip


@contextmanager
def changed(model: LoadedModel, hook: HookSpec, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In passes of the bare module the value at a hook point is a function of it."""
    module = model.component(hook.component)
    assert module is not None, hook.component

    def new(value: Tensor) -> Tensor:
        return function(value * hook.scale) / hook.scale

    def on_input(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (new(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: new(kwargs[name])}

    def on_output(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([new(output[0]), *output[1:]])
        return new(output)

    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if hook.side == "input"
        else module.register_forward_hook(on_output)
    )
    with handle:
        yield


@torch.no_grad()
def _seen(model: LoadedModel, tokens: Tensor, hook: HookSpec) -> Float[Tensor, "batch pos width"]:
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x.clone())
        return x

    with changed(model, hook, keep):
        model.hf(tokens, use_cache=False)
    return found[0].view(*tokens.shape, -1)


@torch.no_grad()
def _loss(model: LoadedModel, batch: ContextBatch) -> Float[Tensor, ""]:
    """Summed next-token cross-entropy over the counted positions, nats."""
    log_q = model.hf(batch.tokens, use_cache=False).logits.double().log_softmax(-1)
    picked = log_q[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
    return -picked[batch.counted].sum()


def _same(what: str, found: Tensor, wanted: Tensor, size: Tensor | None = None) -> None:
    """Raises AssertionError where two numbers differ by more than `OFF` of their size, or of what they sum."""
    if found.ndim == 3 and found.shape[1] > 1 and size is None:
        # Vectors of tokens: a token that a router sends elsewhere for its rounding is no disagreement.
        if not agree(found, wanted):
            raise AssertionError(f"{what} differ from the module's own")
        return
    off = (found.double() - wanted.double()).abs().max()
    if not off <= OFF * (wanted.abs().max() if size is None else size):
        raise AssertionError(f"{what} differ by {off:.2g} from the module's own")


def _last_sae(model: LoadedModel) -> SAE:
    hooks = [hook for hook in model.checks.hooks.values() if hook.kind in ("resid_post", "resid_pre")]
    if not hooks:
        raise InputError("no hook point on the residual stream")
    return tiny_sae(model, hooks[-1].name, hooks[-1].width)


@contextmanager
def _corpus() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(40):
            (Path(folder) / f"{number}.txt").write_text(TEXT.replace("area", f"area_{number}") * 2)
        yield open_corpus(folder)
