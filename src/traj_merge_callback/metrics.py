"""Everything logged at a merge: the record in metrics.jsonl and the scalars in the trainer's logs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from typing import Any

from .search.evaluation import Evaluation
from .search.spans import Span

#: The option ``name`` where none is given, in the names of ``MEANINGS``.
DEFAULT_NAME = "merge"
# Of the metrics that are logged as "merge/...", these come first; all others are details.
_FIRST = ("loss", "live_loss", "gain", "steps_saved", "overhead", "spike")
MEANINGS = {
    "merge/loss": "held-out loss of the merged model on the report split, nats per token",
    "merge/live_loss": "held-out loss of the live model on the report split, nats per token",
    "merge/gain": "merge/live_loss - merge/loss",
    "merge/steps_saved": "how many steps ago a merged snapshot was already as good as the live model is now",
    "merge/overhead": "share of wall time since training began spent in the callback",
    "merge/spike": "1 if the training loss since the last merge, or live's now, was far above its recent range, else 0",
    "merge/eval/<name>": "a number that on_publish found in the snapshot, when it is known",
    "merge/eval/step": "optimizer step of the merge that published that snapshot",
    "merge_details/gain_stderr": "standard error of the gain, of paired differences per held-out batch",
    "merge_details/perplexity": "exp(merge/loss)",
    "merge_details/live_perplexity": "exp(merge/live_loss)",
    "merge_details/rollbacks": "how often the run was rolled back since it began or was resumed, with "
    "on_spike='rollback'",
    "merge_details/weight/<age>": "merge weight of a checkpoint of the window; age 0 is live, 1 the one before it, ...",
    "merge_details/evaluations": "candidates evaluated on the search split, live included",
    "merge_details/step": "optimizer step of the checkpoint that is live in this merge",
    "merge_details/seconds": "time this merge took from training",
    "merge_details/longest_pause": "seconds of the longest piece of this merge between two training steps",
    "merge_details/window_bytes": "memory of the window and its staging row, on one rank",
    "merge_details/loss/<domain>": "merge/loss of one named held-out domain",
    "merge_details/live_loss/<domain>": "merge/live_loss of one named held-out domain",
    "merge_details/gain/<domain>": "merge/gain of one named held-out domain",
}


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as it stands in a line of metrics.jsonl. Losses are of the report split, in nats per token.

    Args:
        step: optimizer step of the merge.
        search: name of the search or recipe.
        checkpoint_steps: steps of the window's rows, oldest first; of rows that are means their last ones.
        row_spans: first step, last step and number of samples of each.
        weights: merge weights of those rows, oldest first; all zero where live itself, being no row, was best.
        running_sum_weights: weights of BEMA's theta_0 and EMA_t; empty for every other search.
        group_weights: merge weights of each parameter group, which are those published; ``weights`` are what they were
            shrunk towards. Empty without ``groups``, or where weights of the whole model did better.
        live_loss, merged_loss, gain, gain_stderr, live_perplexity, merged_perplexity: see ``MEANINGS``; the standard
            error is None when there are too few held-out batches for one.
        steps_saved: see ``MEANINGS``.
        evaluations: candidates evaluated on the search split.
        forward_equivalents: their cost in passes over the search split (a forward is 1, with a gradient 3).
        allowed: ``{"evaluations"}``: passes over the search split that the overhead budget let the merge spend.
        finished_step: optimizer step at which the merge was done; ``step`` if training waited for it.
        seconds, longest_pause, overhead, window_bytes: see ``MEANINGS``.
        search_losses: live and merged loss on the search split, the optimistic numbers the choice was made by.
        source: "merge", or "live" where no merge was better than live on the search split: ``merged_loss`` is then
            live's, the gain is 0, and a snapshot of this step holds live's weights.
        spike: see ``MEANINGS``.
        rollbacks: see ``MEANINGS``; None where there are none.
        domains: per named domain ``{"live_loss", "merged_loss", "gain", "gain_stderr"}``.
        snapshot: folder of the published snapshot, None if none was published.
        run: tells the run's records and snapshots from those of others, however often it is resumed; ``merge.json`` has
            it too.
        name: the option ``name``, which stands in place of "merge" in the names of ``MEANINGS``.
        eval: what ``on_publish`` found in the snapshot, by name; empty until it is known.
    """

    step: int
    search: str
    checkpoint_steps: list[int]
    row_spans: list[Span]
    weights: list[float]
    running_sum_weights: list[float]
    group_weights: dict[str, list[float]]
    live_loss: float
    merged_loss: float
    gain: float
    gain_stderr: float | None
    live_perplexity: float
    merged_perplexity: float
    evaluations: int
    forward_equivalents: float
    allowed: dict[str, int]
    search_losses: dict[str, float]
    source: str
    spike: bool
    domains: dict[str, dict[str, float | None]]
    window_bytes: int
    rollbacks: int | None = None
    steps_saved: int = 0
    finished_step: int = 0
    seconds: float = 0.0
    longest_pause: float = 0.0
    overhead: float = 0.0
    snapshot: str | None = None
    run: str = ""
    name: str = DEFAULT_NAME
    eval: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite become null, which every reader understands."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    def line(self) -> str:
        """The merge in one line, for a console."""
        took = f"{self.seconds:.3g} s, longest pause {self.longest_pause:.3g} s"
        spike = " (in a spike)" if self.spike else ""
        if self.source == "live":
            return f"{self.name} at step {self.step}{spike}: live {self.live_loss:.4f}, no merge is better; {took}"
        gain = with_error(self.gain, self.gain_stderr)
        losses = f"live {self.live_loss:.4f} → merged {self.merged_loss:.4f}, gain {gain}"
        return f"{self.name} at step {self.step}{spike}: {losses}; {took}"

    def eval_line(self) -> str:
        """What ``on_publish`` found in the snapshot in one line, for a console."""
        found = ", ".join(f"{name} {value:.4g}" for name, value in self.eval.items())
        return f"{self.name} at step {self.step}, on_publish: {found}"

    def scalars(self, *, details: bool = True) -> dict[str, float]:
        """The numbers for the trainer's logs by the names of ``MEANINGS``, only finite ones.

        Args:
            details: whether to give those of ``merge_details/...`` too.
        """
        values: dict[str, float | None] = {
            "loss": self.merged_loss,
            "perplexity": self.merged_perplexity,
            "live_loss": self.live_loss,
            "live_perplexity": self.live_perplexity,
            "gain": self.gain,
            "gain_stderr": self.gain_stderr,
            "spike": self.spike,
            "rollbacks": self.rollbacks,
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
        finite = {key: float(v) for key, v in values.items() if v is not None and math.isfinite(v)}
        first = {f"{self.name}/{key}": finite[key] for key in _FIRST if key in finite}
        others = {f"{self.name}_details/{key}": value for key, value in finite.items() if key not in _FIRST}
        return first | others if details else first

    def eval_scalars(self) -> dict[str, float]:
        """What ``on_publish`` found, for the trainer's logs."""
        found = {"step": float(self.step)} | self.eval
        return {f"{self.name}/eval/{key}": value for key, value in found.items()}


def with_error(gain: float, stderr: float | None) -> str:
    """A gain and its standard error, if that is known, for people."""
    return f"{gain:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def for_console(text: str) -> str:
    """A text that can be printed: characters that the console's encoding does not have become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


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


def _domain(live: Evaluation, merged: Evaluation) -> dict[str, float | None]:
    gain, stderr = live.gain_of(merged)
    return {"live_loss": live.loss, "merged_loss": merged.loss, "gain": gain, "gain_stderr": _known(stderr)}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
