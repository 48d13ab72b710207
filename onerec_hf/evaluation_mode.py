"""How any model is asked outside of training."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_lock = threading.Lock()
# Models in use: by how many, and the modes that their modules had before the first one.
_in_use: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients; afterwards, also after an error, all its modules are in their former
    mode.

    Threads may ask one model at the same time: it stays so until the last of them has its answer.
    """
    with _lock:
        users, modes = _in_use.get(model) or (0, [(module, module.training) for module in model.modules()])
        _in_use[model] = users + 1, modes
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            users, modes = _in_use.pop(model)
            if users > 1:
                _in_use[model] = users - 1, modes
            else:
                model.train(dict(modes)[model])
                for module, training in modes:
                    module.training = training
