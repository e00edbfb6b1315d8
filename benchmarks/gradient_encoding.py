"""What encoding with gradients costs the model, for gradient TopK SAEs: docs/methods/rules.md.

On the SAEs that benchmarks/rules.py leaves in a workspace. Every held-out context is run three times: as it is, with
its gradients; reading through the SAE encoding as TopK; and reading through the SAE encoding with these gradients,
which know the tokens to be predicted. Positions count as in `workbench.saes.evaluation`.

    python benchmarks/gradient_encoding.py WORKSPACE [--tokens 65536]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.splice import splice
from workbench import Workspace
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import open_corpus
from workbench.text.packing import FLAG_OK, pack

HOOK, CONTEXT, CONTEXTS_AT_ONCE, SEEDS = "blocks.2.hook_resid_post", 256, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    space, model = Workspace(arguments.workspace, create=False), load_model("demo", device="cpu")
    hook = resolve_hook(model, HOOK)
    saes = [space.sae(f"seed{seed}-gradient_topk") for seed in range(SEEDS)]
    sums = torch.zeros(SEEDS, 2, 2, dtype=torch.float64)
    count = 0
    left = arguments.tokens // CONTEXT
    documents = open_corpus("python-stdlib").documents("heldout")
    for packed in pack(documents, model.tokenizer, model.bos_id, CONTEXT, CONTEXTS_AT_ONCE):
        tokens = torch.from_numpy(packed.tokens[:left]).long()
        ordinary = torch.from_numpy(packed.flags[:left] == FLAG_OK)
        counted = ordinary[:, :-1] & ordinary[:, 1:]
        found = capture(model, tokens, [hook], gradients=True)
        x, gradients = (value[HOOK].float() for value in (found.activations, found.gradients))
        with torch.no_grad():
            clean = model.bridge(tokens)[:, :-1][counted].log_softmax(-1)
            targets = tokens[:, 1:][counted]
            for number, sae in enumerate(saes):
                for mode, given in enumerate((None, gradients)):
                    new = sae.decode(sae.encode(x, given)).view(x.shape)
                    spliced = replaced(model, tokens, new[ordinary], ordinary)[:, :-1][counted].log_softmax(-1)
                    sums[number, mode] += torch.stack([
                        F.nll_loss(spliced, targets, reduction="sum") - F.nll_loss(clean, targets, reduction="sum"),
                        (clean.exp() * (clean - spliced)).sum(),
                    ]).double()  # fmt: skip
        count += len(targets)
        left -= len(tokens)
        if left <= 0:
            break
    means = sums / count
    for mode, name in enumerate(("encoding as TopK", "encoding with gradients")):
        for metric, title in enumerate(("added nats", "KL")):
            values = means[:, mode, metric]
            print(f"{name:24} {title:10} {values.mean():.3f} ± {values.std():.3f}")
    print(f"{count} positions")


def replaced(model: LoadedModel, tokens: Tensor, new: Tensor, ordinary: Tensor) -> Tensor:
    """Logits with `new` rows in place of the ordinary tokens' activations."""
    with splice(model.bridge, HOOK, lambda rows: new, keep=~ordinary):
        logits: Tensor = model.bridge(tokens)
        return logits


if __name__ == "__main__":
    main()
