"""Which checkpoints a name stands for, and in which order."""

import json
import shutil

import pytest
import torch

from offline.folders import llama
from traj_merge_callback.offline import find_checkpoints

NAMES = {
    "checkpoint-500": 500,
    "step1000": 1000,
    "step2000-tokens4B": 2000,
    "stage1-step3000-tokens5B": 3000,
    "iter_0004000": 4000,
    "global_step5000": 5000,
    "6000": 6000,
}


def weights(path):
    path.mkdir(parents=True)
    llama().save_pretrained(path)
    return path


@pytest.fixture
def irregular(tmp_path):
    first = weights(tmp_path / "run" / "checkpoint-500")
    for name in list(NAMES)[1:]:
        shutil.copytree(first, tmp_path / "run" / name)
    return tmp_path / "run"


def test_irregular_names_are_sorted_by_step(irregular):
    assert [one.step for one in find_checkpoints(irregular)] == sorted(NAMES.values())
    assert [one.step for one in find_checkpoints(f"{irregular}/*step*")] == [1000, 2000, 3000, 5000]
    assert [one.step for one in find_checkpoints(irregular, last=3)] == [4000, 5000, 6000]
    assert [one.step for one in find_checkpoints(irregular, every=2000)] == [2000, 4000, 6000]
    assert [one.step for one in find_checkpoints(irregular, steps=(1000, 3000))] == [1000, 2000, 3000]
    one, two = irregular / "step1000", irregular / "checkpoint-500"
    assert [found.step for found in find_checkpoints([one, two])] == [500, 1000]


def test_a_trainers_folder_stands_for_its_checkpoints(trainer_run, lightning_run):
    assert (trainer_run / "model.safetensors").exists()
    assert [one.step for one in find_checkpoints(trainer_run)] == [20, 40, 60, 80, 100, 120]
    found = find_checkpoints(lightning_run)
    assert [one.step for one in found] == [10, 20, 30, 40]
    assert all(one.path.suffix == ".ckpt" for one in found)


def test_what_is_missing_is_said(irregular, caplog):
    shutil.rmtree(irregular / "iter_0004000")
    find_checkpoints(irregular, every=1000)
    assert "steps 4000 are missing" in caplog.text


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda run: shutil.copytree(run / "step1000", run / "step-1000"), {}, ["step-1000", "step1000", "same step"]),
        (lambda run: None, {"every": 7000}, ["0 are left", "2 or more", "500, 1000"]),
        (lambda run: None, {"every": 0}, ["every=0"]),
        (lambda run: None, {"last": 1}, ["1 are left"]),
    ],
)
def test_too_few_or_ambiguous_checkpoints_are_one_sentence(irregular, change, options, words):
    change(irregular)
    with pytest.raises((ValueError, TypeError)) as caught:
        find_checkpoints(irregular, **options)
    for word in words:
        assert word.replace("same step", "both of step") in str(caught.value)


def test_folders_without_checkpoints_or_steps(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        find_checkpoints(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        find_checkpoints(tmp_path)
    weights(tmp_path / "final")
    with pytest.raises(ValueError, match="has no step in its name"):
        find_checkpoints([tmp_path / "final", tmp_path / "final"])


def test_a_step_in_a_document_counts_more_than_a_name(tmp_path):
    weights(tmp_path / "run-7b-a")
    (tmp_path / "run-7b-a" / "trainer_state.json").write_text(json.dumps({"global_step": 300}))
    torch.save({"state_dict": llama().state_dict(), "global_step": 400}, tmp_path / "last.ckpt")
    found = find_checkpoints([tmp_path / "run-7b-a", tmp_path / "last.ckpt"])
    assert [one.step for one in found] == [300, 400]


def test_revisions_in_the_local_cache_are_found_without_a_network(tmp_path, monkeypatch):
    """The cache as snapshot_download leaves it: refs, and snapshots whose files are links to blobs."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--tiny"
    (repo / "blobs").mkdir(parents=True)
    for number, name in enumerate(["step1000-tokens2B", "step2000-tokens4B", "main"]):
        snapshot = weights(repo / "snapshots" / f"{number:040x}")
        for path in snapshot.iterdir():
            blob = repo / "blobs" / f"{number}{path.name}"
            path.rename(blob)
            path.symlink_to(blob)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(f"{number:040x}")
    found = find_checkpoints("org/tiny@step*")
    assert [(one.name, one.step) for one in found] == [
        ("org/tiny@step1000-tokens2B", 1000),
        ("org/tiny@step2000-tokens4B", 2000),
    ]
    assert found[0].path == repo / "snapshots" / f"{0:040x}"
    assert "model.norm.weight" in found[1].tensors
    with pytest.raises(FileNotFoundError, match="step3"):
        find_checkpoints("org/tiny@step3*")
