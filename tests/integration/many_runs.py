"""A worker that makes several runs one after another: argv[1] is JSON, {name: settings}."""

import json
import sys

import dist_train

if __name__ == "__main__":
    for name, settings in json.loads(sys.argv[1]).items():
        result = dist_train.train(None, dist_train.Config(workdir=name, **settings))
        print(name, result.step, flush=True)
