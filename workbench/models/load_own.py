"""Loading models of one's own: live objects, HookedTransformers' checkpoints, and Python functions that make them.

1. What is given becomes an `OwnModel` with its name, where it came from and the hash of its weights.
2. A HookedTransformer gets a TransformerBridge (`workbench.models.hooked`), a TransformerBridge is its own, and any
   other module has the hook points that its description names.
3. A few random tokens show what works, as for every model (`workbench.models.guards`).

A workspace records a live object by name (`live:NAME`), and a function by its file. Neither is a checkpoint that could
be opened again, and a function's file is run when it is named, never because a workspace names it: `recorded_model`
finds those that this process has loaded, by name and hash, and says otherwise how to give them.
"""

import dataclasses
import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from circuits.nodes import gives_tokens
from sae.errors import InputError
from workbench.disk.names import as_name, is_function, lasting_name
from workbench.models.guards import TOKENS, check
from workbench.models.hooked import SUFFIXES, is_checkpoint, is_hooked, native_pair, read_checkpoint
from workbench.models.model import Checks, LoadedModel, ModelInfo
from workbench.models.own import Called, ModuleBridge, OwnModel, described_hooks
from workbench.models.own_hash import own_sha256
from workbench.models.vocabulary import word_tokenizer

LIVE = "live:"
MOST_TRIED, MOST_LOGITS = 4096, 2**26
"""Positions, and logits, of the longest context that is tried when a module is loaded."""
_loaded: "WeakValueDictionary[tuple[str, str], LoadedModel]" = WeakValueDictionary()
"""By name and hash, the latest last."""


@dataclass(frozen=True)
class Given:
    """A model of one's own before it is loaded."""

    own: OwnModel
    name: str
    source: Literal["live", "python", "file"]
    sha256: str


def own_model(spec: "str | nn.Module | OwnModel") -> Given | None:
    """A model of one's own, None for the name of a Hugging Face model.

    Raises:
        InputError: a file or function that gives none.
    """
    if not isinstance(spec, str):
        own = _described(spec, f"load_model got a {type(spec).__name__}")
        return Given(own, LIVE + own.name, "live", own_sha256(own))
    if is_function(spec):
        own = _described(_made_by(spec), f"{spec} gives a {{}}")
        return Given(own, lasting_name(spec), "python", own_sha256(own))
    file = _checkpoint_file(Path(spec).expanduser())
    if file is None:
        return None
    own = OwnModel(read_checkpoint(file), name=spec)
    return Given(own, lasting_name(spec), "file", own_sha256(own))


def short_name(spec: str) -> str:
    """What a model is called in the names of what is made of it: the last part of a path or of a name on the hub,
    without the ending of a file and the function in it."""
    path = PurePath(lasting_name(spec).removeprefix(LIVE).split(".py:")[0])
    return as_name(path.stem if path.suffix.lower() in SUFFIXES else path.name) or "model"


def must_be_given(name: str) -> bool:
    """Whether a recorded name does not bring its model back."""
    return name.startswith(LIVE) or is_function(name)


def remembered(model: LoadedModel, recorded: str | None = None) -> LoadedModel:
    """The model, found again by `recorded_model` as long as somebody holds it.

    Args:
        recorded: under this name too.
    """
    names = [model.info.name] if must_be_given(model.info.name) else []
    for name in dict.fromkeys([*names, *([] if recorded is None else [recorded])]):
        key = name, model.info.weights_sha256
        _loaded.pop(key, None)
        _loaded[key] = model
    return model


def recorded_model(name: str, sha256: str | None = None) -> LoadedModel | None:
    """A model that this process has loaded and that its name alone does not bring back; None for other names.

    Args:
        sha256: of the one that is meant among several of the name; the latest where it is not known or not held.

    Raises:
        InputError: one that has to be given again.
    """
    held = {key[1]: model for key, model in list(_loaded.items()) if key[0] == name}
    if held:
        return held.get(sha256 or "") or list(held.values())[-1]
    if name.startswith(LIVE):
        raise InputError(
            f"the model {name.removeprefix(LIVE)!r} was given as an object, which a workspace does not keep: load it "
            "again with load_model and hold on to it, or give it as --model FILE.py:FUNCTION"
        )
    if is_function(name):
        raise InputError(
            f"the model is made by Python that is run only when you name it: give it again, --model {name}, or in "
            f"Python load_model({name!r})"
        )
    return None


def _checkpoint_file(path: Path) -> Path | None:
    """The weights of a HookedTransformer at a path, a file or a folder without a model of Hugging Face's."""
    if is_checkpoint(path):
        return path
    if not path.is_dir() or (path / "tokenizer_config.json").is_file():
        return None
    config = path / "config.json"
    if config.is_file() and any(
        word in config.read_text(errors="replace") for word in ('"model_type"', '"architectures"')
    ):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) > 1:
        raise InputError(f"{path} holds {len(files)} files of weights: name one, such as {files[0]}")
    return files[0] if files else None


def _made_by(spec: str) -> Any:
    """What a function in a Python file gives. Raises InputError when there is none or it fails."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"no file {file}: --model takes path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None, "a path that ends in .py has a loader"
    assert module_spec.loader is not None, "likewise"
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            functions = [
                known for known, value in vars(module).items() if callable(value) and not known.startswith("_")
            ]
            raise InputError(f"{file} has no function {name!r}: it has {', '.join(functions) or 'none'}")
        return function()
    except InputError:
        raise
    except Exception as error:  # the user's own code
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{spec} failed: {type(error).__name__}: {reason}") from None
    finally:
        sys.path.remove(str(path.parent))


def _described(given: Any, what: str) -> OwnModel:
    own = given if isinstance(given, OwnModel) else OwnModel(given, name=_name_of(given))
    if not isinstance(own.module, nn.Module):
        raise InputError(
            f"{what.format(type(own.module).__name__)}: expected a HookedTransformer, a TransformerBridge, or a torch "
            "module with its description, workbench.OwnModel(module, d_vocab=..., n_ctx=..., hooks=...)"
        )
    return own


def _name_of(module: Any) -> str:
    return str(getattr(getattr(module, "cfg", None), "model_name", None) or type(module).__name__)


def load_own(given: Given, place: torch.device | None, dtype: torch.dtype | None) -> LoadedModel:
    """Loads a model of one's own.

    Args:
        place: where it goes; None leaves it where it is.
        dtype: its precision; None leaves it as it is.

    Raises:
        InputError: a description that does not fit the module, or a HookedTransformer of an unknown kind.
    """
    from transformer_lens.model_bridge import TransformerBridge

    own = given.own
    stored = next((value.dtype for value in own.module.parameters()), None)
    if stored is None:
        raise InputError(f"{own.name} has no weights")
    module: Any = own.module.eval()
    # One at a time: a HookedTransformer takes no more.
    for wanted in (place, dtype):
        if wanted is not None:
            module = module.to(wanted, print_details=False) if is_hooked(module) else module.to(wanted)
    recorded = {
        "name": given.name, "source": given.source, "revision": None, "weights_sha256": given.sha256,
        "checkpoint_dtype": str(stored).removeprefix("torch."), "device": str(next(module.parameters()).device),
    }  # fmt: skip
    if is_hooked(module) or isinstance(module, TransformerBridge):
        if own.hooks or own.call:
            raise InputError(f"{own.name} is a {type(module).__name__}, which has its hook points: name none")
        loaded = _transformer(own, module, recorded)
    else:
        loaded = _module(own, recorded)
    return dataclasses.replace(loaded, weights_at_load=loaded.states_of_weights())


def _transformer(own: OwnModel, module: Any, recorded: dict[str, Any]) -> LoadedModel:
    """A HookedTransformer or a TransformerBridge."""
    shape = module.cfg
    tokenizer = own.tokenizer or (None if own.vocabulary else module.tokenizer)
    bos_id = own.bos_id
    if bos_id is None and own.tokenizer is None and tokenizer is not None:
        bos_id = tokenizer.bos_token_id
    if hasattr(module, "original_model"):
        bare, bridge, processing = module.original_model, module, "as given"
    else:
        (bare, bridge), processing = native_pair(module, own.name), "raw"
    hf = Called(bare, shape.d_vocab)
    tokenizer = tokenizer or word_tokenizer(own.vocabulary, shape.d_vocab)
    if bridge.tokenizer is None:
        bridge.tokenizer = tokenizer
    info = ModelInfo.of(hf, bridge, processing=processing, **recorded)
    if bare is not getattr(module, "original_model", None):
        info = dataclasses.replace(info, architecture=type(module).__name__)
    loaded = LoadedModel(
        info, hf, bridge, tokenizer, bos_id, causal=is_causal(hf, info.d_vocab), gives_tokens=gives_tokens(bridge)
    )
    return dataclasses.replace(loaded, checks=check(loaded))


def _module(own: OwnModel, recorded: dict[str, Any]) -> LoadedModel:
    """Any other module."""
    if own.d_vocab is None or own.n_ctx is None:
        raise InputError(
            f"{own.name} is a torch module, of which is to be said how many tokens it reads, how long a sequence, and "
            f"what its hook points are: {_remedy(own)}"
        )
    if own.d_vocab < 1 or own.n_ctx < 2:
        raise InputError(
            f"{own.name}: d_vocab is {own.d_vocab} and n_ctx {own.n_ctx}: expected a token or more, and two positions"
        )
    hooks = described_hooks(own)
    hf = Called(own.module, own.d_vocab, own.call)
    tokens, outputs = _readable_tokens(own, hf)
    blocks: dict[str, Any] = dict.fromkeys(("n_layers", "d_model", "n_heads", "d_head", "d_attention", "d_mlp"), 0)
    info = ModelInfo(
        processing="as given", architecture=type(own.module).__name__,
        dtype=str(next(own.module.parameters()).dtype).removeprefix("torch."), n_ctx=own.n_ctx, d_vocab=own.d_vocab,
        parallel_attention=False, transformer_lens=version("transformer-lens"), **blocks, **recorded,
    )  # fmt: skip
    bridge = ModuleBridge(hf, hooks)
    loaded = LoadedModel(
        info, hf, bridge, own.tokenizer or word_tokenizer(own.vocabulary, own.d_vocab), own.bos_id,
        causal=is_causal(hf, own.d_vocab, tokens.shape[1]), gives_tokens=outputs == own.d_vocab,
    )  # fmt: skip
    checks = _checked(loaded, hooks, tokens)
    bridge.hook_dict |= checks.hooks
    return dataclasses.replace(loaded, checks=checks)


def _remedy(own: OwnModel) -> str:
    """A description that would do, as far as the module itself says."""
    read = next((one.num_embeddings for one in own.module.modules() if isinstance(one, nn.Embedding)), "...")
    path = next((name for name, one in own.module.named_modules() if name and not isinstance(one, nn.Embedding)), "...")
    return (
        f"load_model(OwnModel(module, d_vocab={own.d_vocab or read}, n_ctx={own.n_ctx or '...'}, "
        f"hooks={dict(own.hooks) or {'NAME': path}}))"
    )


@torch.inference_mode()
def _readable_tokens(own: OwnModel, hf: Called) -> tuple[Int[Tensor, "batch pos"], int]:
    """A few random tokens that the module reads, as long as its context where it takes no shorter ones, and the number
    of its outputs.

    A context that is not huge is tried as well, so that one it does not take fails here and not in a harvest.

    Raises:
        InputError: a module that fails on both, or on its context, gives NaN, or not one answer a token or a sequence,
            or another to a sequence that it reads alone.
    """
    assert own.d_vocab is not None
    assert own.n_ctx is not None
    place, generator = next(own.module.parameters()).device, torch.Generator().manual_seed(0)
    for length in dict.fromkeys((min(TOKENS, own.n_ctx), own.n_ctx)):
        tokens = torch.randint(own.d_vocab, (2, length), generator=generator)
        tokens[0, -1] = own.d_vocab - 1
        tokens = tokens.to(place)
        try:
            logits, alone = hf(tokens).logits, hf(tokens[1:]).logits
            break
        except InputError:
            raise
        except Exception as error:  # the user's own code
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        raise InputError(
            f"{own.name} fails on {length} tokens below {own.d_vocab} ({reason}): check d_vocab, n_ctx and `call`"
        )
    if length < own.n_ctx <= MOST_TRIED and own.n_ctx * own.d_vocab <= MOST_LOGITS:
        try:
            hf(torch.randint(own.d_vocab, (1, own.n_ctx), generator=generator).to(place))
        except torch.OutOfMemoryError:
            pass  # says nothing about the context
        except Exception as error:  # the user's own code
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise InputError(
                f"{own.name} reads {length} tokens and fails on {own.n_ctx} ({reason}): give the longest that it takes "
                "as n_ctx"
            ) from None
    if logits.shape[:2] != tokens.shape:
        raise InputError(
            f"{own.name} gives logits {list(logits.shape)} for tokens {list(tokens.shape)}: expected [batch, pos, "
            "outputs]; say with `call` how to get them"
        )
    if bool(logits.isnan().any()):
        raise InputError(f"{own.name} gives NaN for random tokens: nothing can be measured on it")
    if not torch.allclose(logits[1:], alone, rtol=1e-3, atol=1e-3 * float(alone[alone.isfinite()].abs().max())):
        raise InputError(
            f"{own.name} gives other logits for a sequence alone than beside another: something in it is random, or it "
            "takes positions first, which `call` puts right: lambda module, tokens: module(tokens.T).transpose(0, 1)"
        )
    return tokens, logits.shape[-1]


def _checked(model: LoadedModel, hooks: dict[str, Any], tokens: Int[Tensor, "batch pos"]) -> Checks:
    """Which described hook points hold one vector a token."""
    from workbench.models.capture import hooked
    from workbench.models.places import HookSpec

    values: dict[str, Any] = {}
    passes: Counter[str] = Counter()

    def keep(hook: HookSpec, value: Any) -> None:
        values[hook.name] = value
        passes[hook.name] += 1

    with hooked(model, list(hooks.values()), keep), torch.no_grad():
        model.hf(tokens)
    usable, refused = {}, {}
    for name, hook in hooks.items():
        value = values.get(name)
        place = value.shape[:2] if isinstance(value, Tensor) and value.ndim == 3 else None
        if passes[name] > 1:
            refused[name] = f"{hook.component} runs {passes[name]} times in a pass, so that it has no one value there"
        elif value is not None and place in (tokens.shape, tokens.T.shape):
            usable[name] = dataclasses.replace(
                hook, width=value.shape[-1], positions_first=place != tokens.shape
            )  # fmt: skip
        else:
            found = "nothing" if value is None else f"shape {list(getattr(value, 'shape', []))}"
            refused[name] = f"{hook.component} gives {found} there, expected [batch, pos, width]"
    if not usable:
        raise InputError(f"{model.info.name} has no usable hook point: {'; '.join(refused.values())}")
    unread = f"the unembedding of {model.info.architecture} is not known, so nothing is read through it"
    return Checks(
        usable, refused, None, delegated=False, cached=False, fused=False, editable_patterns=False, unread=unread
    )


@torch.inference_mode()
def is_causal(hf: Any, d_vocab: int, length: int = 2) -> bool:
    """Whether the first token's logits do not depend on the later ones: encoders load as language models too."""
    tokens = torch.zeros(2, length, dtype=torch.long, device=next(hf.parameters()).device)
    tokens[1, 1:] = d_vocab - 1
    logits = hf(tokens, use_cache=False).logits[:, 0]
    scale = logits.abs().max()
    # Rounding alone, since both are computed in one batch.
    rounding = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    return not bool(torch.isfinite(scale)) or bool((logits[0] - logits[1]).abs().max() <= rounding * scale)
