"""What searches find that encoders do not, where the true codes are known (docs/methods/inference.md).

Planted rows (`sae.planted`), read under the true directions and under the decoder of a TopK SAE trained on them, with
as many features a row as fire on average, or on average:

    encoder            the SAE's own; of the true directions the k largest products with them, a tied encoder's
    the others         as `workbench.saes.inference`

FVU, L0 and the mean F1 of firing over the true features, each against its matched direction (`sae.recovery`).

    python benchmarks/inference.py [--seeds 0 1 2] [--steps 600] [--cases zipf correlated ...] [--json]
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from planted import CASES, HELD_OUT_ROWS, config, measure

from sae import SAE, TopK, train
from sae.inference import InferredSAE
from sae.planted import PlantedDictionary, PlantedSource, Planting
from workbench.saes.inference import METHODS, SAMPLE_ROWS, ways_to_codes


def tied(truth: PlantedDictionary, k: int) -> SAE:
    """The true directions as an SAE."""
    planting = truth.planting
    sae = SAE(planting.d_in, planting.n_features, TopK(k))
    with torch.no_grad():
        sae.W_dec.copy_(truth.directions)
        sae.W_enc.copy_(truth.directions.T)
        sae.b_dec.copy_(truth.offset)
    return sae


def found(planting: Planting, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row a dictionary and method."""
    truth = PlantedDictionary(replace(planting, seed=seed))
    k = round(planting.l0)
    made = train([config("sae", TopK(k), planting.n_features * 3 // 2, steps, seed)], PlantedSource(truth, seed))[0].sae
    assert made is not None
    rows = truth.rows(HELD_OUT_ROWS)
    for name, sae in (("true directions", tied(truth, k)), ("trained SAE", made)):
        ways, _ = ways_to_codes(sae, rows.x[:SAMPLE_ROWS], [k], k, METHODS)
        for method in METHODS:
            found = measure(InferredSAE(sae, ways[method, k]), truth, rows)
            yield {"dictionary": name, "method": method, **{key: found[key] for key in ("l0", "fvu", "f1")}}


def table(rows: Mapping[int, list[dict[str, Any]]]) -> pd.DataFrame:
    """Mean and standard deviation over the seeds."""
    every = pd.concat([pd.DataFrame(one) for one in rows.values()])
    return every.groupby(["dictionary", "method"], sort=False).agg(["mean", "std"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["zipf", "correlated"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for case in options.cases:
        rows = {seed: list(found(CASES[case], seed, options.steps)) for seed in options.seeds}
        if options.json:
            print(json.dumps({"case": case, "rows": rows}))
        else:
            print(f"\n{case}\n{table(rows).to_string(float_format='{:.3f}'.format)}")


if __name__ == "__main__":
    main()
