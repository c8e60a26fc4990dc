"""scikit-learn, fitting in a thread: boosting goes on stage after stage until it is asked.

With a number as argument: that many stages, uninterrupted, and a digest of the predictions.
"""

import hashlib
import json
import sys
import threading

import numpy as np
from dialogue import Proof, converse, ends
from sklearn.datasets import make_regression
from sklearn.ensemble import GradientBoostingRegressor

inputs, targets = make_regression(n_samples=300, n_features=8, random_state=3, noise=1.0)


def make_model(stages: int) -> GradientBoostingRegressor:
    return GradientBoostingRegressor(n_estimators=stages, random_state=5, subsample=0.8)


def digest(model: GradientBoostingRegressor) -> str:
    return hashlib.sha256(np.ascontiguousarray(model.predict(inputs)).tobytes()).hexdigest()


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(digest(make_model(int(sys.argv[1])).fit(inputs, targets))))
        return
    enough = threading.Event()
    under_way = threading.Event()
    model = make_model(100_000)

    def watch(stage: int, *_: object) -> bool:
        if stage == 8:
            under_way.set()
        return enough.is_set()

    fitting = threading.Thread(target=lambda: model.fit(inputs, targets, monitor=watch))
    fitting.start()
    under_way.wait()

    def prove() -> Proof:
        enough.set()
        ended = ends(fitting)
        return {
            "ended": ended,
            "arguments": [str(len(model.estimators_))],
            "answer": digest(model),
        }

    def spoil() -> None:
        enough.set()
        ends(fitting)
        model.estimators_[0, 0].tree_.value[:] += 1e-9

    converse(prove, spoil)


main()
