"""Kernels and their launch: divergent threads run one path after the other and meet at the branch's
post-dominator."""

from __future__ import annotations

import numpy as np

from .kinds import WARP, PTXError, u8
from .memory import Memory
from .parser import Body, most_threads, read_parameters, split_module
from .run import Run
from .writer import Writer


class Module:
    """The kernels of a PTX text, each compiled when it is first run."""

    def __init__(self, text: str):
        outside, kernels = split_module(text)
        self.variables = np.zeros(max(outside.variable_bytes, 16), u8)  # they outlive a launch
        self.kernels = {
            name: Kernel(name, *rest, outside, self.variables) for name, *rest in kernels
        }


class Kernel:
    """One entry point.

    Attributes:
        parameters: (name, offset, bytes) of each.
        text: Its body as text; a copy with another one is a mutant.
    """

    def __init__(self, name, parameters, directives, body, outside, variables):
        self.name, self.text, self.variables = name, body, variables
        self._written = parameters, directives, outside
        self.parameters = read_parameters(parameters)
        self.param_bytes = sum(self.parameters[-1][1:]) if self.parameters else 0
        self.max_threads = most_threads(directives)
        self.has_cp_async, self.has_warp_barriers, self.has_wgmma = (
            word in body for word in ("cp.async", "bar.warp", "wgmma")
        )
        self.body: Body | None = None
        self.functions: dict = {}

    def parse(self) -> None:
        """Once; the blocks become functions when they are first run."""
        if self.body is None:
            self.body = Body(self.text, self._written[2], self.parameters)
            self.meet = self.body.meeting_points()
            self.shared_bytes, self.local_bytes = self.body.shared_bytes, self.body.local_bytes
            self.shared_unit = self.body.least_shared_access()

    def _function(self, pc: int, masked: bool, contract: bool):
        """The function of a block, for all threads or with a mask"""
        key = (pc, masked, contract)
        if key not in self.functions:
            self.functions[key] = Writer(self, masked, contract).block(pc, self.body.blocks[pc])
        return self.functions[key]

    def _check_launch(self, grid, block, params):
        size = block[0] * block[1] * block[2]
        if not 0 < size <= 1024 or min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise PTXError(f"no GPU launches grid {grid} of block {block}")
        if self.max_threads and size > self.max_threads:
            raise PTXError(
                f"{self.name}: a block of {size} threads, where it takes {self.max_threads}"
            )
        if len(params) != self.param_bytes:
            raise PTXError(
                f"{self.name}: {len(params)} bytes of parameters, where it takes {self.param_bytes}"
            )
        return size

    def run(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        params: bytes,
        memory: Memory,
        shared: int = 0,
        *,
        races: bool = True,
        errors: int = 0,
        contract: bool = False,
        threads: int = 16384,
        ctas=None,
        steps: int = 200_000,
    ) -> None:
        """Runs the kernel.

        Args:
            grid: Blocks, up to three numbers.
            block: Threads of a block, up to three numbers.
            params: The parameters as they lie in memory.
            memory: The tensors.
            shared: Bytes of dynamic shared memory.
            races: Whether to look for races in shared memory.
            errors: Not 0: of approximations and of the order of atomic operations, each number
                another choice.
            contract: Products and sums without .rn are fused, as ptxas may do with all of them or
                none.
            threads: How many run together, at least one block.
            ctas: A function of the grid: the blocks to run, in their order. None: all.
            steps: Basic blocks after which a kernel counts as one that never ends.

        Raises:
            PTXError: The kernel did what no GPU lets it do, or what this interpreter does not know.
        """
        self.parse()
        grid, block = (tuple(g) + (1,) * (3 - len(g)) for g in (grid, block))
        size = self._check_launch(grid, block, params)
        if memory.arena is None:
            memory.freeze()
        buffer = np.zeros(-(-max(len(params), 16) // 16) * 16, u8)
        buffer[: len(params)] = np.frombuffer(params, u8)
        of = (
            ctas(grid)
            if ctas
            else [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        )
        together = max(1, threads // (-(-size // WARP) * WARP))
        with np.errstate(all="ignore"):
            for first in range(0, len(of), together):
                run = Run(
                    self,
                    grid,
                    block,
                    of[first : first + together],
                    buffer,
                    memory,
                    shared,
                    races,
                    errors,
                )
                self._run(run, contract, steps)

    def _run(self, run, contract, steps):
        registers = [None] * len(self.body.registers)
        end, meet = self.body.exit, self.meet
        stack = [(0, run.here, end)]  # (block, mask or None for all, block to stop at)
        while stack:
            pc, mask, stop = stack.pop()
            if mask is not None:
                mask = mask & run.live
                if not mask.any():
                    continue
                if mask.all():
                    mask = None
            while pc != stop:
                if pc == end:
                    run.live = np.zeros_like(run.live) if mask is None else run.live & ~mask
                    break
                run.steps += 1
                if run.steps > steps:
                    raise PTXError(f"{self.name}: did not end within {steps} basic blocks")
                try:
                    result = self._function(pc, mask is not None, contract)(run, registers, mask)
                except PTXError as error:
                    raise PTXError(f"{self.name}: {error}") from None
                if type(result) is int:
                    pc = result
                    continue
                taken, target, other = result
                if np.ndim(taken) == 0:
                    pc = target if taken else other
                    continue
                go = taken if mask is None else taken & mask
                stay = ~taken if mask is None else ~taken & mask
                if not stay.any():
                    pc = target
                elif not go.any():
                    pc = other
                else:
                    where = meet[pc]
                    stack.append((where, run.live if mask is None else mask, stop))
                    if other != where:
                        stack.append((other, stay, where))
                    if target != where:
                        stack.append((target, go, where))
                    break
