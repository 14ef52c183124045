"""A worker that makes several runs one after another: argv[1] is JSON, {name: settings}."""

import json
import sys

import dist_train
from dist_train.outcome import Outcome


def only_the_model(self, *args):
    """Writes what two runs are compared by; the rest takes longer than these trainings."""
    del args
    with self._parts.averaged_weights():
        self._parts.model.save(self._workdir.model)


if __name__ == "__main__":
    Outcome.write = only_the_model
    for name, settings in json.loads(sys.argv[1]).items():
        result = dist_train.train(None, dist_train.Config(workdir=name, **settings))
        print(name, result.step, flush=True)
