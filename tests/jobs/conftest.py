"""Renders `jobs/` once, by the command that an operator uses."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pkgci.config import ROOT


def render(jobs: Path, output: Path) -> dict[str, ElementTree.Element]:
    """Return the rendered jobs below the directory `jobs` by name."""
    (output / "jjb.ini").touch()
    command = [sys.executable, "-m", "jenkins_jobs", "--conf", output / "jjb.ini", "test", "--recursive", jobs]
    subprocess.run(
        [*command, "--config-xml", "-o", output / "xml"],
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(output)},
    )
    return {path.parent.name: ElementTree.parse(path).getroot() for path in (output / "xml").glob("*/config.xml")}


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    """The product's jobs by name."""
    return render(ROOT / "jobs", tmp_path_factory.mktemp("rendered"))
