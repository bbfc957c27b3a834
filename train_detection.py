#!/usr/bin/env python3
"""Train a tiny detector on a timm backbone, with `--netaug` inside a wider super-network.

    python train_detection.py --data-dir DATA --model netaug_mbv2_tiny --pretrained --img-size 224

The script itself is `timm_netaug/cli/train_detection.py`; installed, it is the command `timm-netaug-train-detection`.
"""
from timm_netaug.cli.train_detection import main

if __name__ == '__main__':
    main()
