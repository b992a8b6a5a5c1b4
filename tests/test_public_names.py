"""The names that notebooks rely on, in a process that imports `saev` and nothing else of it."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

from saev import nn, scorers
from saev.data import config as data_config
from saev.demo import minicub
from saev.nn import config as nn_config
from saev.scorers import config as scorers_config

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = """
import sys
import numpy as np
import saev
assert "torch" not in sys.modules
dpath, shards = sys.argv[1:]

sae = saev.nn.load(f"{dpath}/run/sae.pt")
acts = saev.data.Indexed(shards, layer=23)
x_BD = acts[0]["act"][None]
f_BS = sae.encode(x_BD)
x_hat_BD = sae.decode(f_BS)
assert not sae.training and f_BS.shape == (1, 16) and x_hat_BD.shape == x_BD.shape
assert (acts[5]["image_i"], acts[5]["patch_i"]) == (1, 1) and len(acts) == 12
path, label = acts.images[1]

cub = saev.data.cub.load(f"{dpath}/CUB_200_2011")
N, T = cub.labels_NT.shape
assert N == len(cub.paths_N) == len(cub.is_train_N) == len(cub.class_N) and T == len(cub.attribute_names_T)
assert cub.labels_NT.dtype == bool

ap_KT = saev.protoeval.average_precision(cub.labels_NT[:, :3].astype(np.float32), cub.labels_NT)
assert ap_KT.shape == (3, T) and (np.diag(ap_KT) == 1).all()

scorer = saev.scorers.load(f"{dpath}/scorer.bin")
assert scorer(x_BD).shape == (1, scorer.n_prototypes) == (1, 5)
print("fine")
"""


@pytest.mark.slow
def test_the_designs_notebook_runs(make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=3, n_patches=4, d_vit=8, layers=(11, 23))
    nn.save(
        nn.SparseAutoencoder(nn_config.BatchTopK(d_vit=8, exp_factor=2, top_k=3)), tmp_path / "run" / "sae.pt"
    )
    scorer = scorers.fit(scorers_config.Random(), data_config.Shards(str(dpath), 23), 5)
    scorers.save(scorer, tmp_path / "scorer.bin")
    with pytest.MonkeyPatch.context() as patch:  # the labels matter here, not the photos
        patch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
        minicub.draw(tmp_path / "CUB_200_2011", n_imgs=80)
    command = [sys.executable, "-c", NOTEBOOK, str(tmp_path), str(dpath)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


PACKAGES = ["saev", "saev.codes", "saev.data", "saev.nn", "saev.protoeval", "saev.scorers", "saev.visuals"]


def test_dir_shows_the_names_and_imports_nothing() -> None:
    code = "import sys, saev, saev.codes, saev.nn, saev.data, saev.protoeval, saev.scorers, saev.visuals\n"
    code += "print(*[n for p in sys.argv[1:] for n in dir(sys.modules[p])])\n"
    code += "assert not {'torch', 'numpy'} & sys.modules.keys()"
    command = [sys.executable, "-c", code, *PACKAGES]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    want = {"nn", "load", "save", "SparseAutoencoder", "Indexed", "cub", "average_precision", "fit"}
    assert want <= set(names) and names.count("load") == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_an_editor_sees_the_names_that_are_there(package: str) -> None:
    """The names under `if TYPE_CHECKING` are those of the lazy table, and each is there."""
    fpath = ROOT / package.replace(".", "/") / "__init__.py"
    tree = ast.parse(fpath.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    static = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    module = importlib.import_module(package)
    assert static == set(inspect.getclosurevars(inspect.unwrap(module.__getattr__)).nonlocals["table"])
    assert static <= set(dir(module)) and all(hasattr(module, name) for name in static)


def test_the_package_is_typed() -> None:
    assert (ROOT / "saev" / "py.typed").exists()
