"""README and docs: their Python blocks run, their links lead somewhere, their tables and trees are complete."""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama, warnings_of
from torch.utils.data import DataLoader

import realtext
from traj_merge_callback import MergeConfig, TrajectoryMerger
from traj_merge_callback.metrics import MEANINGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def prelude(text, model) -> dict:
    """What a user's script has before it adds a block: a model, data, trainers. Runs take 100 steps."""
    import lightning.pytorch as pl
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch):
            return self.model(**batch).loss

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    train, heldout = realtext.Blocks(text[0][:400]), realtext.Blocks(text[1][:48])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train_one_step():
        model(**train[:4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "args": TrainingArguments("output", max_steps=100, use_cpu=True, save_strategy="no", report_to="none"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "heldout": heldout,
        "heldout_loader": DataLoader(heldout, batch_size=8),
        "model": model,
        "module": Module(),
        "optimizer": optimizer,
        "other_loader": DataLoader(realtext.Blocks(text[1][48:80]), batch_size=8),
        "pl": SimpleNamespace(Trainer=functools.partial(pl.Trainer, max_steps=100, accelerator="cpu", **quiet)),
        "train": train,
        "train_loader": DataLoader(train, batch_size=4),
        "train_one_step": train_one_step,
        "Trainer": Trainer,
        "val_loader": DataLoader(heldout, batch_size=8),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_a_page_run(page, text, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    if page.name != "README.md":  # the README makes its snapshots itself
        heldout = DataLoader(realtext.Blocks(text[1][:16]), batch_size=8)
        with TrajectoryMerger(heldout, capture_every=1, merge_every=2, on_error="raise") as merger:
            merger.step(model, 1)
            merger.step(model, 2)
            merger.merge_at_end(model)
    namespace = prelude(text, model)
    for number, block in enumerate(BLOCKS[page], start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def rows(page: str, prefix: str = "") -> set[str]:
    """The names in the first column of a page's tables."""
    return set(re.findall(rf"^\| `({prefix}[^`]+)`", (ROOT / page).read_text(), re.MULTILINE))


def test_every_option_and_metric_has_a_row():
    found = rows("docs/options.md")
    options = {field.name for field in dataclasses.fields(MergeConfig)}
    assert found == options | set(MEANINGS)


def test_the_file_tree_is_complete():
    page = (ROOT / "docs/architecture.md").read_text()
    tree = re.search(r"^```text\nsrc/traj_merge_callback/\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    folder, found = "", set()
    for indent, name in re.findall(r"^( +)(\S+)", tree.group(1), re.MULTILINE):
        folder = "" if len(indent) == 2 else folder
        if name.endswith("/"):
            folder = name
        else:
            found.add(folder + name)
    source = ROOT / "src/traj_merge_callback"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    empty = {name for name in files if name.endswith("/__init__.py") and name != "search/__init__.py"}
    assert found == files - empty


def test_the_table_of_methods_is_that_of_the_committed_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = json.loads((ROOT / "benchmarks/results/search_quality.json").read_text())
    made = importlib.import_module("search_quality").table(found)
    assert made in (ROOT / "docs/search.md").read_text()
    assert (ROOT / "benchmarks/results/search_quality.md").read_text() == made + "\n"


def test_what_a_diff_shows_stands_in_the_example():
    example = (ROOT / "examples/nanogpt_loop.py").read_text()
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs/options.md").read_text(), re.DOTALL | re.MULTILINE)
    assert all(line[1:] in example for line in diff.splitlines())
