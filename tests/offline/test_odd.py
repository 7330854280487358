"""Checkpoints, names and folders that are not as one expects, and what a killed command leaves."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from folders import documents, llama, perturbed, saved
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from traj_merge_callback import HeldOutLoss, load_merged
from traj_merge_callback.evaluate.data import NAMELESS
from traj_merge_callback.offline import curve, export, find_checkpoints, merge, search
from traj_merge_callback.offline.cli import app
from traj_merge_callback.offline.heldout import ByteTokenizer, heldout_batches

pytest_plugins = ["folders"]

OPTIONS = {"tokenizer": "bytes", "block_size": 32, "sequences": 32, "progress": False}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "model",
    [
        GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
        MixtralForCausalLM(MixtralConfig(num_key_value_heads=4, num_local_experts=2, **SMALL)),
    ],
    ids=["pythia", "mixture-of-experts"],
)
def test_models_that_transformers_converts_while_it_loads_them(model, heldout_file, tmp_path):
    saved(model, tmp_path / "run", (1, 2, 3))
    record = search(tmp_path / "run", heldout_file, output=tmp_path / "merged", search="lawa", **OPTIONS)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "best").state_dict()
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"step{n}").state_dict() for n in (1, 2, 3)]
    if record.source == "merge":
        for name, value in made.items():
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3, rtol=0, atol=1e-6)


def test_a_curve_keeps_its_points_when_points_are_added(trainer_run, heldout_file, tmp_path):
    given = {"output": tmp_path / "curve", "window": 2, "search": "lawa", **OPTIONS}
    shutil.copytree(trainer_run, tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoint-60", tmp_path / "later")
    first = curve(tmp_path / "run", heldout_file, every_step=True, **given)
    assert [one["step"] for one in first] == [40, 80, 100, 120]
    shutil.move(tmp_path / "later", tmp_path / "run" / "checkpoint-60")
    second = curve(tmp_path / "run", heldout_file, every_step=True, **given)
    assert [one["step"] for one in second] == [40, 60, 80, 100, 120]
    assert [one for one in second if one["step"] != 60] == first
    with pytest.raises(ValueError, match="another every"):
        curve(tmp_path / "run", heldout_file, every_step=True, every=40, **given)


def checkpoint_file(path, step=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": llama().state_dict(), **({} if step is None else {"global_step": step})}, path)


def test_numbers_in_names_that_are_no_steps(tmp_path):
    for number, loss in enumerate(["3.21", "2.87", "1.95"]):
        checkpoint_file(tmp_path / "lit" / f"epoch={number:02d}-val_loss={loss}.ckpt", step=100 * (number + 1))
    assert [one.step for one in find_checkpoints(tmp_path / "lit")] == [100, 200, 300]
    for name in ("step100k", "step200k"):
        saved(llama(), tmp_path / "thousands", [1])
        (tmp_path / "thousands" / "step1").rename(tmp_path / "thousands" / name)
    assert [one.step for one in find_checkpoints(tmp_path / "thousands")] == [100_000, 200_000]
    for name in ("model_000020.pt", "model_000040.pt"):
        checkpoint_file(tmp_path / "nano" / name)
    assert [one.step for one in find_checkpoints(tmp_path / "nano")] == [20, 40]
    saved(llama(), tmp_path / "two", [1, 2])
    (tmp_path / "two" / "step1").rename(tmp_path / "two" / "1000-seed-2")
    with pytest.raises(ValueError, match="several numbers in its name, 1000, 2"):
        find_checkpoints(tmp_path / "two")


def test_several_runs_links_and_folders_without_weights(tmp_path, caplog):
    for version in (0, 1):
        for step in (10, 20):
            checkpoint_file(tmp_path / "logs" / f"version_{version}" / "checkpoints" / f"epoch=0-step={step}.ckpt")
    with pytest.raises(ValueError, match="several runs"):
        find_checkpoints(tmp_path / "logs")
    saved(llama(), tmp_path / "run", (10, 20))
    (tmp_path / "links").mkdir()
    for step in (10, 20):
        (tmp_path / "links" / f"step{step}").symlink_to(tmp_path / "run" / f"step{step}")
    assert [one.step for one in find_checkpoints(tmp_path / "links")] == [10, 20]
    (tmp_path / "run" / "checkpoint-30").mkdir()
    assert [one.step for one in find_checkpoints(tmp_path / "run")] == [10, 20]
    assert "checkpoint-30 holds no weights" in caplog.text
    (tmp_path / "run" / "training_args.bin").write_bytes(b"")
    assert [one.step for one in find_checkpoints(f"{tmp_path}/run/*")] == [10, 20]


def test_optimizers_in_distributed_checkpoints_are_not_merged(tmp_path):
    for number in (1, 2):
        model = perturbed(llama(), number)
        state = {"app": {"model": model.state_dict(), "optim": {"state": {"exp_avg": torch.ones(3)}}}}
        dcp.save(state, checkpoint_id=tmp_path / "run" / f"step{number}")
    folder = merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean", allow_pickle=True, progress=False)
    assert all(name.startswith("app.model.") for name in load_file(folder / "model.safetensors"))
    load_merged(folder, nn.ModuleDict({"app": nn.ModuleDict({"model": llama()})}))
    next((tmp_path / "run" / "step1").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match="step1 is damaged"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "other", allow_pickle=True, progress=False)


@pytest.mark.parametrize(
    "given",
    [["one.jsonl", "one.jsonl"], ["a=one.jsonl", "b=one.jsonl"], ["twice.jsonl"], ["a=one.jsonl", "b=one.jsonl", "r"]],
)
def test_equal_documents_are_in_one_split(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [json.dumps({"text": f"<{number}>" * 60}) for number in range(100)]
    (tmp_path / "one.jsonl").write_text("\n".join(texts))
    (tmp_path / "twice.jsonl").write_text("\n".join(texts + texts))
    report_only = ["b"] if "r" in given else []
    dealt = heldout_batches(
        [one for one in given if one != "r"],
        ByteTokenizer(),
        sequences=60,
        block_size=32,
        batch_size=8,
        report_only=report_only,
    )
    found = {"search": set(), "report": set()}
    for batches in dealt.values():
        for batch, split in batches.batches:
            text = bytes(batch["input_ids"].flatten().tolist()).decode()
            found[split] |= {part for part in text.replace("<", ">").split(">")[1:-1] if part}
    assert found["search"]
    assert not found["search"] & found["report"]


def test_merge_refuses_what_is_not_one_run_or_not_numbers(tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    config = tmp_path / "run" / "step1" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mistral"'))
    with pytest.raises(ValueError, match="one architecture"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean")
    for number in (1, 2):
        tensors = {"l.weight": torch.ones(4, 4, dtype=torch.int8), "l.weight_scale": torch.ones(4)}
        save_file(tensors, tmp_path / f"step{number}.safetensors")
    with pytest.raises(ValueError, match="quantized"):
        merge([tmp_path / "step1.safetensors", tmp_path / "step2.safetensors"], recipe="lawa", output=tmp_path / "m")


def test_masks_are_kept_and_a_checkpoint_that_is_not_finite_is_named(tmp_path):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    for number in (1, 2):
        torch.save({"mask": mask, "weight": torch.full((3,), float(number))}, tmp_path / f"step{number}.pt")
    files = [tmp_path / "step1.pt", tmp_path / "step2.pt"]
    found = load_file(merge(files, recipe="lawa", output=tmp_path / "mean") / "model.safetensors")
    assert torch.equal(found["mask"], mask)
    assert found["weight"].tolist() == [1.5] * 3
    torch.save({"mask": mask, "weight": torch.tensor([1.0, float("nan"), 1.0])}, tmp_path / "step1.pt")
    with pytest.raises(ValueError, match=r"step1\.pt has numbers in 'weight' that are not finite"):
        merge(files, recipe="lawa", output=tmp_path / "other")


def test_a_newest_checkpoint_with_nan_is_named(heldout_file, tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    model = llama()
    model.lm_head.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "run" / "step2")
    with pytest.raises(ValueError, match=r"step2 has numbers in 'lm_head\.weight' that are not finite"):
        search(tmp_path / "run", heldout_file, output=tmp_path / "merged", **OPTIONS)


def test_an_index_that_an_earlier_save_left_is_not_followed(tmp_path):
    for number in (1, 2):
        folder = tmp_path / "run" / f"step{number}"
        llama().save_pretrained(folder, max_shard_size="20KB")
        perturbed(llama(), number).save_pretrained(folder)
    made = load_file(merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean") / "model.safetensors")
    one, two = (load_file(tmp_path / "run" / f"step{number}" / "model.safetensors") for number in (1, 2))
    for name, value in made.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(256, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 256)

    def forward(self, input_ids, labels):
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_counters_are_the_newest_checkpoints_and_the_users_module_stays_as_it_was(tmp_path):
    for number in (1, 2):
        model = Counting()
        model.norm.num_batches_tracked += 10 * number
        torch.save({"state_dict": perturbed(model, number).state_dict()}, tmp_path / f"step{number}.ckpt")
    ids = torch.tensor([list(text.encode()[:64]) for text in documents(16, seed=3)])
    loader, module = [{"input_ids": part, "labels": part} for part in ids.split(4)], Counting()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    files = [tmp_path / "step1.ckpt", tmp_path / "step2.ckpt"]
    record = search(files, loader, model=module, output=tmp_path / "merged", search="lawa", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    load_merged(tmp_path / "merged" / "best", module)
    assert module.norm.num_batches_tracked == 20
    assert HeldOutLoss(loader).evaluate(module, "report").loss == pytest.approx(record.merged_loss, abs=1e-6)


def test_weights_that_are_there_twice_are_not_guessed(tmp_path):
    for number in (1, 2):
        state = {
            f"{which}.{name}": value for which in ("student", "ema") for name, value in llama().state_dict().items()
        }
        torch.save({"state_dict": state}, tmp_path / f"step{number}.ckpt")
    loader = [{"input_ids": torch.ones(8, 16).long(), "labels": torch.arange(128).view(8, 16)}]
    with pytest.raises(ValueError, match="more than once"):
        search([tmp_path / "step1.ckpt", tmp_path / "step2.ckpt"], loader, model=llama(), output=tmp_path / "merged")


def test_blocks_and_tokens_beyond_the_model(heldout_file, tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    with pytest.raises(ValueError, match="context has 64 tokens"):
        search(tmp_path / "run", heldout_file, output=tmp_path / "merged", **{**OPTIONS, "block_size": 128})
    saved(llama(vocab_size=64), tmp_path / "small", (1, 2))
    with pytest.raises(ValueError, match="the model knows 64"):
        search(tmp_path / "small", heldout_file, output=tmp_path / "merged", **OPTIONS)
    assert not (tmp_path / "merged").exists()


def test_the_command_shows_paths_as_they_are_and_renames_nothing(tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    folder = tmp_path / "out[v2]"
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--recipe", "lawa", "--output", str(folder)])
    assert f"written to {folder}" in done.output
    (tmp_path / "mine").mkdir()
    done = CliRunner().invoke(app, ["export", str(folder), "--output", str(tmp_path / "mine")])
    assert (done.exit_code, "is a folder" in done.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out[v2]", "run"]
    assert f'model: "{tmp_path}/run/step1"' in export(folder)
    document = json.loads((folder / "merge.json").read_text())
    (folder / "merge.json").write_text(json.dumps({**document, "weights": [1.0]}))
    for command in ("inspect", "export"):
        done = CliRunner().invoke(app, [command, str(folder)])
        assert (done.exit_code, "merge.json is damaged" in done.stderr) == (1, True)


@pytest.mark.parametrize("arguments", [["--recipe", "lawa"], None], ids=["merge", "search"])
def test_a_killed_command_leaves_nothing_once_it_is_run_again(arguments, heldout_file, tmp_path):
    saved(llama(hidden_size=256, intermediate_size=1024), tmp_path / "run", (1, 2, 3, 4))
    command = [sys.executable, "-m", "traj_merge_callback", "merge" if arguments else "search", tmp_path / "run"]
    command += arguments or ["--heldout", heldout_file, "--tokenizer", "bytes", "--block-size", "32"]
    command += ["--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(tmp_path.glob(".tmp-out-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".tmp-out-*"))
    assert CliRunner().invoke(app, list(map(str, command[3:]))).exit_code == 0
    assert (tmp_path / "out").is_dir()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_two_commands_do_not_write_one_folder(heldout_file, tmp_path):
    saved(llama(hidden_size=256, intermediate_size=1024), tmp_path / "run", (1, 2, 3, 4))
    text = ["--heldout", heldout_file, "--tokenizer", "bytes", "--block-size", "32"]
    first = [
        sys.executable,
        "-m",
        "traj_merge_callback",
        "search",
        tmp_path / "run",
        *text,
        "--output",
        tmp_path / "out",
    ]
    process = subprocess.Popen(first, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(tmp_path.glob(".tmp-out-*")):
        time.sleep(0.001)
    for command in (["merge", tmp_path / "run", "--recipe", "lawa"], ["search", *first[4:-2]], ["curve", *first[4:-2]]):
        done = CliRunner().invoke(app, [*map(str, command), "--output", str(tmp_path / "out")])
        assert (done.exit_code, "is being written by another command" in done.stderr) == (1, True)
    assert process.wait() == 0
    assert (tmp_path / "out" / "best" / "merge.json").is_file()
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("arguments", [["merge", "--recipe", "lawa"], ["search"]], ids=["merge", "search"])
def test_an_interrupted_command_leaves_nothing(arguments, heldout_file, tmp_path):
    saved(llama(hidden_size=256, intermediate_size=1024), tmp_path / "run", (1, 2, 3, 4))
    command = [sys.executable, "-m", "traj_merge_callback", arguments[0], tmp_path / "run", *arguments[1:]]
    command += ["--heldout", heldout_file, "--tokenizer", "bytes", "--block-size", "32"] if len(arguments) == 1 else []
    process = subprocess.Popen(
        [*command, "--output", tmp_path / "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob(".tmp-out-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode != 0
    assert b"Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_terminal_without_unicode_shows_everything_else(heldout_file, tmp_path):
    saved(llama(), tmp_path / "run", (1, 2))
    text = ["--heldout", heldout_file, "--tokenizer", "bytes", "--block-size", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "traj_merge_callback", "search", tmp_path / "run", *text, "--output", tmp_path / "out"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
        capture_output=True,
        check=True,
    )
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert f"{record['merged_loss']:.4f}".encode() in done.stdout


def test_checkpoints_may_be_links(heldout_file, tmp_path):
    saved(llama(), tmp_path / "real", (1, 2, 3))
    for step in (1, 2, 3):
        (tmp_path / "run" / f"step{step}").mkdir(parents=True)
        for path in (tmp_path / "real" / f"step{step}").iterdir():
            (tmp_path / "run" / f"step{step}" / path.name).symlink_to(path)
    options = {"tokenizer": "bytes", "block_size": 32, "sequences": 16, "progress": False}
    linked = search(tmp_path / "run", str(heldout_file), output=tmp_path / "one", **options)
    real = search(tmp_path / "real", str(heldout_file), output=tmp_path / "two", **options)
    assert linked.weights == real.weights
    # Whatever else a link leads to is not copied into a folder that may be shared.
    with pytest.raises(ValueError, match="leads out of its folder"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_rows_of_csv_and_json_files_and_rows_without_text(tmp_path):
    texts = [*documents(40, seed=5), "a text, with a comma,\nand 'two' \"lines\" " * 3000]
    (tmp_path / "one.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "two.json").write_text(json.dumps([None, *texts][1:]))
    (tmp_path / "three.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [None, *texts, None]))
    with (tmp_path / "four.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["number", "text"])
        writer.writeheader()
        writer.writerows({"number": index, "text": text} for index, text in enumerate(texts))
    found = {}
    for path in sorted(tmp_path.iterdir()):
        batches = heldout_batches([str(path)], ByteTokenizer(), sequences=64, block_size=32, batch_size=8)[NAMELESS]
        found[path.name] = torch.cat([batch["input_ids"] for batch, _ in batches.batches])
    assert torch.equal(found["one.json"], found["two.json"])
    assert torch.equal(found["one.json"], found["four.csv"])
    assert len(found["three.jsonl"]) == 64
    (tmp_path / "six.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "four.csv").read_bytes())
    batches = heldout_batches([str(tmp_path / "six.csv")], ByteTokenizer(), sequences=64, block_size=32, batch_size=8)
    assert torch.equal(torch.cat([batch["input_ids"] for batch, _ in batches[NAMELESS].batches]), found["one.json"])
    (tmp_path / "five.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match="row 1 has no text"):
        heldout_batches([str(tmp_path / "five.json")], ByteTokenizer(), sequences=4, block_size=8, batch_size=2)


def test_the_first_key_with_a_text_is_taken(tmp_path):
    rows = [{"text": None, "content": text} for text in documents(40, seed=5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"text": row["content"]}) + "\n" for row in rows))
    found = [
        heldout_batches([str(tmp_path / name)], ByteTokenizer(), sequences=16, block_size=32, batch_size=16)[NAMELESS]
        for name in ("rows.jsonl", "same.jsonl")
    ]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for (a, _), (b, _) in zip(*(one.batches for one in found)))
    (tmp_path / "rows.jsonl").write_text('{"text": 0}\n')
    with pytest.raises(ValueError, match="row 1 has no text"):
        heldout_batches([str(tmp_path / "rows.jsonl")], ByteTokenizer(), sequences=4, block_size=8, batch_size=2)


def test_outputs_that_are_there_are_used_or_refused(heldout_file, tmp_path, monkeypatch):
    saved(llama(), tmp_path / "run", (1, 2, 3))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    curve(tmp_path / "run", str(heldout_file), output=".", **OPTIONS)
    assert (tmp_path / "here" / "metrics.jsonl").is_file()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / ".tmp-a.lock").touch()
    merge(tmp_path / "run", recipe="lawa", output=tmp_path / "left", progress=False)
    assert (tmp_path / "left" / "merge.json").is_file()
    os.mkfifo(tmp_path / ".tmp-pipe.lock")
    merge(tmp_path / "run", recipe="lawa", output=tmp_path / "pipe", progress=False)
    for place in ("/", tmp_path / "left"):
        with pytest.raises(FileExistsError, match="is there already"):
            merge(tmp_path / "run", recipe="lawa", output=place, progress=False)
