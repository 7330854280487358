"""``traj-merge merge`` against mergekit's linear merge: whole processes, on the same files, in turns.

Checkpoints of a Llama in bfloat16 are made first, in shards. mergekit needs an environment of its own, as it pins other
versions: ``python -m venv /some/where && /some/where/bin/pip install mergekit``. The last line is one JSON object.

    python benchmarks/offline_merge.py --mergekit /some/where/bin/mergekit-yaml --output benchmarks/results
    python benchmarks/offline_merge.py --mergekit ... --quick       16 million parameters instead of 0.5 billion
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from traj_merge_callback.disk.checkpoints import weights_of
from traj_merge_callback.offline import export

# Layers and width of the model.
SIZES = {False: (16, 1536), True: (4, 512)}
# Seconds between two looks at a process's memory.
LOOK_EVERY = 0.005


def make_checkpoints(folder: Path, count: int, *, quick: bool) -> list[Path]:
    """Folders with the weights of one random model and small random steps from it."""
    layers, width = SIZES[quick]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    paths = []
    for number in range(1, count + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        paths.append(folder / f"step{number}")
        model.save_pretrained(paths[-1], max_shard_size="500MB")
    return paths


def measured(command: list[str]) -> dict[str, float]:
    """Seconds that a process takes, and the most memory that it has: all of it, and without mapped files."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    began, anonymous, whole = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        anonymous = max(anonymous, int(lines.get("RssAnon", "0 kB").split()[0]))
        whole = max(whole, int(lines.get("VmHWM", "0 kB").split()[0]))
        time.sleep(LOOK_EVERY)
    said, _ = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{said[-3000:]}")
    return {"seconds": seconds, "anonymous_mb": anonymous / 1024, "resident_mb": whole / 1024}


def largest_difference(one: Path, two: Path) -> float:
    """Between the tensors of two model folders; in the units of their numbers."""
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def main() -> None:
    """Compare, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="the program mergekit-yaml")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for offline_merge.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_checkpoints(folder / "run", arguments.checkpoints, quick=arguments.quick)
        weights = ",".join(f"1/{len(paths)}" for _ in paths)
        ours, theirs = folder / "ours", folder / "theirs"
        recipe = folder / "recipe.yaml"
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "mergekit": []}
        for _ in range(arguments.repeats):
            subprocess.run(["rm", "-rf", str(ours), str(theirs)], check=True)
            command = [sys.executable, "-m", "traj_merge_callback", "merge", str(folder / "run"), "--weights", weights]
            runs["ours"].append(measured([*command, "--output", str(ours), "--json"]))
            recipe.write_text(export(ours))
            command = [arguments.mergekit, str(recipe), str(theirs), "--no-copy-tokenizer", "--no-write-model-card"]
            runs["mergekit"].append(measured(command))
        size = sum(path.stat().st_size for path in paths[0].glob("*.safetensors"))
        with safe_open(next(ours.glob("*.safetensors")), framework="pt") as opened:
            dtype = opened.get_slice(next(iter(opened.keys()))).get_dtype()
        difference = largest_difference(ours, theirs)

    def ratio(what: str) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(runs["ours"], runs["mergekit"], strict=True))

    result: dict[str, Any] = {
        "ours_over_mergekit_time": ratio("seconds"),
        "peak_memory_ratio": ratio("anonymous_mb"),
        "resident_memory_ratio": ratio("resident_mb"),
        "max_abs_difference": difference,
        "checkpoints": len(paths),
        "checkpoint_mb": size / 1e6,
        "dtype": dtype,
        "runs": runs,
        "torch": torch.__version__,
        "hardware": f"{os.cpu_count()} cores",
    }
    if arguments.output:
        (arguments.output / "offline_merge.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
