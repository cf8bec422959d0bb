"""triton_kernels/tickets.py: which program of several arrives last.  docs/maths.md, section 5.

A ticket is 0 whenever no kernel counts on it: the last program to count sets it back. Zeroing it at
each call would be a launch like the one that it saves.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl

TICKETS = 1 << 17  # of a device
OF_STREAM = 1 << 9  # more column blocks than a device has room for in two rows


@triton.jit
def is_last_program(ticket_ptr, programs):
    """Whether this is the last of `programs` programs to count on the ticket, which is then 0
    again; it sees what the others stored before."""
    # What every thread stored comes before the count, which is one thread's; and that before what
    # every thread then loads.
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(ticket_ptr, 0)
    return is_last


_lock = threading.Lock()
_pools: dict[torch.device, torch.Tensor] = {}  # int32 [TICKETS]
_taken: dict[torch.device, int] = {}
_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}


def take_tickets(device: torch.device, count: int) -> torch.Tensor | None:
    """int32 [count or more] that no kernel beside the coming one uses, on the device's current
    stream; None where there is none.

    A stream runs its kernels one by one and keeps its tickets. A captured launch may run beside any
    stream, but not beside itself: its tickets are its own for good.
    """
    captured, stream = False, 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            captured = torch.cuda.is_current_stream_capturing()
            stream = torch.cuda.current_stream().stream_id
    # Of a stream that torch did not make, which is an even number, the id may come back.
    if count > OF_STREAM or (stream and stream % 2 == 0):
        return None
    with _lock:
        found = _of_stream.get((device, stream))
        if found is not None and not captured:
            return found
        if device not in _pools:
            if captured:  # what is made now belongs to the graph
                return None
            _pools[device] = torch.zeros(TICKETS, dtype=torch.int32, device=device)
            if device.type == "cuda":  # once: the next stream to count may be another one
                torch.cuda.current_stream(device).synchronize()
        # Of a captured launch as many as it takes, from a multiple of 16 bytes on.
        size, first = (count + 3) // 4 * 4 if captured else OF_STREAM, _taken.get(device, 0)
        if first + size > TICKETS:
            return None
        _taken[device] = first + size
        tickets = _pools[device][first : first + size]
        if not captured:
            _of_stream[device, stream] = tickets
        return tickets
