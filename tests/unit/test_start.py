"""What a step imports before its work begins: the libraries that take long are not among it."""

import subprocess
import sys

import pytest

HEAVY = {
    *("asyncio", "createrepo_c", "cryptography", "debian", "jenkins_jobs", "jinja2", "paramiko", "pytest", "requests"),
    *("rich", "unittest"),
}


@pytest.mark.parametrize("step", ["build", "compile", "publish", "lint", "install", "systest", "mirror"])
def test_a_step_does_not_import_what_it_may_not_need(step: str):
    program = f"import sys, pkgci.cli, pkgci.step, pkgci.{step}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
