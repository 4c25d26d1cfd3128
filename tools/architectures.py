"""What `tpfuse explain` says of every causal language model of transformers that has a tensor-parallel plan, 4 layers each.

    python tools/architectures.py --out benchmarks/results/architectures-cpu-1.json [--only llama,qwen3_next]

Each runs in a process of its own, on the meta device, for two ranks of an H100; half a minute each.  Rows of models that are not
run again stay in the file.  Configurations are the classes' own, cut to 4 layers; some are not whole without a checkpoint's, and
then the row holds the error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

LAYERS = 4
BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "block_types", "layers_block_type", "attn_type_list")


def names() -> list[str]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if n in CONFIG_MAPPING and _plan(CONFIG_MAPPING[n])]


def _plan(config: Any) -> Any:
    return getattr(config, "base_model_tp_plan", None)


def row(name: str) -> dict[str, Any]:
    """The report of one architecture: tpfuse's operators by name, and why all-reduces were left."""
    import torch
    from transformers import CONFIG_MAPPING

    import tpfuse
    from tpfuse import shim
    from tpfuse.cli import models

    models.quiet()
    config = CONFIG_MAPPING[name]()
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, LAYERS)
    for key in BY_LAYER:
        if isinstance(value := getattr(text, key, None), list | tuple):
            setattr(text, key, value[:LAYERS])
    shim.join_fake_group(2)
    model = models.build(config, 2, torch.bfloat16)
    backends = frozenset({"reference", "triton", "cuda", "nccl", "torch"})
    target = tpfuse.Target("cuda", sm=90, world=2, peer_access=True, backends=backends)
    ids = torch.zeros(1, 24, dtype=torch.long, device="meta")
    report = tpfuse.explain(model, input_ids=ids, use_cache=False, target=target)
    left = Counter(str(e.reason) for e in report.declined() if e.attributes.get("operator") == "all_reduce")
    return {"name": name, "operators": report.counts(), "left": dict(left)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        try:
            found = row(given.one)
        except Exception as error:
            found = {"name": given.one, "error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        print(json.dumps(found), flush=True)
        os._exit(0)  # nothing of the fake group is waited for
    from tpfuse.measure import results

    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    known = {r["name"]: r for r in json.loads(given.out.read_text())["rows"]} if given.out.exists() else {}
    for name in given.only.split(",") if given.only else names():
        try:
            command = [sys.executable, __file__, "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            known[name] = json.loads(done.stdout.strip().splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError):
            known[name] = {"name": name, "error": "no answer"}
        known[name]["commit"] = results.commit()
        print(known[name], flush=True)
        rows = sorted(known.values(), key=lambda r: r["name"])
        results.write(given.out, results.document("architectures", rows, versions=versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
