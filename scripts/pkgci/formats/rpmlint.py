"""Reads what rpmlint says, from the lines that it writes for people; it has no other form.

    PACKAGE.ARCH:LINE: SEVERITY: TAG WORDS

rpmlint reads hostile files: a name with a line break can add lines of its own, but none goes missing without notice, as
the last line says how many there are. Source: rpmlint 2.4, filter.py and lint.py.
"""

import re
from collections import Counter

from pkgci.artifacts import LintFinding
from pkgci.errors import InfrastructureError
from pkgci.formats.base import Linted
from pkgci.text import printable

FINDING = re.compile(r"([^:\s]+):(?:(\d+):)? ([EWI]): (\S+)(?: \(Badness: -?\d+\))?(?: (.*))?")
SUMMARY = re.compile(r"packages and \d+ specfiles checked; (\d+) errors, (\d+) warnings,")
SEVERITIES = {"E": "error", "W": "warning", "I": "info"}


def read(said: bytes, unfiltered: bytes | None, tool: str, source: str) -> Linted:
    """Return what rpmlint found.

    Args:
        said: its output.
        unfiltered: its output without the package's own filters, when there are such.
        tool: its name and version.
        source: the source package's name.

    Raises:
        InfrastructureError: it is no such output.
    """
    findings = _findings(said, tool, source)
    silenced = 0 if unfiltered is None else len(_findings(unfiltered, tool, source)) - len(findings)
    return Linted(tool, findings, overridden=max(0, silenced))


def _findings(said: bytes, tool: str, source: str) -> tuple[LintFinding, ...]:
    text = said.decode(errors="replace")
    findings = tuple(_finding(match, source) for line in text.split("\n") if (match := FINDING.fullmatch(line)))
    counted = SUMMARY.findall(text)
    if not counted:
        raise InfrastructureError(f"what {tool} says cannot be read: it has no summary")
    found = Counter(finding.severity for finding in findings)
    if found["error"] < int(counted[-1][0]) or found["warning"] < int(counted[-1][1]):
        raise InfrastructureError(f"what {tool} says cannot be read: it has fewer findings than its summary says")
    return findings


def _finding(match: re.Match, source: str) -> LintFinding:
    where, line, severity, tag, words = match.groups(default="")
    name, _, architecture = where.rpartition(".")
    of_source = architecture in ("src", "nosrc", "spec")
    # what it says of a file begins with its path; of the spec it says the line
    file = re.match(r"/\S*", words)
    place = where + (f":{line}" if line else "") if architecture == "spec" else file[0] if file else None
    return LintFinding(
        package=source if of_source else printable(name, 100),
        source=of_source,
        severity=SEVERITIES[severity],
        tag=printable(tag, 100),
        message=printable(words),
        file=printable(place) if place else None,
    )
