"""torch on the CPU, between the forward pass and the backward one: the graph lives in memory only.

With the argument `whole`: the same two steps uninterrupted, and their digest.
"""

import functools
import hashlib
import json
import sys

import torch
from dialogue import Proof, converse


def main() -> None:
    torch.manual_seed(13)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(4, 8, 5), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(224, 3)
    )
    optimizer = torch.optim.Adam(model.parameters())
    inputs, labels = torch.randn(64, 4, 32), torch.randint(0, 3, (64,))
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)

    def go_on() -> str:
        """Backward over the waiting graph, a step, and another whole step with dropout."""
        state = hashlib.sha256()
        loss.backward()
        for parameter in model.parameters():
            state.update(parameter.grad.numpy().tobytes())
        optimizer.step()
        optimizer.zero_grad()
        hidden = torch.nn.functional.dropout(model(inputs), 0.5)
        torch.nn.functional.cross_entropy(hidden, labels).backward()
        optimizer.step()
        for parameter in model.parameters():
            state.update(parameter.detach().numpy().tobytes())
        return state.hexdigest()

    if sys.argv[1:] == ["whole"]:
        print(json.dumps(go_on()))
        return

    @functools.cache
    def prove() -> Proof:
        return {"arguments": ["whole"], "answer": go_on()}

    def spoil() -> None:
        model[3].bias.data += 1e-4

    converse(prove, spoil)


main()
