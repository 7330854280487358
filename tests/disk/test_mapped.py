"""window_storage="disk" where space is short: refused with the numbers at the start, and never deadly afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AT_ONCE, tiny_llama, train_steps
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger

TESTS = Path(__file__).parents[1]
OPTIONS = {
    "window_storage": "disk",
    "capture_every": 1,
    "merge_every": 4,
    "window_size": 3,
    "progress": False,
    **AT_ONCE,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_too_little_space_is_said_at_the_start_with_what_would_fit(tmp_path, heldout, dtype):
    options = {**OPTIONS, "window_size": 10**9, "dtype": dtype}
    merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), output_dir=str(tmp_path / "merged"), **options)
    needed = r"window_storage='disk' needs [\d.e+]+ GB for 1000000000 rows of " + dtype
    with pytest.raises(OSError, match=needed + r", and [\d.e+]+ GB are free in .*merged; what would fit: window_size="):
        merger.prepare(tiny_llama())
    assert not (tmp_path / "merged").exists()
    # A loop that does not prepare goes on without merging.
    records = []
    train_steps(model := tiny_llama(), heldout, 4, lambda step: records.append(merger.step(model, step)))
    assert records == [None] * 4
    merger.close()


SMALL_DISK = """
from pathlib import Path
from conftest import tiny_llama, train_steps
from torch.utils.data import DataLoader
from traj_merge_callback import TrajectoryMerger
import realtext

text = realtext.Blocks(realtext.split_blocks(realtext.python_source()[:20], 32)[1][:48])
model, disk = tiny_llama(dropout=0.0), Path("/mnt/disk")

def merger(**options):
    options = {**OPTIONS, "output_dir": str(disk), "keep_last": 0, "keep_best": False, **options}
    return TrajectoryMerger(DataLoader(text, batch_size=8), **options)

for options in ({"window_size": 1000}, {"window_size": 30, "dtype": "bfloat16"}):
    try:
        merger(**options).prepare(model)
    except OSError as error:
        print(error)
ours = merger()
ours.prepare(model)
with (disk / "everything else").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
records = []
train_steps(model, text, 8, lambda step: records.append(ours.step(model, step)))
print("merges:", [record.step for record in records if record])
"""


def test_a_disk_that_fills_up_later_kills_nothing():
    """On a disk of 1 MB, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "examples"), *sys.path])
    mount = 'mkdir -p /mnt/disk 2>/dev/null; mount -t tmpfs -o size=1m none /mnt && mkdir /mnt/disk && exec "$@"'
    program = f"OPTIONS = {OPTIONS}\n{SMALL_DISK}"
    found = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    refused, other, merged = found.stdout.splitlines()
    assert "needs 115 MB for 1000 rows of float32" in refused
    assert "window_size=" in refused
    assert "dtype='int8'" in other
    assert merged == "merges: [4, 8]"
