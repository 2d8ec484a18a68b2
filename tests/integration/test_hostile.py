"""Hostile and broken input, with the real sandbox, store and machines: it harms itself, and the next run succeeds.

`test_ordinary_user.py` runs all of this once more as a user without any rights.
"""

import subprocess
import sys
from pathlib import Path

import trees

LARGE = """
import re, resource, sys
from pathlib import Path
from pkgci import source
from pkgci.formats import base
from pkgci.sandbox import Files
files = Files()
base.add_tree(files, source.tree(Path(sys.argv[1]), "large", sys.argv[2]), "/build/tree")
own = re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())
print(files.stream.tell() >> 20, int(own[1]) >> 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


def test_a_tree_of_300_mib_does_not_need_that_memory(tmp_path: Path):
    files = {f"file-{number}": bytes([number]) * (1 << 20) for number in range(150)} | {"large": bytes(150 << 20)}
    commit = trees.commit(tmp_path / "large", files)
    command = [sys.executable, "-c", LARGE, tmp_path / "large", commit]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, own, git = map(int, done.stdout.split())
    assert size >= 300
    assert own < 120
    assert git < 120
