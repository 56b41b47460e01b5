"""A module as one file: it computes the same, reads well, and refuses what would not."""

import ast
import importlib
import subprocess
import sys

import pytest

from site_build.flatten import flatten
from site_build.source import FlattenError, plain

ROPE = '''\
"""Rotation.

Two lines of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Config:
    base: int = 10


def _split(x):
    return x + 1


def rotate(x: Tensor, config=None):
    # base
    return torch.tensor(_split(x) * (config or Config()).base).item()
'''
CASES = {
    "from module import name": (
        "from parts.rope import rotate\n\ndef run():\n    return rotate(1)\n",
        ["run()"],
    ),
    "from module import name as other": (
        "from parts.rope import rotate as turn\n\ndef run(rotate=5):\n    return turn(1) + rotate\n",
        ["run()"],
    ),
    "from package import module": (
        "from parts import rope\n\ndef run():\n    return rope.rotate(1, rope.Config(base=3))\n",
        ["run()"],
    ),
    "from package import module as other": (
        "from parts import rope as r\n\nC = r.Config\n\ndef run():\n    return r.rotate(1, C(base=3))\n",
        ["run()"],
    ),
    "import module": (
        "import parts.rope\n\ndef run():\n    return parts.rope.rotate(1)\n",
        ["run()"],
    ),
    "import module as other": (
        "import parts.rope as rope\n\ndef run(c=rope.Config):\n    return rope.rotate(1, c())\n",
        ["run()"],
    ),
    "relative": (
        "from .rope import rotate\nfrom . import rope\n\ndef run():\n    return rotate(1), rope.rotate(2)\n",
        ["run()"],
    ),
    "inside a function": (
        "def run():\n    from parts.rope import rotate as turn\n    return [turn(i) for i in range(3)]\n\n\n"
        "def other():\n    import parts.rope as r\n\n    def deeper():\n        return r.rotate(2)\n    return deeper()\n",
        ["run()", "other()"],
    ),
    "the only statement of a block": (
        "def run(x):\n    if x:\n        from parts.rope import rotate\n    return rotate(x)\n",
        ["run(2)"],
    ),
    "its own Config and _split": (
        "from parts.rope import rotate, Config as RopeConfig\n\nclass Config:\n    base = 2\n\n\n"
        "def _split(x):\n    return -x\n\n\ndef run():\n    return rotate(1, Config()), rotate(1, RopeConfig()), _split(3)\n",
        ["run()", "Config.base", "_split(1)"],
    ),
    "names that only look the same": (
        "from parts.rope import rotate\nimport parts.rope as r\n\nclass Config:\n    _split = 7\n\n    def rotate(self, _split):\n"
        "        self.r = _split\n        return rotate(self.r), 'rotate _split'\n\n\n"
        "def _split(r=4):\n    return dict(Config=r)\n\n\ndef run():\n    rope = {'rotate': 1}\n"
        "    return Config().rotate(_split=3), Config._split, _split(), rope['rotate'], r.rotate(5)\n",
        ["run()"],
    ),
    "captured by a local of the same name": (
        "from parts.rope import rotate as turn\n\ndef run():\n    rotate = 3\n    return turn(1) + rotate\n\n\n"
        "def other(rotate):\n    return [turn(i) for i in range(rotate)]\n\n\nrun2 = lambda rotate: turn(rotate)\n",
        ["run()", "other(3)", "run2(2)"],
    ),
    "a class's name is not its functions'": (
        "from parts import rope\n\nclass A:\n    rotate = 5\n\n    def run(self):\n        return rope.rotate(1) + self.rotate\n",
        ["A().run()"],
    ),
    "comprehensions, walrus, nested functions": (
        "from parts import rope\n\n_split = 2\n\ndef run():\n    a = [rope._split(x) for x in range(_split)]\n"
        "    if (y := rope._split(3)) > 1:\n        a.append(y)\n    def inner():\n        nonlocal a\n        a = a + [_split]\n"
        "    inner()\n    return a, {k: v for k, v in enumerate(a)}, (lambda _split: _split)(9)\n",
        ["run()"],
    ),
    "through another module": (
        "from parts.middle import turn_twice, rotate as again, nn\n\ndef run():\n    return turn_twice(1), again(1), nn.Linear\n",
        ["run()"],
    ),
    "a diamond": (
        "from parts.middle import turn_twice\nfrom parts.rope import Config, rotate\n\ndef run():\n"
        "    return turn_twice(1), rotate(1, Config(4)), isinstance(Config(), Config)\n",
        ["run()"],
    ),
    "imports merged": (
        "import math\nimport torch\nimport torch.nn.functional\nfrom torch import Tensor, nn\nfrom parts.middle import area\n\n"
        "def run():\n    return area(2), math.pi, torch.nn.functional.relu, nn, Tensor\n",
        ["run()"],
    ),
    "other aliases for the same": (
        "from torch import nn as layers\nimport torch.nn.functional as fun\nfrom parts.middle import area, zero\n\n"
        "def run():\n    return area(1), layers.ReLU, fun.relu, zero()\n",
        ["run()"],
    ),
    "an alias that is another's name": (
        "from parts.middle import area\n\nclass pi:\n    two = 2\n\n\ndef nn():\n    return 1\n\n\ndef run():\n"
        "    return area(1), pi.two, nn()\n",
        ["run()"],
    ),
    "a module's name for a builtin": (
        "from parts.shadow import biggest\n\ndef run():\n    return biggest(2), max(1, 2)\n",
        ["run()"],
    ),
    "global": (
        "from parts.counter import count, reset\n\nnumber = 50\n\ndef run():\n    reset()\n    return count(), count(), number\n",
        ["run()"],
    ),
    "__all__": (
        "from parts.rope import rotate\n\n__all__ = ['rotate', 'run']\n\ndef run():\n    return rotate(1)\n",
        ["run()", "sorted(__all__)"],
    ),
    "try, with, except and match": (
        "from parts.rope import rotate\n\ntry:\n    import json as j\nexcept ImportError as error:\n    j = None\n\n"
        "def run(x):\n    match x:\n        case {'a': rope, **rest}:\n            return rotate(rope), rest, j.dumps(1)\n"
        "        case [first, *others]:\n            return rotate(first), others\n    try:\n        1 / 0\n"
        "    except ZeroDivisionError as rotate_error:\n        return str(rotate_error)\n",
        ["run({'a': 1, 'b': 2})", "run([1, 2])", "run(0)"],
    ),
}  # fmt: skip
CLASHING = {
    "from module import name as other",
    "its own Config and _split",
    "names that only look the same",
    "captured by a local of the same name",
    "comprehensions, walrus, nested functions",
}
OTHERS = {
    "rope": ROPE,
    "middle": (
        '"""In between."""\nimport math\nfrom math import pi\n\nfrom torch import nn\nimport torch.nn.functional as F\n'
        "from parts.rope import rotate\n\n__all__ = ['area']\n\ndef turn_twice(x):\n    return rotate(rotate(x))\n\n\n"
        "def area(r):\n    return math.floor(pi * r), nn.Linear(1, 1).in_features\n\n\ndef zero():\n    return F.relu is not None\n"
    ),
    "shadow": "def max(x):\n    return -x\n\n\ndef biggest(x):\n    return max(x)\n",
    "counter": "number = 0\n\ndef reset():\n    global number\n    number = 0\n\n\ndef count():\n    global number\n    number += 1\n    return number\n",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A package `parts`; gives a function that adds a module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        path = tmp_path / "parts" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("__init__", "")
    for name, text in OTHERS.items():
        write(name, text)
    write.root = tmp_path
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        del sys.modules[name]


def lint(text: str) -> str:
    """What ruff says: unknown and doubled names, unsorted imports, blank lines."""
    rules = "--select=E1,E2,E3,E4,E7,E9,F,I,W,PLC0414 --ignore=E731,F841 --preview"
    command = ["ruff", "check", "--isolated", *rules.split(), "--output-format=concise", "-"]
    done = subprocess.run(
        [sys.executable, "-m", *command], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize("case", CASES)
def test_one_file_does_the_same(parts, case):
    text, expressions = CASES[case]
    parts("target", f'"""The target."""\n\n{text}')
    one = flatten(parts.root, "parts/target.py")
    original = vars(importlib.import_module("parts.target"))
    alone = {"__name__": "alone"}
    names = {n.name for n in ast.walk(ast.parse(one)) if isinstance(n, ast.alias)}
    assert not [name for name in names if name.startswith("parts")]
    assert "parts" not in {getattr(n, "id", "") for n in ast.walk(ast.parse(one))}
    exec(compile(one, "one", "exec"), alone)
    for expression in expressions:
        assert eval(expression, alone) == eval(expression, original), one
    own = {n.name for n in ast.parse(text).body if hasattr(n, "name")}
    assert own <= alone.keys()
    assert ("rope_" in one) == (case in CLASHING)
    assert alone["__doc__"] == "The target."


def test_files_that_hold_the_same_module_leave_it_as_it_is(parts):
    """It is read once for all of them, under names that one changes; an edit of it is seen."""
    parts("clash", CASES["its own Config and _split"][0])
    parts("plain", CASES["from module import name"][0])
    once = [flatten(parts.root, f"parts/{name}.py") for name in ("clash", "plain")]
    assert "rope_Config" in once[0] and "rope_" not in once[1]
    assert [flatten(parts.root, f"parts/{name}.py") for name in ("clash", "plain")] == once
    parts("rope", ROPE.replace("x + 1", "x + 2"))
    assert flatten(parts.root, "parts/plain.py") == once[1].replace("x + 1", "x + 2") != once[1]


@pytest.mark.parametrize("case", ["a diamond", "imports merged", "its own Config and _split"])
def test_it_reads_well(parts, case):
    parts("target", f'"""The target."""\n\n{CASES[case][0]}')
    one = flatten(parts.root, "parts/target.py")
    assert lint(one.replace("import torch.nn.functional\n", "")) == ""
    marks = [line.split()[1] for line in one.splitlines() if line.endswith("------")]
    assert marks[-1] == "parts/target.py" and len(marks) == len(set(marks)) > 1
    assert "# Rotation.\n#\n# Two lines of it.\n" in one
    assert one.count("class Config:\n    base: int") + one.count("class rope_Config:") == 1
    assert "    # base\n" in one


def test_clashing_names_get_a_predictable_prefix(parts):
    parts("target", CASES["its own Config and _split"][0])
    one = flatten(parts.root, "parts/target.py")
    assert "class rope_Config:" in one and "def _rope_split(x):" in one
    assert "return torch.tensor(_rope_split(x) * (config or rope_Config()).base).item()" in one
    assert one == flatten(parts.root, "parts/target.py")


def test_a_second_clash_takes_more_of_the_path(parts):
    parts("deep/rope", "def rotate():\n    return 1\n\n\ndef rope_rotate():\n    return 2\n")
    text = "from parts.deep import rope\n\ndef rotate():\n    return rope.rotate(), rope.rope_rotate()\n"
    parts("target", text + "\n\ndef rope_rotate():\n    return 3\n")
    one = flatten(parts.root, "parts/target.py")
    assert "def deep_rope_rotate():" in one and "def rope_rope_rotate():" in one
    alone = {}
    exec(one, alone)
    assert alone["rotate"]() == (1, 2) and alone["rope_rotate"]() == 3


def test_a_forward_reference_follows_its_name(parts):
    parts(
        "target",
        "from parts.rope import Config as C\n\ndef run(c: 'C | None') -> \"list[C]\": ...\n",
    )
    assert 'def run(c: "Config | None") -> "list[Config]": ...' in flatten(
        parts.root, "parts/target.py"
    )


REFUSED = {
    "from __future__ import annotations\n": "target.py:1: from __future__",
    "from parts.rope import *\n": r"target.py:1: from parts.rope import \*",
    "import math\n\nfrom math import *\n": r"target.py:3: from math import \*",
    "import numpy\n": "target.py:1: imports numpy; one file may need torch, safetensors, triton and PIL only",
    "def f():\n    import transformers\n": "target.py:2: imports transformers",
    "from parts.circle import a\n": "a circle of imports: parts/circle.py imports parts/other.py imports parts/circle.py",
    "from parts.target import x\n": "parts/target.py imports parts/target.py",
    "from parts.nowhere import x\n": "target.py:1: there is no parts.nowhere",
    "import parts.nowhere\n": "target.py:1: there is no parts.nowhere",
    "from parts.rope import nothing\nnothing()\n": "target.py:2: parts/rope.py has no nothing",
    "from parts import rope\nprint(rope.nothing)\n": "target.py:2: parts/rope.py has no nothing",
    "from parts import rope\nprint(rope)\n": "target.py:2: the module parts.rope is used for itself",
    "from parts import rope\nrope.Config = 3\n": "target.py:2: the module parts.rope is used for itself, or a name of it set",
    "from parts.rope import rotate\nrotate = 3\n": "target.py:1: rotate is imported and bound in another way",
    "import torch\ntorch = 3\n": "target.py:1: torch is imported and bound in another way",
    "try:\n    from parts.rope import rotate\nexcept ImportError:\n    pass\n": "target.py:2: an import of the project inside if",
    "from parts.coded import x\n": "target.py:1: parts/coded/__init__.py holds code",
    "from parts.counter import number\nprint(number)\n": "target.py:2: number of parts/counter.py is not fixed",
    "from parts.script import x\nx()\n": "script.py:5: __name__ would be that of the one file",
    "from parts.rope import rotate\ndef len(): ...\nfrom parts.long import f\n": "target.py:1: its name len is a builtin in parts/long.py",
    "from parts.rope import rotate; x = 1\n": "target.py:1: it shares its line",
    "from parts.rope import rotate\n__all__ = ['turn']\n": "target.py:2: __all__ names 'turn'",
    "from parts.rope import Config as C\n\nclass Config:\n    pass\n\nclass A:\n    C = C\n": "target.py:7: C is both the class's and the module's name",
    "from parts.caught import f\nerror = 1\n": "caught.py:3: error is bound here, and would have to become caught_error",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_would_be_wrong_is_refused(parts, text):
    parts("circle", "from parts.other import b\na = 1\n")
    parts("other", "def b():\n    from parts.circle import a\n    return a\n")
    parts("coded/__init__", "x = 1\n")
    parts("coded/x", "")
    parts("script", "def x():\n    return 1\n\n\nif __name__ == '__main__':\n    x()\n")
    parts("long", "def f(x):\n    return len(x)\n")
    parts("caught", "try:\n    f = 1 / 0\nexcept ZeroDivisionError as error:\n    f = 1\n")
    parts("target", text)
    with pytest.raises(FlattenError, match=REFUSED[text]):
        flatten(parts.root, "parts/target.py")


# Shapes

HEAD = "from jaxtyping import Bool, Float, Int\nfrom torch import Tensor\n\n\n"
SHAPES = {
    'def f(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t"]: ...': "def f(x: Tensor) -> Tensor: ...  # x: b t d -> b t",
    'def f(a, x: Int[Tensor, "b t"], *y: Bool[Tensor, " t"], z=1): ...': "def f(a, x: Tensor, *y: Tensor, z=1): ...  # x: int b t, y: bool t",
    'def f(\n    x: Float[Tensor, "b t d"],\n    *more: Float[Tensor, "*b d"],\n    y: Int[Tensor, ""] | None = None,\n) -> Float[Tensor, "b"]:\n    return x': (
        "def f(\n    x: Tensor,  # b t d\n    *more: Tensor,  # *b d\n    y: Tensor | None = None,  # int scalar\n) -> Tensor:  # b\n    return x"
    ),
    'def f(\n    x: Float[Tensor, "b t"], *, n: int = 1\n) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:\n    return x': (
        "def f(\n    x: Tensor, *, n: int = 1  # x: b t\n) -> tuple[Tensor, Tensor]:  # (m n), (n n)\n    return x"
    ),
    'def f() -> tuple[\n    Float[Tensor, "m n"],\n    int,\n]:  # two\n    return 1': (
        "def f() -> tuple[\n    Tensor,  # m n\n    int,\n]:  # two\n    return 1"
    ),
    'def f(x: Float[Tensor, "b"]):  # why\n    y: Float[Tensor, "b 2"] = g(x)  # later\n    return y': (
        "def f(x: Tensor):  # x: b; why\n    y: Tensor = g(x)  # b 2; later\n    return y"
    ),
    'def f(x: Float[Tensor, "b"]): """Float[Tensor,\n    "b"]"""': 'def f(x: Tensor): """Float[Tensor,\n    "b"]"""  # x: b',
    'def f(x: Float[Tensor, "b"], \\\n      y: Int[Tensor, "c"]): ...': "def f(x: Tensor, \\\n      y: Tensor): ...  # x: b, y: int c",
    'def outer():\n    def f(x: Float[Tensor, "b"]):\n        return (lambda y: y)(x)\n    return f': (
        "def outer():\n    def f(x: Tensor):  # x: b\n        return (lambda y: y)(x)\n    return f"
    ),
    '@dataclass\nclass C:\n    k: Float[Tensor, "b t"]\n    v: "Float[Tensor, \'b t\'] | None" = None\n': (
        '@dataclass\nclass C:\n    k: Tensor  # b t\n    v: "Tensor | None" = None  # b t\n'
    ),
    'Rotary = tuple[Float[Tensor, "t k"], Float[Tensor, "t k"]]\n': "Rotary = tuple[Tensor, Tensor]  # (t k), (t k)\n",
    'def f(x: dict[str, Float[Tensor, "b"]], y: Callable[[Float[Tensor, "c"]], int]): ...': (
        "def f(x: dict[str, Tensor], y: Callable[[Tensor], int]): ...  # x: b, y: c"
    ),
    'def f(äöü: Float[Tensor, "b"], x: Int[Tensor, "t"]): return "Ω"': 'def f(äöü: Tensor, x: Tensor): return "Ω"  # äöü: b, x: int t',
    'def a_long_name_of_a_function(first: Float[Tensor, "b t d"], second: Float[Tensor, "b t d"]) -> None: ...': (
        "# first: b t d, second: b t d\ndef a_long_name_of_a_function(first: Tensor, second: Tensor) -> None: ..."
    ),
    'class A:\n    @staticmethod\n    def a_long_name_of_a_function(first: Float[Tensor, "b t d"], second: Float[Tensor, "b t d"], eps: float): ...': (
        "class A:\n    @staticmethod\n    # first: b t d, second: b t d\n    def a_long_name_of_a_function(first: Tensor, second: Tensor, eps: float): ..."
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", SHAPES)
def test_shapes_become_comments(text):
    result = plain("a.py", HEAD + text + "\n")
    assert result == "from torch import Tensor\n\n\n" + SHAPES[text] + "\n"
    ast.parse(result)


@pytest.mark.parametrize(
    "start, use",
    [
        ("import jaxtyping, math", "jaxtyping.Float"),
        ("import jaxtyping as jt\nimport math", "jt.Float"),
        ("from jaxtyping import Float as F\nimport math", "F"),
    ],
)
def test_jaxtyping_by_another_name(start, use):
    text = f'"""Doc."""\n\n{start}\n\n\ndef f(x: {use}[Tensor, "b"]): ...\n'
    expected = '"""Doc."""\n\nimport math\n\n\ndef f(x: Tensor): ...  # x: b\n'
    assert plain("a.py", text) == expected


@pytest.mark.parametrize(
    "text, why",
    [
        ('def f(x):\n    assert isinstance(x, Float[Tensor, "b"])', ":6: jaxtyping's Float"),
        ("def f(x: Float): ...", ":5: jaxtyping's Float is used outside"),
        ('def f(x: Float[Tensor, f"{n} d"]): ...', ":5: not of the form"),
        ('def f(x: Float[Int[Tensor, "a"], "b"]): ...', ":5: not of the form"),
        ("def f():\n    from jaxtyping import Key", ":6: jaxtyping is imported below the top"),
        (
            'PyTree = Int\nfrom jaxtyping import PyTree\nx: PyTree[Tensor, "T"]',
            ":7: not of the form",
        ),
    ],
)
def test_more_of_jaxtyping_is_refused(text, why):
    with pytest.raises(FlattenError, match=f"a.py{why}"):
        plain("a.py", HEAD + text + "\n")


def test_without_jaxtyping_nothing_changes():
    assert plain("a.py", "x = 1 ;y=2\n") == "x = 1 ;y=2\n"
