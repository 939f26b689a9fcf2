"""Lengths in lines, and in tokens, which denser lines cannot please. Exit code 1: one is too long.

    python bench/tokens.py          # each file
    python bench/tokens.py --each   # and each function

Tokens are those of Python 3.11; later versions split f-strings into several.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = "COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"
LIMITS = {  # tokens, lines
    "vlmrm.py": (4800, 600),
    "sac.py": (2600, 320),
    "test_vlmrm.py": (7000, 9999),
    "README.md": (0, 160),
    "paper/README.md": (0, 130),
    "bench/README.md": (0, 90),
}


def measure(name, text):
    """(what, tokens, lines) of a file and of each function in it."""
    code = text if name.endswith(".py") else ""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    rows = [x.start[0] for x in tokens if tokenize.tok_name[x.type] not in LAYOUT]
    sizes = [(name, len(rows), len(text.splitlines()))]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            lines = range(node.lineno, node.end_lineno + 1)
            what = f"{name}:{node.lineno} {node.name}"
            sizes.append((what, sum(row in lines for row in rows), len(lines)))
    return sizes


def fault(what, tokens, lines):
    """A line if it is too long, or an empty one."""
    most = LIMITS.get(what, (99_999, 40 if ".py:" in what else 9999))
    line = f"{what}: {tokens} tokens, {lines} lines; at most {most}\n"
    return line if tokens > most[0] or lines > most[1] else ""


def main():
    faults, paths = "", {*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *map(ROOT.joinpath, LIMITS)}
    for path in sorted(paths):
        sizes = measure(path.relative_to(ROOT).as_posix(), path.read_text())
        faults += "".join(fault(*size) for size in sizes)
        for what, tokens, lines in sizes if "--each" in sys.argv else sizes[:1]:
            print(f"{tokens:6,} tokens {lines:4} lines  {what}")
    sys.exit(faults or 0)


if __name__ == "__main__":
    main()
