#!/usr/bin/env python3
"""Measure the average precision of a tiny detector.

    python validate_detection.py --data-dir DATA --split test --checkpoint output/train/RUN/model_best.pth.tar

The script itself is `timm_netaug/cli/validate_detection.py`; installed, it is the command `timm-netaug-validate-detection`.
"""
from timm_netaug.cli.validate_detection import main

if __name__ == '__main__':
    main()
