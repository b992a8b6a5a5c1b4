"""What the commands that convert other libraries' SAEs share. D d_vit, S latents."""

import collections.abc
import pathlib
import typing as tp

import beartype
import torch
import tyro
from torch import Tensor

from saev import cli, errors, fields
from saev.formats import jsonfile
from saev.nn import config, sae

Export = collections.abc.Callable[[sae.SparseAutoencoder, pathlib.Path], None]


@torch.no_grad()
@beartype.beartype
def build(
    cfg: config.Sae,
    parts: dict[str, Tensor],
    where: str,
    *,
    subtracts_b_dec: bool = True,
    threshold: Tensor | None = None,
) -> sae.SparseAutoencoder:
    """The SAE of these W_enc (D, S), b_enc, W_dec (S, D) and b_dec, in evaluation mode.

    Args:
        where: the file, in an error message.
        subtracts_b_dec: does its encoder see x - b_dec (as ours does), or x? Then b_enc + b_dec W_enc makes up for it.
        threshold: (S,), one for each latent, or (), one for all, in units of pre-activations; below 0 it is 0.

    Raises:
        UserError: a weight is NaN or infinite in float32.
    """
    model = sae.SparseAutoencoder(cfg)
    if not subtracts_b_dec:
        parts = {**parts, "b_enc": parts["b_enc"] + parts["b_dec"] @ parts["W_enc"]}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(model, name).copy_(parts[name])
    if threshold is not None:
        model.architecture.set_threshold(model, threshold)
    return sae.ready(model, where)


@beartype.beartype
def read_json(fpath: pathlib.Path, library: str) -> dict[str, tp.Any]:
    """The library's config.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    remedy = f"Pass a folder that {library} saved."
    try:
        return jsonfile.read(fpath, dict[str, tp.Any], remedy)
    except OSError as err:
        raise unreadable(fpath, err, library) from err


@beartype.beartype
def unreadable(fpath: pathlib.Path, err: Exception, library: str) -> errors.UserError:
    return errors.UserError(
        f"{fpath} cannot be read ({errors.first_line(err)}). Pass a folder that {library} saved."
    )


@beartype.beartype
def command(
    module: str,
    library: str,
    load: collections.abc.Callable[[str], sae.SparseAutoencoder],
    export: Export | None = None,
) -> None:
    """`python -m MODULE load FOLDER CHECKPOINT`, and `export CHECKPOINT FOLDER` where the format can be written."""
    verbs = ("export", "load") if export else ("load",)
    what = "export CHECKPOINT FOLDER, or load FOLDER CHECKPOINT." if export else "load FOLDER FILE."
    verb, source, target = cli.parse(
        tp.Annotated[
            tuple[tp.Literal[verbs], str, str],
            tyro.conf.arg(name="args", help=what, metavar=f"{{{','.join(verbs)}}} FROM TO"),
            tyro.conf.Positional,
        ],
        prog=f"python -m {module}",
        description=f"Converts SAEs of {library}'s on-disk format.",
    )
    target = fields.path(target)
    if verb == "export" and export:
        export(sae.load(source), target)
    elif target.exists():
        raise errors.UserError(f"{target} exists already. Pass a new file.")
    else:
        sae.save(load(source), target)
    print(target)
