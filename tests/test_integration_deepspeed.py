"""DeepSpeed on two processes of a CPU: by hand, and under transformers' Trainer."""

import re

import pytest
import torch
import torch.nn.functional as F
from ranks_support import Ranks, raised
from trainer_support import X, Y, learned, llama, mlp, texts

import dipkernels as dip

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = dip.DIPConfig(ratio=0.5)


def steps(model, call, step, place=0, rows=32):
    """The objective's losses of four steps, or of those that are left, by step(loss, i)."""
    x, y, losses = X[place:][:rows].to(model[0].weight.dtype), Y[place:][:rows], []
    for i in range(getattr(call, "global_steps", 0), 4):
        with RECIPE.noise(i, place * RECIPE.m):
            loss = RECIPE.objective(RECIPE.trajectories(call, x), y, F.cross_entropy, model)
            step(loss, i)
        losses.append(loss.item())
    return losses


def by_torch():
    """The losses, and the state in the end, of plain PyTorch."""
    model = dip.apply(mlp(), RECIPE, [X])
    optimizer = torch.optim.AdamW(dip.param_groups(model, 1e-2, weight_decay=0.1))

    def step(loss, i):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return steps(model, model, step), dict(model.state_dict())


def engine_of(stage, **options):
    import deepspeed

    model = dip.apply(mlp(), RECIPE, [X])
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(dip.param_groups(model, 1e-2, weight_decay=0.1)),
        config={
            "train_batch_size": 32,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            **options,
        },
    )[0]


def check_engine(rank, world, folder, stage, options):
    import deepspeed

    deepspeed.init_distributed("gloo")
    engine, where = engine_of(stage, **options), (rank * 32 // world, 32 // world)
    groups = [(g["name"], g["weight_decay"], g["lr"]) for g in engine.optimizer.param_groups]
    graded = []

    def step(loss, i):
        engine.backward(loss)
        graded.append(raised(lambda: dip.check(engine)))
        engine.step()
        if i == 1:
            engine.save_checkpoint(folder)
            dip.save(engine, folder)

    losses = steps(engine.module, engine, step, *where)
    again = engine_of(stage, **options)
    again.load_checkpoint(folder)

    def go_on(loss, i):
        again.backward(loss)
        again.step()

    resumed = steps(again.module, again, go_on, *where)
    state, other = (
        {name: value.clone() for name, value in each.module.state_dict().items()}
        for each in (engine, again)
    )
    same = resumed == losses[2:] and all(torch.equal(v, other[n]) for n, v in state.items())
    assert dip.check(engine, X[:4].to(engine.module[0].weight.dtype))
    refused = raised(lambda: dip.load_variances(engine, dip.variances(engine)))
    return groups, losses, same, state, graded, dip.variances(engine), refused


@pytest.fixture
def ranks(request, monkeypatch):
    """Processes for one function: DeepSpeed keeps its process group."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    started = Ranks(getattr(request, "param", 2))
    yield started
    started.stop()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_trains_saves_and_resumes_as_plain_torch_does(stage, ranks, tmp_path):
    first, second = ranks.run(check_engine, str(tmp_path), stage, {})
    losses, state = by_torch()
    assert first[0] == [
        ("weights", 0.1, 1e-2),
        ("biases", 0.0, 1e-2),
        ("variances", 0.0, pytest.approx(0.1)),
    ]
    both = [(a + b) / 2 for a, b in zip(first[1], second[1])]
    assert both == pytest.approx(losses, rel=1e-5) and first[2] and second[2]
    for name, value in state.items():
        torch.testing.assert_close(first[3][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[3][name], second[3][name])
    if stage == 0:
        assert [*first[4], first[6]] == ["nothing raised"] * 5
    else:  # ZeRO keeps the gradients, and steps a copy of the variances
        said = r"(?s)ValueError: .*expected gradients to look at"
        assert len(first[4]) == 4 and all(re.match(said, words) for words in first[4])
        assert re.match(r"(?s)ValueError: .*set it before deepspeed\.initialize", first[6])
    saved = dip.variances(dip.load(mlp(), tmp_path))
    assert dip.config.load_state(tmp_path).keys() == saved.keys() == first[5].keys()
    assert not any(torch.equal(v, first[5][n]) for n, v in learned(saved))  # two steps before


@pytest.mark.slow
def test_deepspeed_in_half_precision_keeps_the_variances_in_single(ranks, tmp_path):
    half = {"bf16": {"enabled": True}}
    first, second = ranks.run(check_engine, str(tmp_path), 2, half)
    losses, _ = by_torch()
    both = [(a + b) / 2 for a, b in zip(first[1], second[1])]
    assert both == pytest.approx(losses, rel=2e-2) and first[2]
    assert {values.dtype for values in first[5].values()} == {torch.float32}


def check_stage_3(rank, world, folder):
    import deepspeed

    deepspeed.init_distributed("gloo")
    engine = engine_of(3)

    def step(loss, i):
        engine.backward(loss)
        engine.step()

    losses = steps(engine.module, engine, step, rank * 16, 16)
    calls = (dip.variances, dip.metrics, lambda model: dip.save(model, folder))
    words = [raised(lambda call=call: call(engine)) for call in calls]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        dip.save(engine, folder)
        return losses, words, dip.variances(engine)


@pytest.mark.slow
def test_deepspeeds_stage_3_trains_and_its_variances_are_read_where_they_are_gathered(
    ranks, tmp_path
):
    (first, words, found), (second, _, _) = ranks.run(check_stage_3, str(tmp_path))
    losses, state = by_torch()
    both = [(a + b) / 2 for a, b in zip(first, second)]
    assert both == pytest.approx(losses, rel=1e-5)
    said = r"(?s)ValueError: .*deepspeed\.zero\.GatheredParameters"
    assert all(re.match(said, each) for each in words)
    for name, values in dip.variances(dip.load(mlp(), tmp_path)).items():
        torch.testing.assert_close(values, state[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(values, found[name])


ARGUMENTS = {"report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 8}
ARGUMENTS |= {"max_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
ARGUMENTS |= {"logging_steps": 1, "save_steps": 2}


def check_trainer(rank, world, folder, stage):
    import transformers

    from dipkernels.integrations.transformers import DIPTrainer

    def trainer(where, given=RECIPE, **options):
        config = {
            "zero_optimization": {"stage": options.pop("stage", stage)},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_force_ds_cpu_optimizer": False,
            **options.pop("config", {}),
        }
        arguments = transformers.TrainingArguments(
            f"{folder}/{where}", deepspeed=config, **{**ARGUMENTS, **options}
        )
        data = {"train_dataset": texts(32), "eval_dataset": texts(32)}
        return DIPTrainer(llama(), arguments, **data, dip=given)

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer("a", **best)
    start = dip.variances(whole.model)
    whole.train()
    engine = type(whole.model_wrapped).__name__
    again = trainer("b", given=None)
    again.train(resume_from_checkpoint=f"{folder}/a/checkpoint-2")
    refused = {"stage": 3}, {"config": {"optimizer": {"type": "AdamW", "params": {}}}}
    words = [raised(lambda given=given: trainer("c", **given).train()) for given in refused]
    logged = [
        [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        for each in (whole, again)
    ]
    return engine, start, logged, dip.variances(whole.model), dip.variances(again.model), words


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1], indirect=True)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_trainer_under_deepspeed_is_the_trainer_without(stage, ranks, tmp_path):
    """On one process: of two on a CPU accelerate makes two trainings of one process each."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from dipkernels.integrations.transformers import DIPTrainer, from_pretrained

    (answer,) = ranks.run(check_trainer, str(tmp_path), stage)
    engine, start, logged, trained, resumed, words = answer
    arguments = transformers.TrainingArguments(tmp_path / "one", use_cpu=True, **ARGUMENTS)
    one = DIPTrainer(llama(), arguments, train_dataset=texts(32), dip=RECIPE)
    dip.load_variances(one.model, start)
    one.train()
    assert engine == "DeepSpeedEngine" and logged[0] == logged[1]
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(losses, rel=1e-4)
    for name, values in dip.variances(one.model).items():
        assert torch.equal(trained[name], resumed[name])
        torch.testing.assert_close(trained[name], values, rtol=1e-3, atol=1e-4)
    assert not any(torch.equal(v, start[n]) for n, v in learned(trained))
    saved = from_pretrained(transformers.LlamaForCausalLM, tmp_path / "a" / "checkpoint-4")
    assert all(torch.equal(v, trained[n]) for n, v in dip.variances(saved).items())
    stage_3, own_optimizer = words
    assert re.match(
        "(?s)ValueError: .*expected DeepSpeed's ZeRO up to stage 2, got stage 3", stage_3
    )
    assert re.match("(?s)ValueError: .*without 'optimizer'", own_optimizer)
