"""Peer: PyTorch's DistributedDataParallel on gloo; one process of those that torchrun starts.

    torchrun --nproc_per_node=2 peer_ddp.py DATA EPOCHS

Each process has a core and a thread of its own, and half of each batch.
"""

import os
import sys

import torch
import workload
from peer_torch import make_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    (x, y), held = workload.start()
    epochs = int(sys.argv[2])
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[int(os.environ["LOCAL_RANK"]) % len(cpus)]})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, workers = distributed.get_rank(), distributed.get_world_size()

    images, labels = torch.from_numpy(x), torch.from_numpy(y).long()
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    torch.manual_seed(0)  # one order of the examples for all

    def epoch() -> float:
        losses = []
        for batch in torch.randperm(workload.EXAMPLES).split(workload.BATCH):
            mine = batch[rank::workers]
            loss = criterion(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    epoch()
    with torch.no_grad():
        held_loss = float(
            criterion(model.module(torch.from_numpy(held[0])), torch.from_numpy(held[1]).long())
        )
    distributed.barrier()
    clock = workload.Clock()
    for _ in range(epochs):
        print(f"loss {epoch():.4f}")
    seconds = clock.seconds()
    if rank == 0:
        workload.report(steps=epochs * workload.STEPS, seconds=seconds, loss=held_loss)
    # Together: gloo aborts a process that a peer has left.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
