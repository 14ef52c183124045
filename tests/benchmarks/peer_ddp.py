"""Peer: PyTorch's DistributedDataParallel on gloo; one process of those that torchrun starts.

Each process has a core and a thread of its own, and half of each batch.
"""

import os

import torch
import workload
from peer_torch import held_loss, make_model, make_optimizer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    begun = workload.start()
    work, (x, y) = begun.work, begun.train
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[int(os.environ["LOCAL_RANK"]) % len(cpus)]})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, workers = distributed.get_rank(), distributed.get_world_size()

    images, labels = torch.from_numpy(x), torch.from_numpy(y).long()
    model = DistributedDataParallel(make_model(work))
    optimizer = make_optimizer(work, model)
    criterion = nn.CrossEntropyLoss()
    torch.manual_seed(0)  # one order of the examples for all

    def epoch() -> float:
        losses = []
        for batch in torch.randperm(work.examples).split(work.batch):
            mine = batch[rank::workers]
            loss = criterion(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    epoch()
    loss = held_loss(model.module, begun.held)
    distributed.barrier()
    clock = workload.Clock()
    for _ in range(begun.epochs):
        print(f"loss {epoch():.4f}")
    seconds = clock.seconds()
    if rank == 0:
        workload.report(steps=begun.epochs * work.steps, seconds=seconds, loss=loss)
    # Together: gloo aborts a process that a peer has left.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
