"""Calls the examples in a process of its own: `python -I tests/carry_alone.py FROM TO [BESIDE]`.

FROM is the project, for the originals, or a folder of one-file modules, which are imported with
the project and all but torch out of reach. What came out goes to the file TO. BESIDE is the TO
of another run: what gave there the same compiled as not isn't compiled again, which would take
most of the time.
"""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
NEEDED = {"torch", "safetensors", "PIL"}


class Refuse:
    """No package that one file may not need, whoever asks for it from there."""

    def find_spec(self, name: str, path=None, target=None):
        importer = sys._getframe(1)
        while importer and "importlib" in importer.f_code.co_filename:
            importer = importer.f_back
        forbidden = {"snippets", "jaxtyping", "transformers", "site_build", "tests"}
        package = name.partition(".")[0]
        from_file = importer and importer.f_globals.get("__name__", "").startswith("alone_")
        if package in forbidden or (from_file and package not in NEEDED | sys.stdlib_module_names):
            raise ImportError(f"{name} is out of reach")


def load(folder: Path, name: str):
    """The module snippets/NAME.py of the project, or the file NAME.py alone."""
    if folder == ROOT:
        return importlib.import_module("snippets." + name.replace("/", "."))
    spec = importlib.util.spec_from_file_location("alone_" + name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def flat(value) -> list:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in flat(item)]
    if isinstance(value, dict):
        return flat(list(value.items()))
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        return flat(vars(value))
    return [value.detach() if isinstance(value, torch.Tensor) else value]


def same(ours, theirs) -> bool:
    """To the bit; an error is the same when it has the same type."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def lowered(value):
    """Floating point in bfloat16."""
    if isinstance(value, torch.nn.Module):
        return value.bfloat16()
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if is_float else value


def run(module, example, way: str, plain: list | None = None, skip: set[int] = frozenset()) -> list:
    """The outputs of an example's calls; for one that fails, the error's type.

    With `plain`, what the calls give not compiled, each function is compiled for its first call,
    whose tracing takes most of the time of all this; other calls, and `skip`, get the plain.
    """
    torch.manual_seed(0)
    results, traced = [], set()
    for position, (function, *inputs) in enumerate(example(module)):
        code = getattr(function, "__code__", type(function))
        if plain and (position in skip or code in traced):
            results.append(plain[position])
            continue
        traced.add(code)
        if way == "bfloat16":
            function, *inputs = map(lowered, [function, *inputs])
        elif plain:
            torch.compiler.reset()
            function = torch.compile(function, fullgraph=True, backend=way)
        try:
            torch.manual_seed(0)
            results.append(flat(function(*inputs)))
        except Exception as error:
            if way == "float32":
                raise
            results.append(type(error).__name__)
    return results


def settled(beside: dict) -> set[int]:
    """Positions of the calls that gave the same in both ways there."""
    pairs = enumerate(zip(beside["float32"], beside["eager"], strict=True))
    return {position for position, (once, again) in pairs if same(once, again)}


def main(source: str, target: str, beside: str | None = None) -> None:
    folder = Path(source)
    there = torch.load(beside, weights_only=False) if beside else {}
    spec = importlib.util.spec_from_file_location("examples", ROOT / "tests/examples/__init__.py")
    examples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(examples)
    torch.set_num_threads(1)
    if folder == ROOT:
        sys.path.insert(0, source)
    else:
        sys.meta_path.insert(0, Refuse())
    results = {}
    for position, name in enumerate(examples.NAMES):
        try:
            module = load(folder, name)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            continue
        ways = ["float32", "bfloat16", "eager"]
        header = Path(sysconfig.get_path("include"), "Python.h")
        if position == 0 and shutil.which("g++") and header.is_file():
            ways.append("inductor")
        found = results[name] = {}
        for way in ways:
            plain = found["float32"] if way in ("eager", "inductor") else None
            other = there.get(name) if way == "eager" else None
            skip = settled(other) if isinstance(other, dict) else set()
            found[way] = run(module, examples.example(name), way, plain, skip)
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
