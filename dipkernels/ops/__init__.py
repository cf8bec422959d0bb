"""The operations, one file each: schema, checks, fake, autograd; `registry` says which kernel runs.
docs/maths.md."""

from .. import backends
from . import expectation as expectation
from . import gate as gate
from . import linear as linear
from . import norm as norm
from . import perturb as perturb
from . import registry

registry.choose_all()
backends.listeners.append(registry.choose_all)
backends.watch_cuda()
backends.warn_reference()
