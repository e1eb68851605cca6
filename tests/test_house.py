"""The measures of the house: what one screen and one sitting hold."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "icm_jax"
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
PARSERS = {  # one pass over a format's bytes, in the order of its standard
    "data/jpeg.py:_read": "markers of a JPEG, one after the other",
    "data/jpeg_scan.py:sequential": "a Huffman scan, compiled by Numba, which inlines no closures",
    "data/jpeg_scan.py:progressive": "four kinds of progressive scans, compiled by Numba",
}


def test_no_file_is_too_long():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [str(path) for path, count in lines.items() if count > LONGEST_FILE] == []


def test_no_function_is_too_long_but_parsers():
    long = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long.add(f"{path.relative_to(PACKAGE).as_posix()}:{node.name}")
    assert long == set(PARSERS)
