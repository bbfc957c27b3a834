"""One process of `tests/test_distributed.py`, started as by torchrun: trains two steps on its shard and saves what it saw.

Arguments: output folder, gradient accumulation steps, 1 for an early backward pass of the tiny network.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import distribute_bn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import images, make_supernet  # noqa: E402
from timm_netaug import NetAugTask  # noqa: E402

STEPS, SHARD = 2, 4


def setup(rank=0):
    """A task and its optimizer; each rank draws other weights, which the first rank's replace."""
    torch.manual_seed(rank)
    supernet = make_supernet('mobilenetv3_small_050', dict(width_mults=(1, 1.4), expand_mults=(1, 1.6))).train()
    task = NetAugTask(supernet, seed=3, verbose=False)
    if rank:
        with torch.no_grad():
            for p in task.supernet.parameters():
                p.add_(torch.randn_like(p))
    return task


def shards(world, accum):
    """Images and labels by step, micro-batch and rank."""
    n = STEPS * accum * world * SHARD
    x, y = images(n, 32, seed=1), torch.arange(n) % 10
    pick = [[slice((((s * accum + a) * world) + r) * SHARD, (((s * accum + a) * world) + r + 1) * SHARD)
             for r in range(world)] for s in range(STEPS) for a in range(accum)]
    return [[[(x[part], y[part]) for part in pick[s * accum + a]] for a in range(accum)] for s in range(STEPS)]


def spy(task, seen):
    active = task.supernet.active
    task.supernet.active = lambda widths: seen.append(dict(widths)) or active(widths)


def main() -> None:
    out, accum = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
    task = setup(rank).prepare_distributed()
    task.early_backward = sys.argv[3] == '1'
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
    widths, grads = [], []
    spy(task, widths)
    for step, micro in enumerate(shards(world, accum)):
        task.start_update(step)
        for i, batches in enumerate(micro):
            if i + 1 < accum:
                with task.no_sync():
                    (task(*batches[rank])['loss'] / accum).backward()
            else:
                (task(*batches[rank])['loss'] / accum).backward()
        grads.append({k: p.grad.clone() for k, p in task.supernet.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    own = {k: v.clone() for k, v in task.supernet.named_buffers()}
    distribute_bn(task.get_trainable_module(), world, reduce=True)
    torch.save(dict(widths=widths, grads=grads, own=own, state=task.supernet.state_dict()), out / f'{rank}.pt')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
