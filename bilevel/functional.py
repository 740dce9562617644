"""A module as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bilevel.checks import refuse_data_parallel
from bilevel.module_copy import BoundCopy, ModuleCopier


class Functional:
    """A module as a function ``f(params, *args, **kwargs)``; made by ``functional(module)``.

    A call may be differentiated any number of times and in any mode, and parts of it may be
    recomputed later, by ``torch.utils.checkpoint`` with ``use_reentrant=False`` or ``transformers``
    (``gradient_checkpointing_enable``, in a call never the reentrant way): it runs on a light copy
    of the module that holds the tensors given for as long as anything refers to it. Whether the
    module trains or evaluates, its hooks and its attributes are those of the module at the call;
    what ``module.compile()`` has made for the module itself is left aside.

    Buffers are cloned for every call. What a call makes of them (the running statistics of batch
    normalisation) is dropped; ``update_buffers`` keeps it. Attributes that a call sets are set on
    the module, too.

    Attributes:
        module: The module. Frozen parameters and buffers are used where they are.
        names: Names of the trainable parameters, each once.
        frozen: Names of the parameters that do not require grad, which calls take from the module.
        tied: Further name -> the name under which that parameter is given; of shared submodules,
            those of their parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        _check(module)
        trainable: dict[str, Tensor] = {}
        frozen, first, tied = [], dict[int, str](), {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                tied[name] = first[id(parameter)]
                continue
            first[id(parameter)] = name
            if parameter.requires_grad:
                trainable[name] = parameter
            else:
                frozen.append(name)
        _check_memory(trainable)
        self.names = tuple(trainable)
        self.frozen = tuple(frozen)
        self.tied = tied
        self._trainable = trainable
        self._copier = ModuleCopier(module)

    def __repr__(self) -> str:
        return (
            f"functional({type(self.module).__name__}: {len(self.names)} parameters, "
            f"{len(self.frozen)} frozen, {len(self.tied)} tied)"
        )

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name, new clones of the module's, without a graph."""
        return {name: leaf.detach().clone() for name, leaf in self._trainable.items()}

    @property
    def module_params(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in the module's own memory, without a graph.

        For ``ResidentSolver``, whose steps then train the module itself.
        """
        return {name: leaf.detach() for name, leaf in self._trainable.items()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name, new clones of the module's."""
        return {name: leaf.detach().clone() for name, leaf in self.module.named_buffers()}

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)`` with these parameters.

        Args:
            params: A tensor for each of ``names``.
            *args: As the module takes them.
            **kwargs: As the module takes them.

        Raises:
            ValueError: A name is missing or unknown, or the module has other submodules or
                parameters than when it was given to ``functional``.
        """
        bound = self._bound(params)
        try:
            return bound.module(*args, **kwargs)
        finally:
            bound.hand_back()

    def bind(self, params: Mapping[str, Tensor]) -> nn.Module:
        """Return a light copy of the module that holds these parameters, to call its methods.

        ``f.bind(params).generate(...)`` for example; ``f.bind(params)`` shares nothing with the
        module that a call writes to but what its own code does.
        """
        return self._bound(params).module

    @torch.no_grad()
    def update_buffers(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Run a call without gradients, and keep its buffers in the module.

        For the running statistics of batch normalisation, which steps drop: call it with the
        parameters and the inputs of a step, or before an evaluation with those of several batches.
        """
        bound = self._bound(params)
        try:
            bound.module(*args, **kwargs)
        finally:
            bound.hand_back()
        updated = dict(bound.module.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(updated[name])

    @torch.no_grad()
    def write_back(self, params: Mapping[str, Tensor]) -> None:
        """Copy these parameters into the module, in place.

        Raises:
            ValueError: A name is missing or unknown, or a shape differs; nothing is written then.
        """
        self._check_names(params)
        for name, parameter in self._trainable.items():
            if params[name].shape != parameter.shape:
                raise ValueError(
                    f"write_back: {name!r} has shape {tuple(parameter.shape)} in the module, found "
                    f"{tuple(params[name].shape)}"
                )
        for name, parameter in self._trainable.items():
            parameter.copy_(params[name])

    def _bound(self, params: Mapping[str, Tensor]) -> BoundCopy:
        self._check_names(params)
        return self._copier.bound(
            {id(parameter): params[name] for name, parameter in self._trainable.items()}
        )

    def _check_names(self, params: Mapping[str, Tensor]) -> None:
        if params.keys() == self._trainable.keys():
            return
        missing = [name for name in self.names if name not in params]
        unknown = [name for name in params if name not in self._trainable]
        where = [
            f"{name!r} is given as {self.tied[name]!r}" for name in unknown if name in self.tied
        ]
        where += [f"{name!r} is frozen" for name in unknown if name in self.frozen]
        raise ValueError(
            f"functional: expected the {len(self.names)} trainable parameters of "
            f"{type(self.module).__name__}; missing {missing}, unknown {unknown}"
            + "".join(f"; {text}" for text in where)
            + ". What is not trained has requires_grad=False before functional(module) is called"
        )


def functional(module: nn.Module) -> Functional:
    """Return a module as a pure function of its trainable parameters.

    ::

        f = functional(module)
        problem = BilevelProblem(lambda theta, phi, batch: loss(f(theta, batch)), ...)
        state = solver.init(f.params, phi)
        ...
        f.write_back(state.lower_params)

    Beside ``torch.func.functional_call`` it clones buffers, so that batch normalisation trains in
    every mode, and its calls may be recomputed: activation checkpointing then uses the call's
    parameters, and not the module's own, which ``functional_call`` has put back by then.

    Args:
        module: Any module, also of ``transformers``; its parameters and buffers are not changed.
            What does not require grad is frozen. Tied parameters appear once.

    Cost: a few microseconds per submodule and call. Memory: that of the buffers per call.

    Raises:
        TypeError: Not a module, or one that cannot be copied: scripted, compiled, with parameters
            that have no values yet, or that leads to its own parameters in a way that cannot be
            followed.
        ValueError: Two parameters share memory without being tied, or the module is wrapped for
            several processes.
    """
    return Functional(module)


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functional: expected a torch.nn.Module, found {type(module).__name__}; a function of "
            "tensors needs no functional"
        )
    refuse_data_parallel(module)
    for name, one in module.named_modules():
        kind = None
        if isinstance(one, torch.jit.ScriptModule):
            kind = "is scripted by torch.jit; give the module that was scripted"
        elif hasattr(one, "_orig_mod"):
            kind = "is compiled by torch.compile; give the module that was compiled"
        if kind is not None:
            raise TypeError(f"functional: {name or type(one).__name__} {kind}")
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise TypeError(
                f"functional: {name!r} has no shape yet (a lazy module); run the module once first"
            )


def _check_memory(trainable: Mapping[str, Tensor]) -> None:
    """Refuse two parameters with the same memory, which clones would take apart silently."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, parameter in trainable.items():
        if not parameter.numel() or parameter.is_meta:
            continue
        earlier = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if earlier != name:
            raise ValueError(
                f"functional: {earlier!r} and {name!r} share memory and are two parameters; tie "
                "them by one Parameter in both places, or clone one of them"
            )
