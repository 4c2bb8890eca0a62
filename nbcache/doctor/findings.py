"""What a check came to, and a report of many: as text for people, as a document for scripts. Knows no check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

State = Literal["ok", "warning", "broken"]
"""``warning``: it works, with less than it could. ``broken``: loads fail, or will."""


class Finding(msgspec.Struct, frozen=True):
    """One line: what was looked at, how it is, what was seen, and, unless it is ok, what to do."""

    subject: str
    state: State
    message: str
    remedy: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings. ``healthy`` unless one is broken."""

    version: str
    healthy: bool
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, version: str, findings: Iterable[Finding]) -> Report:
        """The report of these findings."""
        found = tuple(findings)
        return cls(version, all(finding.state != "broken" for finding in found), found)


def ok(subject: str, message: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(subject, "ok", message)


def warning(subject: str, message: str, remedy: str) -> Finding:
    """A finding that costs speed or convenience, not results."""
    return Finding(subject, "warning", message, remedy)


def broken(subject: str, message: str, remedy: str) -> Finding:
    """A finding that makes loads fail."""
    return Finding(subject, "broken", message, remedy)


def render_report(report: Report) -> str:
    """Aligned lines, a remedy below each finding that has one, and a count."""
    width = max((len(finding.subject) for finding in report.findings), default=0)
    indent = " " * (len("warning") + 2)
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.state.ljust(len('warning'))}  {finding.subject.ljust(width)}  {finding.message}")
        if finding.remedy:
            lines.append(f"{indent}{' ' * width}  -> {finding.remedy}")
    counts = {state: sum(finding.state == state for finding in report.findings) for state in ("broken", "warning")}
    said = [f"{count} {word}" for count, word in ((counts["broken"], "broken"), (counts["warning"], "to look at")) if count]
    return "\n".join([*lines, "", f"nbcache {report.version}: {', '.join(said) or 'all is well'}"])
