"""Reads what lintian says, from the JSON that it writes.

lintian reads hostile files, so its word is bounded here and never shown raw. Hints that are pedantic, classifications or
experimental are none: lintian itself does not call them wrong. Source: Lintian::Output::JSON of lintian 2.116.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from pkgci.artifacts import LintFinding
from pkgci.errors import InfrastructureError
from pkgci.formats.base import Linted
from pkgci.text import printable

SEVERITIES = ("error", "warning", "info")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class _Item(_Part):
    name: str


class _Pointer(_Part):
    item: _Item | None = None
    line_position: int = 0


class _Hint(_Part):
    tag: str
    note: str
    visibility: str
    experimental: bool
    pointer: _Pointer | None = None
    override: dict | None = None
    masks: list = []

    @property
    def file(self) -> str | None:
        """The file of the package that it is about, with the line where there is one."""
        if self.pointer is None or self.pointer.item is None:
            return None
        line = f":{self.pointer.line_position}" if self.pointer.line_position > 0 else ""
        return printable(self.pointer.item.name) + line


class _File(_Part):
    path: str
    hints: list[_Hint]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class _Group(_Part):
    input_files: list[_File]


class _Output(_Part):
    groups: list[_Group]


def read(said: bytes, tool: str, source: str, binaries: Mapping[str, str]) -> Linted:
    """Return what lintian found.

    Args:
        said: its output.
        tool: its name and version.
        source: the source package's name.
        binaries: the binary packages' names, by the names of their files.

    Raises:
        InfrastructureError: it is no such output, or does not speak of every package.
    """
    try:
        files = [file for group in _Output.model_validate_json(said).groups for file in group.input_files]
    except ValidationError as error:
        raise InfrastructureError(f"what {tool} says cannot be read: {error.errors()[0]['msg']}") from error
    missing = binaries.keys() - {file.name for file in files}
    if missing or not any(file.name.endswith(".dsc") for file in files):
        raise InfrastructureError(f"{tool} says nothing of {min(missing, default=source)}; see the log above")
    shown = [
        (file, hint)
        for file in files
        for hint in file.hints
        if hint.visibility in SEVERITIES and not hint.experimental and not hint.masks
    ]
    findings = tuple(
        LintFinding(
            package=binaries.get(file.name, source),
            source=file.name not in binaries,
            severity=hint.visibility,
            tag=printable(hint.tag, 100),
            message=printable(hint.note),
            file=hint.file,
        )
        for file, hint in shown
        if hint.override is None
    )
    return Linted(tool, findings, overridden=len(shown) - len(findings))
