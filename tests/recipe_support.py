"""A trainer of the recipes in examples/ on one CPU, for what goes wrong around its checkpoints."""

import recipe_training
import torch

EXAMPLES = 24


def trainer(out, model, flags, **settings):
    """Of a converted model; two epochs of batches of four."""
    parser = recipe_training.make_parser("A recipe.", "a folder")
    small = f"--precision fp32 --batch 4 --epochs 2 {flags}".split()
    args = parser.parse_args(["--data", str(out), "--out", str(out), *small])
    worker = recipe_training.Worker(0, 1, torch.device("cpu"))
    return recipe_training.Trainer(model, worker, args, EXAMPLES, settings)


def train(t, features, before_step=lambda: None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(EXAMPLES, features, generator=generator), torch.arange(EXAMPLES) % 3

    def loss_of(model, indices):
        before_step()
        return torch.nn.functional.cross_entropy(model(x[indices]), y[indices])

    return t.run(lambda indices: indices, loss_of)
