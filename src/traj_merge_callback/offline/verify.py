"""Is a snapshot what was written, and does it have the loss that was reported for it?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..disk.model_files import load_merged, verify_snapshot
from ..disk.snapshots import read_merge, snapshot_folder
from ..disk.untrusted import damage_of, mapping, number
from ..evaluate.heldout import HeldOutLoss, Nll
from .checkpoints import Checkpoint
from .models import device_named, load_model, load_tokenizer
from .search import heldout_of, sources_in

# Nats per token that other hardware may make of the same weights and text.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verified:
    """What was found of a snapshot whose files are what was written.

    Args:
        folder: the snapshot.
        reported: its loss on the report split by merge.json, nats per token.
        recomputed: the same, evaluated anew; None: the held-out data are not known.
        same_data: whether the held-out sequences, and their splits, are those that were reported on.
        differs: what differs, in sentences; empty where nothing does.
    """

    folder: str
    reported: float | None
    recomputed: float | None
    same_data: bool | None
    differs: list[str]


def verify(
    folder: str | Path,
    heldout: Any = None,
    *,
    model: nn.Module | None = None,
    nll: Nll | None = None,
    device: str | None = None,
) -> Verified:
    """Check a snapshot's files, and evaluate it again on the report split.

    Args:
        folder: of the snapshot.
        heldout: names of the text that it was measured on, if it lies elsewhere now; or, for a snapshot of a live run,
            the loader that the run had. None: what merge.json names.
        model: of the snapshot's architecture, where transformers cannot load it.
        nll: as in the run.
        device: to evaluate on; by default the first GPU, or else the CPU.

    Raises:
        FileNotFoundError: there is no snapshot, or a file of it or of the text is missing.
        ValueError: a file is not what was written.
    """
    folder = snapshot_folder(folder)
    merge = read_merge(folder)
    verify_snapshot(folder, merge)
    with damage_of(folder / "merge.json"):
        split, described = mapping(merge.get("report_split") or {}), merge.get("heldout_data")
        described = None if described is None else mapping(described)
        reported = None if split.get("merged_loss") is None else float(number(split["merged_loss"]))
    if reported is None or (heldout is None and described is None):
        return Verified(str(folder), reported, None, None, [])
    checkpoint = Checkpoint(str(folder), merge.get("step", 0), lambda: folder)
    if model is None:
        model = load_model(checkpoint, None, device_named(device))
    else:
        load_merged(folder, model)
    options: dict[str, Any] = {}
    sources = sources_in(heldout)
    if described is not None and (heldout is None or sources is not None):
        described = described if sources is None else {**described, "sources": sources}
        with damage_of(folder / "merge.json"):
            name = described["tokenizer"] if described["tokenizer"] == "bytes" else None
            heldout = heldout_of(described, load_tokenizer([checkpoint], name)[0])
            options = {key: described[key] for key in ("search_fraction", "report_only", "seed")}
    loss = HeldOutLoss(heldout, nll=nll, **options)
    same = loss.digest == merge.get("heldout")
    recomputed = loss.evaluate(model, "report").only(loss.searched).loss
    differs = [] if same else ["the held-out sequences, or their splits, are not those that were reported on"]
    if not abs(recomputed - reported) <= _TOLERANCE:
        differs.append(f"the loss is {recomputed:.6f}, and {reported:.6f} was reported")
    return Verified(str(folder), reported, recomputed, same, differs)
