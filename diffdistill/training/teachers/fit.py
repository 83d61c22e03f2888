"""The loop that every kind of network is trained by: AdamW, a learning rate that rises and falls, averaged weights."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffdistill.errors import UserError


class FitConfig(BaseModel):
    """AdamW with linear warm-up, cosine decay to zero, gradient clipping and an average of the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(128, gt=0, description="samples per step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(200, ge=0, description="steps of linear warm-up; 0 for none")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay; 0 for none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay per step of the averaged weights, the ones written; 0 for no average"
    )


class Fitted(NamedTuple):
    """State of a training after `steps` steps."""

    steps: int
    ema: nn.Module  # the averaged weights
    loss: float  # mean training loss over the last tenth of the steps taken


def lr_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the learning rate at `step` as a share of its peak: linear from 1/warmup to 1, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network: ema <- d * ema + (1 - d) * network.

    d = min(decay, (1 + step) / (10 + step)): the bound lets the average forget the initial weights in a short run.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - d)


def fit(
    network: nn.Module, loss_at: Callable[[int], Tensor], config: FitConfig, progress: bool, snapshot_every: int | None
) -> Iterator[Fitted]:
    """Minimise loss_at(step) over config.steps steps; yield every `snapshot_every` steps, if any, and at the end."""
    ema = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    losses: list[float] = []
    for step in _shown(range(config.steps), losses, progress):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step, config.warmup_steps, config.steps)
        loss = loss_at(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"the loss is {losses[-1]} at step {step}; its weights are not written. Lower fit.lr (now {config.lr:g})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        update_ema(ema, network, config.ema_decay, step)
        done = step + 1
        if done == config.steps or (snapshot_every and done % snapshot_every == 0):
            last = losses[-max(1, done // 10) :]
            yield Fitted(done, ema, sum(last) / len(last))


def _shown(steps: range, losses: list[float], progress: bool) -> Iterator[int]:
    """Pass the steps through, showing where the training is."""
    if not progress:
        yield from steps
    elif sys.stdout.isatty():
        from rich.progress import track

        yield from track(steps, description="training")
    else:
        begin = time.perf_counter()
        for step in steps:
            yield step
            if (step + 1) % 250 == 0 or step + 1 == len(steps):
                recent = losses[-250:]
                rate = (time.perf_counter() - begin) / (step + 1)
                print(
                    f"step {step + 1}/{len(steps)}  loss {sum(recent) / len(recent):.4f}  {1000 * rate:.0f} ms/step  "
                    f"{rate * (len(steps) - step - 1) / 60:.1f} min left",
                    flush=True,
                )
