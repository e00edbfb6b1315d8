"""Trains a transformer on Boolean functions in context and holds it against Bayes: `in_context.py` says of what.

    python data/train_in_context.py FOLDER --family conjunctions+disjunctions --steps 8000

writes a Hugging Face folder with a tokenizer of words ("<s> 01101001 F 11100101 T"), and `measured.csv`: the model on
every family, before and after training, by number of examples. The loss is of labels alone: inputs are random. An
input's embedding starts as the sum of one vector a bit. Minutes on a GPU.

    python data/train_in_context.py FOLDER --family conjunctions+disjunctions --measure-only

measures what lies in FOLDER again, in single precision on the CPU, on prompts that are always the same ones, and writes
nothing.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from in_context import (
    BITS,
    BOS,
    CONTEXT,
    EXAMPLES,
    FALSE,
    FAMILIES,
    FIRST,
    WORDS,
    Family,
    bits,
    family_name,
    measured,
    mixture,
    tokens_of,
)
from small_training import fit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def build(layers: int, width: int, heads: int) -> GPT2LMHeadModel:
    """A GPT-2 whose input tokens start as what a linear map of their bits would give."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS), n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=BOS,
        )
    )  # fmt: skip
    with torch.no_grad():
        signs = 2.0 * bits(torch.arange(2**BITS)) - 1
        model.transformer.wte.weight[FIRST:] = signs @ (0.1 * torch.randn(BITS, width))
    return model


def train(
    model: GPT2LMHeadModel, family: Family, *, steps: int, batch: int, lr: float, seed: int, device: str
) -> list[float]:
    """Trains the model where it is; the loss of every step in nats a label."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        inputs, labels = family.drawn(batch, generator)
        return tokens_of(inputs, labels), FALSE + labels.long()

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens).logits[:, 1::2]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return fit(model, draw, loss_of, steps=steps, lr=lr, weight_decay=0.01)


def on_all_families(model: GPT2LMHeadModel, trained_on: Family, when: str, n: int) -> pd.DataFrame:
    """The model on every family; columns as `in_context.measured`, with `asked` and `when`."""
    device = trained_on.table.device
    tables = [
        measured(model, trained_on, make().to(device), n=n).assign(asked=name, when=when)
        for name, make in FAMILIES.items()
    ]
    return pd.concat(tables, ignore_index=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words between spaces."""
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[BOS]))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=WORDS[BOS], eos_token=WORDS[BOS])


def show(table: pd.DataFrame) -> None:
    """The trained model at a few numbers of examples."""
    shown = (table["when"] == "trained") & table["examples"].isin([0, 4, 8, 16, EXAMPLES - 1])
    print(table[shown].to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--family", type=family_name, default="conjunctions+disjunctions", help="+ between those of a mixture"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2048, help="to measure on")
    parser.add_argument("--measure-only", action="store_true", help="of a finished model, trained on --family")
    asked = parser.parse_args()
    if asked.measure_only:
        finished = GPT2LMHeadModel.from_pretrained(asked.folder, dtype=torch.float32).eval()
        show(on_all_families(finished, mixture(asked.family), "trained", asked.prompts).round(4))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(asked.seed)
    family = mixture(asked.family).to(device)
    model = build(asked.layers, asked.width, asked.heads).to(device)
    before = on_all_families(model.eval(), family, "untrained", asked.prompts)
    settings = {name: getattr(asked, name) for name in ("steps", "batch", "lr", "seed")}
    train(model.train(), family, **settings, device=device)
    after = on_all_families(model.eval(), family, "trained", asked.prompts)
    asked.folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(asked.folder)
    tokenizer().save_pretrained(asked.folder)
    table = pd.concat([before, after], ignore_index=True).round(4)
    table.to_csv(asked.folder / "measured.csv", index=False)
    show(table)


if __name__ == "__main__":
    main()
