"""Reporting shared by training and protoeval: frames as files, tables and charts."""
