"""The examples' checkpoints, data, configurations and flags, damaged at random: read as if whole,
or refused by name.  docs/reliability.md.

A case passes where the example goes on, or ends in an error of its own: a ValueError,
FileNotFoundError or argparse's that names the file, flag or entry. Any other exception is a
failure. A few dozen cases of each kind by default, thousands slow.
"""

import copy
import json
import math
import random
import sys
from pathlib import Path

import pytest
import recipe_support
import torch

pytest.importorskip("sklearn")
import digits
import recipe_training
import train as cluster

import dipkernels as dip

CONFIG = Path(cluster.__file__).parent / "digits.json"
few_or_many = pytest.mark.parametrize(
    ("first", "number"),
    [(0, 60), pytest.param(1000, 2000, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
INTEGERS = [0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**400]
FLOATS = [0.5, -0.5, 1e-320, 1e308, math.nan, math.inf]
TEXTS = ["", "text", "\N{SNOWMAN}" * 9]
VALUES = [None, True, False, *INTEGERS, *FLOATS, *TEXTS, [], [1, 2], {}, {"a": 1}]


def nodes(value, path=()):
    """The path of everything below value, through dicts and lists."""
    is_list = isinstance(value, (list, tuple))
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if is_list else ()
    for key, part in pairs:
        yield (*path, key)
        yield from nodes(part, (*path, key))


def replaced(value, path, change):
    """A copy of value with change(parent, key) done to what lies at path; tuples on the way become
    lists and tuples again."""
    value = copy.copy(value)
    if len(path) == 1:
        parent = list(value) if isinstance(value, tuple) else value
        change(parent, path[0])
        return tuple(parent) if isinstance(value, tuple) else parent
    part = replaced(value[path[0]], path[1:], change)
    if isinstance(value, tuple):
        return (*value[: path[0]], part, *value[path[0] + 1 :])
    value[path[0]] = part
    return value


def mutate(dice, value, values):
    """Somewhere in value: another value, one entry fewer, one more, or two that change places."""

    def change(parent, key):
        kind = dice.randint(0, 4)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            if isinstance(parent, dict):
                parent[dice.choice(["more", 7, ""])] = dice.choice(values)
            else:
                parent.insert(key, dice.choice(values))
        elif kind == 2:
            other = dice.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = dice.choice(values)

    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        places = list(nodes(value))
        if places:
            value = replaced(value, dice.choice(places), change)
    return value


def damage(dice, content):
    """Bytes flipped, cut, moved or random."""
    kind = dice.randint(0, 4)
    if kind == 0:
        return content[: dice.randrange(len(content))]
    if kind == 1:
        return dice.randbytes(dice.randint(0, 300))
    damaged = bytearray(content)
    if kind == 2:
        first = dice.randrange(len(damaged))
        damaged[first : first + dice.randint(1, 4000)] = dice.randbytes(dice.randint(0, 4000))
    else:
        for _ in range(dice.randint(1, 50)):
            damaged[dice.randrange(len(damaged))] = dice.getrandbits(8)
    return bytes(damaged)


# ---- the recipes' checkpoints --------------------------------------------------------------------


def trainer(out, flags):
    torch.manual_seed(0)
    parts = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)
    model = dip.convert(torch.nn.Sequential(*parts))
    return recipe_support.trainer(out, model, flags, recipe="fuzz")


def resumes(out):
    """True where training goes on from out/last.pt to the end, False where the file is refused by
    name."""
    try:
        t = trainer(out, "--resume --save-every 100 --log-every 100")
    except ValueError as error:
        assert str(error).startswith("--resume: ") and (
            "last.pt" in str(error) or "settings" in str(error)
        ), error
        return False
    t.args.out = out / "after"
    try:
        recipe_support.train(t, 6)
    except RuntimeError as error:  # numbers alone were changed, and they are none
        assert "loss: expected a finite number" in str(error), error
    return True


@few_or_many
def test_damaged_recipe_checkpoints_are_refused_or_go_on(tmp_path, first, number, capsys):
    recipe_support.train(trainer(tmp_path, "--stop-after 7"), 6)
    path = tmp_path / "last.pt"
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    assert resumes(tmp_path)
    other = {**content, "model": {name: 2 * t for name, t in content["model"].items()}}
    torch.save(other, path)
    assert resumes(tmp_path)  # numbers alone
    values = [*VALUES, torch.ones(()), torch.ones(2, 2), torch.ones(5, dtype=torch.float64)]
    values += [torch.ones(5).to_sparse(), torch.full((5,), math.nan)]
    went_on = 0
    for case in range(first, first + number):
        dice = random.Random(case)
        if case % 2:
            path.write_bytes(damage(dice, whole))
        else:
            torch.save(mutate(dice, content, values), path)
        went_on += resumes(tmp_path)
    assert went_on < number // 2


# ---- the cluster example: configuration, checkpoint ----------------------------------------------


def small():
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    model = {"width": 4, "depth": 1, "heads": 2}
    return config | {"model": model, "batch": 20, "steps": 2, "save_every": 2}


@few_or_many
def test_configurations_of_any_kind_are_checked_before_anything_runs(
    tmp_path, first, number, capsys, monkeypatch
):
    """What main() reads is a configuration within its ranges, or argparse's error with the file's
    name."""
    path, taken = tmp_path / "config.json", []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(cluster, "train", lambda config, out, device: taken.append(config))
    for case in range(first, first + 5 * number):
        dice = random.Random(case)
        text = json.dumps(mutate(dice, small(), VALUES))
        content = damage(dice, text.encode()) if case % 3 == 0 else text.encode()
        path.write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
        try:
            cluster.main()
        except SystemExit as exit:
            assert exit.code == 2 and "config.json: " in capsys.readouterr().err
    path.write_bytes(b"[" * 10**5)
    with pytest.raises(SystemExit):
        cluster.main()
    assert number // 50 < len(taken) < 5 * number // 2
    for config in taken:
        cluster.check_config(config)
        assert math.isfinite(sum(v for v in config.values() if isinstance(v, (int, float))))


def test_configurations_at_their_edges_run(tmp_path, one_rank):
    for change in (
        {"batch": 1500},
        {"steps": 0},
        {"lr": 0, "seed": 2**62, "dip": {"init_variance": 0.01, "m": 1, "key": -(2**63)}},
        {"dip": {"init_variance": 1e-30}},
        {"dip": {"ratio": {"patches": 0.5, "*": 1.0}}},
    ):
        config = {**small(), "steps": 1, **change}
        if "dip" in change:
            config["dip"] = {"version": 1, **change["dip"]}
        cluster.train(config, tmp_path / str(change), torch.device("cpu"))


@few_or_many
def test_damaged_cluster_checkpoints_are_refused_or_go_on(
    tmp_path, first, number, one_rank, capsys
):
    """`latest`, the metadata or the data changed, a file missing, another model's: ValueError with
    the folder, or training goes on."""
    device = torch.device("cpu")
    cluster.train(small(), tmp_path, device)
    cluster.train(
        {**small(), "model": {"width": 8, "depth": 1, "heads": 2}}, tmp_path / "wider", device
    )
    files = [tmp_path / "latest", *sorted((tmp_path / "step-2").iterdir())]
    assert len(files) == 3
    whole = {path: path.read_bytes() for path in files}
    wider = {path: (tmp_path / "wider" / path.relative_to(tmp_path)).read_bytes() for path in files}
    went_on = refused = 0
    for case in range(first, first + number // 3):
        dice = random.Random(case)
        chosen, kind = dice.choice(files), dice.randint(0, 5)
        if kind == 0:
            chosen.unlink()
        elif kind == 1:
            for path in files:
                path.write_bytes(wider[path])
        else:
            chosen.write_bytes(damage(dice, whole[chosen]))
        try:
            cluster.train({**small(), "steps": 3}, tmp_path, device)
            went_on += 1
        except ValueError as error:
            assert str(error).startswith("--out: expected") and str(tmp_path) in str(error), error
            refused += 1
        for path in files:
            path.write_bytes(whole[path])
    assert refused > number // 12 and went_on > 0


# ---- flags and data files ------------------------------------------------------------------------


NUMBERS = ["0", "1", "-1", "2", "3", "0.5", "1e-9", "1e999", "-1e999", "nan", "7", f"{10**20}"]
NUMBERS += ["text", "", "\N{SNOWMAN}"]


def flags_of(dice, parser, least):
    """Some of a parser's flags with values of any kind."""
    actions = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    given = []
    for action in dice.sample(actions, dice.randint(least, 4)):
        given.append(action.option_strings[0])
        if action.nargs != 0:
            given.append(dice.choice([*NUMBERS, *(action.choices or [])]))
    return given


@few_or_many
def test_flags_of_the_recipes_take_any_text(tmp_path, first, number, capsys):
    """What is let through trains a model for two steps."""
    x, y, ran = torch.randn(24, 6), torch.arange(24) % 3, 0
    for case in range(first, first + 5 * number):
        dice = random.Random(case)
        parser = recipe_training.make_parser("", "the data")
        always = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
        given = [*always, *["--precision", "fp32", "--batch", "2"], *flags_of(dice, parser, 1)]
        try:
            args = parser.parse_args(given)
            recipe_training.check_arguments(parser, args)
        except SystemExit as exit:
            message = capsys.readouterr().err
            assert exit.code == 2 and "--" in message, (given, message)
            continue
        args.device, args.epochs, args.stop_after = "cpu", 1, 2
        args.data, args.out = tmp_path, tmp_path / "out"
        with recipe_training.workers(args.device) as worker:
            torch.manual_seed(args.seed)
            model = torch.nn.Sequential(torch.nn.Linear(6, 3))
            try:
                recipe_training.apply_method(model, model[0], args, x)
                t = recipe_training.Trainer(model, worker, args, 24, {})

                def loss_of(model, i, m=args.m, lambda_s=args.lambda_s):
                    out = dip.trajectories(model, x[i], m=min(m, 4))
                    return dip.objective(
                        out, y[i], torch.nn.functional.cross_entropy, lambda_s=lambda_s
                    )

                t.run(lambda i: i, loss_of)
                ran += 1
            except (ValueError, RuntimeError) as error:
                assert str(error).startswith(("--", "loss: expected a finite number")), (
                    given,
                    error,
                )
    assert ran > number // 5


class Trains(Exception):
    pass


@few_or_many
def test_flags_of_the_digits_take_any_text(tmp_path, first, number, capsys, monkeypatch):
    def train(*arguments):
        raise Trains

    monkeypatch.setattr(digits, "train", train)
    (tmp_path / "a file").write_text("")
    for case in range(first, first + number):
        dice = random.Random(case)
        given = []
        for flag in dice.sample(
            ["--seeds", "--epochs", "--out", "--quick", "--more"], dice.randint(1, 3)
        ):
            value = str(tmp_path / "a file") if flag == "--out" else dice.choice(NUMBERS)
            given += [flag] if flag == "--quick" else [flag, value]
        try:
            digits.main(given)
        except SystemExit as exit:
            assert exit.code == 2 and "error: " in capsys.readouterr().err
        except Trains:
            assert "--out" not in given and "--more" not in given


@few_or_many
def test_damaged_data_files_of_the_recipes_are_refused_by_name(tmp_path, first, number):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import recipe_cifar100
    import recipe_gsm8k

    lines = [{"question": f"{a} and {a}?", "answer": f"{2 * a}\n#### {2 * a}"} for a in range(4)]
    images = random.Random(0).randbytes(3074 * 2)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    for case in range(first, first + 3 * number):
        dice = random.Random(case)
        for recipe, name, content in (
            (recipe_cifar100, "train.bin", images),
            (recipe_gsm8k, "train.jsonl", text),
        ):
            if case % 2 and name.endswith("l"):
                changed = (json.dumps(mutate(dice, line, VALUES)) for line in lines)
                content = "".join(line + "\n" for line in changed).encode()
            (tmp_path / name).write_bytes(content if case % 2 else damage(dice, content))
            try:
                recipe.load(tmp_path / name)
            except ValueError as error:
                assert str(error).startswith("--data: expected") and name in str(error), error
