"""What runs have gained from merging, on one page: :func:`report`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from ...disk.atomic import whole_folder, write_whole
from .runs import read_runs

_CAPTIONS = "traj-merge-figures.json"


def report(runs: str | Path | Iterable[str | Path], output: str | Path = "report.html") -> list[Path]:
    """Write a page about runs, from their metrics.jsonl alone, and its figures as PNG files.

    The page needs no network and fits light and dark screens. The PNGs stand in the folder ``<output>-figures`` beside
    it, which, like the page, is replaced as a whole. Runs that are still being written may be read.

    Args:
        runs: one or several, each an output folder, a metrics.jsonl, or a trainer's output folder with ``merged``,
            ``merged-<name>`` or ``lightning_logs/version_<number>/merged`` in it. Several are drawn over each other.
        output: the HTML file.

    Returns:
        The page, and the PNGs.

    Raises:
        FileNotFoundError: a run is not there.
        ValueError: there is no run, or one has no record of a merge in a file that should; ``output`` is no HTML file.
        ImportError: the extra "report" is not installed.
        OSError: the page cannot be written; what was there before is there still.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if not paths:
        raise ValueError("runs=[]: name at least one output folder or metrics.jsonl")
    page_file = Path(output)
    # Anything else that has this name would be replaced, a metrics.jsonl for instance.
    if page_file.suffix.lower() not in (".html", ".htm") or page_file.is_dir():
        raise ValueError(f"output={str(output)!r}: must be the name of an HTML file, such as 'report.html'")
    try:
        from .figures import draw, png, styled, svg
        from .page import Section, page
    except ImportError as error:
        raise ImportError(
            f"a report needs the extra 'report': pip install 'traj-merge-callback[report]' ({error})"
        ) from error
    found = read_runs(paths)
    with styled(), warnings.catch_warnings():
        # Of letters that matplotlib's font does not have; the browser's has.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        drawn = draw(found) if any(run.merges for run in found) else []
        figures = {one.name: one.figure for one in drawn if one.figure is not None}
        images = {f"{name}.png": png(figure) for name, figure in figures.items()}
        texts = {name: svg(figure) for name, figure in figures.items()}
    text = page(found, [Section(one.name, one.title, one.caption, texts.get(one.name)) for one in drawn])
    folder = page_file.with_name(f"{page_file.stem}-figures")
    with whole_folder(folder, replaces=lambda there: (there / _CAPTIONS).is_file()) as temporary:
        for name, data in images.items():
            write_whole(temporary / name, data)
        captions = {f"{one.name}.png": one.caption for one in drawn if one.figure is not None}
        write_whole(temporary / _CAPTIONS, json.dumps({"page": page_file.name, "figures": captions}, indent=2))
    write_whole(page_file, text)
    return [page_file, *(folder / name for name in images)]
