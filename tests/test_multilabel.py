"""Images with several labels: data, losses, metrics, and the way through checkpoint and exported folder."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.task import MultiLabelClassificationEvaluator

from conftest import run_python
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train_flags import check_train_args, train_parser
from timm_netaug.cli.validate import _target
from timm_netaug.cli.validate_flags import validate_parser
from timm_netaug.errors import UserError
from timm_netaug.io.data import DataSource, encode_targets, open_dataset
from timm_netaug.io.label_table import LabelTable

NAMES = ['bright', 'red', 'striped']
FLAGS = ['--task', 'multilabel', '--model', 'test_efficientnet', '--img-size', 32, '-b', 12, '-j', 0, '--epochs', 1,
         '--warmup-epochs', 0, '--experiment', 'run', '--device', 'cpu']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Thirty images of two splits, and their tables."""
    root, rng = tmp_path_factory.mktemp('labels'), np.random.default_rng(0)
    for split, count in (('train', 24), ('validation', 6)):
        (root / split / 'images').mkdir(parents=True)
        rows = [['file_name', *NAMES]]
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / split / f'images/{i}.png')
            rows.append([f'images/{i}.png', *rng.integers(0, 2, 3)])
        with open(root / split / 'labels.csv', 'w', newline='') as f:
            csv.writer(f).writerows(rows)
    (root / 'stats.json').write_text(json.dumps(dict(num_samples=24, pos_counts=[12, 8, 3])))
    return root


def test_labels_are_those_of_the_table(data):
    dataset = open_dataset(DataSource(str(data)), 'train', 3, target='indices')
    encode_targets([dataset], 3, 'indices')
    rows = list(csv.reader((data / 'train/labels.csv').open()))[1:]
    assert len(dataset) == 24
    for i, (name, *labels) in enumerate(rows):
        assert dataset.filename(i) == name and dataset[i][1].tolist() == [float(label) for label in labels]


@pytest.mark.parametrize('flags', [
    ('--netaug', '--netaug-stop-width-at', 0), ('--loss', 'asl', '--mixup', 0.2), ('--loss', 'poly', '--poly-gamma', 1),
    ('--loss', 'zlpr', '--smoothing', 0), ('--loss', 'twoway', '--smoothing', 0, '--netaug'),
    ('--loss', 'db', '--class-stats', 'STATS'),
    ('--loss-pos-weight', 'neg_pos', '--class-stats', 'STATS', '--loss-weight-power', 0.5),
    ('--loss-class-weight', '1,2,3'),
], ids=lambda flags: ' '.join(map(str, flags)))
def test_training(flags, data, tmp_path):
    flags = [str(data / 'stats.json') if flag == 'STATS' else flag for flag in flags]
    run_python('train.py', '--data-dir', data, *FLAGS, '--output', tmp_path, *flags, draw='asl' in flags)
    row = next(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert {'eval_map', 'eval_micro_f1', 'eval_macro_f1', 'eval_sample_f1'} <= set(row)
    assert float(row['train_loss']) > 0 and ('train_aug_loss' in row) == ('--netaug' in flags)
    checkpoint = torch.load(tmp_path / 'run/model_best.pth.tar', weights_only=False)
    assert checkpoint['args'].run['class_names'] == NAMES and checkpoint['args'].run['target'] == 'indices'
    assert checkpoint['metric'] == pytest.approx(float(row['eval_map']))


def test_weights_change_the_loss(data, tmp_path):
    """Weights by hand are those that the statistics give: (negatives / positives) of each class."""
    results = []
    for flags in (('neg_pos', '--class-stats', data / 'stats.json'), ('1,2,7',), ('1',)):
        run_python('train.py', '--data-dir', data, *FLAGS, '--output', tmp_path / str(len(results)),
                   '--loss-pos-weight', *flags)
        results.append((tmp_path / f'{len(results)}/run/summary.csv').read_text())
    assert results[0] == results[1] != results[2]


def test_evaluation_of_checkpoint_and_folder(data, tmp_path):
    """Both give what timm's evaluator gives for the same logits."""
    run_python('train.py', '--data-dir', data, *FLAGS, '--output', tmp_path)
    best = tmp_path / 'run/model_best.pth.tar'
    run_python('-m', 'timm_netaug', 'export', best, tmp_path / 'out')
    recorded = next(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    for source in (('--checkpoint', best), ('--model', f'local-dir:{tmp_path}/out', '--pretrained')):
        said = run_python('validate.py', '--data-dir', data, '-j', 0, *source).stdout
        result = json.loads(said[said.index('{'):])
        assert 'top1' not in result and result['images'] == 6
        for name in MultiLabelClassificationEvaluator.metric_names[1:]:
            assert result[name] == pytest.approx(float(recorded[f'eval_{name}']), abs=1e-4)


def test_splits_with_the_classes_in_another_order(data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    table = tmp_path / 'data/validation/labels.csv'
    rows = [[row[0], *reversed(row[1:])] for row in csv.reader(table.open())]
    with table.open('w', newline='') as f:
        csv.writer(f).writerows(rows)
    done = run_python('train.py', '--data-dir', tmp_path / 'data', *FLAGS, '--output', tmp_path, check=False)
    assert done.returncode == 1 and 'The two splits have the same classes in another order: ' in done.stderr


@pytest.mark.parametrize('text, said', [
    ('', 'header must be file_name'), ('name,a,b\n', 'header must be file_name'), ('file_name,a,a\n', 'each of them once'),
    ('file_name,a,b\n', 'no rows'), ('file_name,a,b\nimages/0.png,1\n', r'labels\.csv, line 2: .* 2 numbers from 0 to 1'),
    ('file_name,a,b\nimages/0.png,1,2\n', 'line 2'), ('file_name,a,b\nimages/0.png,1,x\n', 'line 2'),
    ('file_name,a,b\nno.png,1,0\n', 'line 2: there is no image no.png'),
    ('file_name,a,b\nimages/0.png,1,0\nimages/0.png,0,1\n', 'images/0.png has more than one row'),
])
def test_bad_tables(text, said, data, tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train/images').symlink_to(data / 'train/images')
    (tmp_path / 'train/labels.csv').write_text(text)
    with pytest.raises(UserError, match=said):
        LabelTable(str(tmp_path), 'train')


@pytest.mark.parametrize('argv, said', [
    ('--loss zlpr', '--loss zlpr needs --task multilabel'),
    ('--task multilabel --loss jsd', '--loss jsd is for one class per image'),
    ('--task multilabel --loss zlpr', 'add --smoothing 0'),
    ('--task multilabel --loss db', '--loss db needs --class-stats'),
    ('--task multilabel --loss-pos-weight neg_pos', 'The weight neg_pos needs --class-stats'),
    ('--task multilabel --class-stats s.json', '--class-stats does nothing without'),
    ('--task multilabel --kd-model-name x', '--kd-model-name does not go together with --task multilabel'),
    ('--task multilabel --netaug --netaug-distill 1', '--netaug-distill does not go together with --task multilabel'),
    ('--task multilabel --eval-metric top5', '--eval-metric must be one of map'),
    ('--target-format dense', '--target-format does nothing without --task multilabel'),
    ('--loss ce --bce-loss', '--loss and --bce-loss do not go together'),
    ('--poly-gamma 1', '--poly-gamma does nothing without --loss poly'),
    ('--loss-class-weight 1,2', '--loss-class-weight does nothing without --loss bce or asl'),
    ('--loss-weight-power 2', '--loss-weight-power does nothing without --loss-pos-weight or --loss-class-weight'),
    ('--bce-loss --bce-pos-weight 2 --loss-pos-weight 2', '--bce-pos-weight is the same as --loss-pos-weight'),
])
def test_refused_by_name(argv, said):
    with pytest.raises(UserError, match=said):
        check_train_args(parse_args(train_parser(), ['--data-dir', 'D', *argv.split()]))


def test_wrong_number_of_classes(data, tmp_path):
    """It is told as such, not as images that cannot be read."""
    done = run_python('train.py', '--data-dir', data, *FLAGS, '--num-classes', 5, '--output', tmp_path, check=False)
    assert done.returncode == 1 and 'labels.csv has 3 classes, but --num-classes is 5' in done.stderr
    dataset = open_dataset(DataSource(str(data)), 'train', 3, target='indices')
    encode_targets([dataset], 2, 'indices')
    with pytest.raises(UserError, match=r'The label of .*images/0\.png is wrong: .*2 entries, got 3'):
        dataset[0]
    assert not dataset.unreadable


@pytest.mark.parametrize('flags, said', [
    (('--metrics-avg', 'macro'), '--metrics-avg is for one class per image'),
    (('--target-format', 'dense'), '--target-format does nothing without --task multilabel'),
    (('--task', 'multilabel', '--target-format', 'dense'), 'the model was trained with indices'),
])
def test_flags_of_validation_that_do_not_fit(flags, said):
    args = parse_args(validate_parser(), ['--data-dir', 'D', *flags])
    with pytest.raises(UserError, match=said):
        _target(args, 'indices')
    assert _target(parse_args(validate_parser(), ['--data-dir', 'D']), 'dense') == 'dense'


def test_there_must_be_a_table(data):
    with pytest.raises(UserError, match=r'there is no table .*nowhere/labels\.csv'):
        open_dataset(DataSource(str(data)), 'nowhere', 3, target='indices')
