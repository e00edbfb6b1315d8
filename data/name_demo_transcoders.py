"""Names the features of data/demo_transcoders by what they fire on and promote, for graphs without an index.

    python data/name_demo_transcoders.py [--tokens 300000]

1. What every MLP of the demo model reads is harvested from the standard library, and each layer indexed on it.
2. Every feature's name, as `FeatureIndex.names` has it without labels, goes into names.json: a list for each layer.
"""

import argparse
import json
import tempfile
from contextlib import closing
from pathlib import Path

from workbench import HarvestConfig, Workspace, load_model
from workbench.circuits.named import NAMES
from workbench.disk.names import layer_name
from workbench.models.bundled import demo_transcoders_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens to index")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        space, model = Workspace(Path(folder) / "workspace"), load_model("demo")
        coders = space.import_transcoders("mlps", "bundled")
        config = HarvestConfig("demo", "python-stdlib", ("blocks.*.mlp.hook_in",), max_tokens=arguments.tokens)
        space.harvest("read", config, model=model)
        names = []
        for layer in coders:
            sae = layer_name("mlps", layer)
            space.build_index(sae, harvest="read", model=model)
            with closing(space.index(sae)) as index:
                found = index.names()
            names.append([found[number] for number in range(len(found))])
    (demo_transcoders_dir() / NAMES).write_text(json.dumps(names, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
