"""Stage 3: codes of patches and images in files, for other tools. `open` reads them without torch."""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.codes.reader import Codes as Codes
    from saev.codes.reader import open as open  # noqa: A004 (used as saev.codes.open)
else:
    __getattr__, __dir__ = lazy.attributes(__name__, {"Codes": "reader", "open": "reader"})
