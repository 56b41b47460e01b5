"""TeX to HTML with KaTeX, at build time: pages carry no maths script."""

import atexit
import json
from functools import cache
from pathlib import Path

from py_mini_racer import JSEvalException, MiniRacer


class TeXError(ValueError):
    """KaTeX refuses a formula."""


@cache
def engine() -> MiniRacer:
    context = MiniRacer()
    context.eval((Path(__file__).parent / "katex.min.js").read_text("utf-8"))
    atexit.register(context.close)  # V8 left open has been seen to hang at exit
    return context


@cache
def render(tex: str, display: bool) -> str:
    """KaTeX's HTML with MathML beside it, for screen readers.

    Raises:
        TeXError: the formula can't be read; KaTeX's own words, with the place.
    """
    options = json.dumps({"displayMode": display, "throwOnError": True, "strict": "ignore"})
    try:
        return engine().eval(f"katex.renderToString({json.dumps(tex)},{options})")
    except JSEvalException as error:
        said = str(error).partition("ParseError: ")[2] or str(error)
        raise TeXError(said.splitlines()[0]) from None
