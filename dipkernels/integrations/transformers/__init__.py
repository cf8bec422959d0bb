"""transformers' Trainer and TRL's trainers: a mixin, a callback, from_pretrained.
docs/guides/trainers.md."""

from .callback import DIPCallback as DIPCallback
from .pretrained import from_pretrained as from_pretrained
from .trainer import DIPMixin as DIPMixin
from .trainer import DIPTrainer as DIPTrainer
