"""The two things that prm asks of torch for which torch has no public function.

Nothing else in the package touches a private name of torch. Tried with torch 2.13; what the
functions must answer is stated by ``tests/prm/models/test_torch_internals.py``, which fails where
a later torch answers otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_mode_stack: Callable[[], list[TorchFunctionMode]] = _get_current_function_mode_stack


def inside_transform() -> bool:
    """Whether the caller runs inside a transform of ``torch.func`` (grad, jvp, vmap, ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def function_modes() -> list[TorchFunctionMode]:
    """The torch function modes that are open, the outermost first."""
    return _mode_stack()
