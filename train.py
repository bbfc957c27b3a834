#!/usr/bin/env python3
"""Train a timm model, with `--netaug` inside a wider super-network.

    python train.py --data-dir DATA --num-classes 10 --model netaug_mbv2_tiny --netaug

The script itself is `timm_netaug/cli/train.py`; installed, it is the command `timm-netaug-train`.
"""
from timm_netaug.cli.train import main

if __name__ == '__main__':
    main()
