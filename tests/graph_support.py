"""What torch.compile makes of a model, seen without running it, and tensors of a GPU that is not
there."""

import contextlib
import warnings

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class Graphs:
    """A backend of torch.compile: runs nothing, gives back zeros, and keeps the names of each
    graph's operations.

    forward, backward: one list of names per graph. saved: bytes that the forward graph keeps for
    backward.
    """

    def __init__(self):
        self.forward, self.backward, self.saved = [], [], []
        compilers = {
            "fw_compiler": self._keep(self.forward),
            "bw_compiler": self._keep(self.backward),
        }
        self._compile = aot_autograd(**compilers, partition_fn=self._partition)

    def __call__(self, graph, inputs):
        return self._compile(graph, inputs)

    @staticmethod
    def _keep(to):
        from functorch.compile import make_boxed_func

        def compiler(graph, inputs):
            to.append(
                [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            )
            wanted = next(node for node in graph.graph.nodes if node.op == "output").args[0]

            def run(*arguments):
                return [_zeros(getattr(node, "meta", {}).get("val"), arguments) for node in wanted]

            return make_boxed_func(run)

        return compiler

    def _partition(self, joint, inputs, **kwargs):
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        outputs = next(node for node in forward.graph.nodes if node.op == "output").args[0]
        kept = [
            node
            for node in outputs[kwargs["num_fwd_outputs"] :]
            if getattr(node, "op", "") == "call_function"
        ]
        values = [node.meta["val"] for node in kept]
        self.saved.append(
            sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))
        )
        return forward, backward


class Compiler:
    """A backend of torch.compile that counts graphs, and runs each as AOTAutograd's."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return aot_eager(graph, inputs)


def _zeros(value, arguments):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    ).zero_()


def compiled(model, *arguments, backward=True):
    """The Graphs of one step of the model, compiled whole."""
    graphs = Graphs()
    torch._dynamo.reset()
    with no_workaround_of_dynamo():
        y = torch.compile(model, backend=graphs, fullgraph=True)(*arguments)
        y = y[0] if isinstance(y, tuple) else y
        if backward:
            y.sum().backward()
    return graphs


@contextlib.contextmanager
def no_workaround_of_dynamo():
    """Fails where torch.compile says that it cannot trace a function and traces something else in
    its place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*Dynamo")
        yield


# No GPU is needed, nor a torch built for one. Only without gradients: autograd asks such a torch
# for the device.
GPU_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(tensor):
    """A tensor of this shape on a GPU that is not there; it has no values."""
    return FakeTensor(GPU_MODE, torch.empty_like(tensor, device="meta"), torch.device("cuda:0"))


def module_on_gpu(module):
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else nn.Parameter(on_gpu(parameter))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else on_gpu(buffer)
    return module
