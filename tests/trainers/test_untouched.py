"""Training is bit-identical with and without the callback, under what other people's code does."""

import torch
from conftest import AT_ONCE, same_weights
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from traj_merge_callback.transformers import TrajMergeCallback


def test_a_masked_language_model_trains_the_same_with_a_seeded_collator(tmp_path, heldout, train):
    vocabulary = {chr(i): i for i in range(256)} | {"<mask>": 256, "<pad>": 257}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, mask_token="<mask>", pad_token="<pad>")

    def run(merging):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        arguments = TrainingArguments(
            str(tmp_path / str(merging)),
            max_steps=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=1e-2,
        )
        trainer = Trainer(
            BertForMaskedLM(config),
            arguments,
            data_collator=DataCollatorForLanguageModeling(tokenizer, seed=7),
            train_dataset=[{"input_ids": row.clamp(max=255)} for row in train.blocks[:64]],
            eval_dataset=[{"input_ids": row.clamp(max=255)} for row in heldout.blocks],
        )
        if merging:
            TrajMergeCallback(window_size=2, capture_every=2, merge_every=2, on_error="raise", **AT_ONCE).attach(
                trainer
            )
        trainer.train()
        return trainer.model

    assert same_weights(run(False), run(True))
