"""docs/api/: is it what the docstrings say, and do they say all that a caller needs?"""

import importlib
import re
from textwrap import dedent

import pytest

import mmkernels

griffe = pytest.importorskip("griffe", reason="griffelib, which parses the docstrings")

from tools import api_pages  # noqa: E402 (needs griffe)

MODULES = api_pages.public_modules(api_pages.load())
OPTIONAL = {"transformers"}


CLASSES: dict[str, "griffe.Class"] = {}
FUNCTIONS: dict[str, "griffe.Function"] = {}
for module_name, module in MODULES.items():
    for item_name, item in api_pages.exported(module).items():
        if item.is_class or item.is_function:
            (CLASSES if item.is_class else FUNCTIONS)[f"{module_name}.{item_name}"] = item


def parameters(function: "griffe.Function") -> list[str]:
    """Names, with their stars, without self and cls."""
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    names = [stars.get(p.kind, "") + p.name for p in function.parameters]
    return [name for name in names if name not in ("self", "cls")]


def section(docstring: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return dedent(found[1]).strip() if found else ""


def items(docstring: str, title: str) -> list[str]:
    """The names that a section lists."""
    return re.findall(r"^([*\w]+): \S", section(docstring, title), re.MULTILINE)


def test_pages_are_what_the_docstrings_say():
    written = {path.name: path.read_text() for path in api_pages.FOLDER.glob("*")}
    pages = api_pages.pages()
    assert written.keys() == pages.keys(), "run make docs"
    stale = [name for name, text in pages.items() if written[name] != text]
    assert not stale, "run make docs"


def test_every_module_that_says_what_it_offers_has_a_page():
    folder = api_pages.ROOT / "mmkernels"
    saying = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if re.search(r"^__all__\b", path.read_text(), re.MULTILINE)
    }
    public = {name for name in saying if "._" not in name}
    assert {module.path for module in MODULES.values()} == public
    assert "mmkernels.masks" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry_in_order(name):
    try:
        module = importlib.import_module(MODULES[name].path)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    text = (api_pages.FOLDER / f"{name}.md").read_text()
    assert re.findall(r"^## `(\w+)`$", text, re.MULTILINE) == module.__all__
    assert all(hasattr(module, entry) for entry in module.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_every_argument_and_their_result(name):
    function = FUNCTIONS[name]
    docstring = function.docstring.value
    assert items(docstring, "Args") == parameters(function)
    if str(function.returns) != "None":
        result = "Yields" if str(function.returns).startswith("Iterator") else "Returns"
        assert section(docstring, result)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_document_every_argument_of_their_constructor(name):
    if constructor := CLASSES[name].members.get("__init__"):
        docstring = CLASSES[name].docstring.value
        assert parameters(constructor) in (items(docstring, "Args"), items(docstring, "Attributes"))


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_methods_name_every_argument(name):
    for method in api_pages.members(CLASSES[name]).values():
        if method.is_function:
            words = set(re.findall(r"\w+", method.docstring.value))
            assert {parameter.strip("*") for parameter in parameters(method)} <= words, method.name


def test_no_private_name_has_an_entry():
    titles = [
        title
        for path in api_pages.FOLDER.glob("*.md")
        for title in re.findall(r"^##+ `(.+)`$", path.read_text(), re.MULTILINE)
    ]
    assert {"attention", "IntervalMask.to_dense", "PatchEmbed.forward"} <= set(titles)
    assert not [title for title in titles if re.search(r"(^|\.)_", title)]


def test_a_function_is_shown_in_place_of_the_submodule_of_its_name():
    page = api_pages.page("mmkernels", MODULES["mmkernels"])
    assert "def attention(\n    q: Tensor," in page
    assert mmkernels.attention.__name__ == "attention"


DOCSTRING = """What it does, on
two lines.

    print(1)
    print(2)

And more.

Args:
    x: (B, D). A long
        sentence: so.
    **rest: others.

Returns:
    (B, D): text
    as it is.

Source: a paper.
"""

MARKDOWN = """What it does, on
two lines.

```python
print(1)
print(2)
```

And more.

**Args**

- `x`: (B, D). A long sentence: so.
- `**rest`: others.

**Returns**

(B, D): text
as it is.

Source: a paper."""


def test_sections_become_lists_and_examples_become_blocks():
    assert api_pages.markdown(DOCSTRING) == MARKDOWN
