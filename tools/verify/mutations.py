"""Faults that a programmer could have made, in a source file of Python or of C++.

| kind      | fault                                                          | found by       |
|-----------|----------------------------------------------------------------|----------------|
| sign      | a plus for a minus, a negation left out                        | text           |
| term      | a term or factor dropped, a sum begun anew                     | tree, C++ text |
| operand   | two operands or arguments swapped                              | tree, text     |
| argument  | a keyword argument left out                                    | tree           |
| bound     | < for <=, a range one too short                                | text, tree     |
| index     | the next element, the first element, a slice one off           | text, tree     |
| mask      | "and" for "or" of bits, one bit of a constant, a mask left out | text, tree     |
| condition | a condition reversed, decided beforehand, or half of it        | text, tree     |
| constant  | another number, True for False                                 | text           |
| statement | a call, an assignment to memory, an addition left out          | tree, C++ text |

Text: one table of regular expressions for both languages, and one for C++ alone. They rely on the
formatters, which put spaces around an operator that joins two operands. Tree: Python's syntax tree.

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
Span = tuple[int, int]
Found = tuple[int, int, str, str]  # start, end, kind, new text


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
    found = _python(source) if path.suffix == ".py" else _cpp(source)
    seen: dict[tuple, int] = {}
    listed = []
    for start, end, kind, new in sorted(set(found)):
        if source[start:end] == new:
            continue
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        last = len(source) if last < 0 else last
        before = " ".join(source[first:last].split())
        after = " ".join((source[first:start] + new + source[end:last]).split())
        count = seen.get((kind, before, after), 0)
        seen[kind, before, after] = count + 1
        line = source.count("\n", 0, start) + 1
        listed.append(Mutation(path.name, kind, start, end, new, line, before, after, count))
    return listed


# ---- drawing -------------------------------------------------------------------------------------


def in_turns(by_kind: dict[str, list[T]], kinds: Iterable[str], count: int) -> list[T]:
    """`count` of the lists' elements: the first of each kind, then the second, until there are no
    more."""
    turns = itertools.zip_longest(*(by_kind[kind] for kind in kinds))
    return [one for turn in turns for one in turn if one is not None][:count]


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


# ---- both languages, by their text ---------------------------------------------------------------

_SWAPPED = {
    "sign": "+ -  - +  += -=  -= +=",
    "bound": "< <=  <= <  > >=  >= >",
    "condition": "== !=  != ==  && ||  || &&",
    "mask": "& |  | &  << >>  >> <<",
    "operand": "// /",
    "term": "+= =  -= =  *= =  /= =  |= =  &= =",
}
# What stands in parentheses or brackets, to the third level; the inside of a pair; an argument.
_DEEP = r"(?:\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\[(?:[^\[\]]|\[[^\[\]]*\])*\])"
_INSIDE = rf"(?:[^()\[\]{{}};]|{_DEEP})*"
_ARGUMENT = rf"(?:[^()\[\]{{}};,]|{_DEEP})+"
_DECLARED = re.compile(r"[\w:<>, ]+[*&]? [*&]?\w+")  # a parameter
_COMMUTATIVE = {"min", "max", "smaller", "larger", "minimum", "maximum", "add", "mul"}
_COMMUTATIVE |= {"promote_types", "logical_and"}
_NO_ORDER = _COMMUTATIVE | {"isinstance", "getattr", "hasattr", "cast"}


def _decimal(text: str) -> str:
    value = float(text)
    return repr(value * 1.01 if value else 1.0)


# (kind, what is replaced: the group `at` or all of it, what it becomes)
Rule = tuple[str, str, Callable[[str], str]]
_BOTH: list[Rule] = [
    *(
        (kind, rf"(?<=\s){re.escape(old)}(?=\s)", lambda _, new=new: new)
        for kind, words in _SWAPPED.items()
        for old, new in (pair.split() for pair in words.split("  "))
    ),
    ("sign", r"(?<=[\s(\[{=])-(?=[\w(.])", lambda _: ""),
    ("index", r"(?<=[\w)\]])\[(?P<at>[a-zA-Z_]\w*)\]", lambda _: "0"),
    ("index", r"(?<=[\w)\]]\[)-?\d+(?=\])", lambda old: str(int(old) + 1)),
    ("mask", r"\b0[xX][\da-fA-F]+", lambda old: hex(int(old, 16) ^ 1)),
    ("constant", r"(?<![\w.\[])\d+(?=[uUlL]*\b(?!\.))", lambda old: str(int(old) + 1)),
    ("constant", r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?", _decimal),
]


def _by_text(source: str, seen: str, rules: Iterable[Rule]) -> Iterator[Found]:
    """Faults that the rules make; seen: the source, with NULs for what is left alone."""
    for kind, pattern, new in rules:
        for match in re.finditer(f"(?=(?P<whole>{pattern}))", seen):  # one inside another too
            start, end = match.span("at" if "at" in match.re.groupindex else "whole")
            yield start, end, kind, new(source[start:end])
    yield from _arguments_swapped(source, seen)


def _arguments_swapped(source: str, seen: str) -> Iterator[Found]:
    for call in re.finditer(rf"(?<!class )(?<!def )\b(\w+)\((?=({_INSIDE})\))", seen):
        name = call[1]
        spans = [m.span() for m in re.compile(_ARGUMENT).finditer(seen, *call.span(2))]
        texts = [source[start:end].strip() for start, end in spans]
        if name in _NO_ORDER or any(_DECLARED.fullmatch(t) or " for " in t for t in texts):
            continue
        for i, (first, second) in enumerate(itertools.pairwise(texts)):
            commutes = i == 0 and name in ("fma", "fma_of")
            fixed = any(re.match(r"\*|\w+=|$", one) for one in (first, second))
            if first != second and not commutes and not fixed:
                start = spans[i][0]
                space = re.match(r"\s*", source[start:])[0]
                yield start, spans[i + 1][1], "operand", f"{space}{second}, {first}"


def _without(source: str, spans: Iterable[Span]) -> str:
    characters = list(source)
    for start, end in spans:
        characters[start:end] = "\0" * (end - start)
    return "".join(characters)


# ---- C++ -----------------------------------------------------------------------------------------

_HINTS = r"static_assert|alignas|asm|decltype|__builtin_expect|__builtin_prefetch|_mm_prefetch"
_CPP_SILENT = rf"""(?sxm)
      //[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
    | ^[ ]*\#(?:[^\n\\]|\\.)*                # the preprocessor
    | \b(?:{_HINTS}){_DEEP}                  # no result
    | \btemplate[ ]?<[^\n]* | \b(?:using|typedef)\b[^;]*; | \benum\b[^;{{]*
    | \boperator[^\w\s]+{_DEEP}
    | \bconstexpr[ ](?:u?int\w*|size_t|bool|long|unsigned)\b[^(=;]*=[^;]*;   # a named size
    # the size of an array: a type stands before the name
    | (?<=\w[ ])(?<!return[ ])(?<!else[ ])(?<!case[ ])\w+\[[^\]\n]*\]
    | (?<=\w[*&>][ ])\w+\[[^\]\n]*\]
"""
_CPP: list[Rule] = [
    ("condition", r"!(?=[\w(])", lambda _: ""),
    ("condition", rf"\bif \((?P<at>{_INSIDE})\)", lambda _: "false"),
    ("condition", rf"\bif \((?P<at>{_INSIDE})\)", lambda _: "true"),
    ("index", rf"(?<=[\w)\]])\[(?P<at>(?!\d+\]){_INSIDE})\]", lambda old: f"{old} + 1"),
    ("term", rf"(?<=[\w)\]])\s[*+] (?:\w+(?:::|\.|->))*\w+(?![\w<]){_DEEP}*", lambda _: ""),
    (
        "statement",
        rf"[;{{}}][\s\0]*(?=(?P<at>(?!(?:if|for|while|switch|return|else|case|default)\b)"
        rf"\w(?:[\w.:<>]|->|{_DEEP})*(?:{_DEEP}| [-+*/|&^]?= {_INSIDE}));)",
        lambda _: "",
    ),
]


def _cpp(source: str) -> Iterator[Found]:
    silent = (match.span() for match in re.finditer(_CPP_SILENT, source))
    yield from _by_text(source, _without(source, silent), _BOTH + _CPP)


# ---- Python --------------------------------------------------------------------------------------

# calls that change no result
_QUIET = {"warn", "print", "cast", "TypeVar", "getLogger", "__init__"}
_ARITHMETIC = {ast.Sub: "-", ast.Div: "/", ast.MatMult: "@", ast.Pow: "**"}


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_silent(node: ast.AST) -> bool:
    """Whether nothing below the node can change a result."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Constant(value=str()) | ast.arg():
            return True
        case ast.Call():
            return _called(node) in _QUIET
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):  # __all__; Grads = tuple[Tensor | None, ...]
            return name.startswith("__") or re.match(r"[A-Z][a-z]", name) is not None
    return False


class _Tree:
    def __init__(self, source: str) -> None:
        self.source, self.lines = source, source.splitlines(keepends=True)
        self.starts = list(itertools.accumulate(map(len, self.lines), initial=0))
        self.silent: list[Span] = [m.span() for m in re.finditer(r"(?m)(?<!\S)#[^\n]*", source)]
        self.nodes: list[ast.AST] = []
        self._visit(ast.parse(source))

    def _visit(self, node: ast.AST) -> None:
        for name in ("annotation", "returns", "decorator_list"):
            ignored = getattr(node, name, None) or []
            self.silent += map(self.span, ignored if isinstance(ignored, list) else [ignored])
        if _is_silent(node):
            self.silent.append(self.span(node))
            return
        self.nodes.append(node)
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for one in child if isinstance(child, list) else [child]:
                    if isinstance(one, ast.AST):
                        self._visit(one)

    def span(self, node: ast.AST) -> Span:
        """In characters; the tree counts bytes of a line."""
        ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        start, end = (
            self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())
            for line, column in ends
        )
        return start, end

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def faults(self) -> Iterator[Found]:
        for node in self.nodes:
            for place, kind, new in self._of(node):
                yield *self.span(place), kind, new

    def _of(self, node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
        text = self.text
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                before, after = f"({text(left)})", f"({text(right)})"
                kind = "mask" if isinstance(op, (ast.BitAnd, ast.BitXor)) else "term"
                if kind == "mask" or isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
                    yield node, kind, before
                if kind == "mask" or isinstance(op, (ast.Add, ast.Mult)):
                    yield node, kind, after
                if sign := _ARITHMETIC.get(type(op)):
                    yield node, "operand", f"({after} {sign} {before})"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, "condition", f"({text(operand)})"
            case ast.Compare(ops=[ast.Is() | ast.IsNot() | ast.In() | ast.NotIn()]):
                yield node, "condition", f"(not ({text(node)}))"
            case ast.BoolOp(op=op, values=values):
                word = " and " if isinstance(op, ast.And) else " or "
                for out in values:
                    kept = word.join(f"({text(value)})" for value in values if value is not out)
                    yield node, "condition", f"({kept})"
            case ast.If(test=test) | ast.IfExp(test=test):
                yield test, "condition", "False"
                if not (isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)):
                    yield test, "condition", "True"  # else nothing would run at all
            case ast.comprehension(ifs=tests):
                yield from ((test, "condition", "True") for test in tests)
            case ast.Constant(value=bool(value)):
                yield node, "constant", str(not value)
            case ast.Call(func=ast.Name(id="range"), args=args) if args:
                stop = args[min(1, len(args) - 1)]
                yield stop, "bound", f"{text(stop)} - 1"
            case ast.Call(args=args, keywords=keywords):
                for out in keywords:
                    # where there is one device only, it is the default
                    if out.arg in (None, "device", "stacklevel"):
                        continue
                    kept = ", ".join(text(one) for one in (*args, *keywords) if one is not out)
                    kind = "mask" if out.arg == "mask" else "argument"
                    yield node, kind, f"{text(node.func)}({kept})"
            case ast.Slice(lower=lower, upper=upper):
                if lower is not None:
                    yield lower, "index", f"{text(lower)} + 1"
                if upper is not None:
                    yield upper, "index", f"{text(upper)} - 1"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
                yield node, "statement", "pass"
            case ast.Expr(value=ast.Call() as call) if _called(call) not in _QUIET:
                yield node, "statement", "pass"


def _python(source: str) -> Iterator[Found]:
    tree = _Tree(source)
    yield from tree.faults()
    yield from _by_text(source, _without(source, tree.silent), _BOTH)


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
