"""Images -> ViT -> activation shards -> batches.

`Indexed`, `Ordered` and `Shuffled` read the shards that `python -m saev.data` writes; `cub` reads CUB-200-2011.
"""

from saev import lazy

__getattr__ = lazy.attributes(
    __name__, {"Indexed": "indexed", "Ordered": "ordered", "Shuffled": "shuffled", "cub": ""}
)
