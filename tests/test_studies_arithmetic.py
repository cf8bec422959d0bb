"""studies/arithmetic.py: problems are right and kept apart, exact match counts what it says, the
command runs."""

import itertools
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")  # through vision_setup
pytest.importorskip("matplotlib")
import arithmetic
import arithmetic_setup as task
import results_page

import dipkernels as dip

TINY = {"seed": 0, "dim": 32, "depth": 1, "lr": 1e-3, "steps": 2}
SETTINGS = {
    "plain": {},
    "input noise": {"sigma": 0.2},
    "fixed variance": {"sigma": 0.2},
    "GaussianDropout": {"rate": 0.1},
    "NEFTune": {"strength": 5.0},
    "DIP": {"sigma": 0.2, "alpha": 0.01},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def base():
    torch.manual_seed(5)
    return task.llama(32, 1).state_dict()


# ---- the task ------------------------------------------------------------------------------------


def test_worked_steps_are_right():
    for one in task.problems(0, 200, 5, "+-*", "train"):
        value, steps = int(one.prompt[0]), one.prompt[1:-1]
        totals = [value]
        for step in steps:
            operator, operand = step[0], int(step[1])
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 5
            totals.append(value)
        assert one.solution == [*(f"={total}" for total in totals), ";"]
        assert one.prompt[-1] == ":"
        assert one.steps == 5


def test_parts_share_no_calculation():
    parts = [
        {tuple(p.prompt) for p in task.problems(0, 300, 2, "+-", part)}
        for part in ("train", "val", "test")
    ]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def test_a_worked_step_stands_where_its_step_stands():
    places = task.positions(3, first=7)
    prompt, solution = places[:5], places[5:]
    assert prompt == [7, 8, 9, 10, 6]  # value, three steps, colon one before the value
    assert solution == [7, 8, 9, 10, 11]


def test_longer_chains_meet_no_new_position():
    def seen(steps):
        batch = task.batch_of(task.problems(0, 3000, steps, "+", "train"), random.Random(0))
        return set(batch["position_ids"].unique().tolist())

    assert seen(8) <= seen(2) | seen(3) | seen(4)


def test_the_loss_counts_worked_steps_only():
    batch = task.batch_of(task.problems(0, 6, 4, "+-", "train"), random.Random(0))
    counted = batch["labels"] != task.IGNORED
    assert counted.sum(1).eq(6).all()  # five totals and the end
    assert counted[:, -6:].all()
    assert batch["labels"][counted].equal(batch["input_ids"][counted])


class Oracle:
    """Answers as the problems say, but for the rows in `wrong`, whose token number `place` is
    another."""

    def __init__(self, problems, wrong, place):
        self.solutions = torch.tensor([task.encode(p.solution) for p in problems])
        self.solutions[wrong, place] = task.TOKEN[":"]
        self.calls = 0

    def eval(self):
        return self

    def __call__(self, input_ids, **kwargs):
        logits = torch.nn.functional.one_hot(
            self.solutions[:, self.calls : self.calls + 1], len(task.VOCABULARY)
        )
        self.calls += 1
        return type("Out", (), {"logits": logits.float(), "cache": None})()


@pytest.mark.parametrize(
    ("place", "answer", "solution"), [(1, 100, 75), (-2, 75, 75), (-1, 75, 75)]
)
def test_exact_match_counts_the_answer_and_the_whole_solution(place, answer, solution):
    chosen = task.problems(0, 8, 3, "+-", "test")
    found = task.exact_match(Oracle(chosen, [0, 3], place), chosen)
    assert found == {"answer": answer, "solution": solution}


def test_greedy_decoding_with_the_cache_is_what_one_pass_says():
    torch.manual_seed(0)
    model, chosen = task.llama(32, 2).eval(), task.problems(0, 16, 3, "+-", "test")
    batch = task.batch_of(chosen, random.Random(0))
    labels = batch.pop("labels")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform
        forced = model(**batch).logits[:, 4:-1].argmax(-1).eq(labels[:, 5:]).all(1)
    found = task.exact_match(model, chosen)["solution"]
    assert found == 100 * forced.double().mean().item()


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", arithmetic.STAGES)
def test_every_method_predicts_alike_before_training_and_noises_in_it(stage):
    batch = task.batch_of(task.problems(0, 4, 3, "+-", "train"), random.Random(0))
    outs, noisy, layers = {}, {}, {}
    for method, setting in SETTINGS.items():
        model = arithmetic.build(TINY | {"stage": stage, "method": method} | setting, base())
        outs[method] = model.eval()(**batch).logits
        model.train()
        noisy[method] = not model(**batch).logits.equal(model(**batch).logits)
        layers[method] = sum(isinstance(module, dip.Variance) for module in model.modules())
    assert all(out.equal(outs["plain"]) for out in outs.values())
    assert noisy == {method: method != "plain" for method in SETTINGS}
    # q k v o gate up down (head)
    assert layers["DIP"] == layers["fixed variance"] == (8 if stage == "scratch" else 7)


def test_lora_trains_adapters_and_variances_only():
    config = TINY | {"stage": "LoRA", "method": "DIP"} | SETTINGS["DIP"]
    model = arithmetic.build(config, base())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = task.batches(0, 2, 8, (2, 3), "+-*")
    arithmetic.train(model, config | {"lr": 1e-2}, data)
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    kinds = [[part for part in ("lora_", "log_variance") if part in name] for name in changed]
    assert all(kinds) and {part for found in kinds for part in found} == {"lora_", "log_variance"}


def test_neftune_noise_has_its_bound():
    hook = arithmetic.EmbeddingNoise(strength=5.0)
    module = torch.nn.Embedding(3, 16).train()
    out = torch.zeros(64, 25, 16)
    noise = hook(module, (), out)
    limit = 5.0 / (25 * 16) ** 0.5
    assert noise.abs().max() <= limit
    assert noise.abs().max() > 0.99 * limit
    assert hook(module.eval(), (), out) is None


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quick_run_writes_tables_figure_and_results(tmp_path, monkeypatch):
    flags = ["--quick", "--out", str(tmp_path)]
    arithmetic.main(flags)
    text = (tmp_path / "results.md").read_text()
    for stage in ("scratch", "lora"):
        section = text.split(f"<!-- arithmetic-{stage}:begin -->")[1].split("<!--")[0]
        assert all(f"| {method} |" in section for method in arithmetic.METHODS)
        runs = results_page.Store(tmp_path / f"arithmetic_{stage}").runs
        assert {run["config"]["part"] for run in runs} == {"val", "test"}
        assert (tmp_path / f"arithmetic_{stage}.svg").stat().st_size > 1000
    monkeypatch.setattr(arithmetic, "train", None)  # from what is stored: nothing is trained
    arithmetic.main(flags)
    assert (tmp_path / "results.md").read_text() == text
