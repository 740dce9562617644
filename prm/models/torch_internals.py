"""Two queries of torch's state for which torch has no public function.

Nothing else in the package uses a private name of torch. The functions were tested with torch 2.13.
``tests/prm/models/test_torch_internals.py`` states their results and fails if a later version of
torch changes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_mode_stack: Callable[[], list[TorchFunctionMode]] = _get_current_function_mode_stack


def inside_transform() -> bool:
    """Return whether the caller runs inside a transform of ``torch.func`` (grad, jvp, vmap)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def function_modes() -> list[TorchFunctionMode]:
    """Return the active torch function modes, the outermost first."""
    return _mode_stack()
