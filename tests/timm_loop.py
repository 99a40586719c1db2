"""A training loop as timm's own script has it; the README's patch is applied to this text."""

from pathlib import Path

import timm
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import nn


def main(images: Path, epochs: int) -> tuple[nn.Module, list[float]]:
    model = timm.create_model("resnet10t", num_classes=2)
    ema = ModelEmaV3(model, decay=0.9)
    dataset = create_dataset("", root=str(images), split="train", is_training=True)
    loader = create_loader(dataset, (3, 32, 32), 8, is_training=True, use_prefetcher=False, num_workers=0)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", epochs, updates_per_epoch=len(loader))
    criterion = LabelSmoothingCrossEntropy()
    losses = []
    for epoch in range(epochs):
        meter = AverageMeter()
        model.train()
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            meter.update(loss.item(), len(x))
        scheduler.step(epoch + 1)
        losses.append(meter.avg)
    return model, losses
