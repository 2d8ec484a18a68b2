"""The report in brief, for a terminal: not more than a screenful."""

from collections.abc import Iterator

from pkgci.report.view import Excerpt, GateView, InstallView, LintView, SystestView, View
from pkgci.text import spelled_out

WIDTH = 160
PACKAGES, FINDINGS, BUILDS = 8, 3, 12
BEFORE, AFTER = 5, 2


def brief(view: View) -> list[str]:
    """Return the lines: why it failed, with the lines of the log that show it; what was built; what tests found."""
    lines = []
    if view.result.exit:
        lines.append(f"reason: {view.result.reason}")
    # what has findings of its own shows those
    parts = (("lint", view.lint), ("install", view.install), ("systest", view.systest))
    told = tuple(f"{step}-" for step, part in parts if part)
    for excerpt in view.excerpts[:1]:
        lines += [] if excerpt.job.startswith(told) else _excerpt(excerpt)
    if view.gate:
        lines += _gate(view.gate)
    if view.build:
        lines.append(f"version: {view.build.version}" + (f" ({view.built})" if view.built else ""))
        lines += _packages(view)
        lines += [view.dependants] if view.dependants else []
    if view.lint:
        lines += [f"lint: {view.lint.summary}{_note(view.lint)}", *_lint(view.lint)]
    if view.install:
        lines += [f"install test: {view.install.summary}{_note(view.install)}", *_install(view.install)]
    if view.systest:
        lines += [f"system test: {view.systest.summary}{_note(view.systest)}", *_systest(view.systest)]
    return [spelled_out(line) for line in lines]


def _note(part: LintView | InstallView | SystestView) -> str:
    return f"; {part.record.note}" if part.record.note else ""


def _excerpt(excerpt: Excerpt) -> Iterator[str]:
    at = next((index for index, line in enumerate(excerpt.lines) if line.marked), len(excerpt.lines) - 1)
    for line in excerpt.lines[max(0, at - BEFORE) : at + AFTER + 1]:
        yield f"  {'>' if line.marked else ' '} {line.number:>5}  {line.text}"[:WIDTH]


def _gate(gate: GateView) -> Iterator[str]:
    if gate.record.builds:
        yield f"builds: {gate.summary}"
    for build, _ in gate.builds.items[:BUILDS]:
        yield f"  {build.package}: {gate.line(build)}"
    if len(gate.builds) > BUILDS:
        yield f"  and {len(gate.builds) - BUILDS} more"
    yield from gate.notes


def _packages(view: View) -> Iterator[str]:
    shown = view.packages.items[:PACKAGES]
    for one in shown:
        against = one.difference
        released = "the released " if against and against.difference.released else ""
        changed = f"; against {released}{against.difference.former_version}: {against.summary}" if against else ""
        yield f"package: {one.package.file}{changed}"
    if len(view.packages) > len(shown):
        yield f"and {len(view.packages) - len(shown)} more packages"


def _lint(lint: LintView) -> Iterator[str]:
    for one in lint.findings.items[:FINDINGS]:
        if one.severity != "info":
            yield f"  {one.severity}: {one.package}: {one.tag}: {one.message}"[:WIDTH]


def _install(install: InstallView) -> Iterator[str]:
    found = [(tested.outcome.name, finding) for tested in install.packages for finding in tested.findings]
    for name, one in found[:FINDINGS]:
        yield f"  {': '.join(filter(None, (name, one.phase, one.file, one.message)))}"[:WIDTH]
    if len(found) > FINDINGS:
        yield f"  and {len(found) - FINDINGS} more findings"


def _systest(systest: SystestView) -> Iterator[str]:
    for one, _ in systest.outcomes.items[:FINDINGS]:
        if one.result == "failed":
            yield f"  {one.scenario}: {one.test}: {one.message}"[:WIDTH]
