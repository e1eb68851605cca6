"""What the documents say of the code, and the code of the documents, is there."""

import pathlib
import re

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
