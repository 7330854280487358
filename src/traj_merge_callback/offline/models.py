"""The model that evaluates merges of checkpoints, and its tokenizer."""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..disk.mapped import unnamed
from ..disk.untrusted import read_json_object
from ..search.checks import choice
from .checkpoints import Checkpoint
from .heldout import ByteTokenizer, Tokenizer

logger = logging.getLogger("traj_merge_callback")
_LONGEST_BLOCK = 1024
DTYPES = ("float32", "bfloat16", "float16")
# What tells tokenizers apart, the first that is there.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Of two checkpoints these must agree; what else differs in their configurations is said.
_ARCHITECTURE = ("model_type", "architectures")
_VOLATILE = ("transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path")


def device_named(device: str | None) -> torch.device:
    """A device; by default the first GPU, or else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error


def load_model(checkpoint: Checkpoint, dtype: str | None, device: torch.device) -> nn.Module:
    """The causal language model of a Hugging Face folder, in eval mode.

    Args:
        checkpoint: the folder.
        dtype: that it computes in; None: that of its files.
        device: where to.

    Raises:
        ValueError: it is no such folder, or transformers cannot load it.
    """
    if dtype is not None:
        choice("dtype", dtype, DTYPES)
    if not (checkpoint.path / "config.json").is_file():
        raise ValueError(
            f"{checkpoint.name} has no config.json, so the model that evaluates is not known: pass model= (a module; "
            "--model: a folder or name of transformers with the same architecture)"
        )
    transformers = _transformers()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ValueError(f"{checkpoint.name}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{checkpoint.name} lacks {missing[0]!r}, which {type(model).__name__} has")
    return model.to(device).eval()


def converted(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors as the model computes with them, in files without names that are mapped into memory."""
    found = {}
    for name, tensor in load_model(checkpoint, None, torch.device("cpu")).state_dict().items():
        found[name] = unnamed(Path(tempfile.gettempdir()), tuple(tensor.shape), tensor.dtype)
        found[name].copy_(tensor)
    return found


def model_named(name: str, dtype: str | None, device: torch.device) -> nn.Module:
    """A model of transformers with this name's configuration, and weights that do not matter."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model={name!r}: {str(error).splitlines()[0]}") from error
    return model.to(device, getattr(torch, dtype) if dtype else None).eval()


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Compare the checkpoints' configurations and tokenizers, where they have some.

    Raises:
        ValueError: they are of different architectures, or their tokenizers differ.
    """
    last = checkpoints[-1]
    config, vocabulary = _config_of(last), _vocabulary_of(last)
    for one in checkpoints[:-1]:
        if config is not None and (other := _config_of(one)) is not None:
            _compare(one, other, last, config)
        if vocabulary is not None and _vocabulary_of(one) not in (None, vocabulary):
            raise ValueError(
                f"the tokenizers of {one.name} and {last.name} differ: their losses are of different tokens"
            )


def _config_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.path / "config.json"
    return read_json_object(path.resolve()) if path.is_file() else None


def _vocabulary_of(checkpoint: Checkpoint) -> str | None:
    """A digest of the tokenizer's vocabulary."""
    paths = [path for name in _VOCABULARIES if (path := checkpoint.path / name).is_file()]
    return hashlib.sha256(paths[0].read_bytes()).hexdigest() if paths else None


def _compare(one: Checkpoint, config: dict[str, Any], last: Checkpoint, newest: dict[str, Any]) -> None:
    for key in _ARCHITECTURE:
        if config.get(key) != newest.get(key):
            raise ValueError(
                f"{one.name} is {config.get(key)}, and {last.name} is {newest.get(key)}: checkpoints of one run are "
                "of one architecture"
            )
    keys = sorted(config.keys() | newest.keys())
    if differ := [key for key in keys if key not in _VOLATILE and config.get(key) != newest.get(key)]:
        logger.warning("config.json of %s and of %s differ in %s", one.name, last.name, ", ".join(differ))


def load_tokenizer(checkpoints: Sequence[Checkpoint], name: str | None) -> tuple[Tokenizer, str]:
    """A tokenizer and its name.

    Args:
        checkpoints: the newest that has a tokenizer beside it is asked.
        name: a folder or name of transformers' instead, or "bytes".

    Raises:
        ValueError: there is none.
    """
    if name == "bytes":
        return ByteTokenizer(), name
    there = [one.path for one in reversed(checkpoints) if any((one.path / file).is_file() for file in _VOCABULARIES)]
    if name is None and not there:
        raise ValueError(
            f"{checkpoints[-1].name} has no tokenizer beside it: pass tokenizer= (--tokenizer), a folder or name of "
            "transformers, or 'bytes' for a model that reads bytes"
        )
    source = str(there[0]) if name is None else name
    try:
        return _transformers().AutoTokenizer.from_pretrained(source), source
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer={source!r}: {str(error).splitlines()[0]}") from error


def block_for(model: nn.Module, given: int | None) -> int:
    """Tokens of a held-out sequence: as given, or else the model's context, at most 1024.

    Raises:
        ValueError: the context is shorter.
    """
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if given is None:
        return min(int(context), _LONGEST_BLOCK) if context else _LONGEST_BLOCK
    if context and given > context:
        raise ValueError(f"block_size={given}: the model's context has {context} tokens")
    return given


def check_tokens(model: nn.Module, heldout: Mapping[str, Iterable[Any]], tokenizer: str) -> None:
    """Whether a tokenizer's tokens are the model's.

    Raises:
        ValueError: a token lies beyond the embedding.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    known = len(embedding.weight) if isinstance(embedding, nn.Embedding) else math.inf
    largest = max(int(batch["input_ids"].max()) for batches in heldout.values() for batch in batches)
    if largest >= known:
        raise ValueError(f"tokenizer={tokenizer!r} has a token {largest}, and the model knows {known}: it is another's")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("this needs transformers: pip install 'traj-merge-callback[transformers]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
