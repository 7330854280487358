"""What the trainer's push_to_hub uploads, by the rules of huggingface_hub itself."""

from huggingface_hub import HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS

from traj_merge_callback.transformers.hub import leave_out_of_uploads

HALF = ".tmp-step-00000020-" + "0123456789abcdef" * 2
# What transformers.Trainer leaves out of its output folder, and of a checkpoint's.
OUTPUT, CHECKPOINT = ["_*", "checkpoint-*"], []


def uploaded(folder, patterns):
    found = HfApi()._prepare_upload_folder_additions(
        folder, "", ignore_patterns=patterns + DEFAULT_IGNORE_PATTERNS, repo_type="model", token=False
    )
    return {one.path_in_repo for one in found}


def test_windows_and_half_written_folders_are_left_out(tmp_path):
    whole = ["model.safetensors", "merged/index.json", "merged/step-00000010/model.safetensors", "merged/.tmp-mine/a"]
    checkpoint = ["model.safetensors", "trainer_state.json"]
    left_out = [
        "merged/.traj-merge.lock",
        f"merged/{HALF}/model.safetensors",
        f"merged/{HALF.replace('step-00000020', 'index.json')}",
    ]
    windows = ["traj_merge/state.json", "traj_merge/row-00.rank-00000.safetensors", f"{HALF}/state.json"]
    for name in [*whole, *left_out, *(f"checkpoint-20/{name}" for name in checkpoint + windows)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    before = list(DEFAULT_IGNORE_PATTERNS)
    try:
        for _ in range(2):
            leave_out_of_uploads("traj_merge")
        assert len(set(DEFAULT_IGNORE_PATTERNS)) == len(DEFAULT_IGNORE_PATTERNS)
        assert uploaded(tmp_path, OUTPUT) == set(whole)
        assert uploaded(tmp_path / "checkpoint-20", CHECKPOINT) == set(checkpoint)
    finally:
        DEFAULT_IGNORE_PATTERNS[:] = before
