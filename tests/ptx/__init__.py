"""Compiled GPU code, run on a CPU: an interpreter of PTX, every instruction over all threads at
once.

    module = Module(ptx_text)
    memory = Memory()
    address = memory.add(numpy_array)  # a segment: any byte outside of it is an error
    module.kernels[name].run(grid, block, parameter_bytes, memory, shared=dynamic_bytes)
    memory.copy_back()

It needs NumPy and nothing else, and knows no kernel. An instruction that it does not know is an
error, never a wrong number.

Beside the numbers it checks what a GPU would answer with wrong ones, or by hanging: bounds,
alignment and permission of every access; shared memory that nobody wrote or that cp.async has not
delivered; races in shared memory between two barriers; two threads storing different values to one
address; barriers, shuffles and matrix instructions by a part of those who must take part;
kernels that do not end; launches that no GPU takes.

Integers, conversions, add, mul, fma, div.rn, rcp.rn and sqrt.rn are exact to the bit in every
rounding mode, subnormal numbers and .ftz included. Approximations are the exact value rounded to
float32, or with errors=1, 2, .. off by as much as the PTX manual allows. Matrix instructions add
exact products in float64 and round once. A NaN's payload is not modelled, nor is time, nor the
order in which blocks see each other's writes.
"""

from .kernel import Module
from .kinds import PTXError
from .memory import Memory

__all__ = ["Memory", "Module", "PTXError"]
