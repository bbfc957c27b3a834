"""On real images: a short training reaches a lower bound of AP50. About two CPU minutes, where the data are there."""
import csv
import tarfile

import pytest

from conftest import SHARED, run_python

ARCHIVE = SHARED / 'data/bccd.tar.gz'
FLAGS = ['--model', 'netaug_mbv2_tiny', '--pretrained', '--train-split', 'train', '--val-split', 'test', '--input-size',
         3, 128, 160, '-b', 4, '--lr', 0.003, '--crop-prob', 0, '--epochs', 12, '--val-interval', 12, '-j', 0]


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f'{ARCHIVE} is not there')
def test_blood_cells(tmp_path):
    pytest.importorskip('faster_coco_eval')
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / 'data', filter='data')
    done = run_python(
        'train_detection.py', '--data-dir', tmp_path / 'data', *FLAGS, '--output', tmp_path, '--experiment', 'bccd')
    assert 'train: 1 box without an area is left out (BloodImage_00343).' in done.stderr
    last = list(csv.DictReader((tmp_path / 'bccd/summary.csv').open()))[-1]
    assert float(last['eval_AP50']) >= 55
