"""Real runs that are killed at random moments and started again, until they are through: what is left on the disk?

Every life is one run of a tiny Llama on Python source with its own strategy, storage, rows and schedule. It is killed
by SIGKILL, either at any moment or shortly after it has entered what it is to die in (a capture, an evaluation,
publishing, pruning, saving, resuming, the merge at the end); of two ranks one is killed, and the other shortly after.
Then its files are looked at, and it is started again from the trainer's newest checkpoint. Prints what was found;
the last line is one JSON object.

    python benchmarks/crash.py --quick                       some kills of each strategy, about a minute
    python benchmarks/crash.py --output benchmarks/results   1000 kills, an hour or two

With ``--output`` crash.json is written after every run: interrupted, the same command goes on counting.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults.runs import RANKS, STEPS, STRATEGIES, Module, heldout_loader, run
from transformers.utils import logging as transformers_logging

from traj_merge_callback import TrajectoryMerger, find_snapshot, load_merged
from traj_merge_callback.disk import snapshots
from traj_merge_callback.disk.snapshots import SnapshotStore
from traj_merge_callback.engine import saving
from traj_merge_callback.engine.merge import Merge
from traj_merge_callback.evaluate.heldout import HeldOutLoss
from traj_merge_callback.window.window import CheckpointWindow

# At the last step no merge is due, so there is one at the end.
OPTIONS: dict[str, Any] = {
    "capture_every": 2,
    "merge_every": 6,
    "window_size": 3,
    "heldout_batches": 6,
    "evaluations": 6,
    "progress": False,
    "process_timeout": 20.0,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": ("interleaved", "blocking"),
    "row": ("multiscale", "mean", "last"),
    "dtype": ("auto", "bfloat16", "int8"),
    "window_storage": ("memory", "disk"),
}
#: What a run can be killed in: where it enters that, and how long after, in seconds, it is killed at most.
PLACES: dict[str, tuple[Any, str, float]] = {
    "capture": (CheckpointWindow, "push", 0.004),
    "evaluation": (HeldOutLoss, "_evaluating", 0.01),
    "merge": (Merge, "pieces", 0.1),
    "publishing": (SnapshotStore, "publish", 0.03),
    "pruning": (SnapshotStore, "_prune", 0.01),
    "saving": (saving, "save_state", 0.02),
    "resuming": (TrajectoryMerger, "load_state", 0.05),
    "the merge at the end": (TrajectoryMerger, "merge_at_end", 0.2),
}
FAULTS = (
    *("torn", "mismatched", "orphans", "final_weights_differ"),
    *("no_merge_at_the_end", "metrics", "failed", "failures_logged"),
)


@dataclass
class Life:
    """One run, from its first start to its end.

    Args:
        strategy: how it trains.
        options: of the merger; None: there is none.
        folder: of its files.
        attempts: how often it was started.
        whole: snapshots that were found whole, by their name and time.
    """

    strategy: str
    options: dict[str, Any] | None
    folder: Path
    attempts: int = 0
    whole: set[tuple[str, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Death:
    """How an attempt is killed: somewhere, on its ``nth`` arrival there, so many seconds later; in one rank."""

    place: str
    nth: int
    delay: float
    rank: int


def drawn(rng: random.Random, strategy: str, lasts: float) -> Death:
    """A death at random, in a run that lasts so many seconds."""
    place = rng.choice(["anywhere", "anywhere", *PLACES])
    nth = 1 if place in ("resuming", "the merge at the end") else rng.choice([1, 1, 1, 2, 3, 5, 8])
    longest = lasts if place == "anywhere" else PLACES[place][2]
    return Death(place, nth, rng.uniform(0.0, longest), rng.randrange(RANKS.get(strategy, 1)))


def kill_there(death: Death) -> None:
    """Let this process kill itself at the place where it is to die."""
    owner, name, _ = PLACES[death.place]
    original, arrivals = getattr(owner, name), iter(range(1, 10**9))

    def arriving(*args: Any, **kwargs: Any) -> Any:
        if next(arrivals) == death.nth:
            threading.Timer(death.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*args, **kwargs)

    setattr(owner, name, arriving)


def train(life: Life, rank: int, death: Death | None) -> None:
    """One attempt, in a process of its own, on one rank."""
    logging.basicConfig(level=logging.WARNING, format=f"[{life.attempts}.{rank}] %(message)s", force=True)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    if death is not None and death.place in PLACES and death.rank == rank:
        kill_there(death)
    if (size := RANKS.get(life.strategy, 1)) > 1:
        meeting = f"file://{life.folder}/meeting-{life.attempts}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    weights = run(life.folder, life.strategy, None if life.options is None else {**OPTIONS, **life.options})
    if rank == 0:
        torch.save(weights, life.folder / "final.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def forked(job: Callable[[], Any], output: Path) -> int:
    """Start a process that does a job and ends; its output goes into a file. Returns its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(written, stream)
        job()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(life: Life, death: Death | None, rng: random.Random) -> str:
    """Start a run, kill it as is said, wait for its end: "killed", "done" or "failed"."""
    life.attempts += 1
    ranks = {
        forked(functools.partial(train, life, rank, death), life.folder / "log.txt"): rank
        for rank in range(RANKS.get(life.strategy, 1))
    }
    began, ended = time.monotonic(), "done"
    while ranks:
        found, status = os.waitpid(-1, os.WNOHANG)
        if found:
            ranks.pop(found, None)
            if status and ended == "done":
                ended = "killed" if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else "failed"
                time.sleep(rng.uniform(0.0, 0.1) if ranks else 0.0)
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
            continue
        if death and death.place == "anywhere" and time.monotonic() - began > death.delay and len(ranks) > death.rank:
            os.kill(list(ranks)[death.rank], signal.SIGKILL)
            death = None
        if time.monotonic() - began > 120:
            ended = "failed"
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    return ended


# What is left


def looked_at(life: Life) -> Counter[str]:
    """What is wrong with the files of a run, in a process of its own."""
    report = life.folder / "looked-at.json"
    report.unlink(missing_ok=True)

    def look() -> None:
        logging.disable(logging.WARNING)
        wrong: Counter[str] = Counter()
        for kind, what in faults(life):
            print(f"[{life.attempts}] {kind}: {what}")
            wrong[kind] += 1
        report.write_text(json.dumps([wrong, sorted(life.whole)]))

    child = forked(look, life.folder / "faults.txt")
    os.waitpid(child, 0)
    wrong, whole = json.loads(report.read_text())
    life.whole = {(name, written) for name, written in whole}
    return Counter(wrong)


def faults(life: Life) -> Iterator[tuple[str, str]]:
    """Snapshots that cannot be read, or whose loss is not the reported one; links and metrics that lead nowhere."""
    output = life.folder / "merged"
    published = [path for path in output.glob("step-*") if not path.is_symlink()]
    heldout = None
    for path in published:
        key = (path.name, path.stat().st_ctime_ns)
        if key in life.whole:
            continue
        try:
            module = Module()
            load_merged(path, module if life.strategy == "lightning" else module.model, verify=True)
            merge = snapshots.read_merge(path)
        except Exception as error:
            yield "torn", f"{path.name}: {error}"
            continue
        heldout = heldout or HeldOutLoss(heldout_loader(), batches=OPTIONS["heldout_batches"])
        found = heldout.evaluate(module.model.eval(), "report").loss
        if abs(found - (reported := merge["report_split"]["merged_loss"])) > 1e-5:
            yield "mismatched", f"{path.name}: {found} for {reported}"
        life.whole.add(key)
    # A run that goes on from a checkpoint before its first merge has a list without snapshots.
    index = output / "index.json"
    listed = index.exists() and json.loads(index.read_text())["snapshots"]
    for which in ("best", "latest") if listed else ():
        try:
            snapshots.read_merge(find_snapshot(output, which))
        except Exception as error:
            yield "torn", f"{which}: {error}"
    for path, parts in ((output / "index.json", None), (output / "metrics.jsonl", "\n")):
        if path.exists():
            content = path.read_text()
            try:
                for line in content.split(parts)[:-1] if parts else [content]:  # a kill may cut off the last line
                    json.loads(line)
            except ValueError as error:
                yield "torn", f"{path.name}: {error}"


def faults_at_the_end(life: Life, reference: Path, state_was_there: bool) -> Iterator[tuple[str, str]]:
    """What should not be left of a run that is through: other weights, half-written folders, lost merges."""
    ours, theirs = torch.load(life.folder / "final.pt"), torch.load(reference)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        yield "final_weights_differ", life.strategy
    for path in life.folder.rglob("*"):
        half = path.name.startswith(".tmp") or ".tmp-" in path.name
        alone = path.name in ("merging", "traj_merge") and len(list(path.parent.iterdir())) < 2
        alone |= path.name.endswith(".ckpt.merge") and not path.with_suffix("").exists()
        if half or alone or path.name.startswith("merged-"):
            yield "orphans", str(path.relative_to(life.folder))
    metrics = life.folder / "merged" / "metrics.jsonl"
    # A run of half a second on a busy machine may have had no two rows when it was killed for the last time.
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(line)["step"] for line in lines]
    if steps != sorted(set(steps)):
        yield "metrics", f"steps {steps}"
    # transformers.Trainer takes one more step where it resumes at the last one.
    if state_was_there and (not steps or steps[-1] < STEPS):
        yield "no_merge_at_the_end", f"steps {steps}"
    # A run that goes on without its state is another run, which keeps its own.
    kept = Counter(snapshots.read_merge(path)["run"] for path in (life.folder / "merged").glob("step-*"))
    if max(kept.values(), default=0) > 3:
        yield "orphans", f"snapshots that were to be removed: {kept}"


def has_last_state(life: Life) -> bool:
    """Whether a run that is started again finds its window beside its last checkpoint."""
    last = {
        "transformers": f"checkpoint-{STEPS}/traj_merge/*.json",
        "lightning": f"step={STEPS}.ckpt.merge/*/*.json",
    }.get(life.strategy, f"checkpoint-{STEPS}/merging/*.json")
    found = [path for path in life.folder.glob(last) if ".tmp" not in str(path.relative_to(life.folder))]
    return bool(found) or not list(life.folder.glob(f"*[-=]{STEPS}*"))


def unexpected(line: str) -> bool:
    """Whether a line of a run's log tells of a failure that no kill explains."""
    explained = ("no saved window beside it", "a rank failed, ended", "closed by peer", "reset by peer", "Broken pipe")
    is_traceback = line.startswith(" ")  # of what a line before says
    return "failed" in line and not is_traceback and not any(cause in line for cause in explained)


def main() -> None:
    """Kill, look, start again; say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 kills")
    parser.add_argument("--kills", type=int, help="how many; 1000, or 30 with --quick")
    parser.add_argument("--attempts", type=int, default=8, help="how many of one run may be killed")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--seed", type=int, default=0, help="of options and moments")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs with faults here")
    parser.add_argument("--output", type=Path, help="folder for crash.json")
    arguments = parser.parse_args()
    wanted = arguments.kills or (30 if arguments.quick else 1000)
    root, began = Path(tempfile.mkdtemp()), time.monotonic()
    path = None if arguments.output is None else arguments.output / "crash.json"
    result: dict[str, Any] = {"kills": 0, "lives": 0, "seconds": 0}
    if path is not None and path.exists():
        result = json.loads(path.read_text())
    before = result["seconds"]
    by_strategy: Counter[str] = Counter(result.get("by_strategy", {}))
    by_place: Counter[str] = Counter(result.get("by_place", {}))
    wrong: Counter[str] = Counter({name: result.get(name, 0) for name in FAULTS})
    lasts: dict[str, float] = {}
    for strategy in arguments.strategies:  # without merging, uninterrupted
        life = Life(strategy, None, root / f"reference-{strategy}")
        life.folder.mkdir()
        started = time.monotonic()
        if attempt(life, None, random.Random(arguments.seed)) != "done":
            sys.exit((life.folder / "log.txt").read_text())
        lasts[strategy] = 2 * (time.monotonic() - started)
    while result["kills"] < wanted:
        lives = result["lives"]
        rng = random.Random(f"{arguments.seed} {lives}")
        strategy = arguments.strategies[lives % len(arguments.strategies)]
        options = {name: rng.choice(values) for name, values in CHOICES.items()}
        life = Life(strategy, options, root / f"life-{lives}")
        life.folder.mkdir()
        found: Counter[str] = Counter()
        ended, state_was_there = "", True
        while ended != "done":
            death = drawn(rng, strategy, lasts[strategy]) if life.attempts < arguments.attempts else None
            state_was_there = has_last_state(life)
            started = time.monotonic()
            ended = attempt(life, death, rng)
            if ended == "killed":
                by_strategy[strategy] += 1
                by_place[death.place if death else "unasked"] += 1
            if ended == "failed":
                found["failed"] += 1
                break
            if ended == "done" and life.attempts == 1:
                lasts[strategy] = 0.7 * lasts[strategy] + 0.3 * (time.monotonic() - started)
            found += looked_at(life)
        if ended == "done":
            for kind, what in faults_at_the_end(life, root / f"reference-{strategy}" / "final.pt", state_was_there):
                found[kind] += 1
                with (life.folder / "faults.txt").open("a") as file:
                    file.write(f"at the end, {kind}: {what}\n")
        said = [line for line in (life.folder / "log.txt").read_text().splitlines() if unexpected(line)]
        found["failures_logged"] += len(said)
        wrong += found
        total = by_place.total()
        print(
            f"{total:5d} kills, {strategy} {options}, {life.attempts} attempts: {dict(+found) or 'whole'}", flush=True
        )
        for line in said[:3]:
            print("      ", line)
        if +found:
            print((life.folder / "faults.txt").read_text() if (life.folder / "faults.txt").exists() else "", end="")
            if arguments.keep:
                shutil.copytree(life.folder, arguments.keep / life.folder.name, symlinks=True)
        shutil.rmtree(life.folder)
        result = {
            "kills": total,
            "lives": lives + 1,
            **{name: wrong[name] for name in FAULTS},
            "by_strategy": dict(by_strategy),
            "by_place": dict(by_place),
            "seconds": before + round(time.monotonic() - began),
            "seed": arguments.seed,
            "torch": torch.__version__,
        }
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(root)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
