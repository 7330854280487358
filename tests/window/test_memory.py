"""Free memory is looked at before a window takes it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from torch.utils.data import DataLoader

from traj_merge_callback import CheckpointWindow, TrajectoryMerger
from traj_merge_callback.distributed import Processes
from traj_merge_callback.window import devices, memory

MB = 10**6
ROW = 28_832 * 4  # bytes of the model's weights
# Files of control groups.
V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "prefix": "total_"}
V2 = {"limit": "memory.max", "used": "memory.current", "prefix": ""}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Lets a system say how much memory is free, and its control groups how much they leave."""
    root = tmp_path / "system"
    monkeypatch.setattr(memory, "_ROOT", root)

    def says(free, total, groups=""):
        (root / "proc/self").mkdir(parents=True, exist_ok=True)
        lines = {"MemTotal": total, "MemFree": 0, "MemAvailable": free}
        (root / "proc/meminfo").write_text("".join(f"{name}:  {n / 1024} kB\n" for name, n in lines.items()))
        (root / "proc/self/cgroup").write_text(groups)

    def group(folder, files, limit, used, cached):
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / files["limit"]).write_text(f"{limit}\n")
        (path / files["used"]).write_text(f"{used}\n")
        counts = {"active_file": cached / 2, "inactive_file": cached / 2}
        lines = [f"{files['prefix']}{name} {count}\n" for name, count in counts.items()]
        (path / "memory.stat").write_text("".join(["anon 5\n", *lines]))

    return SimpleNamespace(says=says, group=group)


def free():
    return tuple(round(one / MB) for one in memory.free_memory(torch.device("cpu")))


def test_free_memory_is_the_least_that_the_machine_and_its_control_groups_leave(machine):
    machine.says(100 * MB, 200 * MB)
    assert free() == (100, 200)
    # A job's group without a limit of its own, in one with a limit; pages of files can be given up.
    machine.says(100 * MB, 200 * MB, "0::/jobs/ours\n")
    machine.group("jobs/ours", V2, "max", 5 * MB, 0)
    machine.group("jobs", V2, 90 * MB, 70 * MB, 10 * MB)
    assert free() == (30, 90)
    # In a container the group's folder is the root, whatever its path outside is.
    machine.says(100 * MB, 200 * MB, "5:cpu:/\n4:hugetlb,memory:/docker/abc\n0::/\n")
    machine.group("memory", V1, 80 * MB, 60 * MB, 0)
    assert free() == (20, 80)
    machine.group("memory", V1, 2**63 - 4096, 60 * MB, 0)
    assert free() == (100, 200)


def test_where_the_system_does_not_say_nothing_is_refused(machine):
    assert memory.free_memory(torch.device("cpu")) == (float("inf"), float("inf"))
    assert CheckpointWindow(tiny_llama(), 2).size == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_refusal_names_the_largest_window_that_fits(machine, dtype):
    machine.says(12 * MB, 100 * MB)
    model = tiny_llama()
    with pytest.raises(memory.NoRoom, match=rf"window_size=9999: 9999 rows of {dtype}, .* take ") as refused:
        CheckpointWindow(model, 9999, dtype=dtype)
    assert "12 MB are free, 5 MB of which are left to training; what would fit: window_size=" in str(refused.value)
    size = int(str(refused.value).rpartition("window_size=")[2])
    assert CheckpointWindow(model, size, dtype=dtype).nbytes <= 7 * MB
    with pytest.raises(memory.NoRoom):
        CheckpointWindow(model, size + 1, dtype=dtype)


@pytest.mark.parametrize("storage", ["memory", "device"])
def test_a_refusal_names_what_else_would_fit(machine, heldout, tmp_path, storage):
    machine.says(12 * MB, 100 * MB)
    options = {"output_dir": str(tmp_path / "merged"), "row": "last", "window_storage": storage}
    merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), window_size=100, **options)
    fits = r"dtype='int8' or window_size=\d+ or window_storage='disk'$"
    with pytest.raises(memory.NoRoom, match=f"what would fit: {fits}"):
        merger.prepare(tiny_llama())
    merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), window_size=10**12, **options)
    with pytest.raises(memory.NoRoom, match=r"what would fit: window_size=\d+$"):
        merger.prepare(tiny_llama())
    # Less than two rows.
    machine.says(5 * MB + 2 * ROW, 100 * MB)
    with pytest.raises(memory.NoRoom, match="no window of this model would fit"):
        CheckpointWindow(tiny_llama(), 2)
    # On a disk nothing but a merged model and live weights are in memory.
    options["window_storage"] = "disk"
    merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), window_size=100, **options)
    merger.prepare(tiny_llama())
    merger.close()


def test_rows_on_a_gpu_are_compared_with_its_own_free_memory(machine, monkeypatch):
    machine.says(1000 * MB, 1000 * MB)
    monkeypatch.setattr(devices, "free_memory", lambda device: (20.0 * MB, 100.0 * MB))

    def ring(count, dtype, rows, beside):
        options = {"live": None, "leading": False, "mean": False, "multiscale": False}
        return memory.Ring(count, 10**6, dtype, **options, allocate=rows, allocate_beside=beside)

    def check(count):
        gpu = torch.device("cuda", 0)
        memory.check_room(ring, count, "float32", Processes(alone=True), rows_on=gpu, disk_free=0.0)

    check(3)
    with pytest.raises(memory.NoRoom, match=r"take 16 MB of cuda:0; 20 MB are free, 5 MB of which .* window_size=3$"):
        check(4)


def test_memory_that_cannot_be_taken_though_it_seemed_free_is_refused_too(monkeypatch):
    def fail(name, shape, dtype):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(memory.NoRoom, match=r"window_size=3: the memory could not be taken .*can't allocate memory"):
        CheckpointWindow(tiny_llama(), 3, allocate=fail)
