"""Importing this makes all functions of saev, if it is imported later, check their arguments' types and shapes."""

import checked

checked.install("saev")
