"""Opens the activations of a group of scorers. Each shard directory is opened once."""

import collections.abc
import typing as tp

from saev.data import activations
from saev.data import config as data_config
from saev.protoeval import config


class Opened(tp.NamedTuple):
    train: activations.Activations
    test: activations.Activations
    fit: dict[data_config.Shards, activations.Activations]
    """The activations of each --fit-data."""

    def of(self, split: config.Split) -> activations.Activations:
        return self.train if split == "train" else self.test


def open_all(cfgs: collections.abc.Sequence[config.ProtoEval]) -> Opened:
    """Opens the train, test and fit activations of configs that share the first two.

    Raises:
        UserError: bad shards; different ViTs or layers, or train and test tokens; or layer "all".
    """
    is_open: dict[data_config.Shards, activations.Activations] = {}

    def opened(data: data_config.Shards, flag: str) -> activations.Activations:
        if data not in is_open:
            is_open[data] = activations.Activations(data, flag, is_open.values())
            is_open[data].only_layer("protoeval compares")
        return is_open[data]

    train = opened(cfgs[0].train_data, "--train-data")
    test = opened(cfgs[0].test, "--test-data")
    fit = {c.fit_data: opened(c.fit_data, "--fit-data") for c in cfgs if c.fit_data.shard_root}
    train.space.check_same(test.space, whose=train.given, flag=test.given)
    for acts in fit.values():
        train.space.check_same(acts.space, whose=train.given, flag=acts.given, patches=False)
    return Opened(train, test, fit)
