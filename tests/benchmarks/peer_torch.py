"""Peer: PyTorch with the examples in memory as two tensors.

peer_torch.py DATA EPOCHS [compile]
"""

import sys

import numpy as np
import torch
import workload
from torch import nn


def make_model() -> nn.Sequential:
    """The model with the initial weights that all peers draw from the same distribution."""
    layers: list[nn.Module] = []
    for weights, biases in workload.glorot(np.random.default_rng(0)):
        layer = nn.Linear(*weights.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights.T))
            layer.bias.copy_(torch.from_numpy(biases))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    (x, y), held = workload.start()
    epochs = int(sys.argv[2])
    images, labels = torch.from_numpy(x), torch.from_numpy(y).long()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    forward = torch.compile(model) if "compile" in sys.argv[3:] else model

    def epoch() -> float:
        losses = []
        for batch in torch.randperm(workload.EXAMPLES).split(workload.BATCH):
            loss = criterion(forward(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    epoch()
    with torch.no_grad():
        held_loss = float(
            criterion(model(torch.from_numpy(held[0])), torch.from_numpy(held[1]).long())
        )
    clock = workload.Clock()
    for _ in range(epochs):
        print(f"loss {epoch():.4f}")
    workload.report(steps=epochs * workload.STEPS, seconds=clock.seconds(), loss=held_loss)


if __name__ == "__main__":
    main()
