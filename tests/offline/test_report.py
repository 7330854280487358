"""The page about runs: what it shows, of which files, and that it is whole and harmless."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import AT_ONCE, tiny_llama, train_steps
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from realtext import Blocks
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.offline import report
from traj_merge_callback.offline.cli import app


class Page(HTMLParser):
    """What a browser makes of a page: its elements, its text, what it would load."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.loads = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)


def record(step, **values):
    """A record as a run of three multiscale rows and live writes it."""
    live = 2.0 + 100 / step
    known = {
        "step": step,
        "search": "auto",
        "checkpoint_steps": [step // 2, step, step],
        "row_spans": [[1, step // 2, 8], [step // 2 + 1, step, 6], [step, step, 1]],
        "weights": [-0.1, 0.9, 0.2],
        "group_weights": {},
        "live_loss": live,
        "merged_loss": live - 0.05,
        "gain": 0.05,
        "gain_stderr": 0.004,
        "forward_equivalents": 9.0,
        "source": "merge",
        "spike": False,
        "rollbacks": None,
        "domains": {},
        "steps_saved": 40,
        "seconds": 1.5,
        "longest_pause": 0.25,
        "overhead": 0.02,
        "snapshot": None,
        "run": "a",
    }
    return {**known, **values}


def write(folder, *records, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder


def shown(tmp_path, *runs):
    return Page(report(list(runs), tmp_path / "page" / "report.html")[0])


FIGURES = {"loss.png", "gain.png", "weights.png", "domains.png", "cost.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """The output folder of a real run with two domains, and its merges."""
    folder = tmp_path_factory.mktemp("run") / "merged"
    heldout = {name: DataLoader(Blocks(text[1][at : at + 32]), batch_size=8) for name, at in (("near", 0), ("far", 64))}
    model = tiny_llama()
    options = {"capture_every": 2, "merge_every": 4, "evaluations": 5, "keep_last": 2, "on_error": "raise", **AT_ONCE}
    merger = TrajectoryMerger(heldout, report_only=["far"], output_dir=str(folder), **options)
    train_steps(model, Blocks(text[0][:500]), 16, lambda step: merger.step(model, step))
    merger.finish(model)
    return folder, merger.records


def test_a_page_shows_the_merges_and_snapshots_of_a_run(run, tmp_path):
    folder, records = run
    paths = report(folder, tmp_path / "report.html")
    assert paths[0] == tmp_path / "report.html"
    assert {path.name for path in paths[1:]} == FIGURES
    for path in paths[1:]:
        with Image.open(path) as image:
            image.verify()
    page = Page(paths[0])
    for one in records:
        assert f"{one.live_loss:.4f} {one.merged_loss:.4f} {one.gain:.4f} ± {one.gain_stderr:.4f}" in page.text
    assert page.tags.count("svg") == 5
    assert "near" in page.text
    index = json.loads((folder / "index.json").read_text())
    assert len(index["snapshots"]) >= 2
    for snapshot in index["snapshots"]:
        assert str(folder / snapshot["name"]) in page.text
        assert f"{snapshot['search_loss']:.4f}" in page.text
    assert "best" in page.text
    assert "latest" in page.text


def test_a_page_needs_no_network_and_runs_no_script(run, tmp_path):
    page = shown(tmp_path, run[0])
    assert not {"script", "iframe", "object", "form", "base"} & set(page.tags)
    assert page.loads
    assert not [target for target in page.loads if not target.startswith(("#", "data:"))]


def test_colours_of_text_and_axes_are_those_of_the_page_in_light_and_dark(run, tmp_path):
    text = report(run[0], tmp_path / "report.html")[0].read_text()
    assert "prefers-color-scheme: dark" in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for drawing in drawings:
        assert set(re.findall(r"<text[^>]*?fill: (\S+?)[;\"]", drawing)) <= {"currentColor"}
        assert "currentColor" in drawing
        assert not re.search(r"#(000000|ffffff|010203)\b", drawing)


def test_runs_are_drawn_over_each_other_under_names_that_tell_them_apart(tmp_path):
    one, other = write(tmp_path / "wide" / "merged", record(100)), write(tmp_path / "narrow" / "merged", record(100))
    page = shown(tmp_path, one, other, one)
    assert "Merges of 2 runs" in page.text
    legend = [text for text in page.texts if text in ("wide", "narrow")]
    assert {"wide", "narrow"} == set(legend)
    assert page.tags.count("svg") == 4  # there are no domains


def test_runs_are_found_in_the_folders_of_both_trainers(tmp_path):
    trainer = tmp_path / "trainer"
    for number, place in enumerate(("merged", "merged-ema", "lightning_logs/version_10/merged-2")):
        write(trainer / place, record(101 + number))
    write(trainer / "lightning_logs/version_9/merged", record(109))
    (trainer / "merged-model").mkdir()
    page = shown(tmp_path, trainer)
    assert "Merges of 4 runs" in page.text
    steps = re.findall(r"\b1(?:0[1-9]) ", page.text[: page.text.index("The numbers of each")])
    assert [int(step) for step in steps] == [101, 102, 109, 103]
    assert "Merges of 2 runs" in shown(tmp_path, trainer / "lightning_logs").text
    assert "Merges of trainer" in shown(tmp_path, trainer / "merged" / "metrics.jsonl").text


def test_a_run_that_is_still_being_written_is_shown_up_to_its_last_whole_line(tmp_path):
    folder = write(tmp_path / "merged", record(100), record(200), json.dumps(record(300))[:80], end="")
    page = shown(tmp_path, folder)
    assert " 200 " in page.text
    assert " 300 " not in page.text
    assert "no records" not in page.text


def test_lines_that_are_no_records_are_counted(tmp_path):
    folder = write(tmp_path / "merged", "[1]", record(100), '{"step": "7"}', "", record(50), record(100, live_loss=7.7))
    page = shown(tmp_path, folder)
    assert f"2 lines of {folder / 'metrics.jsonl'} are no records" in page.text
    assert "7.7000" in page.text
    assert page.text.index(" 50 ") < page.text.rindex(" 100 ")


def test_a_run_without_merges_says_so(tmp_path):
    empty = tmp_path / "empty" / "merged"
    empty.mkdir(parents=True)
    (empty / "index.json").write_text('{"version": 1, "best": null, "latest": null, "snapshots": []}')
    page = shown(tmp_path, empty)
    assert "no merge yet" in page.text
    assert "svg" not in page.tags


def test_records_of_versions_that_wrote_less(tmp_path):
    old = [
        {
            "step": step,
            "live_loss": 3.0,
            "merged_loss": 2.5,
            "checkpoint_steps": [step - 5, step],
            "weights": [0.4, 0.6],
        }
        for step in (10, 20)
    ]
    page = shown(tmp_path, write(tmp_path / "merged", *old))
    assert "3.0000 2.5000 0.5000" in page.text
    assert page.tags.count("svg") == 3
    assert "The records say nothing of what merges cost." in page.text
    bare = shown(tmp_path, write(tmp_path / "bare" / "merged", {"step": 10}))
    for sentence in ("have no losses.", "have no gains.", "say nothing of merge weights."):
        assert f"The records {sentence}" in bare.text
    assert "svg" not in bare.tags


def test_merges_that_published_live_spikes_and_rollbacks_are_marked(tmp_path):
    quiet = shown(tmp_path, write(tmp_path / "quiet" / "merged", record(100), record(200, rollbacks=0)))
    assert not [word for word in ("spike", "rolled back before", "live published") if word in quiet.text]
    records = [
        record(100, rollbacks=0, source="live", weights=[0.0, 0.0, 0.0], gain=0.0),
        record(200, rollbacks=0, spike=True, live_loss=9.0, gain_stderr=None),
        record(300, rollbacks=1),
        record(400, rollbacks=1),
    ]
    page = shown(tmp_path, write(tmp_path / "merged", *records))
    table = page.text[page.text.index("All merges") :]
    assert table.count("live published") == 1
    assert table.count("spike") == 1
    assert table.count("rolled back before") == 1
    assert "rolled back before" in page.text[: page.text.index("All merges")]


def test_a_single_merge_shows_its_error(tmp_path):
    def coloured(name, stderr):
        """How many rows of the figure's pixels have a colour."""
        report([write(tmp_path / name, record(100, gain_stderr=stderr))], tmp_path / f"{name}.html")
        pixels = np.asarray(Image.open(tmp_path / f"{name}-figures" / "gain.png").convert("RGB")).astype(int)
        left = pixels[:, : pixels.shape[1] // 2]
        return int((np.ptp(left, axis=2) > 40).any(axis=1).sum())

    assert coloured("known", 0.02) > 5 * coloured("unknown", None)


def test_weights_of_parameter_groups_have_a_figure(tmp_path):
    groups = {"blocks.0.attention": [0.1, 0.4, 0.5], "head": [0.2, 0.3, 0.5], "odd": [1.0]}
    folder = write(tmp_path / "merged", record(100, group_weights=groups), record(200))
    paths = report(folder, tmp_path / "report.html")
    assert "groups-1.png" in {path.name for path in paths}
    assert "blocks.0.attention" in Page(paths[0]).text


def test_snapshots_of_a_run_without_an_index_are_those_its_merges_name(tmp_path):
    folder = write(tmp_path / "merged", record(100, snapshot="/elsewhere/step-00000100"))
    page = shown(tmp_path, folder)
    assert "/elsewhere/step-00000100" in page.text
    assert "may be gone" in page.text
    (folder / "index.json").write_text('{"version": 1, "snapshots": [{"name": "../../etc", "step": 3}]}')
    assert "The snapshots are not known: ValueError" in shown(tmp_path, folder).text


EVIL = "<script>alert(1)</script>", "$\\frac{1}$ & ]]>", "_hidden\u202e\x00\ud800", "' onload='x"


def test_texts_of_others_are_shown_and_do_nothing(tmp_path):
    losses = {"live_loss": 2.0, "merged_loss": 1.9, "gain": 0.1, "gain_stderr": 0.01}
    domains = dict.fromkeys(EVIL, losses)
    groups = {name: [0.1, 0.2, 0.7] for name in EVIL}
    name = "<img src=x onerror=alert(1)>$"
    folder = write(
        tmp_path / name / "merged",
        record(100, domains=domains, group_weights=groups, search="<b>bold", snapshot="<i>x", run="<u>"),
    )
    page = shown(tmp_path, folder, write(tmp_path / "other" / "merged", record(100)))
    assert not {"script", "img", "b", "i", "u"} & set(page.tags)
    for told in ("<script>alert(1)</script>", "$\\frac{1}$ & ]]>", "<b>bold", "<i>x", name):
        assert told in page.text


@pytest.mark.parametrize(
    "values",
    [
        {"live_loss": None, "merged_loss": None, "gain": None},
        {"live_loss": 1e308, "merged_loss": -1e308, "gain": "0.1"},
        {"weights": [0.1], "row_spans": [[1, 2]], "domains": [], "group_weights": {"a": "b"}},
        {"weights": [1e300, 0, 0], "row_spans": [[0, 0, 0], [999999999999999999, 0, 1], [-1, 0, 1]]},
        {"seconds": {}, "overhead": "1", "rollbacks": "x", "spike": 3, "source": None, "snapshot": 7},
        {"weights": [0.0, 0.0, 0.0], "row_spans": [[100, 100, 1]] * 3},
    ],
)
def test_values_that_are_not_as_they_should_be_are_left_out(tmp_path, values):
    page = shown(tmp_path, write(tmp_path / "merged", record(100, **values)))
    assert " 100 " in page.text


def test_many_domains_and_many_merges_have_a_page_of_bounded_size(tmp_path):
    losses = {"live_loss": 2.0, "merged_loss": 1.9, "gain": 0.1, "gain_stderr": 0.01}
    records = [record(step) for step in range(10, 5_200, 10)]
    records[-1]["domains"] = {f"domain {number}": losses for number in range(300)}
    folder = write(tmp_path / "merged", *records)
    (path, *_) = report(folder, tmp_path / "report.html")
    assert "The first 24 of 300 domains are shown." in Page(path).text
    assert "the last 500 of 519" in Page(path).text
    assert path.stat().st_size < 3_000_000


def test_a_new_report_takes_the_place_of_the_old_one_and_of_nothing_else(tmp_path):
    folder, output = write(tmp_path / "merged", record(100)), tmp_path / "report.html"
    figures = tmp_path / "report-figures"
    figures.mkdir()
    (figures / "mine.txt").write_text("mine")
    first = report(folder, output)
    assert (tmp_path / "report-figures.1" / "mine.txt").read_text() == "mine"
    groups = {"head": [0.2, 0.3, 0.5]}
    report(write(tmp_path / "merged", record(100, group_weights=groups)), output)
    assert (figures / "groups-1.png").exists()
    report(write(tmp_path / "merged", record(100)), output)
    assert {path.name for path in figures.glob("*.png")} == {path.name for path in first[1:]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merged",
        "report-figures",
        "report-figures.1",
        "report.html",
    ]


def test_a_full_disk_leaves_the_old_report_as_it_was(tmp_path):
    folder, output = write(tmp_path / "merged", record(100)), tmp_path / "report.html"
    paths = report(folder, output)
    before = {path: path.read_bytes() for path in paths}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            report(write(folder, record(100), record(200)), output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "report-figures", "report.html"]


def test_the_command_says_where_the_page_is_and_errors_are_a_sentence(tmp_path):
    folder, output = write(tmp_path / "merged", record(100)), tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(output), "--json"])
    assert done.exit_code == 0, done.output
    assert [tmp_path / "page.html", *sorted((tmp_path / "page-figures").glob("*.png"))] == sorted(
        map(Path, json.loads(done.output)), key=lambda path: (path.suffix, path)
    )
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert failed.exit_code == 1
    assert failed.output.startswith("traj-merge: run '")


@pytest.mark.parametrize(
    ("runs", "output", "error", "says"),
    [
        ([], "report.html", ValueError, r"runs=\[\]: name at least one"),
        (["nowhere"], "report.html", FileNotFoundError, "run 'nowhere': there is no such file or folder"),
        (["folder"], "report.html", FileNotFoundError, "run 'folder': there is no metrics.jsonl in it, nor in merged/"),
        (["folder/notes.txt"], "report.html", ValueError, "notes.txt has no merge in it: none of its 2 lines"),
        (["merged"], ".", ValueError, r"output='\.': must be the name of an HTML file"),
        (["merged"], "merged/metrics.jsonl", ValueError, "must be the name of an HTML file"),
        (["merged"], "folder.html", ValueError, "must be the name of an HTML file"),
    ],
)
def test_bad_input_gets_a_sentence_and_writes_nothing(tmp_path, monkeypatch, runs, output, error, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "merged", record(100))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("hello\nworld\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        report(runs, output)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "merged", record(100))
    for name in [name for name in sys.modules if name.startswith("traj_merge_callback.offline.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs the extra 'report': pip install 'traj-merge-callback\[report\]'"):
        report(folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_has_no_complaint_and_shows_the_curves_in_light_and_dark(run, tmp_path, scheme):
    (path, *_) = report(run[0], tmp_path / "report.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1600", "--enable-logging=stderr"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme == 'light':d}",
    ]
    command = [CHROMIUM, *options, f"--screenshot={tmp_path / 'page.png'}", path.as_uri()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
    assert "CONSOLE" not in told
    with Image.open(tmp_path / "page.png") as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    paper = max(counts, key=counts.get)
    assert (sum(paper) > 600) == (scheme == "light")
    assert (sum(paper) < 150) == (scheme == "dark")
    for line in (0x8B919B, 0x2F74E8):  # live, merged
        assert counts.get((line >> 16, line >> 8 & 255, line & 255), 0) > 100
    ink = [color for color in counts if abs(sum(color) - sum(paper)) > 400]
    assert sum(counts[color] for color in ink) > 1000
