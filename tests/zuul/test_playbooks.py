"""The playbooks, run by Ansible itself with Zuul's `zuul_return`; in the place of ssh stands what notes its words."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import zuul_server

from pkgci.config import ROOT

SSH = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
place = Path({place!r})
known = next(word.partition("=")[2] for word in sys.argv if word.startswith("UserKnownHostsFile="))
said = {{"argv": sys.argv[1:], "stdin": json.load(sys.stdin), "known": Path(known).read_text()}}
(place / "asked.json").write_text(json.dumps(said))
print("built", file=sys.stderr)
sys.stdout.write((place / "answers").read_text())
"""
HOSTILE = "bad {{ 6 * 7 }} {% raw %} {{ lookup('pipe', 'id') }}"


class Job:
    """What an executor prepares for one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("bin", "work/logs", "zuul"):
            (place / name).mkdir(parents=True)
        (found,) = zuul_server.zuul().glob(f"lib/python3*/site-packages/zuul/ansible/{zuul_server.ANSIBLE}")
        shutil.copytree(found, place / "zuul" / "ansible")
        for package in ("zuul", "zuul/ansible"):
            (place / package / "__init__.py").touch()
        (place / "actions").mkdir()
        shutil.copy(found / "action" / "zuul_return.py", place / "actions")
        (place / "bin" / "ssh").write_text(SSH.format(place=str(place)))
        (place / "bin" / "ssh").chmod(0o755)
        (place / "work" / "results.json").touch()
        self.executed = place / "executed"
        # free text of whoever pushes a change
        self.topic = f"{{{{ lookup('pipe', 'touch {self.executed}') }}}}"
        self.answers("")

    def answers(self, said: str) -> None:
        (self.place / "answers").write_text(said)

    def play(self, name: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """Run a playbook; `variables` are the job's own."""
        zuul = {
            "executor": {"work_root": f"{self.place}/work", "log_root": f"{self.place}/work/logs"},
            "job": "j",
            "topic": self.topic,
            "items": [{"topic": self.topic}],
        }
        engine = {"host": "engine.example.org", "port": 2222, "user": "zuul", "host_key": "ssh-ed25519 AAAA"}
        given = {"zuul": zuul, "pkgci_engine": engine, "unsafe_vars": variables}
        ansible = zuul_server.ansible() / zuul_server.ANSIBLE / "bin" / "ansible-playbook"
        environment = {
            "PATH": f"{self.place}/bin:{os.environ['PATH']}",
            "HOME": str(self.place),
            "PYTHONPATH": str(self.place),
            "ZUUL_JOBDIR": str(self.place),
            # Zuul's own `command`, which streams, wants a console
            "ANSIBLE_ACTION_PLUGINS": f"{self.place}/actions",
        }
        playbook = ROOT / "zuul" / "playbooks" / f"{name}.yaml"
        words = [ansible, playbook, "-e", json.dumps(given)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    @property
    def asked(self) -> dict:
        return json.loads((self.place / "asked.json").read_text())


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path)
    yield made
    assert not made.executed.exists()


def test_the_engines_host_is_asked_and_zuul_is_told_what_it_says(job):
    returned = {"zuul": {"log_url": "https://builds.example.org/1/", "warnings": [HOSTILE]}}
    job.answers(json.dumps({"exit": 1, "reason": HOSTILE, "returned": returned}))
    done = job.play("follow", pkgci_parameters={"AGAIN": "true"}, pkgci_change=False)
    # only what Zuul is to try again fails here
    assert done.returncode == 0, done.stdout
    # what a package has said is no template
    assert HOSTILE in done.stdout
    assert json.loads((job.place / "work" / "results.json").read_text())["data"] == returned
    assert (job.place / "work" / "logs" / "job-output.txt").read_text() == "built\n"
    asked = job.asked
    assert (asked["stdin"]["verb"], asked["stdin"]["zuul"]["job"]) == ("run", "j")
    assert (asked["stdin"]["change"], asked["stdin"]["parameters"]) == (False, {"AGAIN": "true"})
    assert (asked["stdin"]["zuul"]["topic"], asked["stdin"]["zuul"]["items"]) == (job.topic, [{"topic": job.topic}])
    assert asked["argv"][-4:] == ["-p", "2222", "--", "zuul@engine.example.org"]
    assert {"StrictHostKeyChecking=yes", "BatchMode=yes", "HostKeyAlias=engine"} <= set(asked["argv"])
    assert asked["known"] == "engine ssh-ed25519 AAAA\n"
    failed = job.play("run")
    assert failed.returncode == 2
    assert HOSTILE in failed.stdout


def test_an_infrastructure_fault_fails_before_the_run_so_that_zuul_tries_again(job):
    returned = {"zuul": {"warnings": ["no disk"]}}
    job.answers(json.dumps({"exit": 3, "reason": "no disk", "returned": returned}))
    done = job.play("follow")
    assert done.returncode == 2
    assert "no disk" in done.stdout
    assert json.loads((job.place / "work" / "results.json").read_text())["data"] == returned


def test_an_infrastructure_fault_that_came_twice_fails_the_run_itself(job):
    job.answers(json.dumps({"exit": 3, "tried_twice": True, "reason": "QEMU was killed", "returned": {}}))
    assert job.play("follow").returncode == 0
    failed = job.play("run")
    assert failed.returncode == 2
    assert "QEMU was killed" in failed.stdout


def test_a_job_that_passes_is_not_asked_about_again(job):
    job.answers(json.dumps({"exit": 0, "reason": "built", "returned": {}}))
    assert [job.play(name).returncode for name in ("follow", "run")] == [0, 0]
    assert (job.asked["stdin"]["change"], job.asked["stdin"]["parameters"]) == (True, {})
    (job.place / "asked.json").unlink()
    assert job.play("end").returncode == 0
    assert not (job.place / "asked.json").exists()


@pytest.mark.parametrize("started", [False, True])
def test_what_a_killed_playbook_left_is_aborted(job, started):
    if started:
        (job.place / "work" / "answer.json").touch()
    job.answers(json.dumps({"exit": 0, "reason": "aborted", "returned": {}}))
    done = job.play("end")
    assert done.returncode == 0, done.stdout
    assert job.asked["stdin"]["verb"] == "abort"
