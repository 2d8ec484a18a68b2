"""Metrics of released repositories for monitoring, as a file that Prometheus' node_exporter reads.

Written by the repository host whenever something may have changed, to the configured place; without one there are none.

Source: https://github.com/prometheus/node_exporter#textfile-collector and
https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pkgci.config import Config
from pkgci.errors import PkgciError
from pkgci.released.key import ReleaseKey
from pkgci.released.repository import Repository, repositories

log = logging.getLogger(__name__)

FAILURES = "failures"
UNPUBLISHED = "unpublished"


@dataclass(frozen=True)
class Metric:
    """A metric: its name, kind and meaning."""

    name: str
    kind: str
    help: str


PUBLISHED = Metric("pkgci_last_publication_timestamp_seconds", "gauge", "When packages last changed, since the epoch.")
GENERATION = Metric("pkgci_generation", "gauge", "The generation that readers see.")
FAILED = Metric("pkgci_publication_failures_total", "counter", "Publications of merged changes that failed.")
HELD = Metric("pkgci_held_packages", "gauge", "Source packages on hold.")
MISSING = Metric(
    "pkgci_unpublished_packages", "gauge", "Branch heads that were not released when they were last compared."
)
EXPIRY = Metric("pkgci_release_key_expiry_days", "gauge", "Days until the release key expires; +Inf for never.")


@contextmanager
def publication(config: Config, release: str, codename: str) -> Iterator[None]:
    """Count a failure of what is in the `with`, and write the metrics at its end."""
    repository = Repository(config, release, codename)
    try:
        yield
    except Exception:
        _count_failure(repository)
        raise
    finally:
        write(config)


def compared(repository: Repository, missing: int) -> None:
    """Note how many branch heads are not in a repository."""
    try:
        repository.place.mkdir(parents=True, exist_ok=True)
        new = repository.place / f".{UNPUBLISHED}.{os.getpid()}"
        new.write_text(f"{missing}\n")
        new.replace(repository.place / UNPUBLISHED)
    except OSError as error:
        log.error("repository %s: cannot note what is not published: %s", repository.name, error)


def write(config: Config) -> None:
    """Write the metrics where the configuration says. That it fails is logged: no publication is the worse for it."""
    path = config.settings.metrics
    if path is None:
        return
    try:
        key = ReleaseKey(config, config.data / "released")
        lines = _lines(EXPIRY, {f'key="{key.fingerprint}"': _days(key.expires)})
        values = {
            f'release="{repository.release}",codename="{repository.codename}"': _values(repository)
            for repository in repositories(config)
        }
        for metric in (PUBLISHED, GENERATION, FAILED, HELD, MISSING):
            lines += _lines(metric, {labels: found[metric] for labels, found in values.items() if metric in found})
        new = Path(f"{path}.{os.getpid()}")
        new.write_text("\n".join([*lines, ""]))
        # the collector runs as another user
        new.chmod(0o644)
        new.replace(path)
    except (PkgciError, OSError) as error:
        log.error("cannot write the metrics to %s: %s", path, error)


def _lines(metric: Metric, values: Mapping[str, str]) -> list[str]:
    samples = [f"{metric.name}{{{labels}}} {value}" for labels, value in values.items()]
    return [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *samples]


def _days(expires: datetime | None) -> str:
    return f"{(expires - datetime.now(UTC)).total_seconds() / 86400:.1f}" if expires else "+Inf"


def _values(repository: Repository) -> dict[Metric, str]:
    failures, unpublished = repository.place / FAILURES, repository.place / UNPUBLISHED
    found = {FAILED: str(failures.stat().st_size if failures.exists() else 0), HELD: str(len(repository.holds()))}
    if unpublished.exists():
        found[MISSING] = unpublished.read_text().strip()
    current = repository.current()
    if current:
        found[GENERATION] = str(current.number)
        last = current
        while not (last.added or last.removed) and last.number > 1:
            last = repository.generation(last.number - 1)
        found[PUBLISHED] = f"{last.time.timestamp():.0f}"
    return found


def _count_failure(repository: Repository) -> None:
    """Add a byte to a file: so that none is lost when several processes do."""
    try:
        repository.place.mkdir(parents=True, exist_ok=True)
        with (repository.place / FAILURES).open("ab") as stream:
            stream.write(b".")
    except OSError as error:
        log.error("repository %s: cannot count its failure: %s", repository.name, error)
