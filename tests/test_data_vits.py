"""Every family against its library's own modules, on random weights. B images, L layers, T tokens, D d_vit."""

import functools
import itertools
import json
import math
import pathlib

import numpy as np
import open_clip
import PIL.Image
import pytest
import shallow
import sklearn.datasets
import timm
import torch
import tyro

from saev import errors
from saev.data import config, images, vits

pytestmark = pytest.mark.slow

FAMILIES = {
    "clip": ("clip", "ViT-B-32/openai", 768, 49, 1, 0),
    "siglip": ("siglip", "ViT-B-16-SigLIP/webli", 768, 196, 0, 0),
    "dinov2": ("dinov2", "dinov2_vits14", 384, 256, 1, 0),
    "dinov2 with registers": ("dinov2", "dinov2_vits14_reg", 384, 256, 1, 4),
    "dinov3": ("dinov3", "dinov3_vits16", 384, 256, 1, 4),
    "timm": ("timm", "vit_tiny_patch16_224", 192, 196, 1, 0),
    "timm without CLS": ("timm", "vit_little_patch16_reg4_gap_256", 320, 256, 0, 4),
    "timm distilled": ("timm", "deit_tiny_distilled_patch16_224", 192, 196, 1, 1),
    "timm eva": ("timm", "eva02_tiny_patch14_224", 192, 256, 1, 0),
}
"""name -> family, ckpt, d_vit, patches, [CLS] tokens, other prefix tokens."""

KINDS = {
    "plain": ("test_vit", 16, 1, 0),
    "registers without CLS": ("test_vit2", 16, 0, 1),
    "relative positions": ("test_vit_relpos", 16, 0, 0),
    "clip": ("vit_xsmall_patch16_clip_224", 16, 1, 0),
    "flexible patches": ("flexivit_small", 16, 1, 0),
    "layer scale": ("deit3_small_patch16_224", 16, 1, 0),
    "distilled": ("deit_tiny_distilled_patch16_224", 16, 1, 1),
    "convolutional stem": ("vit_tiny_r_s16_p8_224", 32, 1, 0),
    "parallel blocks": ("vit_small_patch16_18x2_224", 16, 1, 0),
    "beit": ("beit_base_patch16_224", 16, 1, 0),
    "eva": ("eva02_tiny_patch14_224", 14, 1, 0),
    "rotary": ("vit_small_patch16_rope_mixed_ape_224", 16, 1, 0),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", 16, 1, 0),
    "dinov3 of timm": ("vit_tiny_patch16_dinov3_qkvb", 16, 1, 4),
}
"""kind of timm ViT -> its smallest model, patch side, [CLS] tokens, other prefix tokens."""

PHOTO_SIZES = [(300, 200), (201, 333), (57, 411), (640, 99), (128, 64)]


@pytest.fixture(scope="session")
def photo() -> PIL.Image.Image:
    """A real photo, not square, odd sizes."""
    return PIL.Image.fromarray(sklearn.datasets.load_sample_images().images[0]).crop((0, 0, 601, 427))


DEPTH = 6


@functools.lru_cache(maxsize=10)
def random(family: str, ckpt: str, **kwargs: object) -> vits.Vit:
    """Those of `FAMILIES` and of open_clip have six blocks."""
    cfg = config.Vit(vit_family=family, vit_ckpt=ckpt, vit_weights="random", **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        if family in ("clip", "siglip") or (family, ckpt) in [found[:2] for found in FAMILIES.values()]:
            shallow.towers(patch, DEPTH)
        return vits.load(cfg)


def noise(size: tuple[int, int]) -> PIL.Image.Image:
    """A generated photo: coarse and fine colours."""
    rng = np.random.default_rng(0)
    small = PIL.Image.fromarray(rng.integers(0, 255, (7, 5, 3), np.uint8)).resize(size)
    fine = PIL.Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    return PIL.Image.blend(small, fine, 0.3)


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow.towers(monkeypatch, 2)


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
    assert sorted(want) == list(range(DEPTH)) and vit.n_blocks == DEPTH
    layers = (DEPTH - 1, 0, 3)
    with torch.inference_mode():
        acts_BLTD = vit(imgs_BCHW, layers)
    for i, layer in enumerate(layers):
        want_BTD = want[layer]
        want_BTD = torch.cat([want_BTD[:, :n_cls], want_BTD[:, n_cls + n_other :]], dim=1)
        torch.testing.assert_close(acts_BLTD[:, i], want_BTD, rtol=0, atol=0)
    assert not torch.equal(acts_BLTD[0], acts_BLTD[1])


def test_transforms_are_the_libraries_own(photo: PIL.Image.Image) -> None:
    for name in ("clip", "siglip"):
        vit = random(*FAMILIES[name][:2])
        cfg = open_clip.transform.PreprocessCfg(**vit.module.preprocess_cfg)
        prep = open_clip.transform.image_transform_v2(cfg, is_train=False)
        assert torch.equal(prep(photo), vit.transform(photo))
        assert vit.transform.squash == (name == "siglip")
    vit = random("timm", "vit_tiny_patch16_224")
    prep = timm.data.create_transform(**timm.data.resolve_data_config({}, model=vit.module))
    assert torch.equal(prep(photo), vit.transform(photo))


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
    cfgs = [config.Vit("timm", "vit_tiny_patch16_224", "random", s) for s in (1, 1, 2)]
    first, again, other = (vits.load(cfg) for cfg in cfgs)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not again
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
    assert vit.n_patches == 64 and vit.transform.size == (112, 112) and vit.ckpt_id.endswith("@112px")
    assert random("timm", "vit_tiny_patch16_224", img_size=96).n_patches == 36


# ---- the authors' names ----


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, models in vits.timm.PUBLISHED.items() for n in models.timm_names]
)
def test_published_names_stand_for_timm_models_with_weights(family: str, name: str) -> None:
    timm_name = vits.timm.PUBLISHED[family].timm_names[name]
    assert timm.get_pretrained_cfg(timm_name).hf_hub_id
    with torch.device("meta"):
        model = timm.create_model(timm_name)
    letters = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}
    letters |= {"h": (1280, 32), "7": (4096, 40)}
    size = name.removeprefix("mae_").removeprefix(f"{family}_").removeprefix("vit").strip("_")
    assert (model.embed_dim, len(model.blocks)) == letters[size[0]]
    n_registers = 4 if family == "dinov3" or name.endswith("_reg") else 0
    assert (model.num_prefix_tokens, model.cls_token is None) == (1 + n_registers, False)
    patch = 14 if family == "dinov2" or "huge" in name else 16
    assert model.patch_embed.patch_size == (patch, patch)
    assert ("plus" in name) == ("plus" in timm_name) and ("sat493m" in name) == ("sat493m" in timm_name)


def test_dinov2_is_as_ever() -> None:
    vit = vits.load(config.Vit("dinov2", "dinov2_vits14", "random"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = images.Transform((224, 224), 256, False, "bicubic", mean, std)
    assert vit.transform == want and vit.ckpt_id == "dinov2_vits14@random:0"
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    state = vit.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.usefixtures("two_blocks")
def test_transforms_of_the_published_models() -> None:
    """DINOv3: the authors' 256 / 224, rounded down as they do; the satellite models have their own colours. MAE: timm's."""
    dinov3 = vits.load(config.Vit("dinov3", "dinov3_vits16", "random")).transform
    assert (dinov3.size, dinov3.resize, dinov3.mean[0]) == ((256, 256), 292, 0.485)
    with torch.device("meta"):
        model = timm.create_model(vits.timm.PUBLISHED["dinov3"].timm_names["dinov3_vitl16_sat493m"])
    cfg = config.Vit("dinov3", "dinov3_vitl16_sat493m")
    sat = vits.timm.transform_of(model, (256, 256), 224 / 256, cfg)
    assert sat.mean == (0.430, 0.411, 0.296) and sat.std == (0.213, 0.156, 0.143)
    mae = vits.load(config.Vit("mae", "mae_vit_base_patch16", "random")).transform
    assert (mae.size, mae.resize, mae.mean[0]) == ((224, 224), 248, 0.485)


def test_dinov3_has_the_rounded_periods_of_its_authors_weights() -> None:
    periods = random("dinov3", "dinov3_vits16").module.rope.periods
    plain = timm.create_model("vit_small_patch16_dinov3_qkvb").rope.periods
    assert periods.dtype == torch.float32 and not torch.equal(periods, plain)
    torch.testing.assert_close(periods, plain, rtol=2**-8, atol=0)
    assert torch.equal(periods, periods.bfloat16().float())


# ---- every kind of timm ViT, and inputs that are not square ----


def check_layers_and_grid(vit: vits.Vit, size: tuple[int, int], patch: int, n_cls: int, n_other: int) -> None:
    """Hooks on the model's own forward pass; patch (1, 3) of a 3 x 5 grid is the tenth in raster order."""
    rows, columns = size[0] // patch, size[1] // patch
    assert vit.transform.size == size and vit.grid == (rows, columns)
    assert (vit.n_patches, vit.cls_token) == (rows * columns, bool(n_cls))
    a_BCHW = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    b_BCHW = a_BCHW.clone()
    b_BCHW[:, :, patch : 2 * patch, 3 * patch : 4 * patch] += 3
    want = hooked(vit, lambda: vit.module(a_BCHW))
    layers = tuple(range(vit.n_blocks))[::-1]
    acts_BLTD = vit(a_BCHW, layers)
    for i, layer in enumerate(layers):
        want_BTD = want[layer]
        want_BTD = torch.cat([want_BTD[:, :n_cls], want_BTD[:, n_cls + n_other :]], dim=1)
        assert torch.equal(acts_BLTD[:, i], want_BTD)
    diff_T = (vit(b_BCHW, (0,)) - acts_BLTD[:, -1:]).norm(dim=3)[0, 0, n_cls:]
    assert diff_T.argmax() == columns + 3


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_timm_vit_on_a_wide_input(kind: str) -> None:
    name, patch, n_cls, n_other = KINDS[kind]
    vit = vits.load(config.Vit("timm", name, "random", img_size=(3 * patch, 5 * patch)))
    check_layers_and_grid(vit, (3 * patch, 5 * patch), patch, n_cls, n_other)
    assert vit.ckpt_id == f"{name}@random:0@{3 * patch}x{5 * patch}px"


@pytest.mark.parametrize(("name", "patch"), [("clip", 32), ("siglip", 16)])
def test_open_clip_on_a_wide_input(name: str, patch: int) -> None:
    vit = random(*FAMILIES[name][:2], img_size=(3 * patch, 5 * patch))
    check_layers_and_grid(vit, (3 * patch, 5 * patch), patch, *FAMILIES[name][4:])


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize(
    ("ckpt", "patch", "n_other", "crop_pct"),
    [
        ("dinov2_vits14_reg", 14, 4, 224 / 256),
        ("dinov3_vits16plus", 16, 4, 224 / 256),
        ("mae_vit_base_patch16", 16, 0, 0.9),
    ],
)
def test_published_models_on_a_tall_input(ckpt: str, patch: int, n_other: int, crop_pct: float) -> None:
    size = (8 * patch, 4 * patch)
    vit = vits.load(config.Vit(ckpt.partition("_")[0], ckpt, "random", img_size=size))
    check_layers_and_grid(vit, size, patch, 1, n_other)
    assert vit.transform.resize == tuple(math.floor(n / crop_pct) for n in vit.transform.size)


def test_a_model_that_its_library_made_for_tall_inputs() -> None:
    vit = vits.load(config.Vit("timm", "vit_base_patch16_sapiens2", "random"))
    assert vit.transform.size == (1024, 768) and vit.grid == (64, 48) and vit.n_patches == 3072
    data = timm.data.resolve_data_config({}, model=vit.module)
    prep = timm.data.create_transform(**data)
    assert torch.equal(prep(noise((201, 333))), vit.transform(noise((201, 333))))


@pytest.mark.parametrize("size", [(100, 224), (224, 100), 100])
@pytest.mark.parametrize(
    ("family", "ckpt", "patch", "near"),
    [
        ("timm", "test_vit", 16, 96),
        ("timm", "vit_tiny_r_s16_p8_224", 32, 96),
        ("dinov2", "dinov2_vits14", 14, 98),
    ],
)
def test_sizes_that_are_no_multiple_of_the_patch_size(
    family: str, ckpt: str, patch: int, near: int, size: int | tuple[int, int]
) -> None:
    match = rf"not a multiple of the {patch} x {patch} pixel patches of {ckpt}. Pass --img-size .*{near}"
    with pytest.raises(errors.UserError, match=match):
        random(family, ckpt, img_size=size)


def test_a_size_that_is_no_multiple_in_open_clip() -> None:
    with pytest.raises(errors.UserError, match=r"--img-size 64 100: not a multiple of the 32 x 32"):
        random("clip", "ViT-B-32/openai", img_size=(64, 100))


def test_image_size_flags() -> None:
    def parse(*args: str) -> config.Vit:
        return tyro.cli(config.Vit, args=args)

    assert parse().img_size is None
    assert parse("--img-size", "224").img_size == 224
    assert parse("--img-size", "224", "336").img_size == (224, 336)
    for size in (0, (16, -16)):
        with pytest.raises(errors.UserError, match="--img-size .*: must be at least 1"):
            config.Vit(img_size=size)
    square = random("timm", "test_vit", img_size=(96, 96))
    same = random("timm", "test_vit", img_size=96)
    assert square.ckpt_id == same.ckpt_id == "test_vit@random:0@96px"
    assert square.transform == same.transform


# ---- transforms ----


@pytest.mark.parametrize("size", PHOTO_SIZES)
@pytest.mark.parametrize("target", [(64, 96), (160, 48), (97, 96), (64, 64)])
def test_timm_transforms(size: tuple[int, int], target: tuple[int, int]) -> None:
    model, img, cfg = random("timm", "test_vit").module, noise(size), config.Vit("timm", "test_vit")
    data = timm.data.resolve_data_config({}, model=model)
    modes, pcts, interpolations = ("center", "squash"), (1.0, 0.95, 0.875), ("bicubic", "bilinear")
    for mode, pct, interpolation in itertools.product(modes, pcts, interpolations):
        data |= {"input_size": (3, *target), "crop_mode": mode, "interpolation": interpolation}
        model.pretrained_cfg = model.pretrained_cfg | data
        got = vits.timm.transform_of(model, target, pct, cfg)(img)
        assert torch.equal(got, timm.data.create_transform(**data | {"crop_pct": pct})(img))


@pytest.mark.parametrize("size", PHOTO_SIZES)
@pytest.mark.parametrize("target", [(64, 96), (160, 48), (97, 96), (64, 64)])
def test_open_clip_transforms(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Also where open_clip forgets the interpolation, in its cover resize."""
    for mode, interpolation in itertools.product(("shortest", "squash"), ("bicubic", "bilinear")):
        prep = open_clip.transform.PreprocessCfg(size=target, resize_mode=mode, interpolation=interpolation)
        got = vits.open_clip.transform_of(vars(prep), config.Vit())(noise(size))
        want = open_clip.transform.image_transform_v2(prep, is_train=False)(noise(size))
        assert torch.equal(got, want)


def test_crop_modes_that_pad_are_refused() -> None:
    model = random("timm", "test_vit").module
    model.pretrained_cfg = model.pretrained_cfg | {"crop_mode": "border"}
    with pytest.raises(errors.UserError, match="crop mode 'border' is not supported"):
        vits.timm.transform_of(model, None, None, config.Vit("timm", "test_vit"))
    prep = vars(open_clip.transform.PreprocessCfg(resize_mode="longest"))
    with pytest.raises(errors.UserError, match="resize mode 'longest' is not supported"):
        vits.open_clip.transform_of(prep, config.Vit())


# ---- autocast ----


@pytest.mark.parametrize("name", ["clip", "timm", "dinov3"])
def test_autocast_is_close_and_named(name: str) -> None:
    family, ckpt = FAMILIES[name][:2]
    exact = random(family, ckpt, img_size=(96, 160))
    vit = random(family, ckpt, img_size=(96, 160), autocast="bfloat16")
    assert vit.ckpt_id == f"{ckpt}@random:0@96x160px@bf16" == exact.ckpt_id + "@bf16"
    imgs_BCHW = torch.randn(2, 3, *vit.transform.size, generator=torch.Generator().manual_seed(0))
    layers = (0, vit.n_blocks - 1)
    got, want = vit(imgs_BCHW, layers), exact(imgs_BCHW, layers)
    assert got.dtype == want.dtype == torch.float32 and not torch.equal(got, want)
    assert (got - want).norm() < 0.02 * want.norm()
    with torch.autocast("cpu", torch.bfloat16):  # somebody else's
        torch.testing.assert_close(exact(imgs_BCHW, layers), want, rtol=0, atol=0)


# ---- errors ----


@pytest.mark.parametrize(
    ("family", "ckpt", "match"),
    [
        ("timm", "vit_tinyy", "timm knows no such model"),
        ("timm", "resnet18", "not a vision transformer"),
        ("timm", "cait_xxs24_224", "not a vision transformer whose blocks all hold one token per"),
        ("timm", "convit_tiny", "not a vision transformer"),
        ("timm", "xcit_nano_12_p8_224", "not a vision transformer"),
        ("timm", "hiera_tiny_224", "not a vision transformer"),
        ("timm", "samvit_base_patch16_224", "not a vision transformer"),
        ("timm", "naflexvit_base_patch16_gap", "not a vision transformer"),
        ("timm", "swin_tiny_patch4_window7_224", "not a vision transformer"),
        ("clip", "ViT-B-32", "wants ARCH/PRETRAINED"),
        ("clip", "ViT-B-32/nope", "open_clip knows no such model .tags of ViT-B-32: openai"),
        ("clip", "RN50/openai", "not a vision transformer"),
        ("dinov2", "dinov2_vitx14", "family dinov2 has dinov2_vits14, dinov2_vitb14"),
        ("dinov3", "dinov2_vits14", "family dinov3 has dinov3_vits16, .*dinov3_vit7b16,"),
        ("mae", "vit_base_patch16_224", "family mae has mae_vit_base_patch16,"),
    ],
)
def test_unknown_models(family: str, ckpt: str, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        random(family, ckpt)


def test_shape_flags_are_checked() -> None:
    with pytest.raises(
        errors.UserError, match=r"--d-vit 512: vit_tiny_patch16_224 gives 192 wide. Pass --d-vit 192"
    ):
        random("timm", "vit_tiny_patch16_224", d_vit=512)
    with pytest.raises(errors.UserError, match=r"--n-patches-per-img 256: .* gives 196 patches per image"):
        random("timm", "vit_tiny_patch16_224", n_patches_per_img=256)
    assert random("timm", "vit_tiny_patch16_224", d_vit=192, n_patches_per_img=196).d_vit == 192


def test_layers() -> None:
    assert vits.resolve_layers((3, -1, 0), 12) == (3, 11, 0)
    for layers in ((12,), (-13,)):
        with pytest.raises(errors.UserError, match=r"the model has 12 blocks. Pass layers from 0 to 11"):
            vits.resolve_layers(layers, 12)
    with pytest.raises(errors.UserError, match="named twice"):
        vits.resolve_layers((11, -1), 12)


@pytest.mark.parametrize(
    ("family", "ckpt", "remedy"),
    [
        ("timm", "vit_tiny_patch16_224", "pass a local file as --vit-weights"),
        ("clip", "ViT-B-32/openai", "pass a local file as --vit-weights"),
        ("clip", "hf-hub:imageomics/bioclip-2", "pass --vit-ckpt local-dir:FOLDER"),
    ],
)
def test_a_hub_out_of_reach(
    family: str, ckpt: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(errors.UserError, match=rf"cannot be built with weights from 'hub'.*{remedy}"):
        vits.load(config.Vit(vit_family=family, vit_ckpt=ckpt))


def test_blocks_whose_tokens_are_not_what_is_recorded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else a model that looks like a ViT does: fewer tokens, a grid of tokens, tokens in another order."""
    own = timm.models.VisionTransformer.forward_intermediates
    monkeypatch.setattr(
        timm.models.VisionTransformer,
        "forward_intermediates",
        lambda *args, **kwargs: [(p.flip(1), x) for p, x in own(*args, **kwargs)],
    )
    with pytest.raises(errors.UserError, match="not a vision transformer whose blocks"):
        vits.load(config.Vit("timm", "test_vit", "random"))
    monkeypatch.undo()
    block = timm.models.vision_transformer.Block
    own_block = block.forward
    for wrong in (lambda x_BTD: x_BTD[:, :-1], lambda x_BTD: x_BTD[:, None]):
        monkeypatch.setattr(block, "forward", lambda *args, f=wrong: f(own_block(*args)))
        with pytest.raises(errors.UserError, match="not a vision transformer whose blocks"):
            vits.load(config.Vit("timm", "test_vit", "random"))


def test_transform_is_recorded_as_plain_values() -> None:
    transform = random("timm", "vit_tiny_patch16_224").transform
    assert images.Transform.from_dict(transform.to_dict()) == transform
    assert json.loads(json.dumps(transform.to_dict())) == {
        "size": [224, 224],
        "resize": 248,
        "squash": False,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
