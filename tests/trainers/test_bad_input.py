"""Wrong arguments, loaders, models and folders: each is told in a sentence, before the first training step."""

import logging
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, warnings_of
from test_lightning import NoValidation
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from realtext import Blocks
from traj_merge_callback import HeldOutLoss, MergeConfig, Search, TrajectoryMerger, register_search
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback as TransformersCallback

NAN = float("nan")
IDS = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids} for ids in IDS.split(4)]
NUMBER = "a share of wall time above 0, at most 1, as 0.02 for 2 %"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_overhead": "2%"}, rf"max_overhead='2%': must be {NUMBER}"),
        ({"max_overhead": True}, rf"max_overhead=True: must be {NUMBER}"),
        ({"max_overhead": NAN}, "max_overhead=nan: must be a share"),
        ({"max_pause": "1"}, "max_pause='1': must be a positive number of seconds"),
        ({"max_pause": -1}, "max_pause=-1: must be a positive number of seconds"),
        ({"process_timeout": "600"}, "process_timeout='600': must be a positive number of seconds"),
        ({"process_timeout": None}, "process_timeout=None: must be a positive number of seconds"),
        ({"tolerance": "0"}, "tolerance='0': must be at least 0 nats per token"),
        ({"search_fraction": "0.5"}, "search_fraction='0.5': must be a share strictly between 0 and 1"),
        ({"search_fraction": 0}, "search_fraction=0: must be a share strictly between 0 and 1"),
        ({"seed": 2**80}, "seed=1208925819614629174706176: must be at most 4294967295"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": None}, "seed=None: must be an integer"),
        ({"merge_every": "500"}, "merge_every='500': must be an integer; got a str"),
        ({"merge_every": True}, "merge_every=True: must be an integer; got a bool"),
        ({"capture_every": 2.0}, "capture_every=2.0: must be an integer; got a float"),
        ({"samples_per_row": "4"}, "samples_per_row='4': must be an integer"),
        ({"samples_per_row": 4, "row": "last"}, "samples_per_row=4 is for rows that are means.*set row='mean'"),
        ({"samples_per_row": 4, "search": "lawa"}, "samples_per_row=4 is for rows that are means.*search='lawa'"),
        ({"start_step": -1}, "start_step=-1: must be at least 0"),
        ({"heldout_batches": 0}, "heldout_batches=0: must be at least 1"),
        ({"keep_last": None}, "keep_last=None: must be an integer"),
        ({"progress": "no"}, "progress='no': must be True or False"),
        ({"output_dir": ""}, "output_dir='': must be the path of a folder; leave it out"),
        ({"output_dir": 3}, "output_dir=3: must be the path of a folder"),
        ({"output_dir": b"merged"}, "output_dir=b'merged': must be the path of a folder"),
        ({"name": None}, "name=None: must be up to 64 letters"),
        ({"search": "os:system"}, "search='os:system' is .*must be a subclass of traj_merge_callback.Search"),
        ({"search": "os:sytem"}, "search='os:sytem' cannot be imported as 'package.module:Class'"),
        ({"search": "no_such_module:Search"}, "search='no_such_module:Search' cannot be imported"),
        ({"search": ":Search"}, "search=':Search' cannot be imported"),
        ({"search": ".here:Search"}, "search='.here:Search' cannot be imported"),
        ({"search": Search}, "search=.*must be a name; register_search gives your own class one"),
        ({"search": "trajectroy"}, "search='trajectroy' is not one of .*did you mean 'trajectory'"),
        ({"search_options": None}, "search_options=None: must be a dict"),
        ({"search_options": ["space"]}, r"search_options=\['space'\]: must be a dict"),
        ({"search_options": {1: 2}}, "search_options={1: 2}: must be a dict from names"),
        ({"search_options": {"spcae": "simplex"}}, "search_options={'spcae': 'simplex'}.*did you mean 'space'"),
        ({"search": "ema", "search_options": {"decay": "0.9"}}, "search_options={'decay': '0.9'} do not fit"),
        ({"search": "ema", "search_options": {"decay": NAN}}, "decay=nan: must be in"),
        ({"search_options": {"bounds": "x"}}, "search_options={'bounds': 'x'}"),
        ({"dtype": torch.float32}, "dtype=torch.float32 is not one of .*did you mean 'float32'"),
        ({"dtype": np.zeros(3)}, "dtype=array.* is not one of"),
        ({"row": "maen"}, "row='maen' is not one of .*did you mean 'mean'"),
        ({"schedule": None}, "schedule=None is not one of"),
        ({"on_error": True}, "on_error=True is not one of"),
        ({"snapshot_files": "all"}, "snapshot_files='all' is not one of"),
        ({"groups": {}}, "groups={}: give a group"),
        ({"groups": {1: ["a"]}}, r"groups={1: \['a'\]}: the name 1 must be a string"),
        ({"groups": ["blocks"]}, r"groups=\['blocks'\]: must be None, 'blocks', or a dict"),
        ({"domain_weights": [1.0]}, r"domain_weights=\[1.0\]: must be a mapping"),
        ({"domain_weights": {"a": "1"}}, r"domain_weights\['a'\]='1': must be a weight of at least 0"),
        ({"domain_weights": {"a": NAN}}, r"domain_weights\['a'\]=nan: must be a weight"),
        ({"domain_weights": {}}, "domain_weights={}: must be at least 0, and one of them positive"),
        ({"report_only": None}, "report_only=None: must be a list of domain names"),
        ({"report_only": [1]}, r"report_only=\[1\]: must be a list of domain names"),
        ({"merge_evry": 5}, "merge_evry=5: there is no such option; did you mean 'merge_every'"),
        ({"window": 5}, "window=5: there is no such option; did you mean 'window_size'"),
        ({"held_out": 5}, "held_out=5: there is no such option; did you mean 'heldout'"),
        ({"xyz": 5}, r"xyz=5: there is no such option; help\(MergeConfig\) lists the options"),
    ],
)
def test_options(options, message):
    for build in (MergeConfig, TransformersCallback, LightningCallback):
        with pytest.raises((ValueError, TypeError), match=message):
            build(**options)


def test_integers_of_numpy_are_integers():
    config = MergeConfig(merge_every=np.int64(40), seed=np.uint32(2**32 - 1))
    assert config == MergeConfig(merge_every=40, seed=2**32 - 1)
    assert type(config.merge_every) is int


HELDOUT = [
    ({"heldout": "data/heldout"}, "heldout='data/heldout' is a str: give an iterable of batches"),
    ({"heldout": 500}, "heldout=500 is a int: give an iterable of batches"),
    ({"heldout": lambda: BATCHES}, "heldout=<function.*is a function: give an iterable"),
    ({"heldout": DataLoader}, "heldout=<class.*is a type: give an iterable"),
    ({"heldout": nn.Sequential(nn.Linear(2, 2))}, "heldout=Sequential.*give an iterable"),
    ({"heldout": Blocks(IDS)}, "heldout is a Blocks, a Dataset: wrap it in a DataLoader"),
    ({"heldout": IDS}, "heldout is a Tensor: give an iterable of batches"),
    ({"heldout": BATCHES[0]}, r"heldout\['input_ids'\] is a Tensor.*a single batch goes into a list"),
    ({"heldout": {"code": None}}, r"heldout\['code'\]=None is a NoneType: give an iterable"),
    ({"heldout": {"code": {"python": BATCHES}}}, r"heldout\['code'\]=.* is a dict: give an iterable"),
    ({"heldout": {}}, r"heldout has the domains \[\]: give at least one"),
    ({"heldout": {1: BATCHES, "1": BATCHES}}, "heldout has the domains .*names that differ as text"),
    ({"heldout": BATCHES, "nll": 3}, r"nll=3: must be a function \(model, batch\)"),
    ({"heldout": BATCHES, "nll": "loss"}, r"nll='loss': must be a function \(model, batch\)"),
    ({"heldout": BATCHES, "nll": lambda batch: 1}, r"nll=.*must be a function \(model, batch\).*takes \(batch\)"),
    ({"heldout": BATCHES, "nll": lambda model, batch, step: 1}, "nll=.*missing a required argument: 'step'"),
]


@pytest.mark.parametrize(("arguments", "message"), HELDOUT)
def test_heldout_and_nll_at_construction(arguments, message):
    for build in (TrajectoryMerger, TransformersCallback, LightningCallback):
        with pytest.raises((ValueError, TypeError), match=message):
            build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heldout": None}, "heldout=None is a NoneType: give an iterable of batches"),
        ({"heldout": []}, "heldout.* yields no batches"),
        ({"heldout": [{"input_ids": IDS[:1]}]}, "give at least 2 different sequences"),
        ({"nll": {"code": len}}, "nll"),
        ({"precision": "bf16"}, "precision='bf16': must be a function, such as lambda: torch.autocast"),
        ({"precision": None}, "precision=None: must be a function"),
        ({"precision": torch.autocast("cpu")}, "precision=<torch.*: must be a function, such as lambda:"),
        ({"to_device": "cuda"}, "to_device='cuda': must be a function, from a batch"),
        ({"log": 3}, "log=3: must be a function, called with the MergeRecord"),
        ({"extra": 3}, "extra=3: must be a function"),
        ({"report_only": ["pyhton"], "heldout": {"python": BATCHES}}, "report_only=.*did you mean 'python'"),
        ({"domain_weights": {"pyhton": 1.0}, "heldout": {"python": BATCHES}}, "domain_weights=.*did you mean 'python'"),
    ],
)
def test_arguments_of_the_engine(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrajectoryMerger(**{"heldout": BATCHES, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": "3"}, "batches='3': must be an integer"),
        ({"search_fraction": 2.0}, "search_fraction=2.0: must be a share strictly between 0 and 1"),
        ({"seed": 2**80}, "seed=.*: must be at most"),
    ],
)
def test_arguments_of_the_held_out_loss(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HeldOutLoss(BATCHES, **options)
    with pytest.raises(ValueError, match="takes a torch module, and 'search' or 'report'"):
        HeldOutLoss(BATCHES).evaluate(tiny_llama(), "train")


def test_names_that_are_elsewhere():
    with pytest.raises(ImportError, match=r"traj_merge_callback.lightning .*traj_merge_callback.transformers "):
        from traj_merge_callback import TrajMergeCallback  # noqa: F401
    with pytest.raises(TypeError, match="needs a name, as in @register_search"):
        register_search(Search)
    with pytest.raises(TypeError, match=r"attach\(trainer=LlamaForCausalLM.*must be a transformers.Trainer"):
        TransformersCallback().attach(tiny_llama())
    with pytest.raises(AttributeError, match=r"with transformers.Trainer take traj_merge_callback.transformers"):
        LightningCallback().attach(None)
    with pytest.raises(TypeError, match="save_ckpt='yes': must be True or False"):
        LightningCallback(save_ckpt="yes")


def changed(**how):
    """The held-out batches with other entries; a function makes one of the ids, None drops it."""
    return [{key: make(batch["input_ids"]) for key, make in how.items()} for batch in BATCHES]


def same(ids):
    return ids


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def with_float8():
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.to(torch.float8_e4m3fn))
    return model


def loss_of(model, batch):
    return model(**batch).loss


RETURNS = r"nll must return \(summed NLL in nats, number of target tokens\)"
MISFITS = {
    "no labels": (tiny_llama, changed(input_ids=same), None, "heldout must give batches .*with 'labels', or pass nll="),
    "tuples": (
        tiny_llama,
        [(ids, ids) for ids in IDS.split(4)],
        None,
        "heldout, a tuple of .*with 'labels', or pass nll=",
    ),
    "tensors": (tiny_llama, IDS.split(4), None, "heldout, a tensor of shape .*with 'labels', or pass nll="),
    "strings": (tiny_llama, ["a b", "c d", "e f", "g h", "i j", "k l"], None, "with 'labels', or pass nll="),
    "wrong keys": (tiny_llama, changed(ids=same, labels=same), None, "heldout, a mapping with 'ids': .*or pass nll="),
    "ids beyond the vocabulary": (
        tiny_llama,
        changed(input_ids=lambda ids: ids + 9000, labels=same),
        None,
        "heldout: input_ids go from 9.* to 9.*, and model.embed_tokens has 256 rows; .*the model's own tokenizer",
    ),
    "ids beyond the vocabulary in one batch": (
        tiny_llama,
        [*BATCHES[:3], {"input_ids": IDS[12:, :9] + 9000, "labels": IDS[12:, :9]}],
        None,
        "heldout: input_ids go from 9.*, and the model's embedding has 256 rows",
    ),
    "ids below 0": (
        tiny_llama,
        changed(input_ids=lambda ids: ids - 300, labels=same),
        None,
        "heldout: input_ids go from -",
    ),
    "labels beyond the vocabulary": (
        tiny_llama,
        changed(input_ids=same, labels=lambda ids: ids + 9000),
        None,
        "heldout: labels go from 9.*, and the model's output layer has 256 rows",
    ),
    "ids that are floats": (
        tiny_llama,
        changed(input_ids=torch.Tensor.float, labels=same),
        None,
        "float32.*or pass nll=",
    ),
    "labels that are floats": (
        tiny_llama,
        changed(input_ids=same, labels=torch.Tensor.float),
        None,
        "float32.*or pass nll=",
    ),
    "labels that are lists": (tiny_llama, changed(input_ids=same, labels=torch.Tensor.tolist), None, "heldout.*a list"),
    "labels None": (tiny_llama, changed(input_ids=same, labels=lambda ids: None), None, "'labels': None.*or pass nll="),
    "all labels -100": (
        tiny_llama,
        changed(input_ids=same, labels=lambda ids: torch.full_like(ids, -100)),
        None,
        "heldout has no target tokens: all labels are -100",
    ),
    "labels of another length": (
        tiny_llama,
        changed(input_ids=same, labels=lambda ids: ids[:, 1:]),
        None,
        "or pass nll=",
    ),
    "too few labels": (tiny_llama, changed(input_ids=same, labels=lambda ids: ids[:2]), None, "or pass nll="),
    "sequences too long": (gpt2, BATCHES, None, "heldout: .*transformer.wpe has 8 rows; give shorter sequences"),
    "one sequence too long": (
        gpt2,
        [*changed(input_ids=lambda ids: ids[:, :8], labels=lambda ids: ids[:, :8])[:3], BATCHES[3]],
        None,
        "heldout: .*transformer.wpe has 8 rows; give shorter sequences",
    ),
    "nll returns the loss": (tiny_llama, BATCHES, loss_of, f"nll=loss_of fails .*it returned a tensor.*{RETURNS}"),
    "nll returns the output": (
        tiny_llama,
        BATCHES,
        lambda m, b: (m(**b), 3),
        f"its summed NLL is a mapping.*{RETURNS}",
    ),
    "nll returns None": (tiny_llama, BATCHES, lambda m, b: None, f"it returned None.*{RETURNS}"),
    "nll returns three": (tiny_llama, BATCHES, lambda m, b: (1, 2, 3), f"it returned a tuple of 1 and 2.*{RETURNS}"),
    "nll returns strings": (tiny_llama, BATCHES, lambda m, b: ("a", "b"), f"its summed NLL is 'a'.*{RETURNS}"),
    "nll returns losses": (
        tiny_llama,
        BATCHES,
        lambda m, b: (torch.ones(4), 4),
        f"its summed NLL is a tensor.*{RETURNS}",
    ),
    "nll returns a mask": (
        tiny_llama,
        BATCHES,
        lambda m, b: (1.0, torch.ones(4)),
        f"target tokens is a tensor.*{RETURNS}",
    ),
    "nll counts nothing": (tiny_llama, BATCHES, lambda m, b: (1.0, 0), "heldout has no target tokens: nll=.*returns 0"),
    "nll counts below 0": (tiny_llama, BATCHES, lambda m, b: (1.0, -3), f"number of target tokens is -3.*{RETURNS}"),
    "nll counts nan": (tiny_llama, BATCHES, lambda m, b: (1.0, NAN), f"number of target tokens is nan.*{RETURNS}"),
    "nll fails": (tiny_llama, BATCHES, lambda m, b: b["targets"], f"KeyError: 'targets'.*{RETURNS}"),
    "nll is a loss module": (tiny_llama, BATCHES, nn.CrossEntropyLoss(), f"nll=CrossEntropyLoss fails.*{RETURNS}"),
    "no language model": (lambda: nn.Linear(4, 4), BATCHES, None, "Linear fails on a batch of heldout.*or pass nll="),
    "no head": (lambda: tiny_llama().model, BATCHES, None, "LlamaModel returned no .loss.*pass nll="),
    "no model": (lambda: None, BATCHES, None, "model=None: must be the torch module that is trained"),
    "an optimizer": (
        lambda: torch.optim.SGD(nn.Linear(1, 1).parameters()),
        BATCHES,
        None,
        "model=SGD.*: must be the torch",
    ),
    "a class": (lambda: nn.Linear, BATCHES, None, "model=<class.*: must be the torch module"),
    "frozen": (lambda: tiny_llama().requires_grad_(False), BATCHES, None, "has no parameter that requires gradients"),
    "no parameters": (nn.ReLU, BATCHES, None, "model ReLU has no parameter that requires gradients"),
    "meta": (
        lambda: tiny_llama().to("meta"),
        BATCHES,
        None,
        "'model.embed_tokens.weight' is on the meta device.*load or",
    ),
    "lazy": (
        lambda: nn.LazyLinear(3),
        BATCHES,
        None,
        "parameter 'weight' is lazy: run one forward pass of the model first",
    ),
    "float8": (with_float8, BATCHES, None, r"'lm_head.weight' is quantised \(torch.float8_e4m3fn\): freeze it"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), BATCHES, None, "parameter 'weight' is complex"),
}


@pytest.mark.parametrize(("make", "heldout", "nll", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_one_warning_without_traceback(tmp_path, caplog, make, heldout, nll, message):
    options = {"merge_every": 2, "capture_every": 1, "output_dir": str(tmp_path / "merged")} | AT_ONCE
    model = make()
    with TrajectoryMerger(heldout, nll=nll, **options) as merger, caplog.at_level("WARNING", "traj_merge_callback"):
        for step in (1, 2, 3):
            assert merger.step(model, step) is None
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(message, said.getMessage())
    assert said.getMessage().endswith("Nothing is merged. Training goes on.")
    assert said.exc_info is None
    merger = TrajectoryMerger(heldout, nll=nll, on_error="raise", **options)
    with pytest.raises((ValueError, TypeError), match=message):
        merger.prepare(model)
    assert merger.window is None
    assert not (tmp_path / "merged").exists()


def test_debug_level_has_the_traceback(tmp_path, caplog):
    merger = TrajectoryMerger(BATCHES, nll=lambda model, batch: 1 / 0, output_dir=str(tmp_path))
    with caplog.at_level(logging.DEBUG, "traj_merge_callback"):
        merger.prepare(tiny_llama())
    (traced,) = [record for record in caplog.records if record.exc_info]
    assert traced.levelno == logging.DEBUG
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("step", ["3", 3.5, -1, None, True])
def test_a_step_that_is_no_count(tmp_path, caplog, step):
    with TrajectoryMerger(BATCHES, output_dir=str(tmp_path)) as merger:
        merger.step(tiny_llama(), step)
    (message,) = warnings_of(caplog)
    assert f"step={step!r}: must be" in message


def test_the_first_pass_leaves_no_trace(tmp_path):
    """A model with dropout and a counter, and random numbers, are as they were; the hooks on embeddings are gone."""
    model = tiny_llama().train()
    torch.manual_seed(5)
    before, state = model.model.embed_tokens._forward_pre_hooks, torch.get_rng_state()

    def nll(inner, batch):
        inner.seen = torch.rand(())
        return loss_of(inner, batch), 8

    with TrajectoryMerger(BATCHES, nll=nll, output_dir=str(tmp_path)) as merger:
        merger.prepare(model)
        assert merger.window is not None
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert model.model.embed_tokens._forward_pre_hooks is before
        assert not before
        assert not hasattr(model, "seen")
        assert same_weights(model, tiny_llama())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("below", ["", "below/"])
def test_an_output_folder_that_cannot_be_made_is_said_before_training(tmp_path, caplog, below):
    (tmp_path / "merged").write_text("a file where the folder should be")
    with TrajectoryMerger(BATCHES, output_dir=f"{tmp_path}/merged/{below}") as merger:
        merger.prepare(tiny_llama())
    (message,) = warnings_of(caplog)
    assert re.search("output_dir='.*merged.*' cannot be made .*name a folder that can be", message)


def test_one_sequence_to_search_on_is_said(caplog):
    HeldOutLoss([{"input_ids": ids[None]} for ids in IDS[:3]])
    (message,) = warnings_of(caplog)
    assert "heldout leaves one sequence for the" in message
    assert "give more" in message


# In the trainers

OPTIONS = {"window_size": 2, "capture_every": 1, "merge_every": 2, "search": "lawa", "progress": False} | AT_ONCE


def train_with_transformers(folder, eval_dataset, steps=1, **options):
    arguments = {"output_dir": str(folder), "max_steps": steps, "report_to": "none", "save_strategy": "no"}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "logging_strategy": "no"}
    trainer = Trainer(tiny_llama(), TrainingArguments(**arguments), train_dataset=TRAIN, eval_dataset=eval_dataset)
    TransformersCallback(**{**OPTIONS, **options}).attach(trainer)
    return trainer, trainer.train


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Module(NoValidation):
    def __init__(self, returns=lambda loss: loss):
        super().__init__()
        self.returns = returns

    def validation_step(self, batch, batch_idx):
        return self.returns(self.model(**batch).loss)


def train_with_lightning(folder, eval_dataset, steps=1, module=None, **options):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[LightningCallback(**{**OPTIONS, **options})],
    )
    loaders = [DataLoader(TRAIN, 4)] + ([] if eval_dataset is None else [DataLoader(eval_dataset, 4)])
    return trainer, lambda: trainer.fit(module or Module(), *loaders)


TRAIN, EVAL = Blocks(IDS.flip(0)), Blocks(IDS)
BEYOND = Rows([{"input_ids": ids + 9000, "labels": ids} for ids in IDS])
DICT = {"module": lambda: Module(lambda loss: {"val_loss": loss})}
TUPLE = {"module": lambda: Module(lambda loss: (loss, loss))}
NUMBER_ONLY = {"module": lambda: Module(float)}
SAYS_MORE = "validation_step gave no loss: it should return a tensor or a mapping with 'loss'"


@pytest.mark.parametrize(
    ("train", "eval_dataset", "options", "message"),
    [
        (train_with_transformers, Rows([{"input_ids": ids} for ids in IDS]), {}, "heldout must give .*'labels'"),
        (train_with_transformers, BEYOND, {}, "heldout: input_ids go from 9.*model.embed_tokens has 256 rows"),
        (train_with_transformers, EVAL, {"nll": loss_of}, f"nll=loss_of fails.*{RETURNS}"),
        (train_with_lightning, BEYOND, {}, "heldout: input_ids go from 9.*model.embed_tokens has 256 rows"),
        (train_with_lightning, EVAL, DICT, SAYS_MORE),
        (train_with_lightning, EVAL, TUPLE, SAYS_MORE),
        (train_with_lightning, EVAL, NUMBER_ONLY, SAYS_MORE),
    ],
)
def test_misfits_in_trainers(tmp_path, caplog, train, eval_dataset, options, message):
    def made():
        return options | ({"module": options["module"]()} if "module" in options else {})

    trainer, run = train(tmp_path / "warn", eval_dataset, steps=3, **made())
    run()
    (said,) = [record for record in caplog.records if record.name == "traj_merge_callback" and record.levelno > 20]
    assert re.search(message, said.getMessage())
    assert said.exc_info is None
    steps = trainer.state.global_step if isinstance(trainer, Trainer) else trainer.global_step
    assert steps == 3, "training goes on"
    trainer, run = train(tmp_path / "raise", eval_dataset, steps=3, **made(), on_error="raise")
    with pytest.raises(ValueError, match=message):
        run()
    assert (trainer.state.global_step if isinstance(trainer, Trainer) else trainer.global_step) == 0


@pytest.mark.parametrize(
    ("train", "eval_dataset", "options", "message"),
    [
        (train_with_transformers, Rows([]), {}, "heldout.* yields no batches"),
        (train_with_transformers, {}, {}, r"heldout has the domains \[\]"),
        (
            train_with_transformers,
            Rows([{"input_ids": IDS[0], "labels": IDS[0]}]),
            {},
            "at least 2 different sequences",
        ),
        (train_with_lightning, None, {}, "no held-out data: pass heldout=..., or give the trainer a validation"),
        (
            train_with_lightning,
            None,
            {"module": NoValidation},
            "no held-out data: pass heldout=..., or give the trainer",
        ),
        (train_with_lightning, EVAL, {"module": NoValidation, "heldout": BATCHES}, "define one, or pass nll="),
    ],
)
def test_nothing_to_hold_out_is_an_error_before_training(tmp_path, train, eval_dataset, options, message):
    options = options | ({"module": options["module"]()} if "module" in options else {})
    trainer, run = train(tmp_path, eval_dataset, **options)
    with pytest.raises(ValueError, match=message):
        run()
    assert (trainer.state.global_step if isinstance(trainer, Trainer) else trainer.global_step) == 0


@pytest.mark.parametrize("train", [train_with_transformers, train_with_lightning])
@pytest.mark.parametrize(
    ("eval_dataset", "options", "message"),
    [
        (TRAIN, {}, "heldout .*is the training dataset.*give a dataset that it does not train on"),
        (
            EVAL,
            {"merge_every": 50, "merge_at_end": False},
            "merge_every=50.*due at step 50.*ends at step 2 without any merge",
        ),
        (EVAL, {"start_step": 9}, "start_step=9: the first merge is due at step 10.*without any merge"),
    ],
)
def test_what_is_legal_and_strange_is_one_warning(tmp_path, caplog, train, eval_dataset, options, message):
    _, run = train(tmp_path, eval_dataset, steps=2, **options)
    run()
    (found,) = [one for one in warnings_of(caplog) if "heldout" in one or "merge_every" in one]
    assert re.search(message, found)


def test_a_run_whose_only_merge_is_at_its_end_is_told(tmp_path, caplog):
    _, run = train_with_transformers(tmp_path, EVAL, steps=2, merge_every=50)
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        run()
    assert "the first merge is due at step 50, and this run ends at step 2, where the only merge is made" in caplog.text
    assert not [one for one in warnings_of(caplog) if "due at step" in one]


def test_the_callback_of_the_other_trainer_is_named(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(AttributeError, match=r"take traj_merge_callback.transformers.TrajMergeCallback"):
        Trainer(tiny_llama(), arguments, callbacks=[LightningCallback()])
    trainer = pl.Trainer(callbacks=[TransformersCallback()], accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(AttributeError, match=r"take traj_merge_callback.lightning.TrajMergeCallback"):
        trainer.fit(Module(), DataLoader(TRAIN, 4))
