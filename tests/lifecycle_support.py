"""What workers of test_lifecycle.py import: a data set that noises its own examples."""

import torch

from dipkernels import functional


class Noised(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        """(noise of a fixed key, noise of a key drawn in the worker, the worker)"""
        fixed = functional.noise((2, 16), torch.tensor([7, 1]), row0=2 * i)
        drawn = functional.noise((2, 16), torch.randint(-(2**63), 2**63 - 1, (2,)))
        info = torch.utils.data.get_worker_info()
        return fixed, drawn, -1 if info is None else info.id


def one_step(model, x):
    """A training step's loss and gradients, under the generator as it stands."""
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def network():
    import dipkernels as dip

    torch.manual_seed(0)
    plain = [torch.nn.Linear(33, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8)]
    return dip.convert(torch.nn.Sequential(*plain), init_variance=0.04)
