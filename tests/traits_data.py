"""A small experiment whose gallery gets traits: planted activations, CUB's files, photos, an SAE, real stages.

N images, P patches, D d_vit, T traits, S latents.
"""

import dataclasses
import pathlib
import typing as tp

import numpy as np
import PIL.Image
import torch

from saev import nn
from saev.data import config as data_config
from saev.formats import shards
from saev.nn import config as nn_config
from saev.protoeval import config
from saev.scorers import config as scorers_config
from saev.visuals import collect
from saev.visuals import config as visuals_config

N, P, D, S = 48, 4, 8, 16
NAMES = [
    "has_wing_color::blue",
    "has_wing_pattern::spotted",
    "has_bill_shape::</script><script>document.title='hacked'</script>",
    "has_size::most_have_it",
    "has_crown_color::in_no_train_image",
]
PATHS = [f"{i % 3 + 1:03}.Bird_{'ABC'[i % 3]}/bird {i:03}.jpg" for i in range(N)]
IS_TRAIN_N = np.arange(N) % 2 == 0


def labels() -> np.ndarray:
    """(N, T). The last trait is in test images only."""
    rng = np.random.default_rng(0)
    labels_NT = rng.random((N, len(NAMES))) < [0.3, 0.4, 0.3, 0.8, 0.3]
    labels_NT[IS_TRAIN_N, -1] = False
    return labels_NT


@dataclasses.dataclass(frozen=True)
class Made:
    root: pathlib.Path
    cfgs: list[config.ProtoEval]
    """An SAE, random activations and k-means."""
    visuals: visuals_config.Visuals
    acts_NPD: np.ndarray

    @property
    def gallery(self) -> pathlib.Path:
        return pathlib.Path(self.visuals.dump_to)


def make(root: pathlib.Path, **more: tp.Any) -> Made:
    """Dumps, trains nothing, makes the gallery. `more` changes the config of protoeval."""
    acts_NPD = _activations()
    data = data_config.Shards(dump(root / "dump", acts_NPD), 3)
    _write_cub(root / "CUB")
    _save_sae(root / "run" / "sae.pt")
    cfgs = [
        config.ProtoEval(
            scorer=scorer,
            cub_root=str(root / "CUB"),
            train_data=data,
            n_prototypes=(4, 12),
            n_train=(8, -1),
            n_boot=0,
            gallery=str(root / "gallery"),
            force=True,  # so few labels are implausible
            dump_to=str(root / "results"),
            scorers_to=str(root / "scorers"),
            device="cpu",
            **more,
        )
        for scorer in (
            scorers_config.Random(),
            scorers_config.Sae(str(root / "run" / "sae.pt")),
            scorers_config.KMeans(n_samples=40, n_iters=2),
        )
    ]
    visuals = visuals_config.Visuals(
        images=data_config.Cub200(str(root / "CUB")),
        ckpt=str(root / "run" / "sae.pt"),
        data=data,
        dump_to=str(root / "gallery"),
        n_images=2,
        n_group=1,
        image_view=4,
        device="cpu",
    )
    collect.main(visuals)
    return Made(root, cfgs, visuals, acts_NPD)


def _activations() -> np.ndarray:
    """Patch t % P of an image with trait t is large in dimension t. The image's [CLS] token is huge everywhere."""
    acts_NPD = np.random.default_rng(1).standard_normal((N, P, D)).astype(np.float32)
    for n, t in zip(*np.nonzero(labels()), strict=True):
        acts_NPD[n, t % P, t] += 3
    return acts_NPD


def dump(dump_to: pathlib.Path, acts_NPD: np.ndarray) -> str:
    """Writes shards with a [CLS] token that is unlike the patches. Returns their directory."""
    cls_N1D = 9 + np.random.default_rng(2).standard_normal((N, 1, D)).astype(np.float32)
    acts_NLTD = np.concatenate([cls_N1D, acts_NPD], axis=1)[:, None]
    data: dict[str, object] = {"root": "/gone", "__class__": "Cub200"}
    metadata = shards.Metadata("timm", "planted", (3,), P, True, D, N, 20 * (P + 1), data)
    records = [shards.Record(path, path.partition("/")[0]) for path in PATHS]
    out = shards.ShardDir.create(dump_to, metadata, records, {})
    for shard_i in range(metadata.n_shards):
        images = metadata.imgs_in(shard_i)
        with out.writing(shard_i) as writer:
            writer.write(np.ascontiguousarray(acts_NLTD[images.start : images.stop]))
    return str(out.dpath)


def _write_cub(root: pathlib.Path) -> None:
    (root / "attributes").mkdir(parents=True)
    pairs = np.ndenumerate(labels())
    files = {
        "images.txt": [f"{i} {path}" for i, path in enumerate(PATHS, 1)],
        "train_test_split.txt": [f"{i} {int(is_train)}" for i, is_train in enumerate(IS_TRAIN_N, 1)],
        "image_class_labels.txt": [f"{i + 1} {i % 3 + 1}" for i in range(N)],
        "attributes/attributes.txt": [f"{t} {name}" for t, name in enumerate(NAMES, 1)],
        "attributes/image_attribute_labels.txt": [f"{i + 1} {t + 1} {int(y)} 4 1.0" for (i, t), y in pairs],
    }
    for name, lines in files.items():
        (root / name).write_text("\n".join(lines) + "\n")
    for i, path in enumerate(PATHS):
        fpath = root / "images" / path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (60, 40), (5 * i, 100, 50)).save(fpath)


def _save_sae(fpath: pathlib.Path) -> None:
    """Latents d and D + d are the positive part of dimension d, from 1 and from 2 on. The 5th never fires."""
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=S // D))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D).repeat(1, S // D))
        sae.b_enc.copy_(-torch.arange(1, S // D + 1).repeat_interleave(D))
        sae.b_enc[5] = -1e6
    nn.save(sae.eval(), fpath)


def codes(acts_NPD: np.ndarray) -> np.ndarray:
    """The SAE's codes (N, P, S) by hand."""
    f_NPS = np.concatenate([np.maximum(acts_NPD - 1, 0), np.maximum(acts_NPD - 2, 0)], axis=2)
    f_NPS[:, :, 5] = 0
    return f_NPS
