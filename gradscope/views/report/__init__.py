"""A run as one page to open and to send: no other file, and nothing is fetched from anywhere."""

from gradscope.views.report.page import checked_output, report_page, write_report

__all__ = ["checked_output", "report_page", "write_report"]
