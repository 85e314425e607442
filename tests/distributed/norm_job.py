"""What one rank does to normalise with the others; started by `launch.Job`, one process per rank."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from esper.blueprints import SiteShape, build, load_library
from esper.leyline.errors import BlueprintDoesNotFit


def main(folder: Path) -> None:
    ir, site = load_library()["BP-ALL-REDUCE-SHARD"].ir, SiteShape("bd", 4, 4)
    refused = ""
    try:
        build(ir, site, seed=0)
    except BlueprintDoesNotFit as error:
        refused = str(error)
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    child = build(ir, site, seed=0)
    # Each rank sees one half of the data: together their mean is 1 and their deviation 3, on none of them alone.
    shard = torch.tensor([[-2.0], [4.0]])[rank].expand(6, 4)
    for _ in range(1200):
        child(shard)
    moments = child.norm.moments.clone()  # type: ignore[union-attr,operator]
    found = {"refused": refused, "moments": moments, "normed": child.eval().norm(shard)}  # type: ignore[operator]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
