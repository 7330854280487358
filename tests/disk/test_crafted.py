"""Folders that somebody crafted or damaged: refused or harmless, and nothing outside of them is read or removed."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from conftest import warnings_of
from safetensors.torch import load_file, save_file
from tiny_run import Run
from torch import nn

from traj_merge_callback import consolidate_snapshot, find_snapshot, load_merged, read_merge
from traj_merge_callback.disk.checksums import checksums_of, with_checksums


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file that was read executed code')",))


def edit(path, *keys, value):
    """Set one value in a JSON file; the last key may be new."""
    document = json.loads(path.read_text())
    owner = document
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    path.write_text(json.dumps(document))


def reseal(folder, name):
    """Give a document checksums that are right, as somebody who crafts it would."""
    if not (folder / name).is_file():
        return
    try:
        document = json.loads((folder / name).read_text())
        files = {path.name for path in folder.iterdir() if path.is_file() and path.name != name}
        checksums = {name: one for name, one in checksums_of(folder).items() if name in files}
        checksums |= {name: one for name, one in checksums_of(folder, 1).items() if name in files}
        document.pop("checksum")
    except (OSError, ValueError, RecursionError, KeyError):
        return
    (folder / name).write_text(json.dumps(with_checksums(document, checksums)))


def tensors(path, change):
    found = load_file(path)
    change(found)
    save_file(found, path)


def header(path, make):
    """Replace the header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = make(data[8 : 8 + size])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def entry(**values):
    return {"name": "step-00000002", "step": 2, "search_loss": 0.0, "merged_loss": 0.0} | values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with two snapshots and a saved state, beside a folder that belongs to somebody else."""
    root = tmp_path_factory.mktemp("run")
    Run(root).steps(1, 4).save().merger.close()
    victim = root / "step-00000001"
    victim.mkdir()
    shutil.copytree(root / "merged" / "step-00000004", root / "victim")
    for folder in (victim, root / "victim"):
        (folder / "precious.txt").write_text("precious")
    return root


@pytest.fixture
def root(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


STATES = {
    "name: parent": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="../victim")]),
    "name: parent with a name of ours": lambda s: edit(
        s / "state.json", "snapshots", value=[entry(name="../step-00000001", step=1)]
    ),
    "name: absolute": lambda s: edit(s / "state.json", "snapshots", value=[entry(name=str(s.parent / "victim"))]),
    "name: the output folder": lambda s: edit(s / "state.json", "snapshots", value=[entry(name=".")]),
    "name: empty": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="")]),
    "name: two dots": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="..")]),
    "name: a user's file": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="notes")]),
    "name: a null character": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="step-\0")]),
    "name: other digits": lambda s: edit(s / "state.json", "snapshots", value=[entry(name="step-0000000٢")]),
    "name: of another step": lambda s: edit(s / "state.json", "snapshots", value=[entry(step=3)]),
    "name: no text": lambda s: edit(s / "state.json", "snapshots", value=[entry(name=["x"])]),
    "loss: NaN": lambda s: edit(s / "state.json", "snapshots", value=[entry(merged_loss=float("nan"))]),
    "loss: text": lambda s: edit(s / "state.json", "snapshots", value=[entry(merged_loss="0")]),
    "entry: an extra key": lambda s: edit(s / "state.json", "snapshots", value=[entry(extra=1)]),
    "document: an extra key": lambda s: edit(s / "state.json", "extra", value={"a": [1]}),
    "document: a key twice": lambda s: (s / "state.json").write_text(
        (s / "state.json").read_text().replace('"merging"', '"merging": null, "merging"')
    ),
    "document: nested deeply": lambda s: (s / "state.json").write_text(
        '{"version": ' + "[" * 10**5 + "]" * 10**5 + "}"
    ),
    "document: no UTF-8": lambda s: (s / "state.json").write_bytes(b"\xff\xfe{}"),
    "document: a link out": lambda s: relink(s / "state.json", s.parent / "elsewhere.json"),
    "document: a loop of links": lambda s: loop(s / "state.json"),
    "document: a folder": lambda s: [(s / "state.json").unlink(), (s / "state.json").mkdir()],
    "document: a pipe": lambda s: [(s / "state.json").unlink(), os.mkfifo(s / "state.json")],
    "step: of the far future": lambda s: edit(s / "state.json", "run", "last_step", value=10**15),
    "step: many digits": lambda s: edit(s / "state.json", "run", "last_step", value=10**4000),
    "step: negative": lambda s: edit(s / "state.json", "run", "last_step", value=-1),
    "step: true": lambda s: edit(s / "state.json", "run", "last_step", value=True),
    "time: infinite": lambda s: edit(s / "state.json", "run", "busy_s", value=float("inf")),
    "time: negative": lambda s: edit(s / "state.json", "run", "wall_s", value=-5.0),
    "history: NaN": lambda s: edit(s / "state.json", "run", "history", value=[[2, float("nan")]]),
    "merging: a step without a row": lambda s: edit(s / "state.json", "merging", value=1),
    "window: huge steps": lambda s: edit(s / "state.json", "window", "spans", value=[[3, 3, 1], [10**17, 10**17, 1]]),
    "window: more spans than rows": lambda s: edit(
        s / "state.json", "window", "spans", value=[[step, step, 1] for step in (1, 2, 3, 4)]
    ),
    "window: another dtype": lambda s: edit(s / "state.json", "window", "dtype", value="../int8"),
    "index: huge counts": lambda s: edit(s / "state.json", "index", "parts", "0", value=[["weight", 0, 10**15]]),
    "index: a huge shape": lambda s: edit(
        s / "state.json", "index", "tensors", "weight", "shape", value=[10**9, 10**9]
    ),
    "index: a negative start": lambda s: edit(s / "state.json", "index", "parts", "0", value=[["weight", -3, 9]]),
    "index: a rank that is a path": lambda s: edit(s / "state.json", "index", "parts", value={"../0": []}),
    "index: a rank below zero": lambda s: edit(s / "state.json", "index", "parts", value={"-1": [["weight", 0, 9]]}),
    "index: an unknown tensor": lambda s: edit(s / "state.json", "index", "parts", "0", value=[["other", 0, 9]]),
    "index: no front": lambda s: edit(s / "state.json", "index", "tensors", "weight", "front", value=7),
    "row: truncated": lambda s: os.truncate(row(s), row(s).stat().st_size - 3),
    "row: empty": lambda s: os.truncate(row(s), 0),
    "row: missing": lambda s: row(s).unlink(),
    "row: a link out": lambda s: relink(row(s), s.parent / "elsewhere"),
    "row: a pipe": lambda s: [row(s).unlink(), os.mkfifo(row(s))],
    "row: a pickle": lambda s: row(s).write_bytes(pickle.dumps(Trap())),
    "row: an enormous header": lambda s: row(s).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "row: a header twice as long as the file": lambda s: row(s).write_bytes(struct.pack("<Q", 1000) + b"{" * 500),
    "row: a key twice in the header": lambda s: header(row(s), lambda text: text[:-1] + b"," + text[1:]),
    "row: offsets of another place": lambda s: header(row(s), lambda text: text.replace(b"[0,", b"[9,")),
    "row: a nested header": lambda s: header(row(s), lambda text: b'{"row":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "row: a huge shape in the header": lambda s: header(row(s), lambda text: text.replace(b"[12]", b"[99999999999]")),
    "row: another length": lambda s: save_file({"row": torch.zeros(13)}, row(s)),
    "row: another type": lambda s: save_file({"row": torch.zeros(12, dtype=torch.int64)}, row(s)),
    "row: another name": lambda s: save_file({"other": torch.zeros(12)}, row(s)),
}
HARMLESS = {"document: an extra key"}
MEMORIES = {
    "memory: no object": {"rows": 5},
    "memory: of another shape": {"rows": {"4": {"loss": "x", "slopes": []}}},
    "memory: without losses": {"rows": {"3": {}, "4": {}}},
    "memory: huge numbers": {"rows": {str(s): {"loss": 1e308, "slopes": {"3": 1e308, "4": -1e308}} for s in (3, 4)}},
    "memory.rows: steps that are no numbers": {"x": {}},
    "row_losses: too many": {"4": [1.0, 2.0, 3.0], "3": []},
    "previous: too many": [0.1] * 10,
    "previous: huge": [1e308, 1e308],
}


def row(state):
    return state / "row-01.rank-00000.safetensors"


def relink(path, target):
    path.rename(target)
    path.symlink_to(target)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def everything(folder):
    """Contents of all files but the state's, by path; pipes, and what a run writes, are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "state" not in path.parts and "merged" not in path.relative_to(folder).parts
    }


@pytest.mark.parametrize("case", STATES)
def test_a_crafted_state_is_refused_and_the_run_goes_on(root, caplog, case):
    (root / "merged" / "notes").mkdir()
    (root / "merged" / "notes" / "notes.txt").write_text("mine")
    STATES[case](root / "state")
    if "twice" not in case:
        reseal(root / "state", "state.json")
    before = everything(root)
    run = Run(root, resume=True, keep_last=1).steps(5, 10)
    assert everything(root) == before
    assert (root / "merged" / "notes" / "notes.txt").read_text() == "mine"
    assert [record.step for record in run.merger.records] == [6, 8, 10]
    assert find_snapshot(root / "merged", "latest").name == "step-00000010"
    warnings = warnings_of(caplog)
    if case in HARMLESS:
        assert not warnings
    else:
        assert len(warnings) == 1
        assert "restoring the window failed" in warnings[0]
    run.merger.close()


SNAPSHOTS = {
    "version: text": lambda f: edit(f / "merge.json", "version", value="1"),
    "version: missing": lambda f: (f / "merge.json").write_text("{}"),
    "merge.json: a list": lambda f: (f / "merge.json").write_text("[]"),
    "merge.json: empty": lambda f: os.truncate(f / "merge.json", 0),
    "merge.json: a link out": lambda f: relink(f / "merge.json", f.parent.parent / "elsewhere.json"),
    "merge.json: a pipe": lambda f: [(f / "merge.json").unlink(), os.mkfifo(f / "merge.json")],
    "merge.json: nested deeply": lambda f: (f / "merge.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5),
    "format: unknown": lambda f: edit(f / "merge.json", "weights_format", value="pickle"),
    "format: missing": lambda f: edit(f / "merge.json", "weights_format", value=None),
    "format: peft": lambda f: [
        edit(f / "merge.json", "weights_format", value="peft"),
        torch.save({"a": torch.ones(1)}, f / "adapter_model.bin"),
    ],
    "format: transformers": lambda f: [
        edit(f / "merge.json", "weights_format", value="transformers"),
        save_file({"other": torch.zeros(3)}, weights(f)),
    ],
    "merged_tensors: a number": lambda f: edit(f / "merge.json", "merged_tensors", value=3),
    "merged_tensors: of another model": lambda f: edit(f / "merge.json", "merged_tensors", value=["other"]),
    "sharded: no index": lambda f: edit(f / "merge.json", "sharded", value=[1]),
    "weights: truncated": lambda f: os.truncate(weights(f), weights(f).stat().st_size - 1),
    "weights: missing": lambda f: weights(f).unlink(),
    "weights: a pickle": lambda f: [weights(f).unlink(), torch.save({}, f / "pytorch_model.bin")],
    "weights: a link out": lambda f: relink(weights(f), f.parent.parent / "elsewhere"),
    "weights: NaN": lambda f: tensors(weights(f), lambda t: t["weight"][0].fill_(float("nan"))),
    "weights: infinite": lambda f: tensors(weights(f), lambda t: t["bias"].fill_(float("-inf"))),
    "weights: another shape": lambda f: save_file({"weight": torch.zeros(9), "bias": torch.zeros(3)}, weights(f)),
    "weights: integers": lambda f: tensors(weights(f), lambda t: t.update(weight=torch.ones(3, 3).int())),
    "weights: too large for the model": lambda f: tensors(
        weights(f), lambda t: t.update(weight=torch.full((3, 3), 1e300, dtype=torch.float64))
    ),
    "weights: an extra tensor": lambda f: tensors(weights(f), lambda t: t.update(extra=torch.ones(1))),
    "weights: one is missing": lambda f: tensors(weights(f), lambda t: t.pop("bias")),
    "weights: an enormous header": lambda f: weights(f).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "index: a file elsewhere": lambda f: weight_map(f, {"weight": "../../victim/model.safetensors"}),
    "index: an absolute path": lambda f: weight_map(f, {"weight": str(f.parent.parent / "victim/model.safetensors")}),
    "index: numbers": lambda f: weight_map(f, {"weight": 3}),
    "index: a list": lambda f: weight_map(f, ["model.safetensors"]),
    "index: a link out": lambda f: [
        weight_map(f, {"weight": "model.safetensors"}),
        relink(f / "model.safetensors.index.json", f.parent.parent / "elsewhere.json"),
    ],
}


def weights(folder):
    return folder / "model.safetensors"


def weight_map(folder, names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_a_crafted_snapshot_is_refused_and_the_model_is_unchanged(root, case):
    folder = find_snapshot(root / "merged")
    load_merged(folder, nn.Linear(3, 3))
    SNAPSHOTS[case](folder)
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|does not fit|leads|not there|in parts|adapter"):
        load_merged(folder, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


INDEXES = {
    "outside": lambda m: edit(m / "index.json", "best", value="../victim"),
    "outside, with a name of ours": lambda m: edit(m / "index.json", "best", value="../step-00000001"),
    "absolute": lambda m: edit(m / "index.json", "best", value=str(m.parent / "victim")),
    "a number": lambda m: edit(m / "index.json", "best", value=4),
    "the folder itself": lambda m: edit(m / "index.json", "best", value="."),
    "a link": lambda m: [shutil.rmtree(m / "step-00000004"), (m / "step-00000004").symlink_to(m.parent / "victim")],
    "a folder that is no snapshot": lambda m: [
        (m / "step-00000007").mkdir(),
        edit(m / "index.json", "best", value="step-00000007"),
    ],
    "nothing": lambda m: edit(m / "index.json", "best", value="step-00000099"),
    "a list": lambda m: (m / "index.json").write_text("[]"),
    "no JSON": lambda m: (m / "index.json").write_text("{"),
    "an empty object": lambda m: (m / "index.json").write_text("{}"),
    "a link out": lambda m: relink(m / "index.json", m.parent / "elsewhere.json"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_crafted_index_leads_nowhere(root, case):
    edit(root / "merged" / "index.json", "best", value="step-00000004")
    INDEXES[case](root / "merged")
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|names|leads"):
        find_snapshot(root / "merged")


@pytest.mark.parametrize("which", ["../victim", "", "step-00000004", "/", None, 3])
def test_only_best_and_latest_are_found(root, which):
    with pytest.raises(ValueError, match="is not one of"):
        find_snapshot(root / "merged", which)


@pytest.mark.parametrize("target", ["../victim", "../step-00000001", ".", "nothing", "best"])
def test_a_link_that_leads_outside_is_refused(root, target):
    link = root / "merged" / "best"
    link.unlink()
    link.symlink_to(target)
    for read in (read_merge, lambda folder: load_merged(folder, nn.Linear(3, 3))):
        with pytest.raises(ValueError, match="leads"):
            read(link)


def sharded(root):
    """A snapshot as two ranks write it: one matrix, divided by rows."""
    folder = root / "sharded"
    folder.mkdir()
    whole = torch.arange(12.0).view(4, 3)
    for rank in range(2):
        save_file(
            {"weight": whole[2 * rank : 2 * rank + 2].reshape(-1)}, folder / f"weights.rank-{rank:05d}.safetensors"
        )
    index = {
        "tensors": {"weight": {"shape": [4, 3], "front": 0, "dtype": "float32"}},
        "parts": {"0": [["weight", 0, 6]], "1": [["weight", 6, 6]]},
    }
    merge = {"version": 1, "weights_format": "state_dict", "merged_tensors": ["weight"], "sharded": index}
    (folder / "merge.json").write_text(json.dumps(merge))
    return folder, whole


PARTS = {
    "a part is missing": lambda f: part(f).unlink(),
    "a part is truncated": lambda f: os.truncate(part(f), part(f).stat().st_size - 4),
    "a part is a link out": lambda f: relink(part(f), f.parent / "elsewhere"),
    "a part is a pickle": lambda f: part(f).write_bytes(pickle.dumps(Trap()) * 100),
    "a part is shorter": lambda f: save_file({"weight": torch.zeros(5)}, part(f)),
    "a part has another name": lambda f: save_file({"other": torch.zeros(60)}, part(f)),
    "a huge shape": lambda f: edit(f / "merge.json", "sharded", "tensors", "weight", "shape", value=[4, 10**15]),
    "a huge shape with huge parts": lambda f: [
        edit(f / "merge.json", "sharded", "tensors", "weight", "shape", value=[10**15]),
        edit(f / "merge.json", "sharded", "parts", value={"1": [["weight", 0, 10**15]]}),
    ],
    "a shape that overflows": lambda f: edit(
        f / "merge.json", "sharded", "tensors", "weight", "shape", value=[2**40, 2**40]
    ),
    "an unknown dtype": lambda f: edit(f / "merge.json", "sharded", "tensors", "weight", "dtype", value="object"),
    "numbers in no part": lambda f: edit(f / "merge.json", "sharded", "parts", value={"1": [["weight", 6, 6]]}),
    "a range outside of the tensor": lambda f: edit(
        f / "merge.json", "sharded", "parts", "1", value=[["weight", 9, 6]]
    ),
    "a file beside is a link out": lambda f: [
        (f.parent / "secret").write_text("secret"),
        (f / "config.json").symlink_to(f.parent / "secret"),
    ],
}


def part(folder):
    return folder / "weights.rank-00001.safetensors"


@pytest.mark.parametrize("case", PARTS)
def test_crafted_parts_are_refused_and_leave_no_output(root, case):
    folder, _ = sharded(root)
    PARTS[case](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|not valid|hold|not there|leads"):
        consolidate_snapshot(folder, root / "model")
    assert not (root / "model").exists()
    assert not list(root.glob(".tmp-*"))


def test_consolidating_replaces_nothing_and_takes_weights_from_the_parts_alone(root):
    folder, whole = sharded(root)
    save_file({"weight": torch.zeros(4, 3)}, folder / "model-00001-of-00001.safetensors")
    weight_map(folder, {"weight": "model-00001-of-00001.safetensors"})
    for output in (root / "victim", root, folder, root / "merged" / "best"):
        with pytest.raises(FileExistsError, match="output="):
            consolidate_snapshot(folder, output)
    assert (root / "victim" / "precious.txt").read_text() == "precious"
    consolidate_snapshot(folder, root / "model")
    assert sorted(path.name for path in (root / "model").iterdir()) == ["merge.json", "model.safetensors"]
    assert torch.equal(load_file(root / "model" / "model.safetensors")["weight"], whole)


@pytest.mark.parametrize("case", MEMORIES)
def test_what_a_damaged_state_remembers_is_forgotten_and_merges_go_on(root, caplog, case):
    options = {"search": "trajectory", "window_size": 4, "evaluations": 20}
    Run(root, **options).steps(1, 4).save().merger.close()
    edit(root / "state" / "state.json", "run", "search", *case.split(": ")[0].split("."), value=MEMORIES[case])
    reseal(root / "state", "state.json")
    run = Run(root, resume=True, **options).steps(5, 10)
    assert [record.step for record in run.merger.records] == [6, 8, 10]
    assert sum("without what the saved state remembers" in record.getMessage() for record in caplog.records) <= 1
    assert not run.merger._failures.counts
    run.merger.close()


def flip(path, share):
    """Flip one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["state.json", "row-00.rank-00000.safetensors", "row-01.rank-00000.safetensors"])
def test_a_flipped_bit_in_a_state_means_an_empty_window(root, caplog, name, share):
    flip(root / "state" / name, share)
    run = Run(root, resume=True).steps(5, 5)
    assert run.merger.window.steps == (5,)
    assert sum("restoring the window failed" in record.getMessage() for record in caplog.records) == 1
    run.merger.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("name", ["merge.json", "model.safetensors"])
def test_a_flipped_bit_in_a_snapshot_is_found(root, name, share):
    folder = find_snapshot(root / "merged")
    load_merged(folder, nn.Linear(3, 3), verify=True)
    flip(folder / name, share)
    with pytest.raises(ValueError, match="damaged"):
        load_merged(folder, nn.Linear(3, 3), verify=True)


def test_verifying_finds_weights_that_were_added_and_snapshots_without_checksums(root):
    folder = find_snapshot(root / "merged")
    weight_map(folder, {"weight": "model.safetensors"})
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json was not written with it"):
        load_merged(folder, nn.Linear(3, 3), verify=True)
    (folder / "model.safetensors.index.json").unlink()
    merge = read_merge(folder)
    (folder / "merge.json").write_text(json.dumps({key: merge[key] for key in merge if "checksum" not in key}))
    load_merged(folder, nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has no checksums"):
        load_merged(folder, nn.Linear(3, 3), verify=True)


def test_a_consolidated_snapshot_can_be_verified_and_flipped_parts_are_refused(root):
    folder, whole = sharded(root)
    merge = json.loads((folder / "merge.json").read_text())
    (folder / "merge.json").write_text(json.dumps({**merge, "checksum": ""}))
    reseal(folder, "merge.json")
    consolidate_snapshot(folder, root / "model")
    model = nn.Linear(3, 4, bias=False)
    load_merged(root / "model", model, verify=True)
    assert torch.equal(model.weight, whole)
    flip(part(folder), 1.0)
    with pytest.raises(ValueError, match="damaged"):
        consolidate_snapshot(folder, root / "other")


def test_folders_and_files_of_others_with_names_of_ours_stay(root):
    merged = root / "merged"
    for name in (".tmp-mine", ".tmp-step-00000006", "step-00000006", "step-00000001", "state/step-00000001"):
        (merged / name).mkdir(parents=True, exist_ok=True)
        (merged / name / "mine.txt").write_text("mine")
    (merged / "best").unlink()
    (merged / "best").write_text("mine")
    Run(root, keep_last=1, keep_best=False).steps(1, 8).merger.close()
    assert len(list(merged.rglob("mine.txt"))) == 5
    assert (merged / "step-00000006.1" / "mine.txt").exists()
    assert (merged / "best").read_text() == "mine"
    assert find_snapshot(merged).name == "step-00000008"
