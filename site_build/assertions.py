"""Finds a page's assertions, and those among them that could never fail."""

import ast
import builtins
from collections.abc import Callable


class AssertionCounter(ast.NodeTransformer):
    """Adds after each assertion a call `__asserted__(cell, line, column)`, so that it counts
    when it ran.

    An assertion is an `assert` or a call of a function named `assert…`. One that can't fail
    whatever the modules do is constant and not counted: it reads nothing but literals, names
    bound to literals, and builtins applied to those, or compares an expression with itself.
    """

    def __init__(self, cell: Callable[[], int]):
        self.cell = cell
        self.literals: set[str] = set()  # names bound once, to a constant, in all cells so far
        self.others: set[str] = set()  # names bound to anything else

    def visit_Module(self, module: ast.Module) -> ast.Module:
        literal = set()  # the name nodes that are bound to a constant
        for node in ast.walk(module):
            match node:
                case ast.Assign(targets, value) if self.constant(value):
                    literal |= self.bind(targets)
                case ast.AnnAssign(target, _, ast.expr() as value) if self.constant(value):
                    literal |= self.bind([target])
                case ast.Name(name, ast.Store()) if node not in literal:
                    self.others.add(name)
                case ast.arg(name) | ast.FunctionDef(name) | ast.ClassDef(name):
                    self.others.add(name)
                case ast.alias(name, asname):
                    self.others.add(asname or name)
        return self.generic_visit(module)

    def bind(self, targets: list[ast.expr]) -> set[ast.Name]:
        names = {target for target in targets if isinstance(target, ast.Name)}
        for name in names:
            (self.others if name.id in self.literals else self.literals).add(name.id)
        return names

    def visit_Assert(self, node: ast.Assert):
        return node if self.always_true(node.test) else self.counted(node)

    def visit_Expr(self, node: ast.Expr):
        match node.value:
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), args):
                if name.startswith("assert") and not (same(args) or all(map(self.constant, args))):
                    return self.counted(node)
        return node

    def counted(self, node: ast.stmt) -> list[ast.stmt]:
        count = ast.parse(f"__asserted__({self.cell()}, {node.lineno}, {node.col_offset})").body[0]
        for part in ast.walk(count):
            ast.copy_location(part, node)
        return [node, count]

    def always_true(self, test: ast.expr) -> bool:
        match test:
            case ast.Lambda() | ast.JoinedStr():
                return True
            case ast.Tuple(parts) | ast.List(parts) | ast.Set(parts) if parts:
                return True  # `assert (x, "why")` asserts that a pair isn't empty
            case ast.BoolOp(ast.Or(), sides):
                return any(map(self.always_true, sides))
            case ast.BoolOp(ast.And(), sides):
                return all(map(self.always_true, sides))
            case ast.NamedExpr(_, value):
                return self.always_true(value)
            case ast.Compare(left, [ast.Eq() | ast.Is() | ast.LtE() | ast.GtE()], [right]):
                return same([left, right]) or self.constant(test)
        return self.constant(test)

    def constant(self, node: ast.AST) -> bool:
        match node:
            case ast.Name(name):
                known = name in self.literals or hasattr(builtins, name)
                return known and name not in self.others
            case ast.Attribute() | ast.Await() | ast.Lambda():
                return False
        return all(map(self.constant, ast.iter_child_nodes(node)))


def same(sides: list[ast.expr]) -> bool:
    return len(sides) >= 2 and ast.dump(sides[0]) == ast.dump(sides[1])
