"""accelerate: a loop written by hand, on one process and on two."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_support import X, Y, mlp

import dipkernels as dip
from dipkernels.config import CONFIG_FILE, VARIANCES_FILE
from dipkernels.noise import contexts

accelerate = pytest.importorskip("accelerate")
from dipkernels.integrations.accelerate import keep_config, step_noise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = dip.DIPConfig(ratio=0.5)


def trained(batch, accumulate=1, folder=None):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = dip.apply(mlp(), CONFIG, [X])
    optimizer = torch.optim.SGD(dip.param_groups(model, 0.1))
    data = DataLoader(TensorDataset(X, Y), batch)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    keep_config(accelerator, model)
    for i, (x, y) in enumerate(data):
        step, micro = divmod(i, accumulate)
        with (
            accelerator.accumulate(model),
            step_noise(accelerator, model, step, batch_size=batch, micro=micro),
        ):
            loss = CONFIG.objective(CONFIG.trajectories(model, x), y, F.cross_entropy, model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if folder is not None:
        accelerator.save_state(folder)
    return accelerator, accelerator.unwrap_model(model)


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def test_accumulated_gradients_are_those_of_the_big_batch():
    (_, small), (_, big) = trained(4, 2), trained(8)
    same(small.state_dict(), big.state_dict(), rtol=1e-4, atol=1e-6)


def test_longer_examples_have_noise_of_their_own_where_the_batch_is_given():
    accelerator, model = trained(4)
    drawn, probe = [], dip.DIPInput(1)
    for micro, length in enumerate((12, 4)):
        batch = torch.zeros(4 * CONFIG.m, length, 1)
        with step_noise(accelerator, model, 0, batch_size=4, micro=micro, batch=batch):
            drawn.append(probe(batch).flatten())
    assert len(torch.cat(drawn).unique()) == CONFIG.m * 4 * (12 + 4)


def test_examples_are_counted_by_the_batches_tensors_and_not_by_one_examples_boxes():
    accelerator, model = trained(4)
    labels = [{"boxes": torch.zeros(boxes, 4)} for boxes in (7, 2)]
    batch = {"labels": labels, "pixel_values": torch.zeros(2, 3)}
    with step_noise(accelerator, model, 0, batch_size=2, micro=1, batch=batch):
        assert (contexts.row0(), contexts.entries()) == (2 * CONFIG.m, 2 * CONFIG.m)


def test_a_saved_state_has_the_config_and_loads_in_another_process(tmp_path):
    accelerator, model = trained(8, folder=tmp_path)
    assert {CONFIG_FILE, VARIANCES_FILE} <= {path.name for path in tmp_path.iterdir()}
    want = {name: value.clone() for name, value in model.state_dict().items()}
    dip.load_variances(
        model, {name: torch.zeros_like(v) for name, v in dip.variances(model).items()}
    )
    accelerator.load_state(tmp_path)
    same(model.state_dict(), want)
    plain = mlp()
    accelerate.load_checkpoint_in_model(plain, str(tmp_path / "model.safetensors"))
    same(dip.load(plain, tmp_path).state_dict(), want)
    dip.DIPConfig(ratio=0.5, kl=1.0).save(tmp_path)
    with pytest.warns(UserWarning, match=r"trained by another config: {'kl': \(1.0, 0.4\)}"):
        accelerator.load_state(tmp_path)


def test_a_model_without_a_config_is_refused():
    accelerator, model = accelerate.Accelerator(cpu=True), dip.convert(mlp())
    for call in (
        lambda: keep_config(accelerator, model),
        lambda: step_noise(accelerator, model, 0, batch_size=8),
    ):
        with pytest.raises(ValueError, match=r"model: expected one that dip\.apply has converted"):
            call()


def check_train(rank, world, folder):
    accelerator, model = trained(8, folder=folder)
    assert accelerator.num_processes == 2
    dip.check_ranks(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(ranks, tmp_path):
    first, second = ranks.run(check_train, str(tmp_path))
    same(first, second)
    same(trained(16)[1].state_dict(), first, rtol=1e-4, atol=1e-6)
    loaded = dip.load(dip.apply(mlp(), CONFIG, [X]), tmp_path)
    same(loaded.state_dict(), first | mlp().state_dict())
