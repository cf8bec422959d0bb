"""The task of studies/arithmetic.py: chains of sums modulo 5, their tokens, a Llama, exact
match."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

MODULUS = 5
DIGITS = "0123456789"[:MODULUS]
# The blank pads, the semicolon ends; +3 (an operator with its operand) and =3 are one token each.
VOCABULARY = [" ", ";", ":", *DIGITS]
VOCABULARY += [mark + digit for mark in "=+-*" for digit in DIGITS]
TOKEN = {text: number for number, text in enumerate(VOCABULARY)}
IGNORED = -100  # label of a token that the loss does not count
# chains start anywhere below, so that a longer chain meets no position that training has not
LAST_POSITION = 24

# ---- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """`4 +3 -1 :` and its worked steps `=4 =2 =1 ;`, the running total modulo 5; one string for
    each token."""

    prompt: list[str]
    solution: list[str]

    @property
    def steps(self) -> int:
        return len(self.prompt) - 2


def problem(rng: random.Random, steps: int, operators: str) -> Problem:
    value = rng.randrange(MODULUS)
    prompt, solution = [str(value)], [f"={value}"]
    for _ in range(steps):
        operator, operand = rng.choice(operators), rng.randrange(MODULUS)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        value %= MODULUS
        prompt.append(f"{operator}{operand}")
        solution.append(f"={value}")
    return Problem([*prompt, ":"], [*solution, ";"])


def part_of(prompt: list[str]) -> str:
    """train (8 of 10), val or test: decided by the calculation."""
    return {0: "test", 1: "val"}.get(zlib.crc32("".join(prompt).encode()) % 10, "train")


def problems(seed: int, count: int, steps: int, operators: str, part: str) -> list[Problem]:
    """count problems of this number of steps, all from one part."""
    rng, found = random.Random(f"{seed} {steps} {operators} {part}"), []
    while len(found) < count:
        candidate = problem(rng, steps, operators)
        if part_of(candidate.prompt) == part:
            found.append(candidate)
    return found


def encode(tokens: list[str]) -> list[int]:
    return [TOKEN[token] for token in tokens]


def positions(steps: int, first: int) -> list[int]:
    """A worked step has the position of the step it works out, so that attention finds it by
    distance."""
    chain = [first + i for i in range(steps + 1)]
    return [*chain, first - 1, *chain, first + steps + 1]


def batch_of(chosen: list[Problem], rng: random.Random) -> dict[str, Tensor]:
    """Problems of one number of steps as the model takes them; the loss counts the worked steps
    only."""
    steps = chosen[0].steps
    tokens = torch.tensor([encode(one.prompt + one.solution) for one in chosen])
    labels = tokens.clone()
    labels[:, : steps + 2] = IGNORED
    starts = [rng.randrange(1, LAST_POSITION - steps) for _ in chosen]
    places = torch.tensor([positions(steps, start) for start in starts])
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": places, "labels": labels}


def batches(
    seed: int, count: int, batch: int, lengths: tuple[int, ...], operators: str
) -> list[dict[str, Tensor]]:
    """count batches of training problems, each of one number of steps, in random order."""
    rng = random.Random(seed)
    counts = [rng.choice(lengths) for _ in range(count)]
    stock = {n: problems(seed, batch * counts.count(n), n, operators, "train") for n in set(counts)}
    return [batch_of([stock[n].pop() for _ in range(batch)], rng) for n in counts]


# ---- model and test ------------------------------------------------------------------------------


def llama(dim: int, depth: int, heads: int = 4) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=dim,
            intermediate_size=dim * 8 // 3 // 16 * 16,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=256,
            initializer_range=dim**-0.5,  # at the usual 0.02 the first 200 steps learn nothing
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=TOKEN[";"],
            pad_token_id=TOKEN[" "],
        )
    )


@torch.no_grad()
def exact_match(model, chosen: list[Problem]) -> dict[str, float]:
    """Greedy generation, in %: right final answers, and solutions with every step right.

    The problems must be of one number of steps. The loop is its own because generate() counts
    positions on.
    """
    model.eval()
    batch = batch_of(chosen, random.Random(0))
    prompt = chosen[0].steps + 2
    wanted = batch["input_ids"][:, prompt:]
    cache, last, found = None, batch["input_ids"][:, :prompt], []
    for end in range(prompt, batch["input_ids"].shape[1]):
        places = batch["position_ids"][:, end - last.shape[1] : end]
        mask = batch["attention_mask"][:, :end]
        out = model(
            input_ids=last,
            attention_mask=mask,
            position_ids=places,
            cache=cache,
            use_cache=True,
        )
        cache, last = out.cache, out.logits[:, -1:].argmax(-1)
        found.append(last)
    right = torch.cat(found, 1) == wanted
    # The answer counts when the chain also ends where it should.
    answers, solutions = right[:, -2:].all(1), right.all(1)
    return {
        "answer": 100 * answers.double().mean().item(),
        "solution": 100 * solutions.double().mean().item(),
    }
