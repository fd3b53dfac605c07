"""A run as one page to open and to send: no other file, and nothing is fetched from anywhere."""

from gradscope.views.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
