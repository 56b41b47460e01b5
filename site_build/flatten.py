"""One file to copy: a module with all that it imports of its project, needing torch only.

`flatten` puts the modules one below the other in the order of need, merges their imports, and
spells each name as it is in the one file. What can't be done rightly is refused, with its line.
`carried` adds the header and the licence.
"""

import ast
import copy
import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .source import WIDTH, FlattenError, Source, plain

# What one file may import besides the standard library.
NEEDED = ("torch", "safetensors", "triton", "PIL")
OF_THE_FILE = ("__name__", "__file__", "__spec__", "__package__", "globals")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
IMPORTS = (ast.Import, ast.ImportFrom)


# Names, and what they refer to


@dataclass(eq=False)
class Scope:
    kind: type
    parent: "Scope | None" = None
    binds: Counter = field(default_factory=Counter)  # name: how many times
    outer: dict[str, type] = field(default_factory=dict)  # declared global or nonlocal

    @property
    def top(self) -> "Scope":
        return self.parent.top if self.parent else self

    def find(self, name: str) -> "Scope | None":
        """The scope whose name this is, used here; None for a builtin."""
        if self.outer.get(name) is ast.Global:
            return self.top
        if self.binds[name]:
            return self
        scope = self.parent
        while scope and scope.kind is ast.ClassDef:  # a function doesn't see its class's names
            scope = scope.parent
        return scope.find(name) if scope else None

    def bind(self, name: str) -> None:
        if self.outer.get(name) is ast.Global:
            self.top.binds[name] += 1
        elif name not in self.outer:
            self.binds[name] += 1


@dataclass(eq=False)
class Use:
    """A name where it is read or set."""

    node: ast.AST
    name: str
    scope: Scope


@dataclass(eq=False)
class Imported:
    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    scope: Scope
    name: str  # what it binds
    source: str  # the full name of what is imported
    inside: bool  # of the project itself

    @property
    def whole(self) -> bool:
        """`import torch.nn`, which binds torch."""
        return isinstance(self.statement, ast.Import) and not self.alias.asname


@dataclass(frozen=True)
class Meaning:
    """What a name stands for: a module's own thing, or one from outside under its alias."""

    owner: str | None  # the module's path; None: from outside
    source: str  # its name there: Config; or torch.nn.functional
    name: str


class Module(Source):
    """One module of the project, its names resolved."""

    def __init__(self, root: Path, path: str, text: str):
        super().__init__(path, plain(path, text))
        self.root, self.package = root, path.split("/")[0]
        self.top = Scope(ast.Module)
        self.uses: list[Use] = []
        self.imports: list[Imported] = []
        nodes = list(ast.walk(self.tree))
        self.parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        kinds = [getattr(node, key, None) for node in nodes for key in ("annotation", "returns")]
        self.annotations = [annotation for annotation in kinds if annotation is not None]
        self.heads = {s for s in self.tree.body if isinstance(s, IMPORTS)}  # to be moved
        has_docstring = ast.get_docstring(self.tree) is not None
        self.docstring = self.tree.body[0] if has_docstring else None
        self.walk(self.tree.body, self.top)
        self.check_imports()
        self.found = [(use, use.scope.find(use.name)) for use in self.uses]
        self.imported = {(one.scope, one.name): one for one in self.imports if one.inside}
        for scope, name in self.imported:
            del scope.binds[name]  # not bound any more in the one file

    def walk(self, nodes: Iterable[ast.AST], scope: Scope) -> None:
        for node in nodes:
            if isinstance(node, IMPORTS):
                self.note_import(node, scope)
            elif isinstance(node, ast.Name):
                self.note(node, node.id, scope, binds=not isinstance(node.ctx, ast.Load))
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                self.walk_definition(node, scope)
            elif isinstance(node, COMPREHENSIONS):
                first = node.generators[0]
                self.walk([first.iter], scope)
                rest = [n for n in ast.iter_child_nodes(node) if n is not first]
                self.walk([first.target, *first.ifs, *rest], Scope(ast.comprehension, scope))
            elif isinstance(node, ast.NamedExpr):
                self.walk([node.value], scope)
                while scope.kind is ast.comprehension:
                    scope = scope.parent
                self.walk([node.target], scope)
            else:
                for key in ("name", "rest"):  # `except E as name`, `case name`, `case {**rest}`
                    if isinstance(name := getattr(node, key, None), str):
                        self.note(node, name, scope, binds=True)
                self.walk(ast.iter_child_nodes(node), scope)

    def walk_definition(self, node: ast.AST, scope: Scope) -> None:
        inner = Scope(type(node), scope)
        if isinstance(node, DEFINITIONS):
            self.note(node, node.name, scope, binds=True)
            self.declare(node.body, inner)
        if isinstance(node, FUNCTIONS):
            arguments = [n for n in ast.iter_child_nodes(node.args) if isinstance(n, ast.arg)]
            inner.binds.update(argument.arg for argument in arguments)
        body = node.body if isinstance(node.body, list) else [node.body]
        outside = [n for n in ast.iter_child_nodes(node) if n not in body]
        self.walk(outside, scope)  # decorators, bases, defaults, annotations
        self.walk(body, inner)

    def declare(self, body: list[ast.stmt], scope: Scope) -> None:
        """`global` and `nonlocal` hold for the whole block, wherever in it they stand."""
        todo = list(body)
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Global | ast.Nonlocal):
                scope.outer |= dict.fromkeys(node.names, type(node))
                if isinstance(node, ast.Global):
                    self.uses += [Use(node, name, scope) for name in node.names]
            elif not isinstance(node, DEFINITIONS):
                todo += ast.iter_child_nodes(node)

    def note(self, node: ast.AST, name: str, scope: Scope, binds: bool) -> None:
        self.uses.append(Use(node, name, scope))
        if binds:
            scope.bind(name)

    def note_import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        base = getattr(node, "module", None) or ""
        if getattr(node, "level", 0):
            base = ".".join([*self.path.split("/")[: -node.level], *filter(None, [base])])
        if base == "__future__":
            self.refuse(node, "from __future__ would hold for all of the one file")
        for alias in node.names:
            if alias.name == "*":
                self.refuse(node, f"from {base} import *: name what is imported")
            if isinstance(node, ast.ImportFrom):
                source, name = f"{base}.{alias.name}", alias.asname or alias.name
            else:
                source, name = alias.name, alias.asname or alias.name.partition(".")[0]
            scope.bind(name)
            inside = source.partition(".")[0] == self.package
            self.imports.append(Imported(node, alias, scope, name, source, inside))

    def check_imports(self) -> None:
        for one in self.imports:
            package, head = one.source.partition(".")[0], one.statement in self.heads
            if not one.inside and package not in (*NEEDED, *sys.stdlib_module_names):
                needed = ", ".join(NEEDED[:-1]) + f" and {NEEDED[-1]}"
                self.refuse(one.statement, f"imports {package}; one file may need {needed} only")
            if one.inside and one.scope is self.top and not head:
                self.refuse(one.statement, "an import of the project inside if, try or with")
            same = sum(o.scope is one.scope and o.name == one.name for o in self.imports)
            if (one.inside or head) and one.scope.binds[one.name] != same:
                self.refuse(one.statement, f"{one.name} is imported and bound in another way too")

    def file_of(self, name: str) -> str | None:
        """`snippets.layers.rmsnorm`: its path, if there is such a module."""
        path = name.replace(".", "/") + ".py"
        return path if (self.root / path).is_file() else None

    def is_package(self, name: str) -> bool:
        return (self.root / name.replace(".", "/")).is_dir()

    def to_edit(self) -> "Module":
        """The same, its text as it was read."""
        other = copy.copy(self)
        other.edits = []
        return other


# A site has a file for each module, and many of them hold the same blocks.
read_module = lru_cache(512)(Module)


@lru_cache(64)
def holds_code(text: str) -> bool:
    """More than a docstring."""
    body = ast.parse(text).body
    return not all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body)


# Inlining


class Bundle:
    """A module and all that it imports of its project, about to become one file."""

    def __init__(self, root: Path, path: str):
        self.root = root
        self.modules: dict[str, Module] = {}  # in the order of need: the target is last
        self.load(path, [])
        self.target = self.modules[path]
        self.spellings: list[tuple[Module, Use, ast.AST, Meaning]] = []
        self.builtins: dict[str, str] = {}  # name: a module that uses it
        for module in self.modules.values():
            self.resolve(module)
        self.names: dict[Meaning, str] = {}  # in the one file
        self.choose_names()

    def load(self, path: str, chain: list[str]) -> None:
        if path in chain:
            circle = " imports ".join([*chain[chain.index(path) :], path])
            raise FlattenError(f"a circle of imports: {circle}")
        if path not in self.modules:
            text = (self.root / path).read_text("utf-8")
            module = read_module(self.root, path, text).to_edit()
            for one in module.imports:
                if one.inside and (needed := self.needed(module, one)):
                    self.load(needed, [*chain, path])
            self.modules[path] = module

    def needed(self, module: Module, one: Imported) -> str | None:
        """The module that an import is about; None for a package."""
        parts = one.source.split(".")
        for k in range(1, len(parts) + 1):
            init = self.root.joinpath(*parts[:k], "__init__.py")
            if init.is_file() and holds_code(init.read_text("utf-8")):
                name = init.relative_to(self.root).as_posix()
                module.refuse(one.statement, f"{name} holds code: import from modules only")
        names = [one.source, one.source.rpartition(".")[0]]
        for name in names[: 1 + isinstance(one.statement, ast.ImportFrom)]:
            if path := module.file_of(name):
                return path
        if not module.is_package(one.source):
            module.refuse(one.statement, f"there is no {one.source}")
        return None

    # What names mean

    def resolve(self, module: Module) -> None:
        """Find what each name means that the one file may spell otherwise."""
        for use, scope in module.found:
            if one := module.imported.get((scope, use.name)):
                node, meaning = self.follow(module, use, one)
                self.spellings.append((module, use, node, meaning))
            elif scope is module.top:
                meaning = self.meaning(module, use.name)
                self.spellings.append((module, use, use.node, meaning))
            elif scope is None:
                self.builtins[use.name] = module.path

    def follow(self, module: Module, use: Use, one: Imported) -> tuple[ast.AST, Meaning]:
        """From the use of an import to `module.object`, and what that is."""
        node, full = use.node, one.source.partition(".")[0] if one.whole else one.source
        while module.file_of(full) or module.is_package(full):
            above = module.parents.get(node)
            if not isinstance(above, ast.Attribute) or not isinstance(above.ctx, ast.Load):
                module.refuse(node, f"the module {full} is used for itself, or a name of it set")
            node, full = above, f"{full}.{above.attr}"
        base, _, name = full.rpartition(".")
        if module.file_of(base) not in self.modules:
            module.refuse(node, f"there is no {full}, or it was not imported")
        owner = self.modules[module.file_of(base)]
        if not owner.top.binds[name] and not any(o.name == name for o in owner.imports):
            module.refuse(node, f"{owner.path} has no {name}")
        if any(isinstance(u.node, ast.Global) and u.name == name for u in owner.uses):
            module.refuse(node, f"{name} of {owner.path} is not fixed: a function sets it")
        return node, self.meaning(owner, name)

    def meaning(self, module: Module, name: str) -> Meaning:
        for one in module.imports:
            if one.scope is module.top and one.name == name and one.statement in module.heads:
                if not one.inside:
                    return Meaning(None, name if one.whole else one.source, name)
                base, _, last = one.source.rpartition(".")
                if module.file_of(one.source) or one.whole or not module.file_of(base):
                    module.refuse(one.statement, f"another module uses {name}, a module, from here")
                return self.meaning(self.modules[module.file_of(base)], last)
        return Meaning(module.path, name, name)

    # Their names in the one file

    def choose_names(self) -> None:
        """The target's names stay; another module's gets a prefix where it would clash."""
        for name in [name for name, count in self.target.top.binds.items() if count]:
            self.names[self.meaning(self.target, name)] = name
            if name in self.builtins:
                self.target.refuse(None, f"its name {name} is a builtin in {self.builtins[name]}")
        for module in self.modules.values():
            for name in [n for n, count in module.top.binds.items() if count and n != "__all__"]:
                meaning = self.meaning(module, name)
                if meaning not in self.names:
                    free = (n for n in candidates(meaning) if self.is_free(n, meaning))
                    self.names[meaning] = next(free)

    def is_free(self, name: str, meaning: Meaning) -> bool:
        """Not another thing's name in the one file, not a builtin there, nowhere shadowed."""
        if name in self.names.values() or name in self.builtins:
            return False
        found = [use.scope.find(name) for _, use, _, m in self.spellings if m == meaning]
        return all(scope is None or scope.parent is None for scope in found)

    # Writing

    def text(self) -> str:
        for module, use, node, meaning in self.spellings:
            self.spell(module, use, node, self.names.get(meaning, use.name))
        parts = [self.part(module) for module in self.modules.values()]
        head = [self.target.segment(self.target.docstring)] if self.target.docstring else []
        head += filter(None, [self.import_lines()])
        if len(parts) == 1:
            return join(["\n\n".join(head), *parts]) + "\n"
        return "\n\n".join([*head, "\n\n\n".join(parts)]) + "\n"

    def spell(self, module: Module, use: Use, node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Name | ast.Attribute):
            if module.segment(node) != name:
                module.replace(node, name)
        elif use.name == name:
            return
        elif isinstance(node, DEFINITIONS):
            start = module.at(node.lineno, node.col_offset)
            found = re.compile(r"(?:async\s+def|def|class)\s+(\w+)").match(module.text, start)
            module.edits.append((*found.span(1), name))
        elif isinstance(node, ast.Global):
            names = [self.names[self.meaning(module, one)] for one in node.names]
            edit = (*module.span(node), "global " + ", ".join(names))
            module.edits += [edit] * (edit not in module.edits)
        else:
            module.refuse(node, f"{use.name} is bound here, and would have to become {name}")

    def part(self, module: Module) -> str:
        """A module's text without docstring and imports; below its path, unless it is alone."""
        target = module is self.target
        for use in module.uses:
            if not target and use.name in OF_THE_FILE and use.scope.find(use.name) is None:
                module.refuse(use.node, f"{use.name} would be that of the one file")
        for statement in module.tree.body:
            if lists_public_names(statement) and target:
                self.check_all(statement)
            elif statement in (module.docstring, *module.heads) or lists_public_names(statement):
                module.remove(statement)
        self.remove_inner_imports(module)
        names = self.changed(module)
        self.spell_strings(module, names)
        for use in module.uses:
            if use.name in names and use.scope.kind is ast.ClassDef and use.scope.binds[use.name]:
                module.refuse(use.node, f"{use.name} is both the class's and the module's name")
        body = module.edited().strip("\n")
        if len(self.modules) == 1:
            return body
        title = f"# {module.path} ".ljust(WIDTH - 20, "-")
        words = "" if target else ast.get_docstring(module.tree) or ""
        lines = [title, *(f"# {line}".rstrip() for line in inspect.cleandoc(words).splitlines())]
        return join(["\n".join(lines), body])

    def changed(self, module: Module) -> dict[str, str]:
        """The names of a module's top level that the one file spells otherwise."""
        names = [name for name, count in module.top.binds.items() if count]
        names += [
            one.name
            for one in module.imports
            if one.inside
            and one.scope is module.top
            and not one.whole
            and not module.file_of(one.source)
        ]
        new = {name: self.names.get(self.meaning(module, name), name) for name in names}
        return {name: other for name, other in new.items() if name != other}

    def check_all(self, statement: ast.stmt) -> None:
        names = {n.value for n in ast.walk(statement) if isinstance(n, ast.Constant)}
        for name in sorted(names - set(self.names.values())):
            self.target.refuse(statement, f"__all__ names {name!r}, which the one file has not")

    def remove_inner_imports(self, module: Module) -> None:
        for statement in {one.statement: 0 for one in module.imports if one.inside}:
            if statement in module.heads:
                continue
            inside = [o.alias for o in module.imports if o.inside and o.statement is statement]
            kept = [alias for alias in statement.names if alias not in inside]
            fields = [value for _, value in ast.iter_fields(module.parents[statement])]
            block = next(f for f in fields if isinstance(f, list) and statement in f)
            put = ast.unparse(ast.Import(kept)) if kept else "pass" if len(block) == 1 else ""
            module.remove(statement, put)

    def spell_strings(self, module: Module, names: dict[str, str]) -> None:
        """Forward references are names too."""
        for annotation in module.annotations:
            if "Literal" in module.segment(annotation):
                continue
            for part in ast.walk(annotation):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    text = re.sub(r"\b\w+\b", lambda m: names.get(m[0], m[0]), part.value)
                    if text != part.value:
                        module.replace(part, f'"{text}"')

    def import_lines(self) -> str:
        """Merged and sorted: the standard library's, then the others."""
        wholes, froms = set(), {}
        heads = [
            (module, one, self.meaning(module, one.name))
            for module in self.modules.values()
            for one in module.imports
            if one.statement in module.heads and not one.inside
        ]
        modules = {meaning for _, one, meaning in heads if isinstance(one.statement, ast.Import)}
        for module, one, meaning in heads:
            name, (base, _, last) = self.names[meaning], one.source.rpartition(".")
            renamed = "" if name == (one.name if one.whole else last) else f" as {name}"
            if one.whole and renamed and base:
                module.refuse(one.statement, f"{one.name} is another thing in the one file")
            if one.whole or not base or (renamed and meaning in modules):
                wholes.add(f"import {one.source}{renamed}")
            else:
                froms.setdefault(base, set()).add(last + renamed)
        lines = sorted(wholes)
        lines += [line for base in sorted(froms) for line in from_lines(base, froms[base])]
        sections = {True: [], False: []}
        for line in lines:
            sections[line.split()[1].partition(".")[0] in sys.stdlib_module_names].append(line)
        return "\n\n".join("\n".join(section) for section in sections.values() if section)


def lists_public_names(statement: ast.stmt) -> bool:
    assigns = isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign)
    names = ast.walk(statement) if assigns else []
    return any(isinstance(node, ast.Name) and node.id == "__all__" for node in names)


def candidates(meaning: Meaning) -> Iterator[str]:
    """The name itself, then with more and more of where it is from: Config, rope_Config, …"""
    yield meaning.name
    if meaning.owner:
        where = meaning.owner.removesuffix(".py").split("/")[1:]
    else:
        where = meaning.source.split(".")[:-1] or ["the"]
    private, name = "_" * meaning.name.startswith("_"), meaning.name.lstrip("_")
    for k in range(1, len(where) + 1):
        yield private + "_".join([*where[-k:], name])
    yield from (f"{private}{'_'.join([*where, name])}_{k}" for k in itertools.count(2))


def join(parts: list[str]) -> str:
    """With two blank lines around functions and classes, else one."""
    text = ""
    for part in filter(None, parts):
        defines = re.match(r"@|def |class |async def ", part)
        text += ("\n\n\n" if defines else "\n\n") * bool(text) + part
    return text


def from_lines(base: str, names: set[str]) -> list[str]:
    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name

    renamed = {name for name in names if " as " in name}
    together = sorted(names - renamed, key=order)
    line = f"from {base} import {', '.join(together)}"
    if len(line) > WIDTH:
        line = f"from {base} import (\n" + "".join(f"    {name},\n" for name in together) + ")"
    lines = [f"from {base} import {name}" for name in sorted(renamed, key=order)]
    return [line] * bool(together) + lines


def flatten(root: Path, path: str) -> str:
    """The module at `path` below `root`, with all that it imports of its project.

    Raises:
        FlattenError: it can't be done without changing what the module does.
    """
    return Bundle(root, path).text()


def carried(site, path: str) -> str:
    """The one file with its header: what it is, from where, how it was proved, its licence.

    Raises:
        FlattenError: as `flatten` does.
    """
    text = flatten(site.root, path)
    needs = " and ".join(
        name for name in NEEDED if re.search(rf"^\s*(from|import) {name}", text, re.M)
    )
    head = [f"{path} as one file, with all that it imports of its project."]
    head += [
        f"It needs {needs or 'no package'}.",
        "",
        f"Source: {site.origin.source_address(path)}",
    ]
    if site.origin.commit:
        head.append(site.origin.described.capitalize())
    for proof in site.proofs:
        if proof["module"] == path:
            config = ", ".join(f"{key}={value}" for key, value in proof["config"].items())
            head.append(f"Equal to {proof['oracle']} {proof['version']} with {config}:")
            numbers = f"{proof['difference']:.2g}, tolerance {proof['tolerance']:.2g}"
            head.append(f"  largest difference {numbers}")
    licence = site.origin.licence.splitlines()
    if licence:
        head += [*[line for line in licence if line.startswith("Copyright")]]
        head += [f"{licence[0]}, printed in full at the end"]
    return "\n\n".join([comment(head), text.rstrip(), *[comment(licence)] * bool(licence)]) + "\n"


def comment(lines: list[str]) -> str:
    return "\n".join(f"# {line}".rstrip() for line in lines)
