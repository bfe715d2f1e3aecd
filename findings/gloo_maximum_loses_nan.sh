#!/usr/bin/env bash
# all_reduce with MAX over gloo loses a NaN, or keeps it, by the rank that has it and the size of the tensor.
#
# Version: torch 2.13.0, CPU, gloo.
# torch.maximum carries a NaN on, and so do amax and SUM over gloo. all_reduce(MAX) and all_reduce(MIN) do not: of one
# number the NaN of rank 0 stays and that of rank 1 is lost, and of some elements of a tensor it is lost, too. Who
# reduces the largest magnitudes of activations over ranks, as distributed calibration does, gets a finite range for a
# tensor that held a NaN on one of them.
# What helps: reduce a flag, whether there was a NaN, by SUM beside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/reduce.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def reduced(rank, operation, size, holder):
    """How many of `size` numbers, all of which are NaN on one rank, are NaN afterwards."""
    tensor = torch.full((size,), float("nan") if rank == holder else 1.0)
    dist.all_reduce(tensor, operation)
    return int(tensor.isnan().sum())


def work(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = {}
    for operation in ("MAX", "MIN", "SUM"):
        for size in (1, 7):
            for holder in range(RANKS):
                found[operation, size, holder] = reduced(rank, getattr(dist.ReduceOp, operation), size, holder)
    if rank == 0:
        for (operation, size, holder), count in found.items():
            print(f"{operation} of {size}, all NaN on rank {holder}: {count} NaN are left")
        one = {key: count for key, count in found.items() if key[1] == 1}
        as_seen = all(count == size for (operation, size, _), count in found.items() if operation == "SUM")
        as_seen &= all(one[operation, 1, holder] == 1 - holder for operation in ("MAX", "MIN") for holder in range(RANKS))
        as_seen &= any(count < 7 for (operation, size, _), count in found.items() if size == 7 and operation == "MAX")
        print("torch.maximum:", torch.maximum(torch.tensor(float("nan")), torch.tensor(1.0)).item())
        sys.exit(0 if as_seen else "behaviour has changed")


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), RANKS)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/reduce.py" "$folder/store"
