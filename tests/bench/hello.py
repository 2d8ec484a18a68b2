"""GNU hello, as `make demo` imports it: what the benchmarks build."""

import subprocess
import uuid
from pathlib import Path

import trees

from pkgci.config import EMBEDDED, Config

TREE = Config(EMBEDDED).cache / "demo" / "hello"
if not TREE.exists():
    raise SystemExit("run `make demo` first: it makes the tree that is measured")


def changed(place: Path) -> Path:
    """Return a clone of the tree, below `place`, with a change that nobody has built yet."""
    tree = place / "hello"
    subprocess.run(["git", "clone", "-q", "--branch=main", TREE, tree], check=True)
    trees.git(tree, "checkout", "-q", "-b", "change", "--track", "main")
    source = tree / "src" / "hello.c"
    trees.commit(tree, {"src/hello.c": f"/* {uuid.uuid4()} */\n{source.read_text()}"})
    return tree
