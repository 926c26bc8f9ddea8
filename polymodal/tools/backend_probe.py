"""One process of `doctor`'s trial of a backend: `python -m polymodal.tools.backend_probe RANK WORLD PORT
BACKEND`.

Joins the others on this machine and adds up a tensor with them; exit code 0 when the sum is right.
"""

from __future__ import annotations

import sys
from datetime import timedelta


def main(rank: int, world: int, port: int, backend: str) -> None:
    import torch
    import torch.distributed as dist

    from polymodal.runtime import device, rendezvous

    patience = timedelta(seconds=90)
    store = rendezvous.tcp_store("127.0.0.1", port, world, patience, serves=rank == 0)
    where = device.find("cpu" if backend == "gloo" else "auto", rank).torch
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    value = torch.full((1024,), rank + 1.0, device=where)
    dist.all_reduce(value)
    if not value.eq(world * (world + 1) / 2).all():
        raise ValueError(f"the sum over {world} processes is wrong: {value[0].item():g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
