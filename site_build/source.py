"""A Python file, edited at the places that `ast` names, and its shapes as comments.

`plain` turns jaxtyping's annotations into comments: `x: Float[Tensor, "b t d"],` becomes
`x: Tensor,  # b t d`. All else stays as it is, comments and formatting too.
"""

import ast
import itertools
import re
import tokenize
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from io import StringIO

WIDTH = 100
DTYPE = re.compile(r"(Shaped|Bool|Num|Inexact|Real|B?Float\d*|Complex\d*|Integer|U?Int\d*)$")


class FlattenError(ValueError):
    """A module that can't be carried away as one file; says why, and where."""

    cell = 0  # it is of no cell of the page


class Source:
    def __init__(self, path: str, text: str):
        self.path, self.text = path, text
        self.tree = ast.parse(text, path)
        self.lines = text.splitlines(keepends=True)
        self.starts = [0, *itertools.accumulate(map(len, self.lines))]
        self.edits: list[tuple[int, int, str]] = []

    def refuse(self, node: ast.AST | None, why: str):
        raise FlattenError(f"{self.path}:{getattr(node, 'lineno', 1)}: {why}")

    def at(self, line: int, column: int) -> int:
        """A place in the text; ast counts columns in bytes."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.at(node.lineno, node.col_offset)
        return start, self.at(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.AST) -> str:
        return self.text[slice(*self.span(node))]

    def replace(self, node: ast.AST, new: str) -> None:
        self.edits.append((*self.span(node), new))

    def remove(self, statement: ast.stmt, put: str = "") -> None:
        """With its lines, and the blank ones after it where others stand above it."""
        start, end = self.span(statement)
        first, last = statement.lineno - 1, statement.end_lineno
        before, after = self.text[self.starts[first] : start], self.text[end : self.starts[last]]
        if before.strip() or after.strip()[:1] not in ("", "#"):
            self.refuse(statement, "it shares its line with another statement")
        if put:
            self.edits.append((start, end, put))
            return
        above = self.lines[first - 1].strip() if first else ""
        while last < len(self.lines) and not self.lines[last].strip() and above[-1:] in ("", ":"):
            last += 1
        self.edits.append((self.starts[first], self.starts[last], ""))

    def edited(self) -> str:
        text = self.text
        for start, end, new in sorted(self.edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text


@cache
def plain(path: str, text: str) -> str:
    """The module without jaxtyping.

    Raises:
        FlattenError: it uses jaxtyping for more than annotations.
    """
    return Shapes(path, text).as_comments() if "jaxtyping" in text else text


@dataclass
class Shape:
    """One `Float[Tensor, "b t d"]`, and whose annotation it is in."""

    owner: str  # an argument's name, "->", or "" where the place tells
    text: str
    start: int
    end: int


class Shapes(Source):
    def as_comments(self) -> str:
        self.names: dict[str, str] = {}  # as the module calls it: as jaxtyping does
        self.shapes: list[Shape] = []
        self.seen: set[ast.AST] = set()
        nodes = list(ast.walk(self.tree))
        for node in nodes:
            self.drop_import(node)
        for node in nodes:
            if isinstance(node, ast.arg) and node.annotation:
                self.take_out(node.annotation, node.arg)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
                self.take_out(node.returns, "->")
            elif isinstance(node, ast.AnnAssign):
                self.take_out(node.annotation, "")
            elif isinstance(node, ast.Module | ast.ClassDef):
                for statement in node.body:  # an alias: Rotary = tuple[Float[...], ...]
                    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
                        self.take_out(statement.value, "")
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in self.names and node not in self.seen:
                self.refuse(node, f"jaxtyping's {node.id} is used outside of an annotation")
        self.write_comments()
        return self.edited()

    def drop_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and (node.module or "") == "jaxtyping":
            ours, put = node.names, ""
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name == "jaxtyping"]
            others = [alias for alias in node.names if alias not in ours]
            put = ast.unparse(ast.Import(others)) if others else ""
        else:
            return
        if ours:
            if node not in self.tree.body:
                self.refuse(node, "jaxtyping is imported below the top level")
            self.names |= {alias.asname or alias.name: alias.name for alias in ours}
            self.remove(node, put)

    def take_out(self, annotation: ast.expr, owner: str) -> None:
        for node in ast.walk(annotation):
            if found := self.read(node):
                array, text = found
                self.seen |= set(ast.walk(node))
                self.replace(node, self.segment(array))
                self.shapes.append(Shape(owner, text, *self.span(node)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.take_out_of_string(node, owner)

    def take_out_of_string(self, node: ast.Constant, owner: str) -> None:
        """A forward reference: "Float[Tensor, 'b t'] | None"."""
        try:
            inner = ast.parse(node.value, mode="eval")
        except SyntaxError:  # a shape, not a type
            return
        found = [(part, self.read(part)) for part in ast.walk(inner)]
        found = [(ast.unparse(part), *shape) for part, shape in found if shape]
        text = ast.unparse(inner)
        for old, array, shape in found:
            text = text.replace(old, ast.unparse(array))
            self.shapes.append(Shape(owner, shape, *self.span(node)))
        if found:
            self.replace(node, f'"{text}"')

    def read(self, node: ast.AST) -> tuple[ast.expr, str] | None:
        """The array type and the shape, if this is one of jaxtyping's annotations."""
        if not isinstance(node, ast.Subscript):
            return None
        kind = node.value
        if isinstance(kind, ast.Name):
            kind = self.names.get(kind.id)
        else:
            module = kind.value.id if isinstance(getattr(kind, "value", 0), ast.Name) else ""
            kind = kind.attr if self.names.get(module) == "jaxtyping" else None
        if kind is None:
            return None
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        right = len(inside) == 2 and isinstance(inside[0], ast.Name | ast.Attribute)
        if (
            not right
            or not isinstance(getattr(inside[1], "value", 0), str)
            or not DTYPE.match(kind)
        ):
            self.refuse(node, f'not of the form Float[Tensor, "b t d"]: {ast.unparse(node)}')
        shape = " ".join(inside[1].value.split()) or "scalar"
        return inside[0], shape if kind in ("Float", "Shaped") else f"{kind.lower()} {shape}"

    def write_comments(self) -> None:
        """At the ends of lines, or above one that would get too long."""
        ends, comments = [], {}
        for token in tokenize.generate_tokens(StringIO(self.text).readline):
            place = self.starts[token.start[0] - 1] + token.start[1]
            if token.type in (tokenize.NEWLINE, tokenize.NL):  # not within a string, nor after \
                ends.append(place)
            elif token.type == tokenize.COMMENT:
                comments[place + len(token.string)] = token.string
        by_line: dict[int, list[Shape]] = {}
        for shape in sorted(self.shapes, key=lambda shape: shape.start):
            by_line.setdefault(ends[bisect_left(ends, shape.end)], []).append(shape)
        for end, shapes in by_line.items():
            start, old = self.text.rfind("\n", 0, shapes[0].start) + 1, comments.get(end, "")
            line = self.text[start:end]
            code = start + len(line.removesuffix(old).rstrip())
            new = said(line, self.text[shapes[-1].end : code], shapes)
            saved = sum(e - s - len(put) for s, e, put in self.edits if start <= s and e <= end)
            continued = self.text[:start].endswith("\\\n")
            if code - start - saved + len(new) + 4 > WIDTH and not old and not continued:
                margin = line[: len(line) - len(line.lstrip())]
                self.edits.append((start, start, f"{margin}# {new}\n"))
            else:
                old = old.lstrip("# ")
                self.edits.append((code, end, f"  # {new}" + (f"; {old}" if old else "")))


def said(line: str, rest: str, shapes: list[Shape]) -> str:
    """A line's comment: `x: b t d, tokens: int b t -> b t v`. `rest` is what follows the last."""
    comment = ""
    groups = [(o, [s.text for s in g]) for o, g in itertools.groupby(shapes, lambda s: s.owner)]
    for owner, texts in groups:
        text = texts[0] if len(texts) == 1 else ", ".join(f"({text})" for text in texts)
        if owner == "->":
            clear = not comment and (line.lstrip().startswith(")") or "->" not in line)
            comment += text if clear else f" -> {text}"
        else:
            alone = len(groups) == 1 and line.lstrip(" \t*").startswith(f"{owner}:")
            clear = not owner or (alone and ":" not in rest) or f"{owner}:" not in line
            comment += (", " if comment else "") + (text if clear else f"{owner}: {text}")
    return comment.strip()
