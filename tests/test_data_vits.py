"""Every family against its library's own modules, on random weights. B images, L layers, T tokens, D d_vit."""

import pathlib

import PIL.Image
import pytest
import safetensors.torch
import sklearn.datasets
import timm
import torch

from saev import errors
from saev.data import config, images, vits

FAMILIES = {
    "clip": ("clip", "ViT-B-32/openai", 768, 49, 1, 0),
    "siglip": ("siglip", "ViT-B-16-SigLIP/webli", 768, 196, 0, 0),
    "dinov2": ("dinov2", "dinov2_vits14", 384, 256, 1, 0),
    "dinov2 with registers": ("dinov2", "dinov2_vits14_reg", 384, 256, 1, 4),
    "timm": ("timm", "vit_tiny_patch16_224", 192, 196, 1, 0),
    "timm without CLS": ("timm", "vit_base_patch16_siglip_224", 768, 196, 0, 0),
    "timm distilled": ("timm", "deit_tiny_distilled_patch16_224", 192, 196, 1, 1),
    "timm eva": ("timm", "eva02_tiny_patch14_224", 192, 256, 1, 0),
}
"""name -> family, ckpt, d_vit, patches, [CLS] tokens, other prefix tokens."""


@pytest.fixture(scope="session")
def photo() -> PIL.Image.Image:
    """A real photo, not square, odd sizes."""
    return PIL.Image.fromarray(sklearn.datasets.load_sample_images().images[0]).crop(
        (0, 0, 601, 427)
    )


def random(family: str, ckpt: str, **kwargs: object) -> vits.Vit:
    return vits.load(config.Vit(vit_family=family, vit_ckpt=ckpt, vit_weights="random", **kwargs))


def blocks(vit: vits.Vit) -> torch.nn.Module:
    tower = getattr(vit.module, "trunk", vit.module)
    return tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks


@torch.inference_mode()
def hooked(vit: vits.Vit, run: object) -> dict[int, torch.Tensor]:
    """Outputs of the blocks while `run()` runs, by forward hooks."""
    out: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, o, i=i: out.__setitem__(i, o))
        for i, block in enumerate(blocks(vit))
    ]
    run()
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_the_blocks_outputs_in_the_models_own_forward_pass(
    name: str, photo: PIL.Image.Image
) -> None:
    family, ckpt, d_vit, n_patches, n_cls, n_other = FAMILIES[name]
    vit = random(family, ckpt)
    assert (vit.d_vit, vit.n_patches, vit.cls_token) == (d_vit, n_patches, bool(n_cls))
    x_CHW = vit.transform(photo)
    imgs_BCHW = torch.stack([x_CHW, x_CHW.flip(-1)])
    want = hooked(vit, lambda: vit.module(imgs_BCHW))
    assert sorted(want) == list(range(vit.n_blocks))
    layers = (vit.n_blocks - 1, 0, 5)
    with torch.inference_mode():
        acts_BLTD = vit(imgs_BCHW, layers)
    for i, layer in enumerate(layers):
        want_BTD = want[layer]
        want_BTD = torch.cat([want_BTD[:, :n_cls], want_BTD[:, n_cls + n_other :]], dim=1)
        torch.testing.assert_close(acts_BLTD[:, i], want_BTD, rtol=0, atol=0)
    assert not torch.equal(acts_BLTD[0], acts_BLTD[1])


@pytest.mark.parametrize("name", ["clip", "siglip", "timm"])
def test_later_blocks_are_not_run(name: str) -> None:
    vit = random(*FAMILIES[name][:2])
    imgs_BCHW = torch.zeros(1, 3, *vit.transform.size)
    assert sorted(hooked(vit, lambda: vit(imgs_BCHW, (3, 1)))) == [0, 1, 2, 3]


def test_patches_are_in_raster_order() -> None:
    """A change in one 16-pixel square changes that patch's embedding, before any attention, and no other."""
    vit = random("timm", "vit_tiny_patch16_224")
    a_BCHW = torch.zeros(1, 3, 224, 224)
    b_BCHW = a_BCHW.clone()
    b_BCHW[:, :, 3 * 16 : 4 * 16, 5 * 16 : 6 * 16] = 1
    embed = vit.module.patch_embed
    changed = (embed(a_BCHW) != embed(b_BCHW)).any(dim=2)[0].nonzero().flatten().tolist()
    assert changed == [3 * 14 + 5]
    diff_T = (vit(a_BCHW, (0,)) - vit(b_BCHW, (0,))).norm(dim=3)[0, 0]
    assert diff_T[1:].argmax() == 3 * 14 + 5


def test_random_weights_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (random("timm", "vit_tiny_patch16_224", vit_seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [v.module.blocks[0].mlp.fc1.weight for v in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.ckpt_id == "vit_tiny_patch16_224@random:1" != other.ckpt_id


def test_openai_models_use_quick_gelu_and_others_do_not() -> None:
    def gelu(ckpt: str) -> str:
        return type(random("clip", ckpt).module.transformer.resblocks[0].mlp.gelu).__name__

    assert gelu("ViT-B-32/openai") == "QuickGELU"
    assert gelu("ViT-B-32/laion2b_s34b_b79k") == "GELU"


def test_image_size() -> None:
    vit = random("dinov2", "dinov2_vits14", img_size=112)
    assert (
        vit.n_patches == 64 and vit.transform.size == (112, 112) and vit.ckpt_id.endswith("@112px")
    )
    assert random("timm", "vit_tiny_patch16_224", img_size=96).n_patches == 36


def test_transforms_are_the_libraries_own(photo: PIL.Image.Image) -> None:
    import open_clip

    prep = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(), is_train=False
    )
    assert torch.equal(prep(photo), random("clip", "ViT-B-32/openai").transform(photo))
    squash = open_clip.transform.PreprocessCfg(
        mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash"
    )
    prep = open_clip.transform.image_transform_v2(squash, is_train=False)
    assert torch.equal(prep(photo), random("siglip", "ViT-B-16-SigLIP/webli").transform(photo))
    model = timm.create_model("vit_tiny_patch16_224")
    prep = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    assert torch.equal(prep(photo), random("timm", "vit_tiny_patch16_224").transform(photo))


# ---- local weights ----


def test_local_weights_round_trip_and_are_named_by_their_hash(tmp_path: pathlib.Path) -> None:
    source = random("timm", "vit_tiny_patch16_224", vit_seed=5)
    head = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    safetensors.torch.save_file(source.module.state_dict() | head, tmp_path / "w.safetensors")
    torch.save({"state_dict": source.module.state_dict()}, tmp_path / "w.pt")
    imgs_BCHW = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for fpath in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        vit = vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(fpath)))
        torch.testing.assert_close(vit(imgs_BCHW, (11,)), source(imgs_BCHW, (11,)), rtol=0, atol=0)
        assert vit.ckpt_id.startswith("vit_tiny_patch16_224@sha256:")


def test_a_whole_clip_checkpoint_gives_its_image_tower(tmp_path: pathlib.Path) -> None:
    source = random("clip", "ViT-B-32/openai", vit_seed=5)
    state = {f"visual.{k}": v for k, v in source.module.state_dict().items()} | {
        "logit_scale": torch.zeros(())
    }
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    vit = vits.load(config.Vit("clip", "ViT-B-32/openai", str(tmp_path / "clip.safetensors")))
    assert torch.equal(vit.module.conv1.weight, source.module.conv1.weight)


def test_another_position_grid_is_resampled_as_timm_does(tmp_path: pathlib.Path) -> None:
    large = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # 37 x 37
    torch.nn.init.normal_(large.pos_embed)
    safetensors.torch.save_file(large.state_dict(), tmp_path / "w.safetensors")
    vit = vits.load(config.Vit("dinov2", "dinov2_vits14", str(tmp_path / "w.safetensors")))
    want = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    resample = timm.models.vision_transformer.checkpoint_filter_fn
    timm.models.load_checkpoint(want, str(tmp_path / "w.safetensors"), filter_fn=resample)
    torch.testing.assert_close(vit.module.pos_embed, want.pos_embed)


# ---- errors ----


@pytest.mark.parametrize(
    ("family", "ckpt", "match"),
    [
        ("timm", "vit_tinyy", "timm knows no such model"),
        ("timm", "resnet18", "not a vision transformer"),
        ("clip", "ViT-B-32", "wants ARCH/PRETRAINED"),
        ("clip", "ViT-B-32/nope", "open_clip knows no such model .tags of ViT-B-32: openai"),
        ("clip", "RN50/openai", "not a vision transformer"),
        ("dinov2", "dinov2_vitx14", "family dinov2 has dinov2_vits14"),
    ],
)
def test_unknown_models(family: str, ckpt: str, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        random(family, ckpt)


def test_shape_flags_are_checked() -> None:
    with pytest.raises(
        errors.UserError,
        match=r"--d-vit 512: vit_tiny_patch16_224 gives 192 wide. Pass --d-vit 192",
    ):
        random("timm", "vit_tiny_patch16_224", d_vit=512)
    with pytest.raises(
        errors.UserError, match=r"--n-patches-per-img 256: .* gives 196 patches per image"
    ):
        random("timm", "vit_tiny_patch16_224", n_patches_per_img=256)
    assert random("timm", "vit_tiny_patch16_224", d_vit=192, n_patches_per_img=196).d_vit == 192


def test_layers() -> None:
    assert vits.resolve_layers((3, -1, 0), 12) == (3, 11, 0)
    for layers in ((12,), (-13,)):
        with pytest.raises(
            errors.UserError, match=r"the model has 12 blocks. Pass layers from 0 to 11"
        ):
            vits.resolve_layers(layers, 12)
    with pytest.raises(errors.UserError, match="named twice"):
        vits.resolve_layers((11, -1), 12)


def test_weights_that_cannot_be_had(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.UserError, match=r"gone\.pt: cannot be read"):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "gone.pt")))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(errors.UserError, match=r"bad\.safetensors: cannot be read"):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "bad.safetensors")))
    safetensors.torch.save_file(
        {"blocks.0.norm1.weight": torch.zeros(192)}, tmp_path / "few.safetensors"
    )
    with pytest.raises(
        errors.UserError, match=r"does not fit vit_tiny_patch16_224: 1.. tensors are missing"
    ):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "few.safetensors")))


@pytest.mark.parametrize(
    ("family", "ckpt"),
    [
        ("timm", "vit_tiny_patch16_224"),
        ("clip", "ViT-B-32/openai"),
        ("clip", "hf-hub:imageomics/bioclip-2"),
    ],
)
def test_a_hub_out_of_reach(
    family: str, ckpt: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        errors.UserError,
        match=r"cannot be built with weights from 'hub'.*pass a local file as --vit-weights",
    ):
        vits.load(config.Vit(vit_family=family, vit_ckpt=ckpt))


def test_transform_is_recorded_as_plain_values() -> None:
    transform = random("timm", "vit_tiny_patch16_224").transform
    assert images.Transform.from_dict(transform.to_dict()) == transform
