"""Peer: PyTorch, by default with the examples in memory as two tensors.

compile: the model through torch.compile; loader: the examples through a DataLoader, without
processes of its own, which would only cost time with examples that are in memory already.
"""

import numpy as np
import torch
import workload
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_model(work: workload.Workload) -> nn.Sequential:
    """[b, 784] -> [b, 10], with initial weights that all peers draw from the same distribution."""
    kernels = work.model == "cnn"
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))] if kernels else []
    for weights, biases in work.glorot(np.random.default_rng(0)):
        layer: nn.Conv2d | nn.Linear
        if weights.ndim == 4:
            layer = nn.Conv2d(*weights.shape[2:], 3, padding=1)
            layers += [layer, nn.ReLU(), nn.MaxPool2d(2)]
        else:
            layer = nn.Linear(*weights.shape)
            layers += [nn.Flatten(), layer] if kernels else [layer, nn.ReLU()]
        # [outputs, inputs, 3, 3] and [outputs, inputs].
        order = (3, 2, 0, 1) if weights.ndim == 4 else (1, 0)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights.transpose(order)))
            layer.bias.copy_(torch.from_numpy(biases))
    if kernels:
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return nn.Sequential(*layers[:-1])


def make_optimizer(work: workload.Workload, model: nn.Module) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[work.optimizer]
    return kind(model.parameters(), lr=work.learning_rate)


def held_loss(model: nn.Module, held: workload.Arrays) -> float:
    """The mean loss on the pictures that are held out."""
    x, y = held
    with torch.no_grad():
        return float(nn.CrossEntropyLoss()(model(torch.from_numpy(x)), torch.from_numpy(y).long()))


def main() -> None:
    begun = workload.start()
    work, (x, y) = begun.work, begun.train
    images, labels = torch.from_numpy(x), torch.from_numpy(y).long()
    model = make_model(work)
    optimizer = make_optimizer(work, model)
    criterion = nn.CrossEntropyLoss()
    forward = torch.compile(model) if "compile" in begun.how else model

    def gathered():
        for batch in torch.randperm(work.examples).split(work.batch):
            yield images[batch], labels[batch]

    loader = DataLoader(TensorDataset(images, labels), batch_size=work.batch, shuffle=True)

    def epoch() -> float:
        losses = []
        for x_batch, y_batch in loader if "loader" in begun.how else gathered():
            loss = criterion(forward(x_batch), y_batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    epoch()
    loss = held_loss(model, begun.held)
    clock = workload.Clock()
    for _ in range(begun.epochs):
        print(f"loss {epoch():.4f}")
    workload.report(steps=begun.epochs * work.steps, seconds=clock.seconds(), loss=loss)


if __name__ == "__main__":
    main()
