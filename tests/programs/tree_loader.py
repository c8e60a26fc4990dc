"""torch's DataLoader in mid-epoch: two workers that have made more batches than were taken."""

import os
from typing import Any

import torch
from dialogue import Proof, converse
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)


class Numbers(Dataset):  # type: ignore[type-arg]  # torch names no type
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return torch.full((4, 4), float(index) + constant), os.getpid()


constant = 0.5


def main() -> None:
    loader = DataLoader(Numbers(), batch_size=8, num_workers=2, persistent_workers=True)
    batches = iter(loader)
    values, makers = [], set()

    def take() -> None:
        tensor, pids = next(batches)
        values.append(tensor[:, 0, 0])
        makers.update(pids.tolist())

    for _ in range(5):
        take()
    before = set(makers)
    expected = torch.arange(96) + 0.5

    def prove() -> Proof:
        while len(values) < 12:
            take()
        again = torch.cat([tensor[:, 0, 0] for tensor, _ in loader])
        return {
            "epoch": bool(torch.equal(torch.cat(values), expected)),
            "the next one": bool(torch.equal(again, expected)),
            "by the same workers": len(before) == 2 and makers == before,
        }

    converse(prove, lambda: values.pop(0))
    os._exit(0)


if __name__ == "__main__":
    main()
