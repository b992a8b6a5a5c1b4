"""An architecture is one file. D d_vit, S latents."""

import pathlib
import re

import pytest

from saev import errors, nn
from saev.compat import saelens
from saev.nn import architectures, config
from saev.nn.architectures import base

ROOT = pathlib.Path(__file__).parent.parent
NAMES = re.compile(r"ReLU|Relu(?![a-z])|TopK")
"""Also as part of a longer name: AutoEncoderTopK, ReluStep."""
MAY_NAME_THEM = {
    "saev/nn/config.py": "the configs and their union",
    "saev/compat/saelens.py": "converts",
    "saev/compat/dictionary_learning.py": "converts",
    "saev/compat/sparsify.py": "converts",
    "saev/compat/upstream.py": "converts",
}


def sites() -> list[str]:
    """Lines of the package that name an architecture, outside its own file."""
    out = []
    for fpath in [*ROOT.glob("saev/**/*.py"), *ROOT.glob("*.py")]:
        name = fpath.relative_to(ROOT).as_posix()
        if name not in MAY_NAME_THEM and not name.startswith("saev/nn/architectures/"):
            lines = enumerate(fpath.read_text().splitlines(), 1)
            out += [f"{name}:{i}: {line.strip()}" for i, line in lines if NAMES.search(line)]
    return out


def test_no_other_module_names_an_architecture() -> None:
    assert sites() == [], "Ask `sae.architecture` instead: docs/architectures.md"


def test_the_shared_parts_of_the_package_name_none_either() -> None:
    assert not NAMES.search((ROOT / "saev/nn/architectures/base.py").read_text())
    assert not NAMES.search((ROOT / "saev/nn/architectures/__init__.py").read_text())


@pytest.mark.parametrize("cls", config.BY_NAME.values(), ids=config.BY_NAME)
def test_each_config_has_an_architecture_in_a_file_of_its_own(cls: type[config.Architecture]) -> None:
    found = type(architectures.of(cls(d_vit=4)))
    assert found.__name__ == cls.__name__
    others = {arch.__module__ for arch in base.REGISTRY.values() if arch is not found}
    assert found.__module__ not in others


def test_default_learning_rates() -> None:
    """4e-4 for ReLU; for the others 4e-3, times sqrt(1,000 / steps) above 1,000 steps."""
    for cls in config.BY_NAME.values():
        want = [4e-4] * 3 if cls is config.Relu else [4e-3, 4e-3, 2e-3]
        assert [cls().default_lr(n) for n in (10, 1000, 4000)] == pytest.approx(want)


def test_a_converter_refuses_an_architecture_that_it_does_not_know(tmp_path: pathlib.Path) -> None:
    sae = nn.SparseAutoencoder(config.Relu(d_vit=4))
    sae.cfg = config.Architecture(d_vit=4)
    with pytest.raises(errors.UserError, match="SAELens has no Architecture. It cannot be exported"):
        saelens.export(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()
