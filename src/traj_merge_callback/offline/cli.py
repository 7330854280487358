"""The ``traj-merge`` command: each function of :mod:`traj_merge_callback.offline` on the command line."""

from __future__ import annotations

import functools
import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from .. import offline
from ..disk.atomic import write_whole
from ..disk.metrics_file import read_records
from ..disk.snapshots import find_snapshot, read_merge, snapshot_folder
from ..disk.streamed import consolidate_snapshot
from ..disk.untrusted import damage_of
from ..metrics import MergeRecord, with_error

_DIFFERS = 3
_BAR = 30

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Merge checkpoints of one training run: choose the weights on held-out data, and measure the result.",
)
out = Console(highlight=False, markup=False, emoji=False)

Checkpoints = Annotated[
    list[str],
    typer.Argument(help="Checkpoints, folders that hold some, patterns in quotes, or repo@revision (with * and ?)."),
]
Last = Annotated[int | None, typer.Option(help="Take the newest so many checkpoints.")]
Every = Annotated[int | None, typer.Option(help="Take steps that are multiples of this.")]
Steps = Annotated[str | None, typer.Option(help="Take steps FIRST:LAST, both included; either may be left out.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pytorch_model.bin and torch.distributed.checkpoint, which can run code."),
]
Heldout = Annotated[
    list[str],
    typer.Option(
        help="Held-out text: a file, folder, .jsonl, .parquet, .csv, dataset; name=... names its domain. Repeat."
    ),
]
Model = Annotated[str | None, typer.Option(help="Model of transformers, for checkpoints without config.json.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or name of a tokenizer, or 'bytes'.")]
Device = Annotated[
    str | None, typer.Option(help="Where to evaluate, as cuda or cpu; by default a GPU if there is one.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the files.")]
Sequences = Annotated[int, typer.Option(help="Held-out sequences of each domain, both splits together.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens of a sequence; by default the context, at most 1024.")]
BatchSize = Annotated[int, typer.Option(help="Sequences of a batch.")]
SearchName = Annotated[str, typer.Option("--search", help="A search or recipe by name.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another option: evaluations=15, groups=blocks, search_options={...}. Repeat."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables and bars.")]
Folder = Annotated[Path, typer.Argument(help="A snapshot, or its best or latest link.")]


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """What is wrong with what the user gave is one sentence, and exit code 1."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may not have all that is printed
            sys.stdout.reconfigure(errors="replace")
        try:
            command(**arguments)
        except (typer.Exit, typer.Abort):  # both of them RuntimeErrors
            raise
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError) as error:
            logging.getLogger("traj_merge_callback").debug("failed", exc_info=True)
            text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
            typer.echo(f"traj-merge: {text}", err=True)
            raise typer.Exit(1) from None

    return run


@app.command()
@_told
def search(
    checkpoints: Checkpoints,
    heldout: Heldout,
    output: Annotated[Path, typer.Option(help="New folder for the snapshot.")] = Path("merged"),
    last: Last = None,
    every: Every = None,
    steps: Steps = None,
    allow_pickle: AllowPickle = False,
    model: Model = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
    sequences: Sequences = 128,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    search: SearchName = "auto",
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Choose merge weights on held-out data, and write the merge as a model folder."""
    record = offline.search(
        checkpoints,
        heldout,
        output=output,
        last=last,
        every=every,
        steps=_steps(steps),
        allow_pickle=allow_pickle,
        progress=not as_json,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        sequences=sequences,
        block_size=block_size,
        batch_size=batch_size,
        **{"search": search, **_options(options)},
    )
    if as_json:
        typer.echo(record.to_json())
        return
    _print_losses(record)
    _print_weights(record)
    out.print(f"\nwritten to {record.snapshot}", soft_wrap=True)


@app.command()
@_told
def curve(
    checkpoints: Checkpoints,
    heldout: Heldout,
    output: Annotated[Path, typer.Option(help="Folder for metrics.jsonl, curve.html and figures.")] = Path("curve"),
    window: Annotated[int, typer.Option(help="Checkpoints in a merge.")] = 8,
    every_step: Annotated[bool, typer.Option("--every-step", help="A point at every checkpoint.")] = False,
    last: Last = None,
    every: Every = None,
    steps: Steps = None,
    allow_pickle: AllowPickle = False,
    model: Model = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
    sequences: Sequences = 128,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    search: SearchName = "auto",
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sliding merge all along a trajectory; goes on where it was stopped."""
    records = offline.curve(
        checkpoints,
        heldout,
        output=output,
        window=window,
        every_step=every_step,
        last=last,
        every=every,
        steps=_steps(steps),
        allow_pickle=allow_pickle,
        progress=not as_json,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        sequences=sequences,
        block_size=block_size,
        batch_size=batch_size,
        **{"search": search, **_options(options)},
    )
    if as_json:
        typer.echo(json.dumps(records))
        return
    _print_records(records)
    out.print(f"\nwritten to {output}", soft_wrap=True)


@app.command()
@_told
def merge(
    checkpoints: Checkpoints,
    output: Annotated[Path, typer.Option(help="New folder.")],
    weights: Annotated[
        str | None, typer.Option(help="Merge weights, oldest first: 0.25,0.25,0.5 or 1/3,1/3,1/3.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A closed-form recipe instead: lawa, ema, wma, wsm, ...")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="An option of the recipe: decay=0.9.")] = None,
    last: Last = None,
    every: Every = None,
    steps: Steps = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a merge with given weights, without evaluating anything."""
    folder = offline.merge(
        checkpoints,
        output=output,
        weights=None if weights is None else _weights(weights),
        recipe=recipe,
        recipe_options=_options(options),
        last=last,
        every=every,
        steps=_steps(steps),
        allow_pickle=allow_pickle,
        progress=not as_json,
    )
    merged = read_merge(folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **{key: merged[key] for key in ("checkpoint_steps", "weights")}}))
        return
    for step, weight in zip(merged["checkpoint_steps"], merged["weights"], strict=True):
        out.print(f"{step:>10}  {weight:+.4f}")
    out.print(f"written to {folder}", soft_wrap=True)


@app.command()
@_told
def verify(
    folder: Folder,
    heldout: Annotated[list[str] | None, typer.Option(help="Where the held-out text lies now.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check a snapshot's files, and measure its loss again; exit code 3 if something differs."""
    found = offline.verify(folder, heldout or None, device=device)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        out.print("every file is what was written", soft_wrap=True)
        if found.recomputed is None:
            out.print("its loss is not recomputed: its held-out data are not known here", soft_wrap=True)
        else:
            out.print(f"loss {found.recomputed:.6f}, reported {found.reported:.6f} nats per token", soft_wrap=True)
        for sentence in found.differs:
            out.print(sentence, soft_wrap=True)
    if found.differs:
        raise typer.Exit(_DIFFERS)


@app.command()
@_told
def inspect(
    folder: Annotated[Path, typer.Argument(help="A snapshot, or an output folder.")], as_json: AsJson = False
) -> None:
    """Say how a snapshot was made, or which snapshots and merges an output folder has."""
    if not (snapshot_folder(folder) / "merge.json").is_file() and (folder / "metrics.jsonl").is_file():
        records = read_records(folder / "metrics.jsonl")
        if as_json:
            typer.echo(json.dumps(records))
            return
        _print_records(records)
        for which in ("best", "latest"):
            try:
                out.print(f"{which}: {find_snapshot(folder, which)}", soft_wrap=True)
            except FileNotFoundError as error:
                out.print(str(error), soft_wrap=True)
        return
    merged = read_merge(folder)
    if as_json:
        typer.echo(json.dumps(merged))
        return
    with damage_of(snapshot_folder(folder) / "merge.json"):
        _print_made(merged)


def _print_made(merged: dict[str, Any]) -> None:
    if len(merged["checkpoint_steps"]) != len(merged["weights"]):
        raise TypeError(f"{len(merged['weights'])} weights of {len(merged['checkpoint_steps'])} rows")
    split = merged.get("report_split") or {}
    out.print(f"step {merged.get('step')}, {merged.get('search') or 'given weights'}, {merged.get('source')}")
    if split:
        out.print(
            f"live {split['live_loss']:.4f}, merged {split['merged_loss']:.4f}, gain {_gain(split)} nats per token"
        )
    _print_bars(list(zip(map(str, merged["checkpoint_steps"]), merged["weights"], strict=True)))


@app.command()
@_told
def export(
    folder: Folder,
    format: Annotated[str, typer.Option("--format", help="mergekit")] = "mergekit",
    output: Annotated[Path | None, typer.Option(help="A file; by default the recipe is printed.")] = None,
) -> None:
    """Write the recipe of a snapshot for another tool."""
    text = offline.export(folder, format=format)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder: name a file")
    write_whole(output, text)
    out.print(f"written to {output}", soft_wrap=True)


@app.command("eval")
@_told
def evaluate(
    folder: Folder,
    command: Annotated[
        list[str], typer.Argument(help="After --: a program, with {snapshot} and {out} in its arguments.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for its results; by default beside the output folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a snapshot to another program, such as lm_eval, and show the numbers that it finds."""
    found = offline.evaluate(folder, command, output=output)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        out.print(f"{name}  {value:.6g}", soft_wrap=True)


@app.command()
@_told
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="Such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a snapshot to the Hugging Face Hub, after its files were checked."""
    from ..transformers.hub import push_to_hub

    out.print(push_to_hub(folder, repo_id, private=private or None), soft_wrap=True)


@app.command()
@_told
def consolidate(folder: Folder, output: Annotated[Path, typer.Argument(help="The new model folder.")]) -> None:
    """Make a model folder of a snapshot that many ranks wrote in parts."""
    out.print(f"written to {consolidate_snapshot(folder, output)}", soft_wrap=True)


@app.command()
@_told
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Output folders of runs, trainers' folders, or metrics.jsonl files.")
    ],
    output: Annotated[Path, typer.Option(help="The HTML file; its figures stand beside it as PNG files.")] = Path(
        "report.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Show what runs have gained from merging, several over each other, on one page that needs no network."""
    paths = offline.report(runs, output)
    if as_json:
        typer.echo(json.dumps([str(path) for path in paths]))
    else:
        out.print(f"written to {paths[0]}, and {len(paths) - 1} figures to {output.stem}-figures", soft_wrap=True)


# What the user gives


def _steps(given: str | None) -> tuple[int | None, int | None] | None:
    if given is None:
        return None
    first, colon, end = given.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first) if first else None, int(end) if end else None
    except ValueError:
        raise ValueError(f"--steps {given}: must be FIRST:LAST, as 1000:5000, 1000: or :5000") from None


def _weights(given: str) -> list[float]:
    try:
        return [float(Fraction(one.strip())) for one in given.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--weights {given}: must be numbers with commas between them, as 0.5,0.5 or 1/3,2/3"
        ) from None


def _options(given: list[str] | None) -> dict[str, Any]:
    found = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"--set {one}: must be name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


# What the user sees


def _gain(losses: dict[str, Any]) -> str:
    return with_error(losses["gain"], losses.get("gain_stderr"))


def _print_losses(record: MergeRecord) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "live", "merged", "gain"):
        table.add_column(name, justify="left" if not name else "right")
    domains: dict[str, Any] = {"all": vars(record), **record.domains}
    for name, losses in domains.items():
        table.add_row(name, f"{losses['live_loss']:.4f}", f"{losses['merged_loss']:.4f}", _gain(losses))
    out.print(f"{len(record.weights)} checkpoints, steps {record.checkpoint_steps[0]} to {record.step}; held-out loss")
    out.print("(report split, nats per token, live is the newest checkpoint):\n")
    out.print(table)
    if record.source == "live":
        out.print("\nno merge was better than the newest checkpoint on the search split: that is what is written")


def _print_weights(record: MergeRecord) -> None:
    out.print("\nmerge weights" + (" (before they were fitted to each group)" if record.group_weights else "") + ":\n")
    _print_bars(list(zip(map(str, record.checkpoint_steps), record.weights, strict=True)))


def _print_bars(values: list[tuple[str, float]]) -> None:
    largest = max((abs(value) for _, value in values), default=0.0) or 1.0
    for name, value in values:
        sign = "█" if value >= 0 else "░"
        out.print(f"{name:>10}  {value:+.3f}  {sign * round(_BAR * abs(value) / largest)}")


def _print_records(records: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("step", "live", "merged", "gain"):
        table.add_column(name, justify="right")
    for one in records:
        if not {"live_loss", "merged_loss", "gain"} <= one.keys():  # of an earlier version
            continue
        table.add_row(str(one["step"]), f"{one['live_loss']:.4f}", f"{one['merged_loss']:.4f}", _gain(one))
    out.print(table)
