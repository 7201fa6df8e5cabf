"""Write a text to calibrate profiles on: documentation out of Python's own library.

The docstrings of the modules of the standard library, read from their sources without running them, longest first within a
module, separated by a blank line, runs of blanks and tabs collapsed to one blank. About a megabyte of English and code that are
on every machine with Python, and none of it stands in the topics that `kvsieve eval` reads by default.

    python3 scripts/calibration-text.py target/calibration.txt
"""

import ast
import pathlib
import re
import sys
import sysconfig

# Shorter ones say little but names of arguments.
SHORTEST = 200


def docstrings(path: pathlib.Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return sorted({text for text in texts if text and len(text) >= SHORTEST}, key=lambda text: (-len(text), text))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: calibration-text.py OUTPUT")
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
    files = [f for f in sorted(library.rglob("*.py")) if not skipped & set(f.relative_to(library).parts)]
    text = "\n\n".join(text for file in files for text in docstrings(file))
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.write(re.sub(r"[ \t]+", " ", text))


main()
