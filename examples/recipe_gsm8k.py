"""GSM8K on a local causal language model with one epoch of LoRA: the paper's reasoning setting.

    python examples/recipe_gsm8k.py --data gsm8k --model DIR --out out/gsm8k --method dip \\
        --batch 16 --lr 2e-4
    torchrun --nproc-per-node 8 examples/recipe_gsm8k.py ...  the same on eight GPUs
    python examples/recipe_gsm8k.py ... --resume              goes on from OUT/last.pt

--data: the folder with train.jsonl and test.jsonl as published (lines of {"question": ...,
"answer": "... #### 42"}). --model: a local folder of a transformers checkpoint with its tokenizer.
Nothing is downloaded. Noise sits at the input of every layer that carries an adapter. Writes
metrics.jsonl, last.pt (adapters, variances, optimiser) and results.json: exact match of the final
number, by greedy generation with the deterministic model (Algorithm 3).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from recipe_training import (
    COUNT,
    PRECISIONS,
    Trainer,
    Worker,
    apply_method,
    check_arguments,
    make_parser,
    refusing,
    workers,
    write_results,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import dipkernels as dip

IGNORED = -100
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def load(path: Path) -> list[dict[str, str]]:
    """The lines of one file of GSM8K."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: expected {path.name} of GSM8K (lines of question and answer) in "
            f"{path.parent}, found none"
        )
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            whole = (
                isinstance(line["question"], str)
                and isinstance(line["answer"], str)
                and "####" in line["answer"]
            )
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(
                f"--data: expected a question and an answer with '####' in line {number} of {path}"
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"--data: expected examples in {path}, found none")
    return lines


def final_number(text: str) -> str | None:
    """What stands after '####', as a number without thousands' commas and trailing zeros; None
    where there is none."""
    found = NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    if found is None:
        return None
    number = found.group().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def prompt(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def collate(examples: list[dict[str, str]], tokenizer, length: int) -> dict[str, Tensor]:
    """Prompt and answer, padded on the right; the loss counts the answer and the end of text."""
    rows = []
    for example in examples:
        head = tokenizer(prompt(example["question"]))["input_ids"]
        tail = tokenizer(" " + example["answer"], add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        rows.append(((head + tail)[:length], ([IGNORED] * len(head) + tail)[:length]))
    width = max(len(tokens) for tokens, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]
        ),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every next token that counts: [B, T, V] against [B, T]."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer, worker: Worker, trainer: Trainer, examples: list[dict], args
) -> dict:
    """Exact match in % over all workers, and the first answers that were generated."""
    model.eval()
    right, samples = 0, []
    tokenizer.padding_side = "left"
    mine = examples[worker.rank :: worker.size]
    for first in tqdm(
        range(0, len(mine), args.batch),
        desc="test",
        disable=not worker.is_first,
        dynamic_ncols=True,
    ):
        chosen = mine[first : first + args.batch]
        inputs = tokenizer(
            [prompt(e["question"]) for e in chosen], return_tensors="pt", padding=True
        ).to(worker.device)
        inputs.pop("token_type_ids", None)
        with trainer.autocast():
            out = model.generate(
                **inputs,
                max_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(
            (found := final_number(text)) is not None and found == final_number(example["answer"])
            for text, example in zip(texts, chosen)
        )
        samples += texts[: 3 - len(samples)]
    tokenizer.padding_side = "right"
    (total,) = worker.total(right)
    return {
        "exact_match": round(100 * total / len(examples), 3),
        "examples": len(examples),
        "samples": samples,
    }


def train(parser: argparse.ArgumentParser, args: argparse.Namespace, worker: Worker) -> None:
    """Train the adapters, and test them.

    A function, so that the model is gone before the process group is; else a worker may hang.
    """
    with refusing(parser):
        examples, test = load(args.data / "train.jsonl"), load(args.data / "test.jsonl")
        torch.manual_seed(args.seed)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
            base = AutoModelForCausalLM.from_pretrained(
                args.model,
                local_files_only=True,
                dtype=PRECISIONS["bf16" if args.precision == "bf16" else "fp32"],
            )
        except Exception as error:
            raise ValueError(
                f"--model: expected a causal language model in {args.model}, got {error!r}"
            ) from error
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"--model: expected a tokenizer with an end of text, {args.model} has none"
            )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    targets = args.targets[0] if args.targets == ["all-linear"] else args.targets
    model = get_peft_model(
        base,
        LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    model.to(worker.device)
    batch = {
        k: v.to(worker.device)
        for k, v in collate(examples[: args.batch], tokenizer, args.length).items()
    }
    entry = model.get_input_embeddings()
    apply_method(model, entry, args, batch, filter=lambda module, name: name in adapted)

    def batch_of(indices: Tensor) -> dict[str, Tensor]:
        batch = collate([examples[i] for i in indices.tolist()], tokenizer, args.length)
        return {name: value.to(worker.device) for name, value in batch.items()}

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = dip.trajectories(model, **inputs, use_cache=False, m=args.m).logits  # [m, B, T, V]
        return dip.objective(logits, batch["labels"], next_token_loss, lambda_s=args.lambda_s)

    settings = {"recipe": "gsm8k", "rank": args.rank}
    trainer = Trainer(model, worker, args, len(examples), settings)
    if trainer.run(batch_of, loss_of):
        write_results(worker, args, evaluate(model, tokenizer, worker, trainer, test, args))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "folder with train.jsonl and test.jsonl of GSM8K, as published")
    add, again = parser.add_argument, "recompute blocks in backward"
    add("--model", type=Path, required=True, help="local folder of a transformers checkpoint")
    add("--rank", type=COUNT, default=16, help="of the LoRA adapters (16)")
    add("--lora-alpha", type=COUNT, default=32, help="scale of the adapters times the rank (32)")
    add("--targets", nargs="+", default=["all-linear"], help="layers with adapters (all-linear)")
    add("--length", type=COUNT, default=1024, help="tokens of an example, the rest cut off (1024)")
    add("--new-tokens", type=COUNT, default=400, help="tokens of a generated answer (400)")
    add("--gradient-checkpointing", action="store_true", help=again)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if not args.model.is_dir():
        parser.error(f"--model: expected a local folder, got {args.model}")

    with workers(args.device) as worker:
        train(parser, args, worker)


if __name__ == "__main__":
    main()
