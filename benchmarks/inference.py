#!/usr/bin/env python3
"""Compare a model exported from a super-network with the stock model of the same architecture: they must cost the same.

    python benchmarks/inference.py --model mobilenetv2_035 --img-size 160

Both run in turn, so that a machine that slows down slows both. Reported are medians with quartiles, the ratio, the
bytes of the tensors, and on a GPU the memory in use at its peak.
"""
import argparse
import statistics
from typing import Dict, List

import timm
import torch
from step import machine, seconds

import timm_netaug


def tensor_bytes(model: torch.nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in model.state_dict().values())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mobilenetv2_035')
    parser.add_argument('--img-size', type=int, default=160)
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=200)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stock = timm.create_model(args.model).eval().to(args.device)
    exported = timm_netaug.export(timm_netaug.augment(stock)).eval()
    models = {'stock': stock, 'exported': exported}
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    outputs = [model(x) for model in models.values()]
    print(f'{args.model}, {args.img_size} px, batch {args.batch_size}; {machine(args)}')
    print(f'logits equal to the last bit: {torch.equal(*outputs)}\n')
    times: Dict[str, List[float]] = {name: [] for name in models}
    peaks = {}
    for repeat in range(-20, args.repeats):
        for name, model in models.items():
            if args.device.startswith('cuda'):
                torch.cuda.reset_peak_memory_stats()
            elapsed = seconds(lambda: model(x), args.device)
            if repeat >= 0:
                times[name].append(elapsed)
            if args.device.startswith('cuda'):
                peaks[name] = torch.cuda.max_memory_allocated()
    unit = statistics.median(times['stock'])
    print('| model | ms (quartiles) | ratio | bytes of its tensors | peak of memory |\n|---|---|---|---|---|')
    for name, values in times.items():
        low, median, high = (1000 * q for q in statistics.quantiles(values, n=4))
        peak = f'{peaks[name] / 2 ** 20:.1f} MiB' if name in peaks else ''
        print(f'| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {median / 1000 / unit:.3f} |'
              f' {tensor_bytes(models[name]):,} | {peak} |')


if __name__ == '__main__':
    main()
