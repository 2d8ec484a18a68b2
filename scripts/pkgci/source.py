"""Source trees from Gerrit: fetch, merge the queue, pair, check.

Only git runs here, on bare repositories without checkouts: no hook, filter or attribute of a tree has any effect, and the
same inputs give the same tree. What the files say is left to the sandbox.
"""

import bz2
import hashlib
import json
import lzma
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO

from pkgci.change import BRANCH, Change, local_changes
from pkgci.command import read, run, streamed
from pkgci.config import Config, PackageEntry
from pkgci.errors import InfrastructureError, PackageError, RequestError

GIT = {
    # who runs in a hook or an alias of git has these, for another repository
    **dict.fromkeys(("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_NAMESPACE")),
    **dict.fromkeys(("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH")),
    "LC_ALL": "C",
    "GIT_ALLOW_PROTOCOL": "http:https:ssh:git:file",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o StrictHostKeyChecking=yes",
    "GIT_AUTHOR_NAME": "pkgci",
    "GIT_AUTHOR_EMAIL": "pkgci@localhost",
    "GIT_COMMITTER_NAME": "pkgci",
    "GIT_COMMITTER_EMAIL": "pkgci@localhost",
}
# what makes commits takes nothing from the host's configuration, so that they are the same on each
ISOLATED = {
    **GIT,
    **dict.fromkeys(("GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS")),
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "XDG_CONFIG_HOME": os.devnull,
}

# a few objects can name the same gigabytes over and over
LISTING_BYTES = 64 << 20
TREE_BYTES = 2 << 30
# what is looked at in each file, and what a file may have that is read as a whole
HEAD_BYTES = 1 << 20
CONTENT_BYTES = 16 << 20
# refs/changes/KEY/change and, where the branch exists, refs/changes/KEY/base of a local change
LOCAL_REFS = "refs/changes/"


@dataclass(frozen=True)
class Tree:
    """One state of one project.

    `count` is the number of non-merge commits in its history and `date` their latest author date (seconds since the
    epoch): the same for fast forward, merge, rebase and cherry-pick of the same changes.
    """

    repository: Path
    project: str
    commit: str
    id: str
    count: int
    date: int
    subject: str


@dataclass(frozen=True)
class Sources:
    """What a package is built from. For a package in one project both trees are the same.

    `previous` is the packaging as the branch has it now, None for a new branch; `local` says that it is a local change.
    """

    package: str
    entry: PackageEntry
    source: Tree
    packaging: Tree
    previous: Tree | None
    local: bool

    @property
    def pair(self) -> bool:
        """Whether packaging is a project of its own."""
        return self.entry.packaging is not None

    @property
    def count(self) -> int:
        """The number of non-merge commits: of a pair the sum of both."""
        return self.source.count + (self.packaging.count if self.pair else 0)

    @property
    def date(self) -> int:
        """The latest author date of both, in seconds since the epoch."""
        return max(self.source.date, self.packaging.date)

    @property
    def digest(self) -> str:
        """One id for both trees; that of the tree itself for a single project."""
        if not self.pair:
            return self.source.id
        return hashlib.sha1(f"{self.source.id} {self.packaging.id}".encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a tree: its path, its git mode (`100644`, `100755`, `120000`) and its size.

    `stream` gives the content once; of a file of more than `CONTENT_BYTES` only until the next one is asked for.
    """

    path: str
    mode: str
    size: int
    stream: IO[bytes]

    @cached_property
    def content(self) -> bytes:
        """The whole content of a file that is small by nature.

        Raises:
            PackageError: it is not.
        """
        if self.size > CONTENT_BYTES:
            raise PackageError(f"{_shown(self.path)} has more than {CONTENT_BYTES >> 20} MiB, too much for what it is")
        return self.stream.read(self.size)


def git(
    repository: Path,
    *arguments: str | Path,
    check: bool = True,
    input: bytes | None = None,
    quiet: bool = True,
    env: Mapping[str, str | None] = GIT,
):
    """Run git in a bare repository, without hooks."""
    fixed = ["-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", "-c", "maintenance.auto=false"]
    return run(["git", "-C", repository, *fixed, *arguments], env=env, check=check, input=input, quiet=quiet)


def fetch(config: Config, change: Change) -> Sources | None:
    """Fetch what the package of `change` is built from, as it is with the queue merged.

    Returns:
        The trees, or None when no release claims the branch.

    Raises:
        RequestError: the project is unknown, or nothing says what is changed, or where to fetch it from.
        PackageError: a change of the queue does not merge.
        InfrastructureError: fetching failed.
    """
    local = change.url == local_changes(config)
    if change.number and not (change.ref or change.commit or change.queue):
        raise RequestError(
            f"parameter ZUUL_CHANGES: missing; it says what change {change.number} is (or ZUUL_REF does)"
        )
    name = config.package_of(change.project)
    if name is None:
        if not local:
            raise RequestError(f"unknown project {change.project}; no file in {config.directory / 'packages'} names it")
        name, entry = PurePosixPath(change.project).name.lower(), PackageEntry(source=change.project)
    else:
        entry = config.package(name)
        if not local and config.release_of(change.branch) is None:
            return None
    source = state(config, change, entry.source)
    packaging = source if entry.packaging is None else state(config, change, entry.packaging)
    remote = _remote(config, change, packaging.project)
    branch, ref = f"refs/heads/{change.branch}", _local_ref(change, packaging.project) if local else ""
    if ref.startswith(LOCAL_REFS):
        # a local change carries the branch as it met it; another check of the same project may have met another one
        branch = ref.removesuffix("/change") + "/base"
    tip = fetch_ref(packaging.repository, remote, branch, missing_ok=True)
    previous = tree(packaging.repository, packaging.project, tip) if tip else None
    return Sources(name, entry, source, packaging, previous, local)


def state(config: Config, change: Change, project: str) -> Tree:
    """Return the state of one project: Zuul's prepared ref, or the branch tip with the queue merged.

    Raises:
        PkgciError: as `fetch`.
    """
    remote, own = _remote(config, change, project), project == change.project
    repository = init(config.cache / "git" / f"{project}.git")
    if change.url == local_changes(config):
        ref = _local_ref(change, project)
        commit = fetch_ref(repository, change.url + project, ref) if ref else None
        if commit:
            return tree(repository, project, commit)
    elif change.ref:
        commit = fetch_ref(repository, change.url + project, change.ref, missing_ok=not own)
        if commit and own and change.commit not in ("", commit):
            raise RequestError(f"{change.ref} of {project} is {commit}, not ZUUL_COMMIT {change.commit}")
        if commit:
            return tree(repository, project, commit)
    tip = fetch_ref(repository, remote, f"refs/heads/{change.branch}")
    assert tip is not None
    if change.commit and own and not change.queue:
        if git(repository, "merge-base", "--is-ancestor", change.commit, tip, check=False).returncode:
            raise RequestError(f"commit {change.commit} is not in branch {change.branch} of {project}")
        tip = change.commit
    for item in change.queue:
        if item.project == project and item.branch == change.branch:
            commit = fetch_ref(repository, remote, item.ref)
            assert commit is not None
            tip = merge(repository, tip, commit, f"{item.ref} into {item.branch} of {project}")
    return tree(repository, project, tip)


def _local_ref(change: Change, project: str) -> str:
    """Return the ref of a project's local change, which is all of its state; empty when only others' projects have one."""
    if project == change.project:
        return change.ref
    return next((item.ref for item in reversed(change.queue) if item.project == project), "")


def _remote(config: Config, change: Change, project: str) -> str:
    """Return where a project's branches and changes are: in Gerrit, but for a local change; Zuul's URL is for its refs."""
    local = change.url == local_changes(config)
    if local and (project == change.project or _local_ref(change, project)):
        return change.url + project
    url = config.settings.gerrit or ("" if local else change.url)
    if not url:
        raise RequestError(f"cannot fetch {project}: config.yaml names no `gerrit`, and ZUUL_URL leads to no remote")
    return url + project


def init(repository: Path) -> Path:
    """Make a bare repository unless it is there; return it."""
    if not (repository / "HEAD").exists():
        repository.parent.mkdir(parents=True, exist_ok=True)
        new = repository.with_name(f"{repository.name}.{uuid.uuid4().hex}")
        run(["git", "init", "-q", "--bare", "--template=", new], env=ISOLATED, quiet=True)
        try:
            new.rename(repository)
        except OSError:
            # another process was faster
            shutil.rmtree(new)
    return repository


def fetch_ref(repository: Path, remote: str, ref: str, missing_ok: bool = False) -> str | None:
    """Fetch one ref of `remote`; return its commit, or None when it does not exist and that is expected.

    Raises:
        RequestError: it does not exist, or leads to no commit with its whole history.
        InfrastructureError: the remote does not answer.
    """
    name = f"refs/pkgci/{hashlib.sha256(f'{remote} {ref}'.encode()).hexdigest()[:20]}-{uuid.uuid4().hex[:12]}"
    done = git(repository, "fetch", "-q", "--no-tags", "--", remote, f"+{ref}:{name}", check=False, quiet=False)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        if "couldn't find remote ref" in said:
            if missing_ok:
                return None
            raise RequestError(f"{remote} has no {ref}")
        raise InfrastructureError(
            f"cannot fetch {ref} from {remote}: {(said.splitlines() or ['git said nothing'])[-1]}"
        )
    commit = git(repository, "rev-parse", "--verify", f"{name}^{{commit}}", check=False)
    if commit.returncode:
        git(repository, "update-ref", "-d", name, check=False)
        raise RequestError(f"{ref} of {remote} is no commit with its whole history; a shallow clone has no version")
    # one is kept, so that the next fetch gets only what is new; which one of several processes' does not matter
    last = "refs/pkgci/" + (ref.removeprefix("refs/") if ref.startswith("refs/heads/") else "last")
    git(repository, "update-ref", last, name, check=False)
    git(repository, "update-ref", "-d", name)
    return commit.stdout.decode().strip()


def heads(config: Config, project: str) -> dict[str, str]:
    """Return the commits of all branches of a project at the configured remote, by the branches' names.

    Raises:
        InfrastructureError: the remote does not answer.
    """
    remote = f"{config.settings.gerrit}{project}"
    done = run(["git", "ls-remote", "--heads", "--", remote], env=GIT, check=False, quiet=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["git said nothing"]
        raise InfrastructureError(f"cannot list the branches of {remote}: {said[-1]}")
    lines = (line.split("\t") for line in done.stdout.decode(errors="replace").splitlines())
    named = {ref.removeprefix("refs/heads/"): commit for commit, ref in lines}
    return {name: commit for name, commit in named.items() if re.fullmatch(BRANCH, name)}


def merge(repository: Path, base: str, commit: str, what: str) -> str:
    """Merge `commit` onto `base` and return the resulting commit; the same inputs give the same commit.

    Raises:
        PackageError: they conflict; the message names the files.
    """
    if git(repository, "merge-base", "--is-ancestor", base, commit, check=False).returncode == 0:
        return commit
    if git(repository, "merge-base", "--is-ancestor", commit, base, check=False).returncode == 0:
        return base
    options = ["--write-tree", "--name-only", "--no-messages", "-z"]
    done = git(repository, "merge-tree", *options, base, commit, check=False, env=ISOLATED)
    fields = os.fsdecode(done.stdout).split("\0")
    if done.returncode == 1:
        raise PackageError(f"cannot merge {what}: conflict in {', '.join(map(_shown, filter(None, fields[1:])))}")
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise PackageError(f"cannot merge {what}: {(reason or ['git said nothing'])[-1]}")
    date = _log(repository, "-1", "--format=%ct", commit)[0]
    dates = {"GIT_AUTHOR_DATE": f"{date} +0000", "GIT_COMMITTER_DATE": f"{date} +0000"}
    parents = ["-p", base, "-p", commit]
    made = git(repository, "commit-tree", fields[0], *parents, "-m", f"Merge {what}", env={**ISOLATED, **dates})
    return made.stdout.decode().strip()


def _log(repository: Path, *arguments: str) -> list[str]:
    """Return the lines of `git rev-list`, whose output no configuration changes."""
    done = git(repository, "rev-list", "--no-commit-header", *arguments)
    return done.stdout.decode(errors="replace").removesuffix("\n").split("\n")


def tree(repository: Path, project: str, commit: str) -> Tree:
    """Return what is known of the state `commit` of a project.

    Raises:
        RequestError: its history is not whole.
        PackageError: a commit has no author date.
    """
    if git(repository, "rev-parse", "--is-shallow-repository").stdout.strip() == b"true":
        raise RequestError(f"the history of {project} is shallow; a version is counted from the whole history")
    dates = _log(repository, "--no-merges", "--format=%at", commit)
    identity, subject = _log(repository, "-1", "--format=%T%n%s", commit)
    try:
        latest = max(map(int, dates))
    except ValueError:
        raise PackageError(
            f"{project}: a commit before {commit[:12]} has no author date; a version's time comes from it"
        ) from None
    return Tree(repository, project, commit, identity, len(dates), latest, subject)


def names(tree: Tree) -> dict[str, str]:
    """Return the paths of a tree with their git modes, in git's order.

    Raises:
        PackageError: it holds a submodule or a path that leads out of it.
    """
    return {path: mode for path, (mode, _) in _entries(tree).items()}


def identities(tree: Tree, paths: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return path, mode and object id of those of `paths` that a tree has: all that decides what `blobs` yields for them."""
    entries = _entries(tree)
    return [(path, *entries[path]) for path in paths if path in entries]


def _entries(tree: Tree) -> dict[str, tuple[str, str]]:
    """Return the paths of a tree with the mode and the id of each file."""
    listed = read(
        ["git", "-C", tree.repository, "ls-tree", "-r", "-l", "-z", "--full-tree", tree.id],
        env=GIT,
        largest=LISTING_BYTES,
    )
    if listed is None:
        raise PackageError(f"{tree.project}: its list of files has more than {LISTING_BYTES >> 20} MiB")
    found, total = {}, 0
    for line in filter(None, listed.split(b"\0")):
        head, _, raw = line.partition(b"\t")
        mode, _, identity, size = head.decode().split()
        total += int(size) if size.isdigit() else 0
        if total > TREE_BYTES:
            raise PackageError(f"{tree.project}: its files have more than {TREE_BYTES >> 20} MiB together")
        path = os.fsdecode(raw)
        if mode == "160000":
            raise PackageError(f"{tree.project}: {_shown(path)} is a submodule; the tree must hold the whole source")
        if any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise PackageError(f"{tree.project}: the path {_shown(path)} is not allowed in a tree")
        found[path] = mode, identity
    return found


def _shown(path: str) -> str:
    """Return a path for a message of one line: quoted where it holds what cannot be printed."""
    return path if path.isprintable() else ascii(path)


def blobs(tree: Tree, paths: Sequence[str] | None = None) -> Iterator[Blob]:
    """Yield the files of a tree, or those of `paths`, one after the other: no more than `CONTENT_BYTES` are in memory.

    Raises:
        InfrastructureError: the repository lacks one.
    """
    entries = _entries(tree)
    wanted = list(entries) if paths is None else [path for path in paths if path in entries]
    # below the threshold git reads a file as a whole, too
    command = ["git", "-C", tree.repository, "-c", f"core.bigFileThreshold={HEAD_BYTES}", "cat-file", "--batch"]
    with streamed(command, env=GIT, input="".join(f"{entries[path][1]}\n" for path in wanted).encode()) as answer:
        for path in wanted:
            mode, identity = entries[path]
            header = answer.readline().split()
            if header[1:2] != [b"blob"]:
                raise InfrastructureError(
                    f"{tree.repository}: object {identity} is missing or damaged; remove that directory"
                )
            size = int(header[2])
            content = _Part(answer, size)
            # what may be read as a whole is still there when nobody holds this generator any more
            stream = BytesIO(content.readall()) if size <= CONTENT_BYTES else BufferedReader(content)
            yield Blob(path, mode, size, stream)
            content.skip()
            answer.read(1)


class _Part(RawIOBase):
    """The next `left` bytes of a stream."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self._stream = stream
        self.left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        size = min(len(buffer), self.left)
        data = self._stream.read(size)
        if len(data) < size:
            raise InfrastructureError(f"git ended {self.left - len(data)} bytes before the end of a file")
        buffer[:size] = data
        self.left -= size
        return size

    def skip(self) -> None:
        """Read what is left."""
        while self.left:
            self.read(HEAD_BYTES)


def refuse_unfit(config: Config, tree: Tree, entry: PackageEntry, package: str) -> None:
    """Refuse a tree that holds what does not belong in unpacked source, or what would build differently elsewhere.

    Raises:
        PackageError: it holds a source package, a release tarball, a binary package (by content), a git LFS pointer, or
            attributes that change content; the message names the path.
    """
    identity = json.dumps(
        [tree.id, sorted(entry.allow), package, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    )
    passed = config.cache / "trees" / hashlib.sha256(identity.encode()).hexdigest()
    if passed.exists():
        return
    for blob in blobs(tree):
        reason = None if blob.mode == "120000" else _refused(blob, package)
        if reason and not any(PurePosixPath(blob.path).is_relative_to(path) for path in entry.allow):
            raise PackageError(f"{tree.project}: {_shown(blob.path)} {reason}")
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()


def _refused(blob: Blob, package: str) -> str | None:
    """Return why a file must not be in a source tree, or None."""
    name = PurePosixPath(blob.path).name
    if name == ".gitattributes":
        for line in blob.content.decode(errors="replace").splitlines():
            words = line.split()[1:] if not line.lstrip().startswith("#") else []
            if any(word == "export-subst" or word.startswith("filter=") for word in words):
                return "sets export-subst or a filter: the same tree would give different bits; remove the attribute"
    beginning = blob.content if name == ".gitattributes" else blob.stream.read(HEAD_BYTES)
    head = beginning[: 1 << 16]
    if head.startswith(b"!<arch>\ndebian-binary"):
        return "is a Debian binary package; only source belongs in the tree (or `allow` the path as test data)"
    if head.startswith(b"\xed\xab\xee\xdb"):
        return "is an RPM package; only source belongs in the tree (or `allow` the path as test data)"
    if re.search(rb"^Format: [0-9.]+( \((quilt|native)\))?\r?$", head, re.M) and re.search(
        rb"^(Files|Checksums-Sha256):\s*\n [0-9a-f]{32,64} ", head, re.M
    ):
        return "is a Debian source control file (.dsc); git holds the unpacked source only"
    if re.search(r"\.orig(-[a-z0-9-]+)?\.tar\.[a-z0-9]+$", name):
        return "is an orig tarball; git holds the unpacked source only"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git LFS pointer; the tree must hold the file itself"
    top = _first_member(beginning).partition("/")[0].lower()
    if re.fullmatch(rf"{re.escape(package.lower())}[-_]v?[0-9].*", top):
        return f"is a release tarball of {package} itself; git holds the unpacked source only"
    return None


def _first_member(head: bytes) -> str:
    """Return the first path in a (compressed) tar archive by its beginning, empty when it is none."""
    try:
        if head.startswith(b"\x1f\x8b"):
            head = zlib.decompressobj(wbits=31).decompress(head, 1 << 16)
        elif head.startswith(b"\xfd7zXZ"):
            head = lzma.LZMADecompressor(memlimit=1 << 28).decompress(head, 1 << 16)
        elif head.startswith(b"BZh"):
            head = bz2.BZ2Decompressor().decompress(head, 1 << 16)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        return ""
    while _is_header(head):
        size = _octal(head[124:136]) or 0
        if head[156:157] not in b"gxLK":
            prefix = head[345:500].rstrip(b"\0") if head[257:263] == b"ustar\0" else b""
            path = b"/".join(filter(None, [prefix, head[:100].rstrip(b"\0")]))
            return path.decode(errors="replace").removeprefix("./")
        # pax headers (`git archive` begins with one) and long names of GNU tar come before what they describe
        head = head[512 + -(-size // 512) * 512 :]
    return ""


def _is_header(block: bytes) -> bool:
    """Return whether the block begins with a header of a tar archive, by its checksum: the oldest format has no magic."""
    told = sum(block[:148]) + 8 * ord(" ") + sum(block[156:512])
    return len(block) >= 512 and _octal(block[148:156]) == told


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None
