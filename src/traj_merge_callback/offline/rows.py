"""The rows of a merge as they lie in checkpoints' files: mapped into memory, and never written."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..search.spans import Span
from ..window.layout import ParameterLayout, persistent_buffers
from ..window.matrix import Matrix
from ..window.names import clean_name, unwrap
from ..window.products import within
from ..window.storage import CHUNK
from ..window.stored import StoredRow
from .checkpoints import Checkpoint


class StoredOtherwise(ValueError):
    """A checkpoint has its weights under other names, or in another form, than the model computes with."""


class CheckpointRows(Matrix):
    """Checkpoints of one model as the rows of a matrix. Of memory it takes one float32 row, for the merged model.

    Args:
        model: whose floating-point parameters and buffers are merged.
        checkpoints: oldest first.
        groups: see :class:`Matrix`.
        tensors: of each checkpoint, where they are not to be those of its files.

    Raises:
        StoredOtherwise: a checkpoint lacks a parameter of the model.
        ValueError: it has a parameter in another shape, or more than once; the message names both.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        groups: str | Mapping[str, list[str]] | None = None,
        tensors: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        layout = ParameterLayout(model, trainable_only=False)
        aliases = _aliases(model)
        read = [one.tensors for one in checkpoints] if tensors is None else tensors
        found = [_by_slot(layout, aliases, *pair) for pair in zip(checkpoints, read, strict=True)]
        self._newest = read[-1]
        # Buffers that some checkpoint does not have are the model's own.
        buffers = {slot.name for slot in layout.slots if not slot.is_parameter}
        missing = {name for name in buffers if any(name not in row for row in found)}
        layout = ParameterLayout(model, trainable_only=False, skipped=layout.skipped | missing)
        super().__init__(layout, groups, Processes(alone=True))
        self._checkpoints = list(checkpoints)
        self._files = _Files([[row[slot.name].reshape(-1) for slot in layout.slots] for row in found])
        self._staging = torch.empty(layout.numel)

    @contextmanager
    def other_buffers(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the newest checkpoint's buffers where those are not merged, as counters."""
        merged = {slot.name for slot in self.layout.slots}
        stored = {clean_name(name): value for name, value in self._newest.items()}
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for name, places in persistent_buffers(unwrap(model)).items():
                buffer, value = places[0].tensor, stored.get(clean_name(name))
                if clean_name(name) not in merged and value is not None and value.shape == buffer.shape:
                    kept.append((buffer, buffer.clone()))
                    buffer.copy_(value)
            yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)

    def check(self) -> Iterator[int]:
        """Read all rows once, one after another; yields the number of those that are read, before each.

        Raises:
            ValueError: a parameter is not finite.
        """
        for index, one in enumerate(self._checkpoints):
            yield index
            for slot, values in zip(self.layout.slots, self._files.tensors(index), strict=True):
                largest = torch.finfo(values.dtype).max
                if slot.is_parameter and not all(within(chunk, largest) for chunk in values.split(CHUNK)):
                    raise ValueError(f"{one.name} has numbers in {slot.name!r} that are not finite: leave it out")

    def take_over(self, model: nn.Module) -> None:
        """Let a model that was loaded from the newest checkpoint compute with the file itself, and not with a copy.

        Raises:
            StoredOtherwise: the model holds other numbers: whoever loaded it has converted them.
        """
        files = self._files.tensors(len(self._checkpoints) - 1)
        for slot, tensor, values in zip(self.layout.slots, self.layout.tensors(unwrap(model)), files, strict=True):
            if not torch.equal(values.to(tensor.dtype), tensor.detach().reshape(-1).cpu()):
                raise StoredOtherwise(
                    f"{self._checkpoints[-1].name} stores {slot.name!r} in another way than {type(model).__name__} "
                    "computes with it, so its files cannot be merged under this model"
                )
            if tensor.device.type == "cpu" and values.dtype is tensor.dtype:
                tensor.data = values.view(tensor.shape)

    @property
    def spans(self) -> tuple[Span, ...]:
        """See :class:`Matrix`."""
        return tuple(Span(one.step, one.step, 1) for one in self._checkpoints)

    @property
    def nbytes(self) -> int:
        """See :class:`Matrix`."""
        return self._staging.nbytes

    @property
    def dtype(self) -> str:
        """See :class:`Matrix`: the dtypes in the files."""
        return ", ".join(sorted(self._files.dtypes))

    def staging_on(self, device: torch.device) -> Tensor:
        """See :class:`Matrix`."""
        return self._staging if device.type == "cpu" else torch.empty(self.layout.numel, device=device)

    def settle_together(self, *values: float) -> list[float]:
        """See :class:`Matrix`: the rows are complete."""
        return [0.0, *values]

    def _stored_rows(self) -> list[StoredRow]:
        return [StoredRow(self._files, index) for index in range(len(self._checkpoints))]


class _Files:
    """A :class:`Storage` of rows whose tensors lie in files.

    Args:
        rows: for each row its tensors, flat, in the order of their columns.
    """

    def __init__(self, rows: list[list[Tensor]]) -> None:
        self._rows = rows
        self._starts = list(itertools.accumulate((len(values) for values in rows[0]), initial=0))[:-1]

    @property
    def dtypes(self) -> Set[str]:
        """Names of the dtypes of all tensors."""
        return {str(values.dtype).removeprefix("torch.") for row in self._rows for values in row}

    def tensors(self, index: int) -> list[Tensor]:
        """The tensors of a row."""
        return self._rows[index]

    def base(self, columns: slice) -> Tensor | None:
        """See :class:`Storage`."""
        return None

    def stored(self, index: int, columns: slice) -> tuple[Tensor, ...]:
        """See :class:`Storage`."""
        found, place = [], bisect.bisect_right(self._starts, columns.start) - 1
        for start, values in zip(self._starts[place:], self._rows[index][place:], strict=True):
            if start >= columns.stop:
                break
            found.append(values[max(0, columns.start - start) : columns.stop - start])
        return tuple(found)

    def decode(self, stored: tuple[Tensor, ...], columns: slice, scratch: Tensor) -> Tensor:
        """See :class:`Storage`."""
        if len(stored) == 1 and stored[0].dtype is torch.float32:
            return stored[0]
        end = 0
        for values in stored:
            scratch[end : end + len(values)].copy_(values)
            end += len(values)
        return scratch[:end]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each tensor of the state dict all names that it has there, by the first of them."""
    model = unwrap(model)
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(clean_name(name))
    found = {names[0]: names for names in named.values()}
    return found | {clean_name(name): [clean_name(name)] for name in persistent_buffers(model)}


def _by_slot(
    layout: ParameterLayout,
    aliases: Mapping[str, list[str]],
    checkpoint: Checkpoint,
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of the layout, which may have a prefix more or less there."""
    tensors = {clean_name(name): value for name, value in given.items()}
    parameters = [slot for slot in layout.slots if slot.is_parameter]
    best: dict[str, str] = {}
    whole: list[dict[str, str]] = []
    for rename in _renamings(aliases[parameters[0].name], tensors):
        stored = {
            slot.name: name
            for slot in layout.slots
            for name in map(rename, aliases.get(slot.name, [slot.name]))
            if name in tensors
        }
        best = max(best, stored, key=len)
        if all(slot.name in stored for slot in parameters) and stored not in whole:
            whole.append(stored)
    if len(whole) > 1 and any(name not in aliases.get(slot, [slot]) for slot, name in best.items()):
        names = " and ".join(repr(one[parameters[0].name]) for one in whole[:2])
        raise ValueError(
            f"{checkpoint.name} has the model's weights more than once, as {names}: give checkpoints with one of them"
        )
    found = {}
    for slot in layout.slots:
        if slot.name not in best:
            if slot.is_parameter:
                raise StoredOtherwise(
                    f"{checkpoint.name} has no {slot.name!r}, which the model has: all checkpoints must be of one "
                    f"architecture (it has {', '.join(sorted(tensors)[:3])}, ...)"
                )
            continue
        value = tensors[best[slot.name]]
        if tuple(value.shape) != slot.shape:
            raise ValueError(
                f"{checkpoint.name} has {best[slot.name]!r} of shape {tuple(value.shape)}, and the model "
                f"{slot.shape}: all checkpoints must be of one architecture"
            )
        if not value.is_floating_point():
            raise ValueError(
                f"{checkpoint.name} has {best[slot.name]!r} as {value.dtype}: quantized weights are not merged"
            )
        found[slot.name] = value
    return found


def _renamings(names: Sequence[str], tensors: Mapping[str, Tensor]) -> list:
    """Functions from the model's names to a checkpoint's that fit one parameter, known under some names."""
    longer = {key.removesuffix(name) for name in names for key in tensors if key == name or key.endswith(f".{name}")}
    shorter = {name.removesuffix(key) for name in names for key in tensors if name.endswith(f".{key}")}
    found = [lambda name, prefix=prefix: prefix + name for prefix in sorted(longer, key=len)]
    return found + [lambda name, prefix=prefix: name.removeprefix(prefix) for prefix in sorted(shorter, key=len)]
