"""The floor: what no loop can do without, by numpy alone.

products: the matrix products of the MLP's step, forward and backward; bytes: the pictures of a
batch gathered and cast to float32, and the weights read and written once.
"""

import numpy as np
import workload

_SECONDS = 2.0
_MANY = 20  # steps between two looks at the clock


class Products:
    """All matrix products of a step of the MLP, into memory that is there already.

    Args:
      work: whose shapes they have.
    """

    def __init__(self, work: workload.Workload):
        rng = np.random.default_rng(0)

        def numbers(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        # Of each layer: inputs [b, i], weights [i, o], gradients of the outputs [b, o].
        triples = [
            (numbers(work.batch, i), numbers(i, o), numbers(work.batch, o)) for i, o in work.layers
        ]
        pairs = [(x, weights) for x, weights, _ in triples]
        pairs += [(x.T, gradients) for x, _, gradients in triples]
        # Nobody asks for the gradient of the pictures.
        pairs += [(gradients, weights.T) for _, weights, gradients in triples[1:]]
        self._products = [(a, b, np.empty((len(a), b.shape[1]), np.float32)) for a, b in pairs]

    def __call__(self) -> None:
        for a, b, out in self._products:
            np.matmul(a, b, out=out)


class Bytes:
    """The bytes of a step of any loop that has its examples in memory as uint8.

    Args:
      work: whose batches they are.
      pictures: [n, 784] uint8.
    """

    def __init__(self, work: workload.Workload, pictures: np.ndarray):
        rng = np.random.default_rng(0)
        batches = len(pictures) // work.batch
        self._order = rng.permutation(len(pictures))[: batches * work.batch].reshape(batches, -1)
        self._step = 0
        self._pictures = pictures
        self._gathered = np.empty((work.batch, pictures.shape[1]), np.uint8)
        self._cast = np.empty((work.batch, pictures.shape[1]), np.float32)
        self._weights = np.zeros(sum(int(np.prod(shape)) for shape in work.layers), np.float32)

    def __call__(self) -> None:
        ids = self._order[self._step % len(self._order)]
        self._step += 1
        # Without `mode`, numpy gathers into a buffer of its own first.
        np.take(self._pictures, ids, axis=0, out=self._gathered, mode="clip")
        np.copyto(self._cast, self._gathered)
        np.add(self._weights, 1.0, out=self._weights)


def main() -> None:
    begun = workload.start()
    work = begun.work
    if "bytes" in begun.how:
        step = Bytes(work, np.round(begun.train[0] * 255).astype(np.uint8))
    else:
        step = Products(work)
    for _ in range(_MANY):
        step()
    clock, steps = workload.Clock(), 0
    while clock.seconds() < _SECONDS:
        for _ in range(_MANY):
            step()
        steps += _MANY
    workload.report(steps=steps, seconds=clock.seconds(), loss=None)


if __name__ == "__main__":
    main()
