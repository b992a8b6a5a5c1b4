"""Stage 3: for each latent, the images that fire it most, with heat maps.

`show` draws heat on one photo; `open` reads a gallery's statistics into data frames.
"""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.visuals.photo import show as show
    from saev.visuals.reader import Gallery as Gallery
    from saev.visuals.reader import open as open  # noqa: A004 (used as saev.visuals.open)
else:
    __getattr__, __dir__ = lazy.attributes(__name__, {"Gallery": "reader", "open": "reader", "show": "photo"})
