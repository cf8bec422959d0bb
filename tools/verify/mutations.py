"""Faults that a programmer could have made, from the syntax of a source file: Python by its tree,
C++ by its tokens.

| kind      | fault                                                              |
|-----------|--------------------------------------------------------------------|
| sign      | a plus for a minus, a negation left out                            |
| term      | a term or factor dropped, a sum begun anew                         |
| operand   | two operands or arguments swapped                                  |
| argument  | a keyword argument left out (Python)                               |
| bound     | < for <=, a range one too short                                    |
| index     | the next element, the first element, a slice one off               |
| mask      | "and" for "or" of bits, one bit of a constant, a mask left out     |
| condition | a condition removed, reversed or half of it, a check left out      |
| constant  | another number, True for False                                     |
| statement | a call, an assignment to memory, an addition left out              |

What cannot change a result is left alone: comments, documentation, annotations, messages of errors,
imports, assertions of types, and in C++ named sizes (`constexpr int`), the sizes of arrays and
alignments.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Mutation:
    """One fault: `new` in place of the characters start to end of a file."""

    file: str  # its name without its folder: a file may move
    kind: str
    start: int
    end: int
    new: str
    line: int
    before: str  # the line as it is
    after: str  # and as it becomes
    count: int = 0  # how many equal ones come before it in the file

    @property
    def key(self) -> str:
        """Ten hexadecimal digits that stay the same while the line does, wherever it and its file
        move."""
        said = "\0".join((self.file, self.kind, self.before, self.after, str(self.count)))
        return hashlib.sha256(said.encode()).hexdigest()[:10]

    @property
    def text(self) -> str:
        return f"{self.before} -> {self.after or 'nothing'}"

    def applied(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]


def mutations(path: Path) -> list[Mutation]:
    """All of a file, in its order."""
    source = path.read_text(encoding="utf-8")
    found = sorted(set(_python(source) if path.suffix == ".py" else _cpp(source)))
    seen: dict[tuple, int] = {}
    listed = []
    for start, end, kind, new in found:
        if source[start:end] == new:
            continue
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        last = len(source) if last < 0 else last
        words = (
            path.name,
            kind,
            _flat(source[first:last]),
            _flat(source[first:start] + new + source[end:last]),
        )
        listed.append(
            Mutation(
                path.name,
                kind,
                start,
                end,
                new,
                source.count("\n", 0, start) + 1,
                *words[2:],
                seen.get(words, 0),
            )
        )
        seen[words] = seen.get(words, 0) + 1
    return listed


def _flat(text: str) -> str:
    return " ".join(text.split())


# ---- drawing -------------------------------------------------------------------------------------


def in_turns(by_kind: dict[str, list[T]], kinds: Iterable[str], count: int) -> list[T]:
    """`count` of the lists' elements: the first of each kind, then the second, until there are no
    more."""
    kinds = list(kinds)
    turns = (
        by_kind[kind][i] for i in itertools.count() for kind in kinds if i < len(by_kind[kind])
    )
    return list(itertools.islice(turns, min(count, sum(len(by_kind[kind]) for kind in kinds))))


def shuffled(found: list[Mutation], seed: int) -> list[Mutation]:
    """All, of every kind in turn, in an order of the seed's and of each mutation's own: others may
    come and go."""

    def order(name: str) -> str:
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    by_kind: dict[str, list[Mutation]] = {}
    for mutation in sorted(found, key=lambda m: order(m.key)):
        by_kind.setdefault(mutation.kind, []).append(mutation)
    file = found[0].file if found else ""
    return in_turns(by_kind, sorted(by_kind, key=lambda kind: order(f"{file} {kind}")), len(found))


# ---- Python --------------------------------------------------------------------------------------

Found = tuple[int, int, str, str]  # start, end, kind, new text

_BINARY: dict[type, tuple[str, str, str]] = {
    ast.Add: ("+", "-", "sign"),
    ast.Sub: ("-", "+", "sign"),
    ast.FloorDiv: ("//", "/", "operand"),
    ast.BitAnd: ("&", "|", "mask"),
    ast.BitOr: ("|", "&", "mask"),
    ast.LShift: ("<<", ">>", "mask"),
    ast.RShift: (">>", "<<", "mask"),
}
_COMPARED: dict[type, tuple[str, str, str]] = {
    ast.Lt: ("<", "<=", "bound"),
    ast.LtE: ("<=", "<", "bound"),
    ast.Gt: (">", ">=", "bound"),
    ast.GtE: (">=", ">", "bound"),
    ast.Eq: ("==", "!=", "condition"),
    ast.NotEq: ("!=", "==", "condition"),
    ast.Is: ("is", "is not", "condition"),
    ast.IsNot: ("is not", "is", "condition"),
    ast.In: ("in", "not in", "condition"),
    ast.NotIn: ("not in", "in", "condition"),
}
_COMMUTATIVE = {
    "min",
    "max",
    "smaller",
    "larger",
    "minimum",
    "maximum",
    "add",
    "mul",
    "promote_types",
    "logical_and",
}


def _commutes(name: str, number: int) -> bool:
    """Whether a call gives the same when arguments `number` and the next are swapped."""
    return name in _COMMUTATIVE or (number == 0 and name in ("fma", "fma_of"))


_SILENT = {
    "warn",
    "print",
    "cast",
    "TypeVar",
    "getLogger",
    "__init__",
}  # calls that change no result, or all of them


class _Python(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.source, self.found = source, []
        lines = source.splitlines(keepends=True)
        self.starts = list(itertools.accumulate((len(line) for line in lines), initial=0))
        self.lines = lines

    def _at(self, line: int, column: int) -> int:
        """A place of the tree, which counts bytes of a line, in characters of the source."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(
            node.end_lineno, node.end_col_offset
        )

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end]

    def _put(self, node: ast.AST, kind: str, new: str) -> None:
        self.found.append((*self._span(node), kind, new))

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str, kind: str) -> None:
        """Another operator in place of the one that stands between two nodes."""
        low, high = self._span(left)[1], self._span(right)[0]
        written = re.escape(old).replace(r"\ ", r"\s+")
        pattern = rf"\b{written}\b" if old[0].isalpha() else written
        place = re.search(pattern, self.source[low:high])
        if place:
            self.found.append((low + place.start(), low + place.end(), kind, new))

    # what is left alone

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *filter(None, node.kw_defaults)):
            self.visit(default)

    def _body(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if isinstance(node, ast.FunctionDef):
            self.visit(node.args)
        for statement in node.body:
            self.visit(statement)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _body

    def _nothing(self, node: ast.AST) -> None:
        pass

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = _nothing

    def visit_Module(self, node: ast.Module) -> None:
        for statement in node.body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            name = target.id if isinstance(target, ast.Name) else ""
            # an alias, such as Grads = tuple[Tensor | None, ...]
            is_type = re.match(r"[A-Z][a-z]", name) is not None
            if not (name.startswith("__") or is_type):
                self.visit(statement)

    # the operators

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        if rule := _BINARY.get(type(node.op)):
            self._between(node.left, node.right, *rule)
        left, right = f"({self._text(node.left)})", f"({self._text(node.right)})"
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            self._put(node, "term", left)
        if isinstance(node.op, (ast.Add, ast.Mult)):
            self._put(node, "term", right)
        if isinstance(node.op, (ast.BitAnd, ast.BitXor)):
            self._put(node, "mask", left)
            self._put(node, "mask", right)
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.Pow)):
            sign = {ast.Sub: "-", ast.Div: "/", ast.MatMult: "@", ast.Pow: "**"}[type(node.op)]
            self._put(node, "operand", f"({right} {sign} {left})")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.USub):
            self._put(node, "sign", self._text(node.operand))
        elif isinstance(node.op, ast.Not):
            self._put(node, "condition", f"({self._text(node.operand)})")

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:]):
            self._between(left, right, *_COMPARED[type(op)])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.generic_visit(node)
        word = " and " if isinstance(node.op, ast.And) else " or "
        for left_out in node.values:
            kept = [f"({self._text(value)})" for value in node.values if value is not left_out]
            self._put(node, "condition", f"({word.join(kept)})")

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self._text(node.test):
            return
        self.generic_visit(node)
        self._put(node.test, "condition", "False")
        if not isinstance(node.body[0], ast.Raise):  # else nothing would run at all
            self._put(node.test, "condition", "True")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.generic_visit(node)
        self._put(node.test, "condition", "True")
        self._put(node.test, "condition", "False")

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.generic_visit(node)
        for test in node.ifs:
            self._put(test, "condition", "True")

    def visit_Call(self, node: ast.Call) -> None:
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if name in _SILENT:
            return
        self.generic_visit(node)
        function, args = self._text(node.func), [self._text(arg) for arg in node.args]
        keywords = [self._text(keyword) for keyword in node.keywords]
        starred = any(isinstance(arg, (ast.Starred, ast.GeneratorExp)) for arg in node.args)
        if name == "range" and not starred:
            stop = min(1, len(args) - 1)
            shorter = [f"{arg} - 1" if i == stop else arg for i, arg in enumerate(args)]
            self._put(node, "bound", f"range({', '.join(shorter)})")
        for i in range(
            len(args) - 1 if not starred and name not in ("isinstance", "getattr", "hasattr") else 0
        ):
            swapped = [*args[:i], args[i + 1], args[i], *args[i + 2 :]]
            if swapped != args and not _commutes(name, i):
                self._put(node, "operand", f"{function}({', '.join([*swapped, *keywords])})")
        for left_out in node.keywords:
            # where there is one device only, it is the default
            if left_out.arg not in (
                None,
                "device",
                "stacklevel",
            ):
                kept = [self._text(keyword) for keyword in node.keywords if keyword is not left_out]
                kind = "mask" if left_out.arg == "mask" else "argument"
                self._put(node, kind, f"{function}({', '.join([*args, *kept])})")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        at = node.slice
        if isinstance(at, ast.Slice):
            if at.lower is not None:
                self._put(at.lower, "index", f"{self._text(at.lower)} + 1")
            if at.upper is not None:
                self._put(at.upper, "index", f"{self._text(at.upper)} - 1")
        elif isinstance(at, ast.Constant) and isinstance(at.value, int):
            self._put(at, "index", str(at.value + 1))
        elif isinstance(at, ast.Name):
            self._put(at, "index", "0")
        else:
            self.visit(at)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._put(node, "constant", str(not value))
        elif isinstance(value, int):
            text = self._text(node)
            hexadecimal = text.lower().startswith("0x")
            self._put(
                node,
                "mask" if hexadecimal else "constant",
                hex(value ^ 1) if hexadecimal else str(value + 1),
            )
        elif isinstance(value, float):
            self._put(node, "constant", repr(value * 1.01 if value else 1.0))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        sign = {
            ast.Add: "+=",
            ast.Sub: "-=",
            ast.Mult: "*=",
            ast.Div: "/=",
            ast.BitOr: "|=",
            ast.BitAnd: "&=",
        }
        if old := sign.get(type(node.op)):
            self._between(node.target, node.value, old, "=", "term")
            other = {"+=": "-=", "-=": "+="}.get(old)
            if other:
                self._between(node.target, node.value, old, other, "sign")
        self._put(node, "statement", "pass")

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self._put(node, "statement", "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        self.generic_visit(node)
        if isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name not in _SILENT:
                self._put(node, "statement", "pass")


def _python(source: str) -> list[Found]:
    visitor = _Python(source)
    visitor.visit(ast.parse(source))
    return visitor.found


# ---- C++ -----------------------------------------------------------------------------------------

_TOKENS = re.compile(
    r"""
      (?P<skip> //[^\n]* | /\*.*?\*/ | ^[ \t]*\#(?:[^\n\\]|\\.|\\\n)* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])' )
    | (?P<number> 0[xX][0-9a-fA-F']+[uUlL]* | (?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fFuUlL]* )
    | (?P<name> [A-Za-z_]\w* )
    | (?P<sign> <<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||::|[-+*/%&|^]=|[^\s\w] )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_SWAPPED = {
    "+": ("-", "sign"),
    "-": ("+", "sign"),
    "<": ("<=", "bound"),
    "<=": ("<", "bound"),
    ">": (">=", "bound"),
    ">=": (">", "bound"),
    "==": ("!=", "condition"),
    "!=": ("==", "condition"),
    "&&": ("||", "condition"),
    "||": ("&&", "condition"),
    "&": ("|", "mask"),
    "|": ("&", "mask"),
    "<<": (">>", "mask"),
    ">>": ("<<", "mask"),
}
_ASSIGNED = {"+=", "-=", "*=", "/=", "|=", "&=", "^=", "<<=", ">>="}
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}
_DECLARES = {
    "using",
    "typedef",
    "template",
    "static_assert",
    "alignas",
    "namespace",
    "enum",
    "extern",
    "friend",
    "asm",
}
_HINTS = {
    "__builtin_expect",
    "__builtin_prefetch",
    "_mm_prefetch",
}  # to the processor and the compiler: no result
_NO_CALL = {
    "if",
    "for",
    "while",
    "switch",
    "return",
    "sizeof",
    "alignof",
    "decltype",
    "catch",
    "operator",
    *_DECLARES,
}


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int
    what: str

    @property
    def is_value(self) -> bool:
        """Whether an expression can end here, so that the next sign joins two operands."""
        return (
            self.what == "number"
            or self.text in (")", "]")
            or (self.what == "name" and self.text != "return")
        )


class _Cpp:
    def __init__(self, source: str) -> None:
        self.source, self.found = source, []
        self.tokens = [
            _Token(m.group(), m.start(), m.end(), m.lastgroup)
            for m in _TOKENS.finditer(source)
            if m.lastgroup != "skip"
        ]
        self.partner: dict[int, int] = {}
        stack: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.text in _OPEN:
                stack.append(i)
            elif token.text in _CLOSE and stack:
                self.partner[stack[-1]] = i
                self.partner[i] = stack.pop()
        self.left_alone = self._declarations()

    def _declarations(self) -> set[int]:
        """Tokens of declarations that hold no computation: template heads, static_assert, named
        sizes, alignments."""
        found: set[int] = set()
        for i, token in enumerate(self.tokens):
            if token.text in (
                "static_assert",
                "alignas",
                "asm",
                "decltype",
                "operator",
            ) and i + 1 < len(self.tokens):
                last = self.partner.get(i + 1, i + 1)
                last = self.partner.get(last + 1, last) if token.text == "operator" else last
                found |= set(range(i, last + 1))
            if token.text in ("template", "using", "typedef", "enum"):
                last = i
                while last + 1 < len(self.tokens) and self.tokens[last].text not in (";", "{"):
                    if (
                        token.text == "template"
                        and "\n" in self.source[self.tokens[last].end : self.tokens[last + 1].start]
                    ):
                        break
                    last += 1
                found |= set(range(i, last + 1))
            if token.text == "constexpr":
                line_end = self.source.find("\n", token.start)
                declared = self.source[token.start : line_end]
                if re.match(r"constexpr (?:u?int\w*|size_t|bool|long|unsigned)\b[^(]*=", declared):
                    j = i
                    while j < len(self.tokens) and self.tokens[j].text != ";":
                        found.add(j)
                        j += 1
        return found

    def _put(self, start: int, end: int, kind: str, new: str) -> None:
        self.found.append((start, end, kind, new))

    def _spaced(self, i: int) -> bool:
        """A space or line end on both sides: as clang-format writes what joins two operands, and no
        pointer or template."""
        token = self.tokens[i]
        return (
            self.source[token.start - 1].isspace()
            and self.source[token.end : token.end + 1].isspace()
        )

    def _parts(self, i: int) -> list[tuple[int, int]]:
        """Start and end of each argument inside the parenthesis that token i opens."""
        parts, start, j = [], self.tokens[i].end, i + 1
        last = self.partner[i]
        while j < last:
            if self.tokens[j].text in _OPEN:
                j = self.partner.get(j, j)
            elif self.tokens[j].text == ",":
                parts.append((start, self.tokens[j].start))
                start = self.tokens[j].end
            j += 1
        return [*parts, (start, self.tokens[last].start)]

    def _one(self, i: int) -> None:
        tokens, source = self.tokens, self.source
        token, before = tokens[i], tokens[i - 1] if i else None
        if token.what == "number":
            self._number(i)
        elif token.text in _SWAPPED and before is not None and before.is_value and self._spaced(i):
            new, kind = _SWAPPED[token.text]
            self._put(token.start, token.end, kind, new)
        elif (
            token.text == "-"
            and before is not None
            and not before.is_value
            and not source[token.end].isspace()
        ):
            self._put(token.start, token.end, "sign", "")
        elif token.text == "!" and tokens[i + 1].text != "=":
            self._put(token.start, token.end, "condition", "")
        elif token.text in _ASSIGNED:
            self._put(token.start, token.end, "term", "=")
            if token.text in ("+=", "-="):
                self._put(token.start, token.end, "sign", "-=" if token.text == "+=" else "+=")
        elif token.text == "if" and tokens[i + 1].text == "(" and i + 1 in self.partner:
            low, high = tokens[i + 1].end, tokens[self.partner[i + 1]].start
            if ";" not in source[low:high]:
                self._put(low, high, "condition", "false")
                self._put(low, high, "condition", "true")
        elif (
            token.text == "[" and before is not None and before.is_value and before.what != "number"
        ):
            self._subscript(i)
        elif (
            token.text == "("
            and before is not None
            and before.what == "name"
            and before.text not in _NO_CALL
        ):
            self._call(i)
        if token.text in ("*", "+") and before is not None and before.is_value and self._spaced(i):
            self._term(i)
        if token.text in (";", "{", "}"):
            self._statement(i)

    def _number(self, i: int) -> None:
        token = self.tokens[i]
        text = token.text
        digits, suffix = re.fullmatch(r"(.*?)([uUlL]*)", text).groups()
        if digits.lower().startswith("0x"):
            self._put(
                token.start, token.end, "mask", hex(int(digits.replace("'", ""), 16) ^ 1) + suffix
            )
        elif re.fullmatch(r"[\d']+", digits):
            self._put(
                token.start, token.end, "constant", str(int(digits.replace("'", "")) + 1) + suffix
            )
        else:
            number, suffix = re.fullmatch(r"(.*?)([fF]?)", digits).groups()
            value = float(number.replace("'", ""))
            self._put(
                token.start, token.end, "constant", repr(value * 1.01 if value else 1.0) + suffix
            )

    def _declares_array(self, i: int) -> bool:
        """`float z[8]`, `static C* part[n]`: a type stands before the name."""
        return i >= 2 and (
            (
                self.tokens[i - 2].what == "name"
                and self.tokens[i - 2].text not in ("return", "else", "case")
            )
            or (self.tokens[i - 2].text in ("*", "&", ">") and not self._spaced(i - 2))
        )

    def _subscript(self, i: int) -> None:
        if i not in self.partner:
            return
        if self._declares_array(i):
            self.left_alone |= set(range(i, self.partner[i]))
            return
        low, high = self.tokens[i].end, self.tokens[self.partner[i]].start
        inside = self.source[low:high]
        if inside.strip().isdigit():
            self.left_alone.add(i + 1)
            self._put(low, high, "index", str(int(inside) + 1))
        elif inside.strip():
            self._put(low, high, "index", "0")
            self._put(low, high, "index", f"{inside} + 1")

    def _call(self, i: int) -> None:
        if i not in self.partner:
            return
        name, before = self.tokens[i - 1].text, self.tokens[i - 2] if i >= 2 else self.tokens[i]
        expression = before.text in ("return", "else") or (
            before.text in ("*", "&") and self._spaced(i - 2)
        )
        if not expression and (before.what == "name" or before.text in ("*", "&", ">", "~")):
            return  # a declaration: a type stands before the name
        if name in _HINTS:
            self.left_alone |= set(range(i, self.partner[i]))
            return
        parts = self._parts(i)
        texts = [self.source[low:high] for low, high in parts]
        if any(
            re.search(r"\w[*&]?\s+[*&]?\w+\s*$", text)
            and not re.search(r"[-+/%<>=?|]|\breturn\b", text)
            for text in texts
        ):
            return
        for number, ((low, _), (_, high), a, b) in enumerate(
            zip(parts, parts[1:], texts, texts[1:])
        ):
            if a.strip() != b.strip() and not _commutes(name, number):
                gap = re.match(r"\s*", b).group()
                self._put(low, high, "operand", f"{b.strip()},{gap or ' '}{a.strip()}")

    def _term(self, i: int) -> None:
        """The operand behind a sign dropped with the sign, where it is one name, number or call."""
        j = i + 1
        if self.tokens[j].what not in ("name", "number"):
            return
        while j + 1 < len(self.tokens):
            text = self.tokens[j + 1].text
            if text in ("(", "[") and j + 1 in self.partner:
                j = self.partner[j + 1]
            elif text in (".", "->", "::"):
                j += 2
            else:
                break
        if self.tokens[j + 1].text == "<" and not self._spaced(j + 1):
            return  # a template's arguments
        start = self.tokens[i].start
        start -= len(self.source[:start]) - len(self.source[:start].rstrip(" "))
        self._put(start, self.tokens[j].end, "term", "")

    def _statement(self, i: int) -> None:
        """What follows token i, where it is a call or an assignment to memory, left out."""
        j = i + 1
        if (
            j + 1 >= len(self.tokens)
            or self.tokens[j].what != "name"
            or self.tokens[j].text in _NO_CALL | _HINTS
        ):
            return
        first = self.tokens[j + 1].text
        if first not in ("(", "[", ".", "->", "::", "=", "<") and first not in _ASSIGNED:
            return
        end = j
        while end < len(self.tokens) and self.tokens[end].text not in (";", "{", "}"):
            end = self.partner.get(end, end) + 1 if self.tokens[end].text in _OPEN else end + 1
        if (
            end < len(self.tokens)
            and self.tokens[end].text == ";"
            and self.tokens[end - 1].text != ":"
        ):
            self._put(self.tokens[j].start, self.tokens[end].start, "statement", "")


def _cpp(source: str) -> list[Found]:
    reader = _Cpp(source)
    for i in range(len(reader.tokens)):
        if i not in reader.left_alone:
            reader._one(i)
    return reader.found


# ---- tables --------------------------------------------------------------------------------------


def found_table(
    title: str, rows: Iterable[T], of: Callable[[T], str], is_found: Callable[[T], bool]
) -> list[str]:
    """| title | faults | found |, one line for each value of `of`."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        count = counts.setdefault(of(row), [0, 0])
        count[0] += 1
        count[1] += is_found(row)
    lines = (f"| {name} | {number} | {found} |" for name, (number, found) in sorted(counts.items()))
    return [f"| {title} | faults | found |", "|---|---|---|", *lines]


def sources(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """The files below root that a pattern matches, each once, in order."""
    yield from dict.fromkeys(
        path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()
    )
