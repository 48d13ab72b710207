"""Keyword arguments that were called otherwise: the old name still works, and warns."""

import functools
import warnings
from collections.abc import Callable


def renamed_arguments(**new_names: str) -> Callable[[Callable], Callable]:
    """Decorator of a function that still takes keyword arguments by their old names, given as `old="new"`.

    Raises:
        TypeError: a call gives both names of an argument.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__} got {old!r}, the old name of {new!r}, beside it")
                warnings.warn(f"{function.__qualname__}: {old!r} is now called {new!r}", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
