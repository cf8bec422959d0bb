"""griffe extension for the API reference: the project's one-paragraph docstrings as lists of arguments."""

import functools
import re

import griffe

WORDS = ("Returns", "Raises", "Warns", "Source")


def escaped(text):
    """Stars of patterns and of *args are no emphasis; what stands in backquotes stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"\*(?=\S)|(?<=\S)\*", r"\\*", part) for i, part in enumerate(parts))


def item(name, found):
    """One list item for the arguments that `found` names together."""
    return "\n\n- " + re.sub(name, r"**\g<0>**", found.group(1)) + ": "


def readable(text, names):
    """`text` with "name: ..." of each argument as an item, and Returns, Raises, Warns and Source as paragraphs."""
    blocks = []
    for block in re.split(r"\n\n+", text):
        if block.startswith("    ") or "\n    " in block:  # code
            blocks.append(block)
            continue
        block = escaped(block)
        if names:
            name = "(?:" + "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) + ")"
            found = rf"(?:^|(?<=[.);])\s+|\n)({name}(?:(?:,| and) {name})*): "
            block = re.sub(found, functools.partial(item, name), block)
        block = re.sub(rf"(?<=[.)])\s+({'|'.join(WORDS)})\b", r"\n\n\1", block)
        blocks.append(block.strip())
    return "\n\n".join(blocks)


class Arguments(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        self.walk(pkg)

    def walk(self, obj):
        if obj.is_alias:
            return
        if obj.docstring:
            has_parameters = obj.is_function or obj.is_class
            names = [p.name.lstrip("*") for p in obj.parameters] if has_parameters else []
            obj.docstring.value = readable(obj.docstring.value, [n for n in names if n != "self"])
        for member in list(getattr(obj, "members", {}).values()):
            self.walk(member)
