"""Long signatures with a parameter a line.

mkdocstrings asks black or ruff for that, which takes 10 ms each: more than all the rest of
an API page.
"""

import re

from mkdocstrings_handlers.python._internal import rendering

TOKEN = re.compile(r'"[^"]*"|\'[^\']*\'|.', re.DOTALL)  # a comma in a string splits nothing


def wrap(code: str, line_length: int) -> str:
    """`def f(a, b) -> c: pass` as a formatter would write it; other code stays as it is."""
    if not code.startswith("def "):
        return code
    name, _, rest = code.partition("(")
    tokens, parameters, depth = iter(TOKEN.findall(rest)), [""], 0
    for token in tokens:
        if token == ")" and not depth:
            break
        depth += (token in {"(", "[", "{"}) - (token in {")", "]", "}"})
        if token == "," and not depth:
            parameters.append("")
        else:
            parameters[-1] += token
    lines = "".join(f"    {parameter.strip()},\n" for parameter in parameters)
    returns = "".join(tokens).removesuffix(" pass")
    return f"{name}(\n{lines}){returns}\n    pass\n"


def install() -> None:
    rendering._get_formatter = lambda: wrap
