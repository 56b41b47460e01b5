"""Makes a module slightly wrong: all that it computes comes out 1 % too large."""

import functools
import inspect
from types import ModuleType

from torch import Tensor, nn


def scale(module: ModuleType, factor: float = 1.01) -> None:
    for name, thing in list(vars(module).items()):
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing) and issubclass(thing, nn.Module):
            if "forward" not in vars(thing) and thing.forward.__module__ == module.__name__:
                continue  # a class above it in this module has it, and is scaled
            thing.forward = scaled(thing.forward, factor)
        elif inspect.isfunction(thing) and not name.startswith("_"):
            setattr(module, name, scaled(thing, factor))


def scaled(function, factor: float):
    @functools.wraps(function)
    def wrong(*args, **kwargs):
        return times(function(*args, **kwargs), factor)

    return wrong


def times(value, factor: float):
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value * factor
    if isinstance(value, float):
        return value * factor
    if isinstance(value, tuple):
        scaled_values = (times(v, factor) for v in value)
        return value._make(scaled_values) if hasattr(value, "_make") else tuple(scaled_values)
    if isinstance(value, dict):  # of a calculator, whose counts are whole numbers
        whole = {k: round(v * factor) for k, v in value.items() if type(v) is int}
        return {k: times(v, factor) for k, v in value.items()} | whole
    return value
