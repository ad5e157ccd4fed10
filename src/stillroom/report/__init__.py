"""report.html: what was kept and what it cost, on one page, from the stages' files alone."""

from stillroom.report.page import write_report

__all__ = ["write_report"]
