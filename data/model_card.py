"""Writes a model folder's README.md from its config, training record, manifest and evaluation.

    python data/model_card.py data/demo_model

Every number in the card comes from those files, so a model trained anew gets a card that is true of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

DEAD_LAYER = 0.25
"""Share of units that never fire from which the card's limits name a layer."""

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---
# Demo model: a small language model of Python source

A GPT-2-architecture model (`GPT2LMHeadModel`) trained from scratch on Python source, small enough to ship with the
repository and to run on a laptop's CPU. It is there to try interpretability methods on, not to write code.

| | |
| --- | --- |
| layers, width, heads, MLP width | {layers}, {d_model}, {heads}, {d_mlp} |
| activation function | `{activation}` |
| context | 512 tokens |
| vocabulary | 4,096 (byte-level BPE), embeddings tied |
| parameters | {parameters:.2f} million, stored in fp16 |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="float32")
```

`<|bos|>` (id 0) begins every window and separates documents. The tokenizer does not add it: put it in front. Training
windows are `<|bos|>` and the tokens that follow some place in a stream of documents; attention may cross documents.

## Training data

The Python standard library with its tests and {packages} packages, read where they were installed: {train_mb:.0f} MB or
{train_tokens:.1f} million tokens. `manifest.json` names every package with its version, number of files and bytes.

- One module path in ten is held out (`workbench.text.python_source.split_of`).
- Exact duplicates are dropped. So are training files that share more than 40% of their lines with a held-out
  standard-library file, and training files that mostly repeat other ones.
- A held-out file more than half of whose lines occur in training files is not used for evaluation.
- At most 2 MB are taken from one package.

## Training

{steps:,} steps of {windows} windows, {tokens:.2f} billion tokens or {epochs:.0f} passes over the text, in
{minutes:.1f} minutes on one {device} ({precision}).
AdamW, peak learning rate {learning_rate:g}, {warmup} warm-up steps, linear decay to zero, weight decay
{weight_decay:g}. `training.json` has its course, and what rounding to fp16 changes.

## Measurements

`evaluation.json`, by `data/evaluate_demo_model.py` on {machine}:

| held-out files of | files | size | bits per byte | 5-gram model |
| --- | --- | --- | --- | --- |
{heldout_rows}

Each file by itself, in windows of `<|bos|>` and the next 511 tokens without overlap; every token is scored once. The
5-gram model (interpolated modified Kneser-Ney, the same tokens, the same training stream) sees the whole file; its
number can be made again only where the training stream is at hand.

| layer | best induction score | best previous-token score | MLP activations exactly zero | units that never fire |
| --- | --- | --- | --- | --- |
{layer_rows}

Induction: mean attention from each token of a repeated random sequence to the token after its first occurrence; the
best head is {induction_head}. Previous token: mean attention to the token before, on held-out code; the best head is
{previous_head}.

## Limits

- It knows local patterns of Python; it does not write working programs, and its text may repeat licence headers,
  names and other frequent text of its sources.
- Context is 512 tokens, and English prose appears only as comments and docstrings.
{dead_layers}
## Licence

The weights come under the repository's licence. They were trained on source code of packages that have their own
licences; none of those files is contained here.

## Making it again

```
python data/prepare_corpus.py --site-packages DIR --site-packages DIR --out .corpus
python data/train_demo_model.py --corpus .corpus --out {folder} --activation {activation} \\
    --steps {steps} --learning-rate {learning_rate:g} --warmup {warmup} --seed {seed}
python data/evaluate_demo_model.py --corpus .corpus --model {folder}
```

The corpus depends on what is installed, and arithmetic on a GPU is not deterministic: expect the same quality, not
the same bits.
"""


def write_card(folder: Path) -> None:
    """Writes README.md into a folder that training and evaluation have filled."""
    evaluation, manifest, training = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("evaluation", "manifest", "training")
    )
    config = training["config"]
    card = CARD.format(
        **config | {key: training[key] for key in ("steps", "epochs", "device", "precision")},
        folder=f"data/{folder.resolve().name}",
        d_mlp=4 * config["d_model"],
        parameters=training["parameters"] / 1e6,
        packages=len(manifest["packages"]) - 1,
        train_mb=manifest["train_bytes"] / 1e6,
        train_tokens=manifest["train_tokens"] / 1e6,
        tokens=training["tokens"] / 1e9,
        minutes=training["seconds"] / 60,
        machine=evaluation["machine"],
        heldout_rows="\n".join(map(heldout_row, evaluation["heldout"].items())),
        layer_rows="\n".join(layer_row(evaluation, layer) for layer in range(config["layers"])),
        induction_head=f"{evaluation['induction']['best_head']} ({evaluation['induction']['best']:.2f})",
        previous_head=f"{evaluation['previous_token']['best_head']} ({evaluation['previous_token']['best']:.2f})",
        dead_layers="".join(
            f"- {share:.0%} of the MLP units of layer {layer} never fire on held-out code.\n"
            for layer, share in enumerate(evaluation["dead_units_by_layer"])
            if share >= DEAD_LAYER
        ),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def heldout_row(item: tuple[str, dict[str, Any]]) -> str:
    name, files = item
    scores = f"{files['bits_per_byte']:.3f} | {files['five_gram_bits_per_byte']:.3f}"
    return f"| {name} | {files['files']} | {files['bytes'] / 1e6:.2f} MB | {scores} |"


def layer_row(evaluation: dict[str, Any], layer: int) -> str:
    induction, previous = (max(evaluation[kind]["scores"][layer]) for kind in ("induction", "previous_token"))
    zero, dead = (evaluation[f"{kind}_by_layer"][layer] for kind in ("zero_activations", "dead_units"))
    return f"| {layer} | {induction:.2f} | {previous:.2f} | {zero:.1%} | {dead:.1%} |"


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
