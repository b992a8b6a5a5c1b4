"""Checks that linked files outside docs/ (code, the logbook) exist, and shows such links as paths."""

import logging
import pathlib
import re

logger = logging.getLogger("mkdocs.plugins.saev")
DOCS = pathlib.Path(__file__).parent


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    def shown(link: re.Match[str]) -> str:
        fpath = (DOCS / link[2].partition("#")[0]).resolve()
        if not fpath.exists():  # a warning ends a strict build
            logger.warning("%s: no such file: %s", page, link[2])
        return f"{link[1]} (`{link[2].removeprefix('../')}`)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)", shown, markdown)
