"""Optimizers with each of what a step may have: momentum, decay, clip, groups, second moments."""

from __future__ import annotations

from bilevel import SGD, Adagrad, Adam, AdamW, NAdam, RMSProp

OPTIMIZERS = {
    "plain": SGD(0.1),
    "sgd": SGD(0.1, weight_decay=0.1),
    "momentum": SGD(0.1, momentum=0.9, nesterov=True),
    "clip held": SGD(0.1, momentum=0.9, max_norm=0.5),
    "clip differentiated": SGD(0.1, max_norm=0.5, differentiate_clip=True),
    "adam": Adam(0.01, weight_decay=0.1, max_norm=0.5),
    "adamw": AdamW(0.01, weight_decay=0.1, decay_mask=lambda name: name != "b"),
    "groups": AdamW({"a": 0.1, "b": 0.2, "c": 0.3}, group=lambda name: name),
    "rmsprop": RMSProp(0.01),
    "adagrad": Adagrad(0.01),
    "nadam": NAdam(0.01),
}
