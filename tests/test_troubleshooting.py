"""docs/guides/troubleshooting.md has every error and warning that the package can give, read from
its source."""

import ast
import re

import pytest
from source_support import ROOT

PACKAGE = ROOT / "dipkernels"
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
HOLE = "\N{BULLET}"  # what a message fills in
# Parts of longer messages, in the words of other packages, or values and not messages.
NOT_MESSAGES = {f"{HOLE}: {HOLE}", HOLE, f"{HOLE}{HOLE}"}


def template(node, constants):
    """A message with a HOLE for what it fills in; None for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side, constants) for side in (node.left, node.right)]
        return "".join(HOLE if part is None else part for part in parts)
    return constants.get(node.id) if isinstance(node, ast.Name) else None


def messages_in(source):
    """Of one module: what it raises, warns of, and any text of the form of its errors, for helpers
    that only make one."""
    tree = ast.parse(source)
    constants = {
        target.id: template(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, (ast.JoinedStr, ast.BinOp))
        for part in ast.walk(node)
    }
    inner -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            found.add(template(node.exc.args[0], constants))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn" and node.args:
            found.add(template(node.args[0], constants))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in inner | docs:
            text = template(node, constants)
            if text is not None and re.match(rf"[\w, .{HOLE}\[\]]+: expected ", text):
                found.add(text)
        elif isinstance(node, ast.Return) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
            text = template(node.value, constants)
            if text is not None and " " in text and id(node.value) not in docs:
                found.add(text)
    return {text for text in found if text and text not in NOT_MESSAGES}


# whose functions return reasons that others print
REASONS = (
    "models/convertible.py",
    "models/refused.py",
    "models/check.py",
    "nn/variance.py",
    "backends.py",
    "gpus.py",
    "library.py",
)


def messages():
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]):
        name = str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))
        tree = messages_in(path.read_text())
        for text in tree:
            if name in REASONS or "expected" in text or ":" in text or text.startswith(HOLE):
                found[text] = name
    return found


def rows():
    cells = re.findall(r"^\| (`.+?) \| .+\|$", PAGE.read_text(), re.MULTILINE)
    return [pattern for cell in cells for pattern in re.findall(r"`([^`]+)`", cell)]


def as_regex(row):
    return re.compile(
        ".*".join(re.escape(part) for part in re.split(r"\s*\.\.\.\s*", row)), re.DOTALL
    )


# Lines of a report or an axis, a docstring's words, one word of a sentence that another message
# ends.
UNSEEN = (
    r"fixed_noise\(key, row0\) = ",
    r"generator state ",
    r"gradients of|numbers of",
    r"it runs on CUDA tensors|it runs on CPU tensors",
    r"unset DIPKERNELS_BACKEND",
    rf"{HOLE} and (newer|PTX)",
    r"pip install --no-build",
    rf"{HOLE}, (dim|init_variance)=",
    rf"{HOLE} \({HOLE}\)$",
    rf"{HOLE}, {HOLE}, dim=",
    rf"{HOLE} on {HOLE}: as the reference",
    rf"{HOLE}: {HOLE}$",
    rf"{HOLE}, which does not load",
    rf"\[{HOLE} \.\.",
    r"\s",
    rf"{HOLE}\n",
    rf"{HOLE} of {HOLE}$",
    rf"{HOLE} -> {HOLE}",
    rf"{HOLE} {HOLE}$",
)


@pytest.fixture(scope="module")
def known():
    return [as_regex(row) for row in rows()]


def test_every_message_of_the_source_has_a_row(known):
    found = messages()
    assert len(found) > 250
    missing = [
        f"{name}: {text}"
        for text, name in found.items()
        if not any(row.match(text) for row in known)
        and not any(re.match(unseen, text) for unseen in UNSEEN)
    ]
    assert not missing, "\n".join(missing)


def test_every_row_is_of_a_message_of_the_source(known):
    found = [*messages(), *(path.read_text() for path in (ROOT / "dipkernels").rglob("*.py"))]
    texts = [text for text in found if len(text) < 2000]
    sources = " ".join(re.sub(r'"\s*\n\s*f?"', "", text) for text in found if len(text) >= 2000)
    for row in rows():
        words = max(re.split(r"\.\.\.", row), key=len).strip()
        assert any(as_regex(row).match(text) for text in texts) or words in sources, row


def test_a_new_message_would_be_missed(known):
    source = 'def f(x):\n    raise ValueError(f"colour: expected red wine, got {x!r}")\n'
    (text,) = messages_in(source)
    assert text == f"colour: expected red wine, got {HOLE}"
    assert not any(row.match(text) for row in known)
