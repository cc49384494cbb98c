"""`python -m tools.api_pages`: writes docs/api/, a page for each public module.

A module is public if it says with `__all__` what it offers and nothing in its path begins with an
underscore. The code is parsed, not imported, so that the pages are the same on every machine.
"""

import ast
import re
from collections.abc import Iterator
from textwrap import dedent

import griffe

from tools.generated import ROOT

FOLDER = ROOT / "docs" / "api"
HEAD = "<!-- begin api: written by `make docs` from the docstrings; change those -->\n\n"
TAIL = "\n\n<!-- end api -->\n"
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
PROSE = ("Returns", "Yields")  # sections of text; the others list names
HIDDEN = {"extra_repr"}  # called by nobody but torch


def load() -> griffe.Module:
    """The package, parsed."""
    # No extensions: the default one adds constructors to dataclasses that no code has.
    none = griffe.Extensions()
    return griffe.load("mmkernels", search_paths=[ROOT], extensions=none, allow_inspection=False)


def exported(module: griffe.Module) -> dict[str, griffe.Object]:
    """What `__all__` names, in its order, wherever it is defined."""
    found = {}
    for name in map(str, module.exports or ()):
        # A submodule may have the name of a function that is imported in its place.
        path = module.imports.get(name, f"{module.path}.{name}")
        target = module.modules_collection[path]
        found[name] = target.final_target if target.is_alias else target
    return found


def public_modules(package: griffe.Module) -> dict[str, griffe.Module]:
    """Public modules by the name that users import: `mmkernels.masks` lies elsewhere."""

    def walk(module: griffe.Module) -> Iterator[griffe.Module]:
        if not module.name.startswith("_"):
            yield module
            for _, inner in sorted(module.modules.items()):
                if not inner.is_alias:  # an import
                    yield from walk(inner)

    offered = {target.path: name for name, target in exported(package).items()}
    return {
        f"{package.name}.{offered[module.path]}" if module.path in offered else module.path: module
        for module in walk(package)
        if module.exports is not None
    }


def members(cls: griffe.Class) -> dict[str, griffe.Object]:
    """A class's own public methods and properties."""
    return {
        name: member
        for name, member in cls.members.items()
        if not name.startswith("_") and name not in HIDDEN and member.docstring
    }


def code(item: griffe.Object) -> str:
    """What stands above the docstring; for a class also what its constructor takes."""
    if item.is_attribute:
        return f"{item.name}: {item.annotation}" if "property" in item.labels else item.source
    (node,) = ast.parse(dedent(item.source)).body
    text = "\n".join(dedent(item.source).splitlines()[: node.body[0].lineno - 1])
    if item.is_class and "__init__" in item.members:
        inner = code(item.members["__init__"]).splitlines()
        text = "\n".join([text, *(f"    {line}" for line in inner)])
    return text


def markdown(docstring: str) -> str:
    """A docstring's sections as lists, and its indented examples as blocks that the tests run."""
    parts = []
    for part in re.split(r"\n(?=\S)", docstring):
        first, _, rest = part.partition("\n")
        if section := SECTION.fullmatch(first):
            parts.append(f"**{section[1]}**\n\n{listed(section[1], dedent(rest).strip())}\n")
        elif rest.strip():
            parts.append(f"{first}\n\n```python\n{dedent(rest).strip()}\n```\n")
        else:
            parts.append(part)
    return "\n".join(parts).strip()


def listed(section: str, text: str) -> str:
    """The lines of a section."""
    if section in PROSE:
        return text
    items = (" ".join(item.split()).partition(": ") for item in re.split(r"\n(?=\S)", text))
    return "\n".join(f"- `{name}`: {meaning}" for name, _, meaning in items)


def entry(name: str, item: griffe.Object, level: int = 2) -> str:
    """A name with its code, its docstring and, for a class, its members."""
    title = f"{'#' * level} `{name}`"
    if item.is_module:
        return f"{title}\n\nA module: [mmkernels.{name}](mmkernels.{name}.md)."
    # The tests run blocks that are marked as python; this one is no whole statement.
    parts = [title, f"```py\n{code(item)}\n```", markdown(item.docstring.value)]
    if item.is_class:
        inner = members(item).items()
        parts += [entry(f"{name}.{member}", method, level + 1) for member, method in inner]
    return "\n\n".join(parts)


def page(name: str, module: griffe.Module) -> str:
    """A module's page."""
    found = exported(module)
    contents = " · ".join(f"[`{item}`](#{item.lower()})" for item in found)
    parts = [f"# `{name}`", markdown(module.docstring.value), contents]
    parts += [entry(*pair) for pair in found.items()]
    return HEAD + "\n\n".join(filter(None, parts)) + TAIL


def pages() -> dict[str, str]:
    """Every page by its file's name, and a list of them."""
    modules = public_modules(load())
    lines = [
        f"- [`{name}`]({name}.md): {module.docstring.value.splitlines()[0]}"
        for name, module in modules.items()
    ]
    index = "# What is public\n\nWhat else is, and how it may change: [CONTRIBUTING.md]"
    index += "(../../CONTRIBUTING.md#versions-and-releases).\n\n"
    written = {f"{name}.md": page(name, module) for name, module in modules.items()}
    return {"README.md": HEAD + index + "\n".join(lines) + TAIL, **written}


def main() -> None:
    """Writes the pages, and removes those of modules that are gone."""
    FOLDER.mkdir(exist_ok=True)
    new = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in new:
            path.unlink()
    for name, text in new.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
