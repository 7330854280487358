"""Everything logged at a merge: the record in metrics.jsonl and the scalars in the trainer's logs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .disk.atomic import write_whole
from .search.evaluation import Evaluation

logger = logging.getLogger("traj_merge_callback")

PREFIX = "merge/"

MEANINGS = {
    "merge/loss": "held-out loss of the merged model on the report split, nats per token",
    "merge/perplexity": "exp(merge/loss)",
    "merge/live_loss": "held-out loss of the live model on the report split, nats per token",
    "merge/live_perplexity": "exp(merge/live_loss)",
    "merge/gain": "merge/live_loss - merge/loss",
    "merge/gain_stderr": "standard error of the gain, of paired differences per held-out batch",
    "merge/steps_saved": "how many steps ago a merged snapshot was already as good as the live model is now",
    "merge/weight/<age>": "merge weight of a checkpoint of the window; age 0 is live, 1 the one before it, ...",
    "merge/evaluations": "candidates evaluated on the search split, live included",
    "merge/step": "optimizer step of the checkpoint that is live in this merge",
    "merge/seconds": "time this merge took from training",
    "merge/longest_pause": "seconds of the longest piece of this merge between two training steps",
    "merge/overhead": "share of wall time since training began spent in the callback",
    "merge/window_bytes": "memory of the window and its staging row, in one process",
    "merge/loss/<domain>": "merge/loss of one named held-out domain",
    "merge/live_loss/<domain>": "merge/live_loss of one named held-out domain",
    "merge/gain/<domain>": "merge/gain of one named held-out domain",
}


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as it stands in a line of metrics.jsonl. Losses are of the report split, in nats per token.

    Args:
        step: optimizer step of the merge.
        search: name of the search or recipe.
        checkpoint_steps: steps of the window's rows, oldest first.
        weights: merge weights of those rows, oldest first; all zero where live itself, being no row, was best.
        running_sum_weights: weights of BEMA's theta_0 and EMA_t; empty for every other search.
        group_weights: merge weights of each parameter group, which are those published; ``weights`` are what they were
            shrunk towards. Empty without ``groups``, or where weights of the whole model did better.
        live_loss, merged_loss, gain, gain_stderr, live_perplexity, merged_perplexity: see ``MEANINGS``; the standard
            error is None when there are too few held-out batches for one, all are where nothing was evaluated.
        steps_saved: see ``MEANINGS``.
        evaluations: candidates evaluated on the search split.
        forward_equivalents: their cost in passes over the search split (a forward is 1, with a gradient 3).
        allowed: ``{"evaluations", "heldout_share"}``: what the overhead budget let the merge spend.
        finished_step: optimizer step at which the merge was done; ``step`` if training waited for it.
        seconds, longest_pause, overhead, window_bytes: see ``MEANINGS``.
        search_losses: live and merged loss on the search split, the optimistic numbers the choice was made by.
        domains: per named domain ``{"live_loss", "merged_loss", "gain", "gain_stderr"}``.
        snapshot: folder of the published snapshot, None if none was published.
    """

    step: int
    search: str
    checkpoint_steps: list[int]
    weights: list[float]
    running_sum_weights: list[float]
    group_weights: dict[str, list[float]]
    live_loss: float | None
    merged_loss: float | None
    gain: float | None
    gain_stderr: float | None
    live_perplexity: float | None
    merged_perplexity: float | None
    steps_saved: int | None
    evaluations: int
    forward_equivalents: float
    allowed: dict[str, float]
    finished_step: int
    seconds: float
    longest_pause: float
    overhead: float
    window_bytes: int
    search_losses: dict[str, float]
    domains: dict[str, dict[str, float | None]]
    snapshot: str | None

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite become null, which every reader understands."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    def scalars(self) -> dict[str, float]:
        """The numbers for the trainer's logs, by the names of ``MEANINGS``; only finite ones."""
        values: dict[str, float | None] = {
            "loss": self.merged_loss,
            "perplexity": self.merged_perplexity,
            "live_loss": self.live_loss,
            "live_perplexity": self.live_perplexity,
            "gain": self.gain,
            "gain_stderr": self.gain_stderr,
            "steps_saved": self.steps_saved,
            "evaluations": self.evaluations,
            "step": self.step,
            "seconds": self.seconds,
            "longest_pause": self.longest_pause,
            "overhead": self.overhead,
            "window_bytes": self.window_bytes,
        }
        values |= {f"weight/{age}": weight for age, weight in enumerate(reversed(self.weights))}
        for name, domain in self.domains.items():
            values |= {f"loss/{name}": domain["merged_loss"], f"live_loss/{name}": domain["live_loss"]}
            values[f"gain/{name}"] = domain["gain"]
        return {PREFIX + key: float(v) for key, v in values.items() if v is not None and math.isfinite(v)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_losses(live: Evaluation, merged: Evaluation, searched: Set[str]) -> dict[str, Any]:
    """The losses of a record, from evaluations of live and of the merged model on the report split.

    Overall numbers cover the domains in ``searched``; with several domains each is reported, those or not.
    """
    overall_live, overall_merged = live.only(searched), merged.only(searched)
    gain, stderr = overall_live.gain_of(overall_merged)
    names = list(dict.fromkeys(live.domains))
    return {
        "live_loss": overall_live.loss,
        "merged_loss": overall_merged.loss,
        "gain": gain,
        "gain_stderr": _known(stderr),
        "live_perplexity": overall_live.perplexity,
        "merged_perplexity": overall_merged.perplexity,
        "domains": {name: _domain(live.only({name}), merged.only({name})) for name in names if len(names) > 1},
    }


def not_measured() -> dict[str, Any]:
    """The losses of a record where nothing was evaluated."""
    names = ["live_loss", "merged_loss", "gain", "gain_stderr", "live_perplexity", "merged_perplexity"]
    return {**dict.fromkeys(names), "domains": {}}


def _domain(live: Evaluation, merged: Evaluation) -> dict[str, float | None]:
    gain, stderr = live.gain_of(merged)
    return {"live_loss": live.loss, "merged_loss": merged.loss, "gain": gain, "gain_stderr": _known(stderr)}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


class MetricsFile:
    """metrics.jsonl: one record a line, continued by a resumed run, never mixed with another run's.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False
        self.resumed = False

    def append(self, record: MergeRecord) -> None:
        """Add a line.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._take_back(record.step) if self.resumed else self._set_aside()
            self._begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def _take_back(self, step: int) -> None:
        """Drop the lines of steps that a resumed run makes again, and a last line that was cut off."""
        lines = [line for line in self._path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_whole(self._path, "".join(line + "\n" for line in lines if json.loads(line)["step"] < step))

    def _set_aside(self) -> None:
        number = 1
        while (aside := self._path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        self._path.rename(aside)
        logger.info("%s was there from another run; it is now %s", self._path, aside)
