"""Sweep files and the flags that win over them."""

import dataclasses
import os
import pathlib
import time

import inprocess
import pytest

from saev import cli, errors, launch, sweeps
from saev.data import config as data_config
from saev.demo import config as demo_config
from saev.formats import tomlfile
from saev.nn import config as nn_config
from saev.protoeval import config as protoeval_config
from saev.scorers import config as scorers_config
from saev.training import config
from saev.visuals import config as visuals_config


@pytest.fixture
def parse(tmp_path: pathlib.Path):
    """parse(toml, args, cls) -> configs."""

    def run(toml: str, args: str = "", cls: type = config.Train) -> list:
        (tmp_path / "x.toml").write_text(toml)
        return sweeps.parse(cls, "", ["--sweep", str(tmp_path / "x.toml"), *args.split()])

    return run


def test_no_sweep_is_one_config() -> None:
    (cfg,) = sweeps.parse(config.Train, "", ["--lr", "0.5", "sae:relu", "--sae.d-vit", "7"])
    assert cfg.lr == 0.5 and cfg.sae == nn_config.Relu(d_vit=7)


def test_lists_are_crossed_in_file_order(parse) -> None:
    cfgs = parse("lr = [1e-4, 1e-3]\nseed = 3\n[sae]\ntop_k = [8, 16]\n[data]\nlayer = 5")
    assert [(c.lr, c.sae.top_k) for c in cfgs] == [(1e-4, 8), (1e-4, 16), (1e-3, 8), (1e-3, 16)]
    assert {(c.seed, c.data.layer, type(c.sae)) for c in cfgs} == {(3, 5, nn_config.BatchTopK)}


def test_tables_vary_together(parse) -> None:
    toml = """
    seed = [0, 1]
    [[sae]]
    type = "top-k"
    top_k = [8, 16]
    [[sae]]
    type = "relu"
    sparsity_coeff = 1e-3
    """
    cfgs = parse(toml)
    want = [nn_config.TopK(top_k=8), nn_config.TopK(top_k=16), nn_config.Relu(sparsity_coeff=1e-3)]
    assert [(c.seed, c.sae) for c in cfgs] == [(s, sae) for s in (0, 1) for sae in want]


def test_paired_parameters_of_the_top_level(parse) -> None:
    cfgs = parse("[[paired]]\nlr = 1e-4\nn_lr_warmup = 500\n[[paired]]\nlr = 1e-3\nn_lr_warmup = 50")
    assert [(c.lr, c.n_lr_warmup) for c in cfgs] == [(1e-4, 500), (1e-3, 50)]


def test_a_list_for_a_list_parameter_is_its_value(parse) -> None:
    cls = protoeval_config.ProtoEval
    assert [c.n_train for c in parse("n_train = [16, -1]", cls=cls)] == [(16, -1)]
    assert [c.n_train for c in parse("n_train = [[16], [64, -1]]", cls=cls)] == [(16,), (64, -1)]


def test_a_list_for_a_nested_list_parameter_is_its_value(parse) -> None:
    cfgs = parse("[data]\nshard_root = 'a'\nmore_roots = ['b', 'c']")
    assert [c.data.more_roots for c in cfgs] == [("b", "c")]
    cfgs = parse("[data]\nshard_root = 'a'\nmore_roots = [['b', 'c'], []]\nlayer = [1, 2]")
    assert [(c.data.more_roots, c.data.layer) for c in cfgs] == [
        (("b", "c"), 1),
        (("b", "c"), 2),
        ((), 1),
        ((), 2),
    ]


def test_typed_flags_win(parse) -> None:
    cfgs = parse("lr = [1e-4, 1e-3]\n[sae]\ntop_k = [8, 16]", "--lr 0.5 sae:top-k --sae.top-k 4")
    assert cfgs == [config.Train(lr=0.5, sae=nn_config.TopK(top_k=4), sweep=cfgs[0].sweep)]
    cfgs = parse("n_hours = 3\nslurm_acct = 'A'\nlr = 1", "--slurm-acct B")
    assert (cfgs[0].slurm.n_hours, cfgs[0].slurm.slurm_acct, cfgs[0].lr) == (3.0, "B", 1.0)


@pytest.mark.parametrize("typed", ["--sae.d-sae 100", "--sae.exp-factor=5", "--sae.exp_factor 5"])
def test_a_typed_size_replaces_the_files_in_either_form(parse, typed: str) -> None:
    for toml in ("exp_factor = [8, 16]", "d_sae = [80, 160]", "d_vit = 20\nexp_factor = 8"):
        (cfg,) = parse(f'[sae]\ntype = "relu"\n{toml}', f"sae:relu {typed}")
        assert cfg.sae.sized(20).d_sae == 100


def test_a_file_may_sweep_the_number_of_latents(parse) -> None:
    cfgs = parse('[sae]\ntype = "top-k"\nd_sae = [100, 200]')
    assert [cfg.sae.sized(7).d_sae for cfg in cfgs] == [100, 200]
    with pytest.raises(errors.UserError, match="x.toml: --sae.exp-factor 4 and --sae.d-sae 100"):
        parse('[sae]\ntype = "top-k"\nd_sae = 100\nexp_factor = 4')


def test_the_typed_subcommand_takes_the_files_keys(parse) -> None:
    cfgs = parse("[sae]\nsparsity_coeff = [1e-4, 1e-3]", "sae:relu --sae.d-vit 9")
    assert [c.sae for c in cfgs] == [nn_config.Relu(d_vit=9, sparsity_coeff=v) for v in (1e-4, 1e-3)]


BAD = {
    "top_q = 3": "unknown key 'top_q'. Valid keys: sae, objective, data",
    "learning_rate = 3": "unknown key 'learning_rate'",
    "slurm_act = 'x'": "unknown key 'slurm_act'. Perhaps you meant 'slurm_acct'",
    "[sae]\ntopk = 3": "unknown key 'sae.topk'. Perhaps you meant 'sae.top_k'. Valid keys: sae.d_vit",
    "[sea]\ntopk = 3": "unknown key 'sea'. Perhaps you meant 'sae'",
    "sae = 3": "sae must be a table",
    "lr = 'fast'": "lr = 'fast': must be float",
    "seed = 1.5": "seed = 1.5: must be int, not float",
    "dry_run = 'yes'": "dry_run = 'yes': must be bool",
    "[sae]\ntop_k = [8, '9']": "sae.top_k = '9': must be int, not str",
    "[sae]\ntop_k = 0": "--sae.top-k 0: must be at least 1",
    "lr = -1.0": "--lr -1.0: must be more than 0",
    "lr = nan": "--lr nan: must be more than 0",
    "lr = []": "lr is an empty list",
    "[sae]\ntop_k = []": "sae.top_k is an empty list",
    "[[sae]]\ntype = 'topk'": "sae.type = 'topk': must be one of relu, top-k, batch-top-k",
    "lr = ": "not valid TOML",
    "lr = " + "[" * 100_000: "not valid TOML: too deeply nested",
    "seed = " + "9" * 5000: "not valid TOML",
    "seed = 1e16": "seed = 1e\\+16: must be int, not float",
    "seed = 1e400": "seed = inf: must be int, not float",
    "lr = 1" + "0" * 400: "lr = 10*: must be float",
    'ckpt_to = "a\\u0000b"': "--ckpt-to .* cannot hold the character NUL",
    'ckpt_to = "$NO_SUCH_VARIABLE/x"': r"--ckpt-to \$NO_SUCH_VARIABLE/x: the environment variable",
    "[[paired]]\n[[paired.x]]\n": "unknown key 'x'",
    "paired = [1]": "paired must be a table",
    "paired = []": "paired is an empty list",
    "sae = []": "sae is an empty list",
    "[sae]\ntype = {a = 1}": "sae.type = {'a': 1}: must be one of relu, ",
    "lr = [1.0, 2.0]\n[[paired]]\nlr = 3.0": r"lr is given twice: inside and outside \[\[paired\]\]",
    "lr = {a = 1}": "lr = {'a': 1}: must be float",
    "[n_hours]\na = 1": "n_hours = {'a': 1}: must be float, not dict",
    "seed = true": "seed = True: must be int, not bool",
    "[sae]\nd_vit = 'x'": "sae.d_vit = 'x': must be int",
    "[data]\npatches = 'img'": "data.patches = 'img': must be one of 'image', 'cls', 'all'",
    "[sae]\nsparsity_coeff = 1e-3": "unknown key 'sae.sparsity_coeff'. It belongs to type relu or jump-relu. Valid keys: .*sae.type",
    "n_gpus = [0, 1]": "n_gpus varies, but a sweep is one job array",
}


@pytest.mark.parametrize("toml", BAD)
def test_mistakes_are_one_line_with_the_file(parse, toml: str) -> None:
    with pytest.raises(errors.UserError, match=rf"x\.toml: .*{BAD[toml]}") as err:
        parse(toml)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("toml", ["n_train = 16", "n_train = [[16], 64]", "n_train = [true]"])
def test_a_list_parameter_wants_a_list(parse, toml: str) -> None:
    with pytest.raises(errors.UserError, match=r"x\.toml: n_train = .*: must be a list of int\.$"):
        parse(toml, cls=protoeval_config.ProtoEval)


def test_every_item_of_a_list_is_checked(parse) -> None:
    """beartype looks at one item, drawn at random."""
    for position in range(20):
        items = ["16"] * position + ["'x'"] + ["16"] * (19 - position)
        with pytest.raises(errors.UserError, match="must be a list of int"):
            parse(f"n_train = [{', '.join(items)}]", cls=protoeval_config.ProtoEval)


def test_paired_entries_may_hold_tables(parse) -> None:
    toml = "[[paired]]\nlr = 1e-4\n[paired.sae]\ntop_k = [8, 16]\n[[paired]]\nlr = 1e-3\n[paired.sae]\ntop_k = 32"
    assert [(c.lr, c.sae.top_k) for c in parse(toml)] == [(1e-4, 8), (1e-4, 16), (1e-3, 32)]


def test_a_typed_flag_of_the_files_type_needs_no_subcommand(parse) -> None:
    cfgs = parse("[[sae]]\ntype = 'relu'\n[[sae]]\ntype = 'top-k'", "--sae.d-vit 4 --n-hours 2")
    assert [c.sae for c in cfgs] == [nn_config.Relu(d_vit=4), nn_config.TopK(d_vit=4)]
    assert {c.slurm.n_hours for c in cfgs} == {2.0}


def test_a_value_that_looks_like_a_subcommand_is_none(parse) -> None:
    (cfg,) = parse("[[sae]]\ntype = 'top-k'", "--ckpt-to sae:x")
    assert cfg.ckpt_to == "sae:x" and cfg.sae == nn_config.TopK()


@pytest.mark.slow
def test_a_hundred_configurations_parse_quickly(parse) -> None:
    start_s = time.process_time()
    toml = f"seed = {list(range(10))}\nlr = {[1e-5 * i for i in range(1, 11)]}"
    assert len(parse(toml, "sae:relu")) == 100
    assert time.process_time() - start_s < 10


def test_a_type_against_the_typed_subcommand(parse) -> None:
    with pytest.raises(
        errors.UserError, match="sae.type is 'top-k', but the command line has sae:relu. Drop one"
    ):
        parse("[[sae]]\ntype = 'top-k'", "sae:relu")


def test_missing_file() -> None:
    with pytest.raises(errors.UserError, match=r"gone\.toml: no such file"):
        sweeps.parse(config.Train, "", ["--sweep", "gone.toml"])


UNIONS = [
    *(("train.py", "sae", c) for c in (nn_config.Relu, nn_config.TopK, nn_config.BatchTopK)),
    *(
        ("protoeval.py", "scorer", c)
        for c in (scorers_config.Random, scorers_config.KMeans, scorers_config.Pca, scorers_config.Sae)
    ),
    *(("visuals.py", "images", c) for c in (data_config.ImageFolder, data_config.Cub200)),
]


@pytest.mark.parametrize(("program", "field", "cls"), UNIONS)
def test_subcommand_names_are_tyros(program: str, field: str, cls: type) -> None:
    done = inprocess.run(program, "--dry-run", f"{field}:{sweeps.subcommand_name(cls)}")
    assert done.returncode == 0 and f"{field}: {cls.__name__}" in done.stdout


CONFIGS = [
    *(config.Train, protoeval_config.ProtoEval, visuals_config.Visuals, demo_config.Demo, launch.SlurmConfig),
    *(data_config.Dump, data_config.Vit, data_config.Shards, data_config.ImageFolder, data_config.Cub200),
    *(cls for _, _, cls in UNIONS),
]


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_have_the_declared_types(cls: type) -> None:
    """beartype never looks at defaults; replace() passes them through the checked constructor."""
    assert dataclasses.replace(cls()) == cls()


def test_groups_share_a_stream() -> None:
    cfgs = [config.Train(lr=lr, seed=seed) for seed in (0, 1) for lr in (1e-4, 1e-3)]
    assert [[c.lr for c in g] for g in sweeps.group(cfgs)] == [[1e-4, 1e-3], [1e-4, 1e-3]]
    assert len(sweeps.group([config.Train(batch_size=8), config.Train(batch_size=16)])) == 2


def test_whole_numbers_may_be_written_as_floats(parse) -> None:
    (cfg,) = parse("n_patches = 2.5e6\nseed = 1_000\nbatch_size = 1e3\n[data]\nlayer = 3.0")
    got = (cfg.n_patches, cfg.seed, cfg.batch_size, cfg.data.layer)
    assert got == (2_500_000, 1000, 1000, 3) and {type(n) for n in got} == {int}
    (cfg,) = parse("n_train = [1e3, -1]", cls=protoeval_config.ProtoEval)
    assert cfg.n_train == (1000, -1)


def test_paths_of_a_sweep_are_expanded(
    parse, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """As the shell expands those of flags, so that both find the same run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHARDS", "/data/shards")
    (cfg,) = parse('ckpt_to = "~/ck"\n[data]\nshard_root = "$SHARDS/x"', "--slurm-acct A")
    assert (cfg.ckpt_to, cfg.data.shard_root) == (f"{tmp_path}/ck", "/data/shards/x")
    (again,) = sweeps.parse(config.Train, "", ["--sweep=~/x.toml", "--slurm-acct=A"])
    assert again == cfg  # --sweep's own path, too
    assert parse("", f"--ckpt-to={tmp_path}/ck")[0].ckpt_to == cfg.ckpt_to


HUGE = {
    "top level": "\n".join(
        f"{name} = {list(range(100, 200))}"
        for name in ("n_lr_warmup", "seed", "n_patches", "log_every", "costly_every")
    ),
    "a table": f"[sae]\ntop_k = {list(range(1, 201))}\naux_k = {list(range(200))}",
    "paired": "[[paired]]\n" + f"seed = {list(range(200))}\nkeep_last = {list(range(1, 201))}",
}


@pytest.mark.parametrize("where", HUGE)
def test_a_sweep_of_too_many_configurations_is_refused_at_once(parse, where: str) -> None:
    start_s = time.process_time()
    wanted = "10,000,000,000" if where == "top level" else "40,000"
    with pytest.raises(errors.UserError, match=rf"x\.toml: is a sweep of {wanted} configurations"):
        parse(HUGE[where])
    assert time.process_time() - start_s < 5


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xef\xbb\xbfseed = 3\r\n", ""),
        (b"seed = 3\rlr = 1.0\r", ""),
        ("seed = 3".encode("utf-16"), "is UTF-16 or not text. Save it as UTF-8"),
        (b"seed = 3\nckpt_to = 'caf\xe9'", r"x\.toml:2: holds the byte 0xe9, which is not UTF-8"),
        (b"# " + b"x" * 2**20, "at most 1,048,576 are expected"),
        (None, "is not a regular file"),
    ],
)
def test_sweep_files_as_people_have_them(tmp_path: pathlib.Path, data: bytes | None, match: str) -> None:
    fpath = tmp_path / "x.toml"
    os.mkfifo(fpath) if data is None else fpath.write_bytes(data)
    if match:
        with pytest.raises(errors.UserError, match=match):
            sweeps.parse(config.Train, "", ["--sweep", str(fpath)])
    else:
        assert sweeps.parse(config.Train, "", ["--sweep", str(fpath)])[0].seed == 3


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--lr", "0.25", "--seed=3"],
        ["--no-slurm-wait", "--slurm-acct", "A", "--n-patches", "1e6"],
        ["--data.layer", "all", "--data.partial"],
        ["--data.no-partial", "--wandb-project", "", "sae:relu"],
        ["--slurm-setup", "a b", "c", "sae:top-k", "--sae.exp-factor", "2"],
        ["sae:batch-top-k", "--sae.d-sae", "64", "objective:matryoshka", "--objective.n-prefixes", "3"],
    ],
    ids=" ".join,
)
def test_flags_override_as_when_tyro_parses_each_configuration(
    tmp_path: pathlib.Path, args: list[str]
) -> None:
    """Parsing each configuration's command line with its values as defaults is slower, but plainly right."""
    fpath = tmp_path / "sweep.toml"
    fpath.write_text(
        "lr = [1e-3, 1e-2]\nn_hours = 3.0\n[data]\nlayer = [3, 7]\n[sae]\nexp_factor = [8, 4]\n"
        "[[paired]]\nbatch_size = 64\nn_patches = 128\n[[paired]]\nbatch_size = 32\nn_patches = 64\n"
    )
    typed = ["--sweep", str(fpath), *args]
    cfg = cli.parse(config.Train, typed)
    overrides = sweeps.expand(tomlfile.read(fpath, sweeps.REMEDY), config.Train, fpath)
    if "--sae.d-sae" in args:  # replaces the sweep's exp_factor
        overrides = [{key: v for key, v in o.items() if key != "sae.exp_factor"} for o in overrides]
    each = [
        cli.parse(config.Train, typed, default=sweeps._apply(config.Train, cfg, override, fpath, []))
        for override in overrides
    ]
    assert sweeps.parse(config.Train, "", typed) == list(dict.fromkeys(each))
