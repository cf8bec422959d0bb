"""A small model of a type that transformers knows, with inputs for it: for sweep.py.

The config's numbers are shrunk by the names that transformers gives them, SIZES. No type is known
here by its own name.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LARGEST = 25_000_000  # parameters
VOCABULARY = 128
# What a config's number may be at most, by its name: the first that fits. None: it stays.
SIZES: dict[str, tuple[str, int | None]] = {
    "vocabulary": ("vocab_size", VOCABULARY),
    "chosen": (r"experts_per_tok|top_?k$|num_experts_per|moe_k$|num_selected", 2),
    "shared": (r"shared_experts|^n_group$|topk_group|first_k_dense_replace", 1),
    "experts": (r"experts|n_routed|num_routed", 4),
    "key heads": (r"(key_value|kv)_heads|num_kv|n_kv|head_kv|(attention|query)_groups", 2),
    "heads": (r"heads$|n_head$|_heads_", 4),
    "rotary": (r"rotary_dim", 4),
    "head": (r"head_dim|d_kv|head_size|d_head|qk_nope|(key|value)_length|kv_channels", 8),
    "rank": (r"lora_r$|_rank$", 16),
    "kept": (r"feat_extract", None),
    "layers": (r"layers|(num|n)_.*blocks$|n_layer$|num_blocks|num_stages_|depths?$", 2),
    "positions": (
        r"max_.*position|n_positions|max_seq|n_ctx|max_(source|target)|context_length",
        512,
    ),
    "image": (r"image_size|crop_size|img_size|input_size$", 32),
    "patch": (r"^patch_size", 8),
    "inner": (r"intermediate|ffn|inner_dim|d_ff|feedforward|mlp_dim|n_inner|ff_dim|d_inner", 64),
    "window": (
        r"num_channels|in_chan|audio_channels|kernel|window|group|stride|patch|block_size|chunk"
        r"|bucket|grid|local|conv_size|image|section|axes",
        None,
    ),
    "width": (r"hidden|d_model|n_embd|embed|width|_?dims?$|^emb_|channels|_sizes?$|filters", 32),
}
# Tried one after the other: some classes need more layers, one head, or their own widths.
TRIES: tuple[dict[str, int | None], ...] = (
    {},
    {"layers": 4},
    {"heads": 1, "key heads": 1, "width": 128, "head": None},
    {"heads": None, "key heads": None, "width": None, "head": None, "inner": None},
)
# Of each type the first class that can be built; then all others.
FIRST = """
SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ CAUSAL_LM IMAGE_TEXT_TO_TEXT MULTIMODAL_LM MASKED_LM
IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION CTC AUDIO_CLASSIFICATION SEMANTIC_SEGMENTATION
DEPTH_ESTIMATION SEQUENCE_CLASSIFICATION
"""


def classes(kind: str) -> list[str]:
    """The names of a type's model classes, the one to try first first."""
    others = sorted(name for name in dir(modeling_auto) if re.match("MODEL_.*MAPPING_NAMES$", name))
    first = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in FIRST.split()]
    found: dict[str, None] = {}
    for name in [*first, "MODEL_MAPPING_NAMES", *others]:
        here = getattr(modeling_auto, name).get(kind, ())
        found |= dict.fromkeys((here,) if isinstance(here, str) else here)
    return list(found)


def smaller(name: str, value: Any, limits: dict[str, int | None]) -> Any:
    """What stands in a small config for this value: powers of two, and no dropout."""
    if isinstance(value, float):
        return 0.0 if re.search("drop|mask_(time|feature)_prob|jitter", name) else value
    if isinstance(value, (list, tuple)) and value and all(type(part) is int for part in value):
        return type(value)(smaller(name, part, limits) for part in value)
    if type(value) is not int:
        return False if name == "apply_spec_augment" else value
    if re.search("token_(id|index)$", name):  # the texts are of 30 to 99
        return value if value < 30 else 100 + sum(map(ord, name)) % (VOCABULARY - 100)
    for key, (pattern, limit) in SIZES.items():
        if re.search(pattern, name):
            limit = limits.get(key, limit)
            return value if limit is None or value < 2 else min(limit, 1 << value.bit_length() - 1)
    return value


def parts(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from parts(value)


def small(config: Any, limits: dict[str, int | None]) -> Any:
    """A config of the same class with smaller numbers, those inside it too."""
    changed = {}
    for name, value in vars(config).items():
        inside = isinstance(value, transformers.PreTrainedConfig)
        new = small(value, limits) if inside else smaller(name, value, limits)
        if inside or (new != value and not re.match("_|num_labels|chunk_size_feed", name)):
            changed[name] = new
    made = type(config)(**changed)
    rotary = getattr(made, "rope_parameters", None) or {}
    if "mrope_section" in rotary:  # three parts of half a head
        heads = getattr(made, "num_attention_heads", 1)
        half = (getattr(made, "head_dim", None) or made.hidden_size // heads) // 2
        rotary["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return made


def randomise(model: nn.Module) -> None:
    """Weights that are not trivial, where a class starts at zeros, ones or nothing; no dropout."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel():
                z = torch.randn(p.shape, generator=generator)
                wild = not (p.abs() < 1e3).all()
                if p.ndim < 2:
                    p.copy_(z * 0.1 if wild else p + z * 0.1)
                else:
                    p.copy_(z * max(0.03, (p.shape[0] / p.numel()) ** 0.5))
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)


def inputs(model: nn.Module, config: Any, form: int) -> dict[str, Any]:
    """Keyword inputs for two examples; form: which of three shapes of an image or a sound.

    Raises KeyError for an argument of forward that is not known here.
    """

    def of(*names: str, default: Any, among: Any = config) -> Any:
        found = [getattr(part, name, None) for part in parts(among) for name in names]
        return next((value for value in found if value is not None), default)

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    taken = inspect.signature(model.forward).parameters
    ids = torch.randint(30, 100, (2, 12), generator=generator)
    vision = of("vision_config", default=config)
    size = of("image_size", "img_size", "input_size", default=32, among=vision)
    size = size.get("height", 32) if isinstance(size, dict) else size
    size = (size if isinstance(size, int) else size[0], 64, 224)[form]
    channels = of("num_channels", "in_channels", "in_chans", default=3, among=vision)
    frames = of("num_frames", "frames_per_clip", default=None)
    image = normal(*([frames] if frames else []), channels, size, size)
    mel = of("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", default=80)
    length = 2 * of("max_source_positions", default=32)
    history = of("context_length", default=32) + max(of("lags_sequence", default=None) or [0])
    series = of("num_input_channels", default=None)
    width = of("hidden_size", "d_model", default=32)
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :8],
        "bbox": torch.randint(0, 50, (2, 12, 4), generator=generator).sort(-1).values,
        "inputs_embeds": normal(12, width),
        "hidden_states": normal(12, width),
        "pixel_values": image,
        "pixel_values_videos": image,
        "input_features": normal(*((mel, length), (64, mel), (mel, 64))[form]),
        "input_values": normal(*((2000,), (1, 2000), (of("max_length", default=64), mel))[form]),
        "past_values": normal(history, *([series] if series else [])),
        "past_observed_mask": torch.ones(2, history, *([series] if series else [])),
        "return_loss": False,
    }
    needed = [
        name for name, p in taken.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    main = getattr(model, "main_input_name", "input_ids")
    wanted = {main, *needed, *({"bbox", "return_loss"} & set(taken))}
    if of("projection_dim", default=None) and {"input_ids", "pixel_values"} <= set(taken):
        wanted |= {"input_ids", "pixel_values"}  # CLIP and its kind
    if "input_ids" in wanted and "attention_mask" in taken:
        wanted.add("attention_mask")
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        wanted.add("decoder_input_ids")
    return {name: known[name] for name in wanted - {"labels"}}


def parameters(made: type, config: Any) -> int:
    """How many; 0 for a class that cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
    except Exception:
        return 0


class NotBuilt(Exception):
    """No class of the type could be built and called."""


def build(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a type, in eval mode, and a batch for it.

    Raises NotBuilt with what was tried.
    """
    tried: list[str] = []
    for limits in TRIES:
        for name in classes(kind)[:4]:
            try:
                made = getattr(transformers, name)
                config = small(CONFIG_MAPPING[kind](), limits)
                if (count := parameters(made, config)) > LARGEST:
                    raise ValueError(f"{count} parameters")
                model = made(copy.deepcopy(config)).eval()
                randomise(model)
            except Exception as problem:
                tried.append(f"{name}: {problem!r}"[:300])
                continue
            for form in range(3):
                try:
                    batch = inputs(model, config, form)
                    with torch.no_grad():
                        if not any(bool(out.isfinite().any()) for out in run(model, batch)):
                            raise ValueError("no finite output")
                    return model, batch
                except Exception as problem:
                    tried.append(f"{name}, form {form}: {problem!r}"[:300])
    raise NotBuilt("; ".join(dict.fromkeys(tried)))


def tensors(out: Any) -> Iterator[Tensor]:
    """The floating tensors of an output, in order."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, (dict, list, tuple)):
        for part in out.values() if isinstance(out, dict) else out:
            yield from tensors(part)


def run(model: nn.Module, batch: dict[str, Any], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    return list(tensors(model(**copy.deepcopy(batch))))
