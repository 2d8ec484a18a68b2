"""The server of the live tests does what they need of it."""

import subprocess

import trees
from gerrit_server import VERSION


def test_a_change_is_pushed_reviewed_submitted_and_survives_a_restart(gerrit, tmp_path):
    assert gerrit.ask("get", "config/server/version") == VERSION
    tree = tmp_path / "tree"
    trees.commit(tree, trees.deb())
    gerrit.create_project("org/small", tree, "CHERRY_PICK")
    trees.commit(tree, {"README": "one\n"}, "Read me")
    number = gerrit.push(tree, "org/small", topic="reading")
    assert gerrit.amend(tree, {"README": "two\n"}, "org/small") == number
    change = gerrit.change(number)
    assert (change["status"], change["topic"], change["submittable"]) == ("NEW", "reading", False)
    assert change["revisions"][change["current_revision"]]["_number"] == 2
    gerrit.approve(number)
    gerrit.review(number, "Passed.", {"Verified": 2}, "zuul")
    gerrit.review(number, "recheck", user="pkgci")
    assert gerrit.votes(number, "Verified") == {"zuul": 2}
    assert any("Passed." in said for said in gerrit.messages(number, "zuul"))
    gerrit.restart()
    assert gerrit.change(number)["submittable"]
    gerrit.submit(number, "zuul")
    assert gerrit.merged(number)
    assert gerrit.tip("org/small") != change["current_revision"], "a cherry-pick has a commit of its own"


def test_ssh_and_other_submissions(gerrit, tmp_path):
    tree = tmp_path / "tree"
    trees.commit(tree, trees.deb())
    gerrit.create_project("small", tree)
    gerrit.set_submit_type("small", "FAST_FORWARD_ONLY")
    trees.commit(tree, {"README": "one\n"}, "One")
    first = gerrit.push(tree, "small")
    trees.commit(tree, {"README": "two\n"}, "Two")
    second = gerrit.push(tree, "small")
    gerrit.abandon(second)
    assert gerrit.change(second)["status"] == "ABANDONED"
    gerrit.submit_by_force(first)
    options = ["-i", gerrit.identity(), "-o", f"UserKnownHostsFile={gerrit.known_hosts}", "-o", "BatchMode=yes"]
    ssh = ["ssh", "-F", "none", *options, "-p", str(gerrit.ssh_port), "zuul@127.0.0.1"]
    query = [*ssh, "gerrit", "query", "--format=JSON", f"change:{first}"]
    assert '"status":"MERGED"' in subprocess.run(query, check=True, capture_output=True, text=True).stdout
    assert gerrit.password_file("pkgci").read_text() == "pkgcipass\n"
