"""What autograd keeps of a forward pass for backward."""

import torch


def saved_bytes(run, apart=()):
    """Bytes, each storage once, those of `apart` not counted."""
    skip, kept = {t.untyped_storage().data_ptr() for t in apart}, {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # alive to the end, so that no storage's address is used twice
    del out
    return sum(size for pointer, size in kept.items() if pointer not in skip)
