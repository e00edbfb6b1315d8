"""Builds the demo model's corpus: splits, removes duplicates, trains the tokenizer, packs the token streams.

    python data/prepare_corpus.py --site-packages DIR --site-packages DIR --out .corpus

1. Read the standard library and every installed package (`corpus_sources`), split by module path.
2. Remove duplicates and near-duplicates (`corpus_duplicates`).
3. Train a byte-level BPE of 4,096 tokens on the training side (`demo_tokenizer`), or take a model's (`--tokenizer`).
4. Encode. The training stream is `<|bos|> doc <|bos|> doc ...` in a shuffled order of documents, as uint16 under xz;
   held-out documents stay apart, with their sizes in bytes.

Writes train.xz, heldout.npz, tokenizer/ and manifest.json. No text leaves the folders it is installed in.
"""

import argparse
import json
import lzma
import random
import sysconfig
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from corpus_duplicates import Deduplicated, deduplicate
from corpus_sources import (
    STANDARD_LIBRARY,
    Distribution,
    Document,
    documents,
    installed_distributions,
    standard_library,
)
from demo_tokenizer import BOS_ID, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

# Token ids below 4,096 leave the high byte nearly constant: two-byte alignment (lp, pb) packs that away.
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2, "lp": 1, "pb": 1, "dict_size": 1 << 26}]


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    distributions, corpus = read_corpus(arguments.site_packages, arguments.max_package_mb)
    random.Random(arguments.seed).shuffle(corpus.train)
    report(f"{len(corpus.train)} training and {len(corpus.heldout)} held-out files", started)

    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer is None:
        tokenizer = train_tokenizer(document.text for document in corpus.train[:: arguments.tokenizer_every])
        report("tokenizer trained", started)
    else:
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    save_tokenizer(tokenizer, arguments.out / "tokenizer")

    train_ids = encode(tokenizer, [document.text for document in corpus.train])
    stream = np.concatenate([part for ids in train_ids for part in (np.array([BOS_ID], np.uint16), ids)])
    with lzma.open(arguments.out / "train.xz", "wb", filters=XZ_FILTERS) as file:
        file.write(stream.tobytes())
    heldout_ids = encode(tokenizer, [document.text for document in corpus.heldout])
    np.savez_compressed(
        arguments.out / "heldout.npz",
        tokens=np.concatenate(heldout_ids),
        lengths=np.array([len(ids) for ids in heldout_ids]),
        bytes=np.array([document.bytes for document in corpus.heldout]),
        stdlib=np.array([document.from_stdlib for document in corpus.heldout]),
        module_paths=np.array([document.module_path for document in corpus.heldout]),
    )
    manifest = build_manifest(distributions, corpus, stream)
    (arguments.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    report(f"{len(stream) / 1e6:.1f}M training tokens", started)
    print(json.dumps({key: value for key, value in manifest.items() if key != "packages"}, indent=1))


def read_corpus(site_packages: list[Path], max_package_mb: float) -> tuple[list[Distribution], Deduplicated]:
    """Steps 1 and 2: the running interpreter's standard library and the packages of some folders, each file once."""
    distributions = [standard_library(), *installed_distributions(site_packages, exclude=["interp-workbench"])]
    return distributions, deduplicate(
        document
        for distribution in distributions
        # The standard library comes first, so copies of its modules in packages are the duplicates that go.
        for document in documents(
            distribution, float("inf") if distribution.name == STANDARD_LIBRARY else max_package_mb * 1e6
        )
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--site-packages",
        type=Path,
        action="append",
        help="folder of installed packages; may be repeated (default: the running interpreter's)",
    )
    parser.add_argument("--out", type=Path, default=Path(".corpus"))
    parser.add_argument("--max-package-mb", type=float, default=2.0, help="most text taken from one package")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer is taken; none is trained then")
    parser.add_argument("--tokenizer-every", type=int, default=1, help="train the tokenizer on every n-th file")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents in the stream")
    arguments = parser.parse_args()
    arguments.site_packages = arguments.site_packages or [Path(sysconfig.get_path("purelib"))]
    return arguments


def encode(tokenizer: Any, texts: list[str], batch: int = 512) -> list[np.ndarray]:
    """Token ids of each text."""
    return [
        np.array(encoding.ids, np.uint16)
        for start in range(0, len(texts), batch)
        for encoding in tokenizer.encode_batch_fast(texts[start : start + batch], add_special_tokens=False)
    ]


def build_manifest(distributions: list[Distribution], corpus: Deduplicated, stream: np.ndarray) -> dict[str, Any]:
    """What the corpus holds, without any path of the machine it was built on."""
    files: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for document in corpus.train + corpus.heldout:
        files[document.distribution, document.split] += 1
        sizes[document.distribution, document.split] += document.bytes
    packages = [
        {
            "name": distribution.name,
            "version": distribution.version,
            "train_files": files[distribution.name, "train"],
            "train_bytes": sizes[distribution.name, "train"],
            "heldout_files": files[distribution.name, "heldout"],
            "heldout_bytes": sizes[distribution.name, "heldout"],
        }
        for distribution in distributions
        if files[distribution.name, "train"] + files[distribution.name, "heldout"]
    ]
    return {
        "split": "workbench.text.python_source.split_of: one module path in ten held out, by SHA-256",
        "train_files": len(corpus.train),
        "train_bytes": sum(document.bytes for document in corpus.train),
        "train_tokens": len(stream),
        "heldout_files": len(corpus.heldout),
        "heldout_bytes": sum(document.bytes for document in corpus.heldout),
        "dropped_files": corpus.dropped,
        "sha256": text_digest(corpus.train + corpus.heldout),
        "packages": packages,
    }


def text_digest(corpus: list[Document]) -> str:
    """SHA-256 over all documents in the order of their distribution and path."""
    digest = sha256()
    for document in sorted(corpus, key=lambda document: (document.distribution, document.module_path)):
        digest.update(f"{document.distribution}\0{document.module_path}\0{document.text}\0".encode())
    return digest.hexdigest()


def report(message: str, started: float) -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)


if __name__ == "__main__":
    main()
