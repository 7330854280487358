"""The options come from a command line or from YAML, beside those of the trainer."""

import pytest
from test_transformers import make_trainer
from transformers import HfArgumentParser, TrainingArguments

from traj_merge_callback import MergeConfig
from traj_merge_callback.transformers import MergeArguments, TrajMergeCallback

YAML = """
output_dir: {folder}
max_steps: 4
merge_every: 4
capture_every: 2
window_size: 4
heldout_batches: 2
search: ema
search_options: {{decay: 0.5}}
schedule: blocking
merge_seed: 7
report_only: []
"""


def test_a_command_line_gives_the_configuration():
    line = "--merge_every 20 --groups blocks --max_overhead 0.02 --keep_best false --report_only cpp law --no_progress"
    on_publish = ["--on_publish", "sh bench.sh {snapshot}"]
    (config,) = HfArgumentParser(MergeConfig).parse_args_into_dataclasses([*line.split(), *on_publish])
    assert config == MergeConfig(
        merge_every=20,
        groups="blocks",
        max_overhead=0.02,
        keep_best=False,
        report_only=["cpp", "law"],
        progress=False,
        on_publish=on_publish[1],
    )
    with pytest.raises(ValueError, match="merge_every=0: must be at least 1"):
        HfArgumentParser(MergeConfig).parse_args_into_dataclasses(["--merge_every", "0"])


def test_dicts_are_json_on_a_command_line():
    parser = HfArgumentParser((TrainingArguments, MergeArguments))
    line = [
        "--search_options",
        '{"space": "simplex"}',
        "--groups",
        '{"heads": ["*attn*"]}',
        "--domain_weights",
        '{"a": 1}',
    ]
    _, merging = parser.parse_args_into_dataclasses([*line, "--evaluations", "12"])
    options = merging.options()
    assert options["search_options"] == {"space": "simplex"}
    assert options["groups"] == {"heads": ["*attn*"]}
    assert options["domain_weights"] == {"a": 1}
    assert parser.parse_args_into_dataclasses(["--groups", "blocks"])[1].groups == "blocks"
    with pytest.raises(ValueError, match=r"search_options='\{space: 1\}': is no JSON"):
        parser.parse_args_into_dataclasses(["--search_options", "{space: 1}"])


def test_without_arguments_all_defaults_are_the_same():
    args, merging = HfArgumentParser((TrainingArguments, MergeArguments)).parse_args_into_dataclasses(["--seed", "3"])
    assert args.seed == 3
    assert MergeConfig(**merging.options()) == MergeConfig()
    with pytest.raises(ValueError, match="merge_every=0: must be at least 1"):
        MergeArguments(merge_every=0)


def test_one_yaml_file_gives_both_and_a_run_takes_them(tmp_path, train, heldout):
    (tmp_path / "run.yaml").write_text(YAML.format(folder=tmp_path / "out"))
    args, merging = HfArgumentParser((TrainingArguments, MergeArguments)).parse_yaml_file(tmp_path / "run.yaml")
    trainer = make_trainer(args.output_dir, train, heldout, max_steps=args.max_steps, eval_strategy="no")
    callback = TrajMergeCallback(**{**merging.options(), "on_error": "raise"})
    callback.attach(trainer)
    trainer.train()
    assert (callback.config.seed, callback.config.search_options) == (7, {"decay": 0.5})
    assert [record.search for record in callback.merger.records] == ["ema"]
    assert (tmp_path / "out" / "merged" / "best" / "merge.json").exists()
