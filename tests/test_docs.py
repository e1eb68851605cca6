"""What the documents say of the code, and the code of the documents, is there."""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
_REFERENCE = re.compile(r"(docs/)?papers\.md (\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)*)?")


def _sources():
    for folder in ("icm_jax", "configs", "tests", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_references_to_papers_find_their_section():
    """The code names its sections by number, and never the file without its folder."""
    headings = set(
        re.findall(r"^#+ (\d+(?:\.\d+)?)\b", (ROOT / "docs/papers.md").read_text(), re.M)
    )
    assert {"1", "2.3", "7.4"} <= headings
    count = 0
    for path in _sources():
        text = re.sub(r"\s+(?:# )?", " ", path.read_text())
        if path == pathlib.Path(__file__):
            continue
        for found in _REFERENCE.finditer(text):
            assert found[1] and found[2], f"{path}: {text[found.start() - 40 : found.end() + 20]}"
            for number in re.findall(r"\d+(?:\.\d+)?", found[2]):
                assert number in headings, f"{path} refers to section {number}"
                count += 1
    assert count > 20


DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "icm_jax/models/*.md")
    for path in ROOT.glob(pattern)
)


def _slug(heading):
    """The anchor that a heading gets: letters, digits and hyphens."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", path.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in map(_slug, headings), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_names_of_the_package_exist(path):
    """`icm_jax/x.py`, `tests/...`, `configs/...` are files; `icm_jax.x.y` and `y` behind a module's
    name can be imported. Changelogs also name what is gone."""
    if path.name == "CHANGELOG.md":
        return
    text = path.read_text()
    files = rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]"
    for name in re.findall(files, text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for name in re.findall(r"(?<![\w'\[/])icm_jax(?:\.[A-Za-z_]\w*)+", text):
        assert _exists(name), f"{path.name} names {name}"


FOLDERS = ("icm_jax", "configs", "tests", "benchmarks", "launch", "colabs", "requirements", "docs")


def _exists(name):
    """Whether a dotted name is a module, or an attribute below one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[count:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("path", sorted((ROOT / "docs/extend").glob("*.md")), ids=lambda p: p.stem)
def test_pages_show_what_the_tests_play(path):
    """A block of Python under the name of a file of tests/strangers is that file."""
    shown = re.findall(
        r"`(tests/strangers/\w+\.py)`:\n+```python\n(.*?)```", path.read_text(), re.S
    )
    assert shown, "each page has a whole example"
    for name, code in shown:
        assert code == (ROOT / name).read_text(), f"{path.name} shows another {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_places_in_files_exist(path):
    """`icm_jax/x.py:name` is a function or class of that file, `:Class.method` one within."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    place = r"`((?:icm_jax|configs|tests)/[\w/]+\.py):([A-Za-z_][\w.]*)`"
    for file, name in re.findall(place, path.read_text()):
        if file.startswith("configs/") and not name.startswith("runs"):
            continue  # a scale; tests/test_configs.py loads them
        tree = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            tree = next(
                (n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == part), None
            )
            assert tree is not None, f"{path.name} names {file}:{name}"
