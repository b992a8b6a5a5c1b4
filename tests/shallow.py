"""Vision transformers of a few blocks, under their own names: whatever does not depend on the depth costs less with them."""

import copy
import typing as tp

import open_clip
import pytest
import timm


def towers(patch: pytest.MonkeyPatch, depth: int, **kwargs: tp.Any) -> None:
    """timm's and open_clip's models have `depth` blocks, and those of open_clip hardly a text tower.

    kwargs: further arguments of timm's models.
    """
    create, configs = timm.create_model, open_clip.factory.get_model_config

    def config_of(name: str) -> dict[str, tp.Any] | None:
        found = copy.deepcopy(configs(name))
        if found and isinstance(found["vision_cfg"].get("layers"), int):
            found["vision_cfg"]["layers"] = depth
        if found:
            found["text_cfg"] |= {"layers": 1, "vocab_size": 64}
        return found

    patch.setattr(timm, "create_model", lambda name, **kw: create(name, depth=depth, **kwargs, **kw))
    patch.setattr(open_clip.factory, "get_model_config", config_of)
