"""The traj-merge command as a user types it, each command in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import llama, perturbed, saved
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from traj_merge_callback.offline import merge
from traj_merge_callback.offline.cli import app

pytest_plugins = ["folders"]

SMALL = ["--tokenizer", "bytes", "--block-size", "32", "--sequences", "32"]


def run(*arguments, code=0):
    """The command in this process, as it takes seconds to start."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, (arguments, done.output, done.exception)
    return done


@pytest.mark.parametrize("command", [["-m", "traj_merge_callback"], ["traj-merge"]])
def test_the_command_starts_as_a_program_and_as_a_module(command, tmp_path):
    program = Path(sys.executable).with_name(command[0]) if command[0] == "traj-merge" else sys.executable
    arguments = [program, *command[command[0] == "traj-merge" :], "merge", tmp_path, "--output", tmp_path / "mean"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "traj-merge: weights=None, recipe=None: give one of them\n"


def test_search_inspect_verify_export_and_what_verify_finds(trainer_run, heldout_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copy(heldout_file, tmp_path / "text.jsonl")
    said = run("search", trainer_run, "--heldout", "text.jsonl", "--output", "merged", *SMALL).stdout
    snapshot = tmp_path / "merged" / "best"
    merge = json.loads((snapshot / "merge.json").read_text())
    split = merge["report_split"]
    assert f"{split['live_loss']:.4f}" in said
    assert f"{split['merged_loss']:.4f}" in said
    assert f"{split['gain']:.4f} ± {split['gain_stderr']:.4f}" in said
    assert all(f"{weight:+.3f}" in said for weight in merge["weights"])
    assert f"{split['merged_loss']:.4f}" in run("inspect", snapshot).stdout
    assert "latest" in run("inspect", tmp_path / "merged").stdout
    assert json.loads(run("inspect", snapshot, "--json").stdout) == merge
    found = json.loads(run("verify", snapshot, "--json").stdout)
    assert found["differs"] == []
    assert found["same_data"] is True
    assert found["recomputed"] == pytest.approx(split["merged_loss"], abs=1e-6)
    exported = run("export", snapshot, "--format", "mergekit").stdout
    assert exported.startswith("merge_method: linear\n")
    assert all(repr(weight) in exported for weight in merge["weights"])
    # Other text, then other weights.
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:-20]))
    found = json.loads(run("verify", snapshot, "--json", code=3).stdout)
    assert found["same_data"] is False
    weights = snapshot / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged" in run("verify", snapshot, code=1).stderr


@pytest.mark.parametrize("search", ["fisher", "df-merge", "regmean"])
def test_merges_that_weigh_each_parameter_are_verified_and_not_exported(trainer_run, heldout_file, tmp_path, search):
    arguments = ["search", trainer_run, "--heldout", heldout_file, "--search", search, "--output", tmp_path / "merged"]
    assert f"search='{search}' takes" in run(*arguments, *SMALL, "--set", "evaluations=2", code=1).stderr
    assert not (tmp_path / "merged").exists()
    run(*arguments, *SMALL)
    snapshot = tmp_path / "merged" / "best"
    merge = json.loads((snapshot / "merge.json").read_text())
    alone = merge["weights"].count(0.0) == len(merge["weights"]) - 1  # live, or one of the others
    assert merge["weighing"] == ("rows" if alone else "regmean" if search == "regmean" else "fisher")
    found = json.loads(run("verify", snapshot, "--json").stdout)
    assert found["differs"] == []
    if not alone:
        assert "makes no weighted mean" in run("export", snapshot, code=1).stderr
        assert "is no weighted mean of them" in (snapshot / "README.md").read_text()


def test_merge_writes_what_was_asked_for(tmp_path):
    saved(llama(), tmp_path / "run", (100, 200, 300))
    found = run("merge", tmp_path / "run", "--weights", "1/2,0,1/2", "--output", tmp_path / "mean", "--json")
    assert json.loads(found.stdout) == {
        "folder": str(tmp_path / "mean"),
        "checkpoint_steps": [100, 200, 300],
        "weights": [0.5, 0.0, 0.5],
    }
    one, _, three = (load_file(tmp_path / "run" / f"step{n}" / "model.safetensors") for n in (100, 200, 300))
    for name, value in load_file(tmp_path / "mean" / "model.safetensors").items():
        assert torch.equal(value, 0.5 * one[name] + 0.5 * three[name])
    run("merge", tmp_path / "run", "--recipe", "ema", "--set", "decay=0.5", "--output", tmp_path / "ema")
    weights = json.loads((tmp_path / "ema" / "merge.json").read_text())["weights"]
    assert weights == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_a_curve_goes_on_where_it_was_stopped(trainer_run, heldout_file, tmp_path):
    output = ["--output", tmp_path / "curve"]
    options = [trainer_run, "--heldout", heldout_file, "--window", 3, "--every-step", *SMALL, *output]
    whole = json.loads(run("curve", *options, "--json").stdout)
    assert [one["step"] for one in whole] == [40, 60, 80, 100, 120]
    assert [len(one["weights"]) for one in whole] == [2, 3, 3, 3, 3]
    assert not list((tmp_path / "curve").glob("step-*"))
    assert (tmp_path / "curve" / "curve.html").exists()
    assert list((tmp_path / "curve" / "curve-figures").glob("*.png"))
    metrics = tmp_path / "curve" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]) + lines[2][:50])  # as a kill may leave it
    again = json.loads(run("curve", *options, "--json").stdout)
    for one, two in zip(whole, again, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert "another" in run("curve", *options, "--search", "lawa", code=1).stderr


def missing_shard(folder):
    saved(llama(), folder, (1, 2), max_shard_size="20KB")
    (folder / "step1" / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next((folder / "step1").glob("model-00002-*"), folder / "x").unlink(missing_ok=True)


def mixed(folder):
    saved(llama(), folder, [1])
    saved(GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)), folder, [2])


def mixed_sizes(folder):
    saved(llama(), folder, [1])
    saved(llama(hidden_size=64), folder, [2])


def not_finite(folder):
    saved(llama(), folder, (1, 2))
    model = llama()
    model.lm_head.weight.data[3, 3] = float("nan")
    model.save_pretrained(folder / "step1")


def no_safetensors(folder):
    saved(llama(), folder, (1, 2))
    (folder / "step1" / "model.safetensors").write_text("not a safetensors file")


def no_config(folder):
    saved(llama(), folder, (1, 2))
    (folder / "step2" / "config.json").unlink()


def other_tokenizers(folder):
    saved(llama(), folder, (1, 2))
    for number in (1, 2):
        (folder / f"step{number}" / "tokenizer.json").write_text(json.dumps({"version": number}))


def fine(folder):
    saved(llama(), folder, (1, 2))


BAD = [
    (lambda folder: folder.mkdir(), [], ["holds no checkpoints"]),
    (lambda folder: None, [], ["is not there"]),
    (lambda folder: saved(llama(), folder, [1]), [], ["1 are left", "2 or more"]),
    (missing_shard, [], ["shards are missing", "step1"]),
    (mixed, [], ["llama", "gpt2", "one architecture"]),
    (mixed_sizes, [], ["(256, 32)", "step1", "one architecture"]),
    (not_finite, [], ["step1", "lm_head.weight", "not finite"]),
    (no_safetensors, [], ["model.safetensors is damaged"]),
    (no_config, [], ["no config.json", "--model"]),
    (other_tokenizers, [], ["tokenizers of", "differ"]),
    (fine, ["--block-size", "100000"], ["block_size=100000", "context has 64 tokens"]),
    (fine, ["--heldout", "short.txt"], ["too few", "block_size=32"]),
    (fine, ["--heldout", "missing.txt"], ["missing.txt"]),
    (fine, ["--search", "autoo"], ["autoo", "did you mean"]),
    (fine, ["--search", "bema"], ["bema", "callback"]),
    (fine, ["--set", "evaluation=15"], ["evaluation", "evaluations"]),
    (fine, ["--set", "merge_every=15"], ["merge_every=15", "no such option"]),
    (fine, ["--device", "tpu9"], ["device='tpu9'"]),
    (fine, ["--dtype", "int3"], ["dtype='int3'"]),
    (fine, ["--tokenizer", "/nowhere"], ["tokenizer='/nowhere'"]),
    (fine, ["--steps", "100"], ["--steps 100", "FIRST:LAST"]),
    (fine, ["--output", "."], ["is there already"]),
]


@pytest.mark.parametrize(("make", "options", "words"), BAD, ids=lambda value: None)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    make, options, words, heldout_file, tmp_path, monkeypatch
):
    make(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.")
    given = {"--heldout": str(heldout_file), "--output": str(tmp_path / "merged"), "--tokenizer": "bytes"}
    given |= {"--block-size": "32", "--sequences": "32"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    done = run("search", tmp_path / "run", *(part for pair in given.items() for part in pair), code=1)
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_no_space_for_the_result_is_said_before_anything_is_written(tmp_path, monkeypatch):
    fine(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="are free"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_program_evaluates_a_snapshot_and_its_numbers_come_back(tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    merge(tmp_path / "run", recipe="lawa", output=tmp_path / "merged" / "mean")
    program = tmp_path / "count.py"
    program.write_text(
        "import json, pathlib, sys\n"
        "size = len(list(pathlib.Path(sys.argv[1]).iterdir()))\n"
        "pathlib.Path(sys.argv[2], 'results.json').write_text(json.dumps({'results': {'files': {'count': size}}}))\n"
    )
    command = [sys.executable, program, "{snapshot}", "{out}"]
    found = run("eval", tmp_path / "merged" / "mean", "--json", "--", *command).stdout
    assert json.loads(found) == {"files/count": len(list((tmp_path / "merged" / "mean").iterdir()))}
    assert (tmp_path / "merged-eval" / "mean" / "results.json").exists()
    said = run("eval", tmp_path / "merged" / "mean", "--", sys.executable, "-c", "1", code=1).stderr
    assert "must name the snapshot" in said
    assert (
        "exit status 7"
        in run("eval", tmp_path / "merged" / "mean", "--", "sh", "-c", "exit 7 {snapshot}", code=1).stderr
    )


def test_weights_that_do_not_fit(tmp_path):
    saved(perturbed(llama(), 0), tmp_path / "run", (1, 2))
    for weights, word in [("1/3,1/3,1/3", "give one for each"), ("0.5,0.6", "sum to 1.1"), ("a,b", "numbers")]:
        assert (
            word in run("merge", tmp_path / "run", "--weights", weights, "--output", tmp_path / "mean", code=1).stderr
        )
    assert "give one of them" in run("merge", tmp_path / "run", "--output", tmp_path / "mean", code=1).stderr
    assert "use search" in run("merge", tmp_path / "run", "--recipe", "gp", "--output", tmp_path / "m", code=1).stderr
