#!/usr/bin/env python3
"""Evaluate a registered timm model, a folder or Hub repository, a checkpoint of `train.py`, or a reference checkpoint.

    python validate.py --data-dir DATA --checkpoint output/train/RUN/model_best.pth.tar

The script itself is `timm_netaug/cli/validate.py`; installed, it is the command `timm-netaug-validate`.
"""
from timm_netaug.cli.validate import main

if __name__ == '__main__':
    main()
