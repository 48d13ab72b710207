"""Arguments by the types that a signature gives them: YAML reads 1e-5 as text."""

import functools
import inspect
import math
from enum import Enum
from typing import Any, TypeVar, get_args

Class = TypeVar("Class", bound=type)


def typed_value(value: Any, name: str, annotation: Any) -> Any:
    """A value as its annotation says, where that is a number, true or false, or one of an enumeration; others are left
    as they are.

    Raises:
        ValueError: a value of another type, with its name.
    """
    for choices in get_args(annotation):
        if isinstance(choices, type) and issubclass(choices, Enum):
            allowed = [choice.value for choice in choices]
            value = "no" if value is False else value  # as YAML reads no
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kind = kind.removesuffix(" | None")
    if value is None or kind not in ("bool", "int", "float"):
        return value
    if kind == "bool":
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (kind == "int" and not number.is_integer()):
        raise ValueError(f"{name} must be a {'whole ' * (kind == 'int')}number, got {value!r}.")
    if kind == "int":
        return int(number)
    return number if isinstance(value, str) else value


def typed_arguments(cls: Class, read_text: bool = True) -> Class:
    """Decorator of a class whose numbers may be given as text, which is read as [`typed_value`] does; other values are
    left to the class.

    Args:
        read_text: without, all text in a number's place is refused: of a saved configuration it is damage.

    Raises:
        ValueError: when the class is called, text that is not of the argument's type.
    """
    initialize = cls.__init__
    annotations = {name: each.annotation for name, each in inspect.signature(initialize).parameters.items()}

    def typed(name: str, value: Any) -> Any:
        if not isinstance(value, str) or name not in annotations:
            return value
        found = typed_value(value, f"{cls.__name__}: {name}", annotations[name])
        if not read_text and not isinstance(found, str):
            raise ValueError(f"{cls.__name__}: {name} must be a number, got the text {value!r}.")
        return found

    @functools.wraps(initialize)
    def __init__(*args, **kwargs):
        args = (*map(typed, annotations, args), *args[len(annotations) :])
        initialize(*args, **{name: typed(name, value) for name, value in kwargs.items()})

    cls.__init__ = __init__
    return cls
