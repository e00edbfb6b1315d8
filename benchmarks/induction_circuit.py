"""The demo model's induction circuit by six methods: the numbers and figures of docs/methods/induction.md.

    python benchmarks/induction_circuit.py [--draws 10] [--prompts 8] [--no-figures]

Everything is measured on several draws of the prompts, seeds 0, 1, ...; all prompts of a draw repeat at the same place.
Prints for the strongest heads the mean of each method with the least and the greatest over the draws, what the page
claims draw by draw, and the methods' rank correlations; writes two SVG files to docs/methods/figures/. Ablation is
measured twice: as the fall of the logit difference, and as the loss it adds on the second repeat of random tokens,
where induction is the only way to know what comes next.
"""

import argparse
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from circuits.ablation import ablate_heads, head_means
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.faithfulness import FaithfulnessCurve, faithfulness_curve
from circuits.heads import head_scores, repeated_tokens
from circuits.nodes import head_name, head_names
from circuits.patching import patch_activations
from circuits.prompts import PromptSet
from circuits.tasks import make_task
from workbench.circuits.heads import first_and_others
from workbench.models.load import LoadedModel, load_model
from workbench.show.colours import PALETTE

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "methods" / "figures"
COLOURS = (PALETTE[1], PALETTE[0])
"""Of EAP and EAP-IG."""
CIRCUIT = ("a2.h0", "a3.h0", "a3.h3", "a3.h5")


@torch.no_grad()
def second_repeat_losses(model: LoadedModel, rows: torch.Tensor, prompts: PromptSet) -> dict[str, float]:
    """Nats that mean-ablating each head adds to the loss on the second repeat.

    `head_means` are those of the task's prompts, which are random tokens as well.
    """
    half = (rows.shape[1] - 1) // 2
    targets = rows[:, half + 2 :]

    def loss(hooks: list[Any]) -> float:
        with model.bridge.hooks(fwd_hooks=hooks):
            logits = model.bridge(rows)[:, half + 1 : -1]
        return float(-logits.log_softmax(-1).gather(2, targets[..., None]).double().mean())

    before, found = loss([]), {"none": 0.0}
    print(f"loss on the second repeat: {before:.3f} nats", flush=True)
    for layer, (name, mean) in enumerate(head_means(model.bridge, prompts).items()):
        for head in range(model.info.n_heads):

            def ablate(value: torch.Tensor, hook: Any, head: int = head, mean: torch.Tensor = mean) -> torch.Tensor:
                value = value.clone()
                value[:, :, head] = mean[head]
                return value

            found[head_name(layer, head)] = loss([(name, ablate)]) - before
    return found


def measure(model: LoadedModel, n: int, seed: int) -> tuple[pd.DataFrame, list[FaithfulnessCurve], dict[str, float]]:
    """One draw: one row a head and one column a method; the curves of EAP and EAP-IG; the metric on either prompts."""
    prompts = make_task("induction", model.tokenizer, model.bos_id, n, seed)
    first, vocabulary = first_and_others(model)
    rows = repeated_tokens(vocabulary, first, n, seed=seed)
    scores = head_scores(model.bridge, rows).table().set_index("node")
    table = scores[["previous_token", "induction"]].copy()
    table["repeat loss"] = pd.Series(second_repeat_losses(model, rows, prompts))
    heads = head_names(model.info.n_layers, model.info.n_heads)
    edges = {variant: attribute_edges(model.bridge, prompts, variant=variant) for variant in ("eap", "ig-inputs")}
    for column, found in (
        ("ablation", ablate_heads(model.bridge, prompts, kind="mean-over-positions")),
        ("patching", patch_activations(model.bridge, prompts)),
        ("EAP-IG", edges["ig-inputs"].nodes()),
        ("EAP", edges["eap"].nodes()),
        ("direct", logit_attribution(model.bridge, prompts).nodes()),
    ):
        table[column] = pd.Series({head: found[head] for head in heads})
    curves = [faithfulness_curve(model.bridge, prompts, found) for found in edges.values()]
    return table, curves, {"clean": edges["eap"].clean, "corrupted": edges["eap"].corrupted}


def claims(table: pd.DataFrame, curves: Sequence[FaithfulnessCurve], metric: Mapping[str, float]) -> dict[str, object]:
    """What the page says, on one draw."""

    def first(method: str, n: int) -> list[str]:
        return list(table[method].abs().nlargest(n).index)

    eap, ig = curves
    tenth, few = ig.fractions.index(0.1), ig.fractions.index(0.005)
    ranks = table.rank().corr()
    return {
        **metric,
        "patching: circuit first": set(first("patching", 4)) == set(CIRCUIT),
        "EAP-IG: circuit first": set(first("EAP-IG", 4)) == set(CIRCUIT),
        "same order": first("patching", 4) == first("EAP-IG", 4),
        "patching first": " ".join(first("patching", 5)),
        "ablation first": " ".join(first("ablation", 2)),
        "direct first": " ".join(first("direct", 3)),
        "EAP a2.h0 / patching": table["EAP"]["a2.h0"] / table["patching"]["a2.h0"],
        "patching~direct, Pearson": table["patching"].corr(table["direct"]),
        "patching~EAP, Pearson": table["patching"].corr(table["EAP"]),
        "patching~EAP-IG, Pearson": table["patching"].corr(table["EAP-IG"]),
        "patching~EAP-IG": ranks["patching"]["EAP-IG"],
        "ablation~repeat loss": ranks["ablation"]["repeat loss"],
        "tenth, EAP-IG": ig.faithfulness[tenth],
        "tenth, EAP": eap.faithfulness[tenth],
        "without 0.5%, EAP-IG": ig.completeness[few],
    }


def ranges(tables: Sequence[pd.DataFrame], top: int = 10) -> pd.DataFrame:
    """`mean (least to greatest)` of every method on the heads of largest mean ablation."""
    together = pd.concat(tables, keys=range(len(tables)), names=["draw", "node"])
    groups = together.groupby("node", sort=False)
    mean, least, greatest = groups.mean(), groups.min(), groups.max()
    chosen = mean["ablation"].abs().nlargest(top).index
    return pd.DataFrame(
        {
            column: [
                f"{mean[column][node]:.2f} ({least[column][node]:.2f} to {greatest[column][node]:.2f})"
                for node in chosen
            ]
            for column in mean.columns
        },
        index=chosen,
    )


def head_maps(table: pd.DataFrame, columns: Sequence[str], n_layers: int, n_heads: int) -> str:
    """One small heat map a column, blue above zero and red below, the strongest three named, the circuit framed."""
    cell, gap, across = 22, 46, 4
    width = n_heads * cell + gap
    rows = -(-len(columns) // across)
    height = n_layers * cell + 64
    pieces = []
    for number, column in enumerate(columns):
        left, top = 40 + (number % across) * width, 34 + (number // across) * height
        largest = float(table[column].abs().max())
        pieces.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{escape(column)}</text>')
        for node, value in table[column].items():
            layer, head = (int(part) for part in str(node)[1:].split(".h"))
            x, y = left + head * cell, top + (n_layers - 1 - layer) * cell
            colour = PALETTE[0] if value > 0 else PALETTE[1]
            frame = ' stroke="#111" stroke-width="1.6"' if node in CIRCUIT else ' stroke="#ddd" stroke-width="0.5"'
            pieces.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{colour}" '
                f'fill-opacity="{abs(value) / largest:.3f}"{frame}><title>{node}: {value:.3g}</title></rect>'
            )
        best = table[column].abs().nlargest(3).index
        named = ", ".join(f"{node} {table[column][node]:.2g}" for node in best)
        pieces.append(f'<text x="{left}" y="{top + n_layers * cell + 15}" fill="#555">{named}</text>')
        if number % across == 0:
            pieces += [
                f'<text x="{left - 8}" y="{top + (n_layers - 1 - layer) * cell + 15}" text-anchor="end">{layer}</text>'
                for layer in range(n_layers)
            ]
    return svg(40 + across * width, 20 + rows * height, pieces)


def curve_chart(draws: Sequence[Sequence[FaithfulnessCurve]]) -> str:
    """Faithfulness (solid) and completeness (dashed) against the share of edges, on a logarithmic axis; a thin line a
    draw and a thick one for their mean."""
    wide, high, left, top = 520, 240, 52, 20
    low, span = -0.25, 1.5

    def place(fraction: float, value: float) -> tuple[float, float]:
        x = left + wide * (1 + torch.log10(torch.tensor(fraction)).item() / 3)
        return x, top + high * (1 - (min(max(value, low), low + span) - low) / span)

    def line(fractions: Sequence[float], values: Sequence[float], style: str) -> str:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, fractions, values))
        return f'<polyline points="{points}" fill="none" {style}/>'

    pieces = []
    for level in (0.0, 0.5, 1.0):
        y = place(1, level)[1]
        pieces.append(f'<line x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        pieces.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{level:g}</text>')
    for fraction in (0.001, 0.01, 0.1, 1.0):
        x = place(fraction, 0)[0]
        pieces.append(f'<text x="{x:.1f}" y="{top + high + 16}" text-anchor="middle">{fraction:g}</text>')
    pieces.append(f'<text x="{left + wide / 2}" y="{top + high + 34}" text-anchor="middle">share of the edges</text>')
    for number, (curves, colour) in enumerate(zip(zip(*draws, strict=True), COLOURS, strict=True)):
        for kind, dash in (("faithfulness", ""), ("completeness", 'stroke-dasharray="5 4"')):
            values = torch.tensor([getattr(curve, kind) for curve in curves])
            style = f'stroke="{colour}" {dash}'
            pieces += [
                line(curves[0].fractions, one, f'{style} stroke-width="0.7" opacity="0.4"') for one in values.tolist()
            ]
            pieces.append(line(curves[0].fractions, values.mean(dim=0).tolist(), f'{style} stroke-width="2"'))
        pieces.append(f'<text x="{left + 8}" y="{top + 14 + 16 * number}" fill="{colour}">{curves[0].method}</text>')
    return svg(left + wide + 20, top + high + 46, pieces)


def svg(width: float, height: float, pieces: Sequence[str]) -> str:
    """A picture on white, readable on light and dark pages."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join(pieces)
        + "</svg>\n"
    )


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--no-figures", action="store_true", help="print alone")
    asked = parser.parse_args()
    model = load_model("demo", device="cpu")
    found = [measure(model, asked.prompts, seed) for seed in range(asked.draws)]
    tables = [table for table, _, _ in found]
    print(ranges(tables).to_string())
    said = pd.DataFrame([claims(*one) for one in found]).rename_axis("draw")
    print(said.round(2).T.to_string())
    print(said.describe().loc[["mean", "std", "min", "max"]].round(2).T.to_string())
    correlations = pd.concat([table.rank().corr() for table in tables]).groupby(level=0, sort=False).mean()
    print(correlations.round(2).to_string())
    if asked.no_figures:
        return
    FIGURES.mkdir(exist_ok=True)
    mean = pd.concat(tables).groupby(level=0, sort=False).mean()
    maps = head_maps(mean, list(mean.columns), model.info.n_layers, model.info.n_heads)
    (FIGURES / "induction-heads.svg").write_text(maps, encoding="utf-8")
    (FIGURES / "induction-curves.svg").write_text(curve_chart([curves for _, curves, _ in found]), encoding="utf-8")
    print(f"figures in {FIGURES}")


if __name__ == "__main__":
    main()
