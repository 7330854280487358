"""A second model of the same kind on a spare device, built without copying the first one's weights."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..window.layout import ParameterLayout, unwrap

_INTERNALS = frozenset(vars(nn.Module()))


class Skeleton:
    """A model with the modules of another one, whose merged weights are memory of the spare device yet to be filled.

    Modules are copied as shallow objects: their plain attributes are shared, their parameters and buffers are not.
    Parameters that are not merged are copied once, because they are frozen; buffers at every :meth:`refresh`.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        layout: which of its tensors are merged: their weights come from the window, so they get no memory here.
        device: the spare device.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, device: str) -> None:
        self._device = torch.device(device)
        self._merged = {id(tensor) for tensor in layout.tensors(model)}
        self._modules: dict[int, nn.Module] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self.model = self._module(unwrap(model))
        for module in self._modules.values():
            self._rebind(module)
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Copy the buffers as they are now."""
        for module in unwrap(model).modules():
            twin = self._modules[id(module)]
            vars(twin)["_buffers"] = {
                name: None if buffer is None else buffer.to(self._device, copy=True)
                for name, buffer in module._buffers.items()
            }
            twin.training = False

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        twin = self._modules[id(module)] = module.__class__.__new__(module.__class__)
        attributes = dict(vars(module))
        # Compiled code belongs to the other model.
        attributes["_compiled_call_impl"] = None
        attributes["_parameters"] = {name: self._parameter(value) for name, value in module._parameters.items()}
        attributes["_modules"] = {
            name: child if child is None else self._module(child) for name, child in module._modules.items()
        }
        vars(twin).update(attributes)
        return twin

    def _parameter(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in self._parameters:
            if id(parameter) in self._merged:
                # It points to the candidate at hand whenever the skeleton computes; until then one number is enough.
                there = torch.zeros(1, dtype=parameter.dtype, device=self._device).expand(parameter.shape)
            else:
                there = parameter.detach().to(self._device, copy=True)
            self._parameters[id(parameter)] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        return self._parameters[id(parameter)]

    def _rebind(self, module: nn.Module) -> None:
        """Let attributes that lead to the other model's modules lead to this one's."""
        for name, value in vars(module).items():
            if name not in _INTERNALS:
                vars(module)[name] = self._twin(value)

    def _twin(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in self._modules:
            return MethodType(value.__func__, self._modules[id(value.__self__)])
        if type(value) in (list, tuple):
            return type(value)(self._twin(item) for item in value)
        if type(value) is dict:
            return {key: self._twin(item) for key, item in value.items()}
        return value.to(self._device) if isinstance(value, Tensor) else value
