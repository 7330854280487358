"""What bfloat16 and int8 rows cost in loss, on the trajectories of ``search_quality.py`` (trained once, kept in runs/).

For every trajectory and window of that benchmark at its first point: the held-out loss of two merges, the average and
one that extrapolates, less that of the same merge of float32 rows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from search_quality import ROWS, SPECS, heldout, windows
from trajectories import load, put

from traj_merge_callback import CheckpointWindow
from traj_merge_callback.evaluate.weights import installed
from traj_merge_callback.window.storage import DTYPES

MERGES = {"average": np.full(ROWS, 1 / ROWS), "extrapolating": np.array([0.0, 0.0, 0.0, -0.3, 0.2, 0.3, 0.4, 0.4])}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the JSON object to compact_rows.json in this folder")
    args = parser.parse_args()
    cases: dict[str, Any] = {}
    for trajectory in load(list(SPECS)):
        spec = trajectory.spec
        model, loss = spec.build(), heldout(spec.text, False)
        for kind in windows(spec, spec.points[0]):
            kept = {dtype: CheckpointWindow(model, ROWS, dtype=dtype, mean_rows=kind.samples > 1) for dtype in DTYPES}
            # Some rows more than fit, so that the anchor of int8 rows is renewed under them.
            for age in range(ROWS + 3, -1, -1):
                end = spec.points[0] - age * kind.spacing
                if end <= kind.spacing:
                    continue
                for sample in range(kind.samples - 1, -1, -1):
                    step = end - sample * (kind.spacing // kind.samples)
                    put(model, trajectory.at(step))
                    for window in kept.values():
                        window.sample(model, step) if sample else window.push(model, step)
            for merge, weights in MERGES.items():
                found = {}
                for dtype, window in kept.items():
                    with installed(window.layout, model, window.combine(weights)):
                        found[dtype] = loss.evaluate(model, "report").loss
                name = f"{spec.name}, {kind.name} rows, {merge}"
                cases[name] = {dtype: found[dtype] - found["float32"] for dtype in ("bfloat16", "int8")}
                print(f"{name}: {cases[name]}", flush=True)
    largest = {dtype: max(abs(case[dtype]) for case in cases.values()) for dtype in ("bfloat16", "int8")}
    document = {"largest_loss_difference_nats": largest, "cases": cases}
    if args.output:
        (args.output / "compact_rows.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
