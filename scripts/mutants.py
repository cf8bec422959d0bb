"""Breaks the code on purpose, one line at a time, and sees whether the tests notice.  docs/reliability.md.

    python scripts/mutants.py                    # every mutant, in a copy of the working tree
    python scripts/mutants.py --minutes 30       # what fits; the next run goes on
    python scripts/mutants.py --only functional  # those whose file or name says so
    python scripts/mutants.py --record           # writes the figures into docs/reliability.md

The working tree is never touched: the mutants live in a copy, which is built and tested there. A mutant is killed when one of its
tests fails, and survives when all pass; one that does not compile, or whose line is gone, is an error of the list.
"""

from __future__ import annotations

# ruff: noqa: E501  one mutant a line
import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  for the forks

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reliability import ROOT, record

STATE = ROOT / "out" / "mutants.json"
PYTHON = sys.executable

PERTURB = ("tests/test_perturb.py", "tests/test_properties.py")
NOISE = ("tests/test_noise.py", "tests/test_perturb.py")
GUARDS = ("tests/test_guards.py",)
EMULATED = ("tests/test_cuda_emulated.py",)
INTERPRETED = ("tests/test_triton_interpreter.py::TestPerturb",)
INTERPRETED_LINEAR = ("tests/test_triton_interpreter.py::TestLinear",)
INTERPRETED_ACTIVATION = ("tests/test_triton_interpreter.py::TestActivation",)
LINEAR = ("tests/test_linear.py",)
AVERAGED = ("tests/test_properties.py",)
AVERAGING = ("tests/test_averaging.py",)
ACTIVATION = ("tests/test_activation.py",)
SAMPLES = ("tests/test_samples.py",)
LAYERS = ("tests/test_layers.py", "tests/test_seeds.py", "tests/test_faults.py")
USER_CODE = ("tests/test_user_code_variance.py",)


class Mutant(NamedTuple):
    path: str
    old: str  # must be there, once where `which` is 0, else the which-th time
    new: str
    tests: tuple[str, ...]
    which: int = 0
    explained: str = ""  # why no test can tell

    @property
    def name(self) -> str:
        return f"{self.path}: {self.old.strip()} -> {self.new.strip() or 'nothing'}"


MUTANTS = [
    # ---- the contract's bits and values
    Mutant("csrc/philox.h", "0xD2511F53u", "0xD2511F55u", NOISE, 1),
    Mutant("csrc/philox.h", "(row >> 32) * 0xCD9E8D57u", "row * 0xCD9E8D57u", NOISE),
    Mutant("csrc/philox.h", "p0 >> 32 ^ keys.round[1].hi", "p0 >> 32 ^ keys.round[1].lo", NOISE),
    Mutant("csrc/philox.h", "first2 = stream_sample ^ keys", "first2 = 0 ^ keys", NOISE),
    Mutant("csrc/philox.h", "key.lo + 0x9E3779B9u", "key.lo + 0x9E3779B8u", NOISE),
    Mutant("csrc/philox.h", "round < 10", "round < 9", NOISE, 2),
    Mutant("csrc/philox.h", "round = 3; round < 10", "round = 4; round < 10", NOISE),
    Mutant("csrc/philox.h", "ctr[1], key.lo)", "ctr[1], key.hi)", NOISE),
    Mutant("csrc/noise.h", "0.3442501127719879f", "0.3442401127719879f", NOISE),
    Mutant("csrc/noise.h", "V::splat(0x3F800004u)", "V::splat(0x3F800000u)", NOISE),
    Mutant("csrc/noise.h", "*odd = V::mul(r_sin, V::add(c, s))", "*odd = V::mul(r_sin, V::sub(c, s))", NOISE),
    Mutant("csrc/noise.h", "& 0xFFFF) << 16 | sample", "& 0xFFFF) << 15 | sample", NOISE),
    Mutant("csrc/noise.h", "V::as_uint(r), upper_half, sign", "V::as_uint(r), odd_quadrant, sign", NOISE),
    Mutant("csrc/noise.h", "static_cast<uint32_t>(key >> 32)}", "static_cast<uint32_t>(key)}", NOISE),
    # ---- CPU kernels
    Mutant("csrc/cpu/simd.h", "_mm512_setr_epi32(0, 2, 8, 10, 1", "_mm512_setr_epi32(0, 2, 10, 8, 1", PERTURB),
    Mutant("csrc/cpu/simd.h", "store(p + 16, _mm256_permute2x128_si256(low[0], low[1], 0x31))", "store(p + 16, _mm256_permute2x128_si256(low[0], low[1], 0x30))", PERTURB),
    Mutant("csrc/cpu/simd.h", "*b = _mm512_unpackhi_ps(even, odd)", "*b = _mm512_unpackhi_ps(odd, even)", PERTURB),
    Mutant("csrc/cpu/simd.h", "f(2 * V::kLanes, x, y);", "f(2 * V::kLanes, y, x);", PERTURB),
    Mutant("csrc/cpu/draw.h", "c.row_lo[0] == c.row_lo[last] &&", "true &&", PERTURB),
    Mutant("csrc/cpu/draw.h", "draw.first + static_cast<uint32_t>(sample)", "draw.first", PERTURB),
    Mutant("csrc/cpu/draw.h", "for (int s = 1; s < draw.num_samples", "for (int s = 2; s < draw.num_samples", PERTURB),
    Mutant("csrc/cpu/draw.h", "1.0f / static_cast<float>(draw.num_samples)", "1.0f / static_cast<float>(draw.num_samples + 1)", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "u[i] = fma_of(scale_of(", "u[i] = fma_of(-scale_of(", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "fma_of(du[i], static_cast<C>(z[i]), acc[i])", "fma_of(du[0], static_cast<C>(z[i]), acc[i])", PERTURB),
    Mutant("csrc/cpu/draw.h", "phase(col0 % 8)", "phase(0)", PERTURB),
    Mutant("csrc/cpu/draw.h", "first(col0 / 8)", "first(0)", PERTURB, 1),
    Mutant("csrc/cpu/draw.h", "static_cast<uint64_t>(row0 + row)", "static_cast<uint64_t>(row)", PERTURB),
    Mutant("csrc/cpu/draw.h", "c.row_hi[i] = static_cast<uint32_t>(r >> 32);", "c.row_hi[i] = 0;", NOISE),
    Mutant("csrc/cpu/draw.h", "c.row_hi[i] = hi + (at < lo);", "c.row_hi[i] = hi;", NOISE),
    Mutant("csrc/cpu/draw.h", "start + (i & mask)", "start + (i & mask / 2)", PERTURB),
    # a tile that stays in registers
    Mutant("csrc/cpu/perturb.cpp", "One::load(du + next), b, One::load(acc + next)", "One::load(du + at), b, One::load(acc + next)", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "One::load(scale + next), b", "One::load(scale + at), b", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "dense && a.num_samples == 1 && (a.x", "dense && (a.x", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "same(a.x) &&", "true &&", PERTURB),
    Mutant("csrc/cpu/perturb.cpp", "stream_pair(u + at, here, beside)", "stream_pair(u + at, here, here)", PERTURB),
    Mutant("csrc/cpu/parallel.h", "smaller(w.total, at + w.grain)", "at + w.grain", ("tests/test_guards.py", "tests/test_perturb.py"),
           explained="each part ends at its tensor's end by itself; the clamp spares it empty rounds"),
    Mutant("csrc/cpu/draw.h", "i < left ? hi : next_hi", "hi", NOISE),
    Mutant("csrc/cpu/draw.h", "smaller(kTileGroups, count - g));\n      for", "smaller(kTileGroups, count - g + 1));\n      for", PERTURB),
    Mutant("csrc/cpu/walk.h", "if (g >= count_of_row) g -= count_of_row, ++row;", "if (g > count_of_row) g -= count_of_row, ++row;", PERTURB),
    Mutant("csrc/cpu/walk.h", "sum[col] += acc[k + j]", "sum[col] += 0 * acc[k + j]", PERTURB),
    Mutant("csrc/cpu/walk.h", "std::memset(acc, 0, sizeof(C) * static_cast<size_t>(k + kTile));", ";", PERTURB),
    Mutant("csrc/cpu/walk.h", "std::memset(acc, 0, sizeof(C) * static_cast<size_t>(k + kTile));",
           "std::memset(acc, 0, sizeof(C) * static_cast<size_t>(k));", PERTURB),
    Mutant("csrc/cpu/walk.h", "smaller(8, s.features - first_channel)", "8", GUARDS),
    Mutant("csrc/cpu/walk.h", "from = static_cast<int>(larger(0, -first_channel))", "from = static_cast<int>(0)", GUARDS),
    Mutant("csrc/cpu/walk.h", "s.row0 + row + i", "s.row0 + i", PERTURB),
    Mutant("csrc/cpu/walk.h", "inner = 0;\n          ++outer;", "++outer;", PERTURB),
    Mutant("csrc/cpu/walk.h", "for (int i = 0; i < kTileGroups; ++i) sum[t]", "for (int i = 0; i < kTileGroups - 1; ++i) sum[t]", PERTURB),
    Mutant("csrc/cpu/walk.h", "smaller(m, (b + 1) * block_rows) * groups", "smaller(m, (b + 1) * block_rows - 1) * groups", PERTURB),
    Mutant("csrc/cpu/walk.h", "partials[b * k + channel] = sum[t]", "partials[channel] = sum[t]", PERTURB),
    Mutant("csrc/cpu/draw.h", "factor * 0.5 * at(j) : factor", "factor * at(j) : factor", PERTURB),
    Mutant("csrc/cpu/draw.h", "factor * 0.5 * at(j) : factor", "factor * 0.5 * at(j) : 1.0", PERTURB),
    Mutant("csrc/cpu/draw.h", "std::exp(0.5f * s)", "std::exp(s)", PERTURB),
    Mutant("csrc/cpu/draw.h", "numbers[n + j] = numbers[j]", "numbers[n + j] = numbers[0]", PERTURB),
    Mutant("csrc/cpu/walk.h", "smaller(k, 8 * (g + here) - phase)", "smaller(k + 1, 8 * (g + here) - phase)", GUARDS),
    Mutant("csrc/cpu/walk.h", "C* acc = static_cast<C*>(std::calloc(", "static C* acc = static_cast<C*>(std::calloc(", ("tests/test_guards.py", "tests/test_perturb.py")),
    Mutant("csrc/cpu/convert.h", "bits + 0x7FFFu + ((bits >> 16) & 1u)", "bits + 0x8000u", ("tests/test_noise.py", *PERTURB)),
    Mutant("csrc/cpu/simd.h", "up, _mm512_set1_epi32(-1))", "up, _mm512_set1_epi32(0))", PERTURB),
    Mutant("csrc/cpu/simd.h", "_mm256_add_epi32(bits, splat(0x7FFF)), last)", "_mm256_add_epi32(bits, splat(0x7FFF)), splat(0))", PERTURB),
    Mutant("csrc/cpu/simd.h", "_mm256_permute4x64_epi64(packed, 0xD8)", "packed", PERTURB),
    Mutant("csrc/cpu/convert.h", "magnitude >= 0x477FF000u", "magnitude >= 0x47800000u", ("tests/test_noise.py",),
           explained="from 65520 to 65536 rounding carries into infinity by itself"),
    Mutant("csrc/cpu/convert.h", "f != f ? 0x7FC0 :", "false ? 0x7FC0 :", ("tests/test_noise.py", *PERTURB)),
    # ---- the seam to torch
    Mutant("csrc/ops.cpp", "next = strides[d] * sizes[d];", "next = strides[d];", PERTURB),
    Mutant("csrc/ops.cpp", "!outer || inner != 1", "!outer || inner > 1", PERTURB),
    Mutant("csrc/ops.cpp", "if (t.size(dim) != 1 && t.stride(dim) != 1) return", "if (t.size(dim) != 1 && t.stride(dim) > 2) return", PERTURB),
    Mutant("csrc/ops.cpp", "    d == skip || sizes[d] == 1) continue;".strip(), "d == skip) continue;", PERTURB),
    Mutant("csrc/ops.cpp", "return torch::stable::copy_(u, dense_u);", "return u;", PERTURB),
    Mutant("csrc/ops.cpp", "sigma.stride(0) == 1 || sigma.size(0) == 1 ?", "true ?", PERTURB),
    # ---- derivatives
    Mutant("dipkernels/functional.py", "return dx, dsigma * torch.exp(sigma / 2) / 2 if", "return dx, dsigma * torch.exp(sigma / 2) if", PERTURB),
    Mutant("dipkernels/functional.py", "num_samples**-0.5", "num_samples**-1", PERTURB),
    Mutant("dipkernels/functional.py", "rows.t() @ flat_rows(u)", "rows.t() @ flat_rows(x)", LINEAR),
    Mutant("dipkernels/functional.py", "rows.sum(0).to(ctx.bias_dtype)", "rows.mean(0).to(ctx.bias_dtype)", LINEAR),
    Mutant("dipkernels/functional.py", "dsigma = dsigma * torch.exp(sigma / 2) / 2\n", "dsigma = dsigma * torch.exp(sigma / 2)\n", PERTURB),
    Mutant("dipkernels/functional.py", "return dx.to(ctx.out_dtype or ctx.x_dtype)", "return dx.to(ctx.x_dtype)", PERTURB,
           explained="torch hands a jvp zeros, never None, for an input that does not move: the branch is not reached"),
    Mutant("dipkernels/functional.py", "_Perturb.apply(zeros, h, seed", "_Perturb.apply(zeros, -h, seed", PERTURB),
    Mutant("dipkernels/functional.py", "return _NoiseSumFunc.apply(dg, sigma, seed, ctx.where)", "return _NoiseSumFunc.apply(-dg, sigma, seed, ctx.where)", PERTURB),
    Mutant("dipkernels/functional.py", "return du, torch.zeros_like(ctx.saved_tensors[0])", "return du, None", LAYERS),
    Mutant("dipkernels/functional.py", "        _check_sigma(sigma)\n", "        pass\n", PERTURB),
    Mutant("dipkernels/functional.py", "u = _perturb(x, sigma, seed, (-1, row0, col0, s, 1,", "u = _perturb(x, sigma, seed, (-1, row0, col0, sample, 1,", AVERAGED),
    Mutant("dipkernels/functional.py", "mean: Tensor = y / num_samples", "mean: Tensor = y", AVERAGED),
    Mutant("dipkernels/functional.py", "_num_kept(keep, activation, where[3], dtype or x.dtype)", "_num_kept(keep, activation, where[3], x.dtype)", AVERAGING),
    Mutant("dipkernels/functional.py", "dtype.itemsize // kept.itemsize", "1", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "samples[group.start : group.stop], 0,", "samples[: len(group)], 0,", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "part = samples[group.start : group.stop]", "part = samples[: len(group)]", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "max(num_kept - group.start, 0)", "num_kept", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "(scale, seed, row0 + block.start, col0", "(scale, seed, row0, col0", AVERAGING, 1),
    Mutant("dipkernels/row_blocks.py", "(scale, seed, row0 + block.start, col0", "(scale, seed, row0, col0", AVERAGING, 2),
    Mutant("dipkernels/row_blocks.py", "num_kept, torch.uint8 if dtype is torch.bfloat16 else dtype", "num_kept, dtype", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "min(x.shape[0], _ELEMENTS", "max(x.shape[0], _ELEMENTS", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "row_sum.mul_(1 / num_samples)", "row_sum", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "dweight.addcmul_(noise_sum, scale.to(wide))", "dweight.add_(noise_sum)", AVERAGING),
    Mutant("dipkernels/row_blocks.py", "(slope.float() * _SLOPE_STEPS + _SLOPE_ZERO)", "(slope.float() * _SLOPE_STEPS)", AVERAGING),
    Mutant("csrc/cpu/samples.cpp", "bits[j] | wide[j]", "wide[j]", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "(h[j] <= 0 ? 0 : bit)", "(h[j] < 0 ? 0 : bit)", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "s == 0 || bit == 1 ? 0 : -1", "s == 0 ? 0 : -1", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "bit != 128 && s + 1", "s + 1", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "y.slope != y.slope ? kSlopeNan : code", "code", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "kSlopeZero + 0.5f", "kSlopeZero", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "bytes[j] & bit ? dy[j]", "bytes[j] ? dy[j]", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "8 - i % 8", "8", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "static_cast<int>(s - begin)", "0", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "j < whole_n ? whole_lines : 0", "whole_lines", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "words[i] ^= change << shift", "words[i] ^= change", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "run.outer * a.out.outer_stride + run.inner", "run.outer * a.inner + run.inner", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "return sample * t.sample_stride + ", "return ", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", ">= 12.5f ? 0.0f : tail", ">= 12.5f ? tail : tail", SAMPLES),
    Mutant("csrc/cpu/samples.cpp", "s * fma_of(x, rest, 1.0f)}", "s * fma_of(x, 1.0f - rest, 1.0f)}", SAMPLES),
    Mutant("csrc/cpu/perturb.cpp", "same(a.z) &&", "true &&", SAMPLES),
    Mutant("csrc/cpu/perturb.cpp", "One::store_pair(z + at, a, b)", "One::store_pair(z + at, b, a)", SAMPLES),
    Mutant("csrc/ops.cpp", "a.sample += static_cast<int32_t>(s)", "a.sample += 0", SAMPLES),
    Mutant("csrc/ops.cpp", "s * j.size * j.bytes_z", "s * j.size * j.bytes_u", SAMPLES),
    Mutant("csrc/cpu/activation.cpp", "sum[i] += dmu[i];", ";", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "sum[j] += part[j]", "sum[j] = part[j]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "dv[j] += dv_part[j]", "dv[j] = dv_part[j]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "dw[j] += given[j]", "dw[j] = given[j]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "sum_blocks(partials + blocks * n", "sum_blocks(partials", ACTIVATION),
    Mutant("csrc/cpu/parallel.h", "partials[j] * factor(j)", "partials[j]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "slope += x < 0 ? tails : C(1) - tails", "slope += C(1) - tails", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "if (variance_at(args, first + i) != 0) continue;", "continue;", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "for (double& h : curvature) h = 0;", "{}", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "value[l] * (1 - beta) + series", "value[l] * beta + series", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "(n - 2 * i) * (n - 2 * i - 1)", "(n - 2 * i) * (n - 2 * i + 1)", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "double power = kOdd ? beta : std::sqrt(beta);", "double power = std::sqrt(beta);", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "slope[0] += p * beta;", "slope[0] += p;", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "2 * (l + 1) * from[l + 1] - from[l]", "2 * l * from[l + 1] - from[l]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "(2 * l + 1) * from[l] - (l ? from[l - 1] : 0)", "(2 * l + 1) * from[l]", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "size = size > C(1e15) ? C(1e15) : size;", "", ACTIVATION),
    Mutant("csrc/cpu/activation.cpp", "pass.any_plain |= v == 0", "pass.any_plain = v == 0", ACTIVATION),
    Mutant("csrc/ops.cpp", "    check_same_shape(*given, \"given\", weight, \"weight\");", "", ACTIVATION),
    Mutant("dipkernels/expectation.py", "if needs_dweight or needs_dsigma:", "if needs_dweight:", AVERAGING),
    Mutant("dipkernels/expectation.py", "dmu @ weight.to(dmu.dtype)", "dmu @ weight", AVERAGING),
    Mutant("dipkernels/expectation.py", "sums.to(bias.dtype)", "dv.to(bias.dtype)", AVERAGING),
    Mutant("dipkernels/expectation.py", "log_variance, dweight)", "log_variance, None)", AVERAGING),
    Mutant("dipkernels/expectation.py", "return exports or torch._C", "return torch._C", ("tests/test_compile.py",)),
    Mutant("dipkernels/functional.py", "expectation.linear(x.to(dtype or x.dtype)", "expectation.linear(x", AVERAGING),
    Mutant("csrc/cpu/vector_math.h", "-1.42860677e-6f", "1.42860677e-6f", SAMPLES),
    Mutant("csrc/cpu/vector_math.h", "fma_of(power, rest, power - 1.0f)", "fma_of(power, rest, power) - 1.0f", SAMPLES),
    Mutant("csrc/cpu/vector_math.h", "return x < -87.0f ? 0.0f : s;", "return s;", SAMPLES),
    Mutant("dipkernels/functional.py", "dx = du.to(x.dtype) if needs_dx else None", "dx = du if needs_dx else None", LINEAR,
           explained="autograd casts a gradient to the type of its input"),
    # ---- checks and registration
    Mutant("dipkernels/ops.py", "    _check_seed(seed, x.device)", "    pass", PERTURB),
    Mutant("dipkernels/ops.py", "sample <= MAX_SAMPLES - num_samples", "sample <= MAX_SAMPLES", ("tests/test_noise.py", *PERTURB)),
    Mutant("dipkernels/ops.py", "0 <= row0 <= MAX_ORIGIN and", "0 <= row0 and", PERTURB),
    Mutant("csrc/ops.cpp", "origin >= 0 && origin <= 3 * (int64_t{1} << 61)", "origin >= 0", PERTURB),
    Mutant("dipkernels/ops.py", "new_empty(shape, dtype=torch.float32)", "new_empty(shape, dtype=torch.float64)", ("tests/test_ops.py",)),
    Mutant("dipkernels/ops.py", "return torch.empty_like(x, dtype=out_dtype)", "return torch.empty_like(x)", ("tests/test_ops.py",)),
    # ---- layers and seeds
    Mutant("dipkernels/layers.py", "row0=seeds.first_row(input)", "row0=0", LAYERS, 1),
    Mutant("dipkernels/layers.py", "return self.training if seeds._MODE is None", "return True if seeds._MODE is None", LAYERS),
    Mutant("dipkernels/layers.py", "torch.promote_types(moved.dtype, torch.float32)", "moved.dtype", LAYERS),
    Mutant("dipkernels/layers.py", "next(_NUMBERS) % MAX_LAYERS", "0 * next(_NUMBERS)", LAYERS),
    Mutant("dipkernels/layers.py", "            self.variance.start_anew()", "            pass", USER_CODE),
    Mutant("dipkernels/layers.py", "                self._fill(after)\n", "                pass\n", USER_CODE),
    Mutant("dipkernels/layers.py", "missing[:] = [key for key in missing", "[key for key in missing", LAYERS),
    Mutant("dipkernels/decay.py", "if p.requires_grad}", "}", USER_CODE),
    Mutant("dipkernels/seeds.py", "        if d != feature:\n", "        if True:\n", LAYERS),
    Mutant("dipkernels/seeds.py", "signed(self._number * _GOLDEN)", "signed(_GOLDEN)", ("tests/test_trajectories.py",)),
    Mutant("dipkernels/seeds.py", "_KEY, _ROW0, _MODE, _TAG = self._saved.pop()", "_KEY, _ROW0, _MODE, _TAG = self._saved[0]", LAYERS),
    # ---- the method
    Mutant("dipkernels/trajectories.py", "return by_example.transpose(0, 1)", "return value.unflatten(0, (m, batch))", ("tests/test_trajectories.py",)),
    Mutant("dipkernels/trajectories.py", "return parts[0] / max(k, 1)", "return parts[0]", ("tests/test_trajectories.py",)),
    Mutant("dipkernels/trajectories.py", "seeds.numbered_pass(number, count)", "seeds.numbered_pass(0, count)", ("tests/test_trajectories.py",)),
    Mutant("dipkernels/trajectories.py", "count = min(chunk, max(k, 1) - first)", "count = chunk", ("tests/test_trajectories.py",)),
    Mutant("dipkernels/objective.py", "part.mean() for part in parts", "part.sum() for part in parts", ("tests/test_objective.py",)),
    Mutant("dipkernels/objective.py", "log_variance.exp().sum() - beta * log_variance.sum() + total", "log_variance.exp().sum() + beta * log_variance.sum() + total", ("tests/test_objective.py",)),
    Mutant("dipkernels/objective.py", "float32)).var(0)", "float32)).var(0, unbiased=False)", ("tests/test_objective.py",)),
    Mutant("dipkernels/objective.py", "variance.sum(-1).mean() if", "variance.mean() if", ("tests/test_objective.py",)),
    Mutant("dipkernels/objective.py", "torch.stack(losses).mean()", "torch.stack(losses).sum()", ("tests/test_objective.py",)),
    # ---- Triton, interpreted
    Mutant("triton_kernels/perturb.py", "total = tl.fma(du, z, total)", "total = tl.fma(-du, z, total)", INTERPRETED),
    Mutant("triton_kernels/perturb.py", "inv_num_samples, row0 + row, group", "inv_num_samples, row, group", INTERPRETED, 1),
    Mutant("triton_kernels/perturb.py", "num_row_blocks - 1 - i if FROM_END", "num_row_blocks - i if FROM_END", INTERPRETED, 1),
    Mutant("triton_kernels/perturb.py", "num_row_blocks - 1 - i if FROM_END else i", "i", INTERPRETED, 2),
    Mutant("triton_kernels/perturb.py", "scale = 0.5 * noise_scale(", "scale = noise_scale(", INTERPRETED),
    Mutant("triton_kernels/perturb.py", "mask=(p < num_partials) & mask[None, :]", "mask=(p < num_partials - 1) & mask[None, :]", INTERPRETED),
    Mutant("triton_kernels/noise.py", "for i in range(1, num_samples)", "for i in range(2, num_samples)", INTERPRETED),
    Mutant("triton_kernels/noise.py", "s = _flip_sign(s * x, odd)", "s = _flip_sign(s * x, half)", INTERPRETED),
    Mutant("triton_kernels/noise.py", "zero + ((row >> 32) & 0xFFFFFFFF)", "zero + ((row >> 33) & 0xFFFFFFFF)", INTERPRETED),
    Mutant("triton_kernels/activation.py", "return tl.exp2(-b * b), q * r", "return tl.exp2(-b * b), q", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "col_mask & (v_of <= 0.0)", "col_mask", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "power = beta if ODD else tl.sqrt(beta)", "power = tl.sqrt(beta)", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "total = total * (1.0 - beta) + SERIES", "total = total * beta + SERIES", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "(2.0 * (i + 1)) * of[i + 1]", "(2.0 * i) * of[i + 1]", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "total -= of[i - 1]", "pass", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "slopes = _plus(slopes, TERMS[2 * i + 1] * beta)", "slopes = _plus(slopes, TERMS[2 * i + 1])", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "b = tl.minimum(b, 16.0, propagate_nan=tl.PropagateNan.ALL)", "pass", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "total_dv = tl.where(zero, plain_dv, total_dv)", "pass", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "total_dmu = tl.where(zero, plain_dmu, total_dmu)", "pass", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "out += tl.cast(tl.num_programs(1), tl.int64) * N", "pass", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "dweight += tl.load(given_ptr + at", "dweight = tl.load(given_ptr + at", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "2.0 * scaled * square", "scaled * square", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/activation.py", "slope * tl.sum(total, axis=0)", "tl.sum(total, axis=0)", INTERPRETED_ACTIVATION),
    Mutant("triton_kernels/linear.py", "slope = s * (1.0 + h * (1.0 - s))", "slope = s * (1.0 + h)", INTERPRETED_LINEAR),
    # ---- CUDA, emulated
    Mutant("csrc/cuda/perturb.cu", "static_cast<uint32_t>(p.first_group + group)", "static_cast<uint32_t>(group)", EMULATED, 1),
    Mutant("csrc/cuda/perturb.cu", "row += n * step;", "row += step;", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "half > 0; half /= 2", "half > 1; half /= 2", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "last_word + s, group, row", "last_word, group, row", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "a.factor * 0.5 * sigma_at<C>", "a.factor * sigma_at<C>", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "inner -= wrap, outer += turn;", "inner -= wrap;", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "      __syncthreads();\n      if (threadIdx.y < half)", "      if (threadIdx.y < half)", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "if (inside(start + t, a.features)) partial[t] = mine[t];", "partial[t] = mine[t];", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "sum += static_cast<const C*>(partials)[i * a.features + col];", "sum = static_cast<const C*>(partials)[i * a.features + col];", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "if (p.from_end) row = p.rows - 1 - row;", "if (p.from_end) row = p.rows - 2 - row;", EMULATED),
    Mutant("csrc/cuda/perturb.cu", "inner -= wrap, outer += turn;", "inner -= a.inner, ++outer;", EMULATED),
    Mutant("csrc/cuda/tickets.h", "count_up(ticket, blocks - 1) == blocks - 1", "count_up(ticket, blocks) == blocks - 1", EMULATED),
    Mutant("csrc/cuda/tickets.h", "of_stream[{device, id}] = first;", "for (unsigned long long i = 0; i < 9; ++i) of_stream[{device, i}] = first;", EMULATED),
]  # fmt: skip


def mutated(text: str, mutant: Mutant) -> str:
    places = [m.start() for m in re.finditer(re.escape(mutant.old), text)]
    wanted = max(mutant.which, 1)
    if len(places) < wanted or (mutant.which == 0 and len(places) != 1):
        raise LookupError(
            f"expected the line {'once' if mutant.which == 0 else f'{wanted} times'}, found it {len(places)} times"
        )
    at = places[wanted - 1]
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


class Copy:
    """The tree, copied to a folder of its own and built there, without optimisation to speak of: -O1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for name in names:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dipkernels" / "triton_kernels").symlink_to("../triton_kernels")
        setup = folder / "setup.py"
        setup.write_text(setup.read_text().replace("-O3 -fPIC", "-O1 -fPIC"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "DIPKERNELS_CUDA": "0",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / ".hypothesis"),
        }
        where = self.python("-c", "import dipkernels; print(dipkernels.__file__)").stdout.strip()
        assert Path(where).is_relative_to(folder), f"the tests would run on {where}"

    def python(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess:
        return subprocess.run(
            [PYTHON, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def build(self) -> str | None:
        """None, or the compiler's words."""
        written = list(self.folder.glob("build/temp*/ninja"))
        if not written:
            done = self.python("setup.py", "-q", "build_ext", "--inplace")
        else:  # setup.py has written what ninja does, and would take seconds to import torch again
            ninja = shutil.which("ninja") or str(Path(PYTHON).parent / "ninja")
            done = subprocess.run([ninja, "-C", str(written[0]), "-j", "2"], capture_output=True, text=True)
        if done.returncode:
            return (done.stdout + done.stderr)[-2000:]
        if written:
            new = next(self.folder.glob("build/lib*/dipkernels/_C.so"))
            (self.folder / "dipkernels" / "_C.so").unlink()
            shutil.copy2(new, self.folder / "dipkernels" / "_C.so")
        return None

    def test(self, names: Iterable[str], timeout: float) -> tuple[str, str]:
        """("killed" | "survived" | "error", the first failing test or the reason); in a fork, which has torch already."""
        output = self.folder / "output.txt"
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 5))
            os.chdir(self.folder)
            os.environ.update(self.environment)
            sys.path.insert(0, str(self.folder))
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1), os.dup2(to, 2)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--tb=line", *names])
            sys.stdout.flush()
            os._exit(int(code))
        end = time.monotonic() + 10 * timeout  # a machine may be busy: processor time tells a loop
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "killed", f"no end within {timeout:.0f} s"
            time.sleep(0.1)
        if os.WIFSIGNALED(status):
            return "killed", f"signal {os.WTERMSIG(status)}"
        code, text = os.WEXITSTATUS(status), output.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        if code == 0:
            return "survived", ""
        return ("killed", failed.group(1)) if failed else ("error", text[-800:])


def needs_build(path: str) -> bool:
    return path.startswith("csrc/") and not path.startswith("csrc/cuda/")


def digest(mutant: Mutant) -> str:
    return hashlib.sha256("\0".join((mutant.path, mutant.old, mutant.new, str(mutant.which))).encode()).hexdigest()[:12]


def load() -> dict:
    return json.loads(STATE.read_text()) if STATE.exists() else {}


def save(state: dict) -> None:
    """Beside what another run has left meanwhile."""
    STATE.parent.mkdir(exist_ok=True)
    part = STATE.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(load() | state, indent=1) + "\n")
    part.replace(STATE)


def report(state: dict) -> str:
    rows = [(m, state[digest(m)]) for m in MUTANTS if digest(m) in state]
    count = {kind: sum(row["status"] == kind for _, row in rows) for kind in ("killed", "survived", "error")}
    commits = sorted({row["commit"] for _, row in rows})
    lines = [
        f"{len(rows)} of {len(MUTANTS)} mutants run (trees at {', '.join(commits)}): {count['killed']} killed, "
        f"{count['survived']} survived, {count['error']} could not be run.",
        "",
    ]
    areas: dict[str, list[str]] = {}
    for mutant, row in rows:
        areas.setdefault(mutant.path, []).append(row["status"])
    lines += ["| file | mutants | killed |", "|---|---|---|"]
    lines += [f"| {path} | {len(all_)} | {all_.count('killed')} |" for path, all_ in areas.items()]
    for kind in ("survived", "error"):
        for mutant, row in rows:
            if row["status"] == kind:
                why = f" ({mutant.explained})" if mutant.explained else ""
                lines += ["", f"{kind.capitalize()}: `{' '.join(mutant.name.split())}`{why}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; the next run goes on")
    parser.add_argument("--only", default="", help="part of a file's or a mutant's name")
    parser.add_argument("--again", action="store_true", help="also those that were killed before")
    parser.add_argument("--folder", type=Path, help="an empty folder for the copy (a temporary one)")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds of processor time for one mutant's tests (300)"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the figures into docs/reliability.md and run nothing"
    )
    args = parser.parse_args()
    state = load()
    if args.record:
        record("mutants", report(state))
        print(report(state))
        return 0
    wanted = [m for m in MUTANTS if args.only in m.name]
    done = {m: state.get(digest(m), {}).get("status") for m in wanted}
    todo = [m for m in wanted if args.again or not (done[m] == "killed" or (done[m] == "survived" and m.explained))]
    todo.sort(key=lambda m: done[m] is not None)  # survivors last
    todo.sort(key=lambda m: needs_build(m.path))  # what needs no compiler first
    start = time.monotonic()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="mutants") as temporary:
        copy = Copy(args.folder or Path(temporary))
        problem = copy.build()
        if problem:
            raise SystemExit(f"the unchanged copy does not build:\n{problem}")
        ours: set[str] = set()
        stale = False  # whether the library is still that of a mutant
        for number, mutant in enumerate(todo):
            if time.monotonic() - start > 60 * args.minutes:
                print(f"{len(todo) - number} left for the next run")
                break
            path = copy.folder / mutant.path
            before = path.read_text()
            status, why = "survived", ""
            try:
                path.write_text(mutated(before, mutant))
                if stale or needs_build(mutant.path):
                    stale = needs_build(mutant.path)
                    problem = copy.build()
                    if problem:
                        status, why = "error", f"does not build: {problem[-300:]}"
                for name in mutant.tests:
                    if status == "survived" and (copy.folder / name.split("::")[0]).exists():
                        status, why = copy.test([name], args.timeout)
            except LookupError as error:
                status, why = "error", str(error)
            finally:
                path.write_text(before)
            state[digest(mutant)] = {"name": mutant.name, "status": status, "why": why, "commit": commit}
            ours.add(digest(mutant))
            save({key: state[key] for key in ours})
            seconds = time.monotonic() - start
            line = " ".join(mutant.name.split())
            print(f"{status:9s} {line[:150]}  [{' '.join(why.split())[:90]}] {seconds:.0f} s", flush=True)
        # What killed a mutant has to pass where nothing is broken.
        if stale and copy.build():
            raise SystemExit("the copy no longer builds")
        killers = {state[key]["why"] for key in ours if state[key]["status"] == "killed" and "::" in state[key]["why"]}
        while killers:
            status, why = copy.test(sorted(killers), 10 * args.timeout)
            if status == "survived":
                break
            print(f"fails unbroken too: {why}")
            if why not in killers:
                raise SystemExit(f"the killing tests on the unbroken copy: {why}")
            killers.discard(why)
            for key in ours:
                if state[key]["why"] == why:
                    state[key].update(status="error", why=f"fails unbroken too: {why}")
        save({key: state[key] for key in ours})
    state = load()
    print(report(state))
    known = [state.get(digest(m), {}).get("status") for m in wanted]
    return 0 if all(status == "killed" or m.explained for m, status in zip(wanted, known, strict=True)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
