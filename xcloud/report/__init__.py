"""What a person sees of a run, and what a script reads of it.

`Board` keeps the state that the driver's events describe. `LiveView` draws it on a terminal,
`PlainView` writes a line for each thing worth one, `JsonView` writes JSON lines.
"""

from xcloud.report.board import Board
from xcloud.report.folder import job_record, job_summary, status_record, status_view
from xcloud.report.text import (
    closing_lines,
    event_line,
    human_bytes,
    human_clock,
    human_count,
    human_loss,
    human_seconds,
    human_usd,
    round_line,
)
from xcloud.report.views import JsonView, LiveView, PlainView, text_view

__all__ = [
    "Board",
    "JsonView",
    "LiveView",
    "PlainView",
    "closing_lines",
    "event_line",
    "human_bytes",
    "human_clock",
    "human_count",
    "human_loss",
    "human_seconds",
    "human_usd",
    "job_record",
    "job_summary",
    "round_line",
    "status_record",
    "status_view",
    "text_view",
]
