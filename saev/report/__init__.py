"""Reporting shared by the stages: frames as files, tables, charts and figures."""
