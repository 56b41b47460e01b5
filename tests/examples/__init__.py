"""For each module, what tests/test_carry.py calls: the original and its one-file form.

An example, `tests/examples/TOPIC/NAME.py`, has `calls(m)`: it takes the module and gives calls,
each a callable of it with its inputs. Only torch, safetensors and PIL may be imported there: the
one-file form is called where nothing else can be.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(
    path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.py")
)


def example(name: str) -> Callable:
    """`calls` of the module snippets/NAME.py."""
    spec = importlib.util.spec_from_file_location(
        "example_" + name.replace("/", "_"), FOLDER / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.calls
