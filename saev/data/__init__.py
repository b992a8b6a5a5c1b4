"""Images -> ViT -> activation shards -> batches.

`Activations` and the loaders `Indexed`, `Ordered` and `Shuffled` read shards; `cub` reads CUB-200-2011;
`vits.load(config.Vit(...))` loads a ViT.
"""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.data import config as config
    from saev.data import cub as cub
    from saev.data import vits as vits
    from saev.data.activations import Activations as Activations
    from saev.data.indexed import Indexed as Indexed
    from saev.data.ordered import Ordered as Ordered
    from saev.data.shuffled import Shuffled as Shuffled
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "Activations": "activations",
            "Indexed": "indexed",
            "Ordered": "ordered",
            "Shuffled": "shuffled",
            **dict.fromkeys(("config", "cub", "vits"), ""),
        },
    )
