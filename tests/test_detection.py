"""Detectors: the dense part in a super-network, data sets and what is wrong with them, training, folder and Hub."""
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from torchvision.models.detection import FCOS

import timm_netaug
from conftest import generator, images, randomise, run_python, run_ranks
from detection_data import COLORS, SIZE, write_coco, write_voc, xml
from hub_server import serve
from timm_netaug.__main__ import main as run_command
from timm_netaug.cli.command_line import parse_args
from timm_netaug.cli.train import train
from timm_netaug.cli.train_detection import Detection, train_detection_parser
from timm_netaug.cli.training_record import detection_record
from timm_netaug.detection import create_detector, export_detector
from timm_netaug.detection.annotations import find_classes, read_class_map, read_split, size_notes
from timm_netaug.detection.data import DetectionDataset, DetectionLoader, collate, eval_transform, train_transform
from timm_netaug.detection.detector import build_detector, name_in_model
from timm_netaug.detection.evaluate import predict
from timm_netaug.detection.fcos import STRIDES, Fcos, _Matched
from timm_netaug.detection.folder import detector_run, load_checkpoint
from timm_netaug.detection.metric import average_precision
from timm_netaug.detection.pictures import check_picture, draw, draw_grid
from timm_netaug.errors import UserError
from timm_netaug.info import describe

NAMES = sorted(COLORS)
needs_metric = pytest.mark.skipif(
    importlib.util.find_spec('faster_coco_eval') is None, reason='faster-coco-eval is not installed')


def make(name='test_efficientnet', classes=3, size=64, **kwargs):
    torch.manual_seed(0)
    detector = create_detector(name, classes, size, **kwargs)
    randomise(detector.dense)
    return detector.eval()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(a, b) for k in one for a, b in zip(one[k], other[k]))


# The network


@pytest.mark.parametrize('config', [{}, dict(width_mults=(1.0,)), dict(from_stage=2)], ids=str)
def test_tiny_pass_export_and_reload_are_equal(config, tmp_path):
    """The detector, the tiny pass of its super-network, the export, and the folder that is loaded again."""
    detector, x = make(), images(2, 64)
    supernet = randomise(timm_netaug.augment(detector.dense, timm_netaug.NetAugConfig(**config)), 1)
    wider = [n for n, c in supernet.max_widths.items() if c > supernet.layout.tiny[n] and not n.startswith('backbone.')]
    assert bool(wider) == ('width_mults' not in config)  # neck and head have widths, and no expansions
    with torch.no_grad():
        want = supernet.eval()(x)
        with supernet.sampled(generator()):
            assert not equal(supernet(x), want)
        tiny = timm_netaug.export(supernet)
        assert type(tiny) is type(detector.dense) and equal(tiny(x), want)
        again = build_detector(detector.config)
        again.dense.load_state_dict(tiny.state_dict())
        export_detector(again, tmp_path / 'folder')
        reloaded = create_detector(f'local-dir:{tmp_path / "folder"}')
        assert equal(reloaded.dense(x), want) and reloaded.config == detector.config
        one, other = reloaded(x), detector.__class__(supernet, detector.config).eval()(x)
        assert all(equal({k: [v] for k, v in a.items()}, {k: [v] for k, v in b.items()}) for a, b in zip(one, other))
        assert len(one[0]['boxes'])


@pytest.mark.parametrize('name', ['test_efficientnet', 'test_convnext'])  # timm flattens the stages of the second
def test_backbone_of_a_folder_is_a_timm_model(name, tmp_path):
    detector, x = make(name), images(1, 64)
    export_detector(detector, tmp_path / 'folder')
    again = create_detector(f'local-dir:{tmp_path / "folder/backbone"}', 5, 96, pretrained=True)
    assert again.config.num_classes == 5 and again.config.img_size == (96, 96)
    with torch.no_grad():
        assert all(map(torch.equal, again.eval().dense.backbone(x), detector.dense.backbone(x)))


def test_pretrained_path_of_a_flattened_backbone(tmp_path):
    """A file of weights fits a backbone whose names timm has flattened; a file of another model is refused."""
    model = randomise(timm.create_model('test_convnext'))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    flags = ['--data-dir', 'DATA', '--pretrained-path', str(tmp_path / 'weights.pth'), '--model']
    backbone = Detection._backbone(train_detection_parser().parse_args([*flags, 'test_convnext']))
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name_in_model(name, model.state_dict())])
    with pytest.raises(UserError, match='test_convnext2'):
        Detection._backbone(train_detection_parser().parse_args([*flags, 'test_convnext2']))


def test_cost():
    """A quarter of a million parameters, 24 thousand of them in neck and head; `torch.export` takes the dense part."""
    dense = create_detector('netaug_mbv2_tiny', 3, 224).dense
    info = describe(dense, (3, 224, 224), samples=1)
    assert info['parameters'] == 274_024 and info['macs'] == 62_322_512
    assert info['parameters'] - sum(p.numel() for p in dense.backbone.parameters()) == 23_816
    assert info['netaug'] and not info['netaug']['fixed']


@pytest.mark.parametrize('args, said', [
    (('netaug_mbv2_tiny', 3, 100), 'multiples of 32, got 100 x 100: take 96 x 96'),
    (('netaug_mbv2_tiny', 0, 64), 'num_classes of a detector must be a whole number of at least 1'),
    (('netaug_mbv2_tiny',), 'create_detector() needs num_classes and img_size'),
    (('test_vit', 3, 64), 'a detector needs those at 8, 16, 32'),
    (('netaug_mbv2_tinny', 3, 64), 'the nearest name is netaug_mbv2_tiny'),
])
def test_detectors_that_there_are_not(args, said):
    with pytest.raises(UserError, match=re.escape(said)):
        create_detector(*args)


@pytest.mark.parametrize('fields, said', [
    (dict(interpolation='lanczos'), "one of nearest, bilinear, bicubic, got 'lanczos'."),
    (dict(mean=(0.5,)), 'mean of a detector must be three numbers'),
    (dict(class_names=['a']), 'A detector of 3 classes needs as many class names, got 1.'),
])
def test_fields_out_of_range(fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        create_detector('test_efficientnet', 3, 64, **fields)


# Points and boxes


def levels(fcos, box, side):
    """The levels with a point that learns a box, alone in a square input."""
    sizes = [(side // s, side // s) for s in STRIDES]
    head, fcos.torchvision.head = fcos.torchvision.head, _Matched()
    counts = [a * b for a, b in sizes]
    matched = fcos.torchvision.compute_loss([dict(boxes=box)], {}, [torch.cat(fcos.anchors(sizes))], counts)[0]
    fcos.torchvision.head = head
    return {i for i, part in enumerate(matched.split(counts)) if (part >= 0).any()}


def test_ranges_follow_the_input():
    """A box goes to the same level in an input of twice the size; with torchvision's ranges it would not."""
    for side in (14, 30, 60, 150, 200):
        box = torch.tensor([[160 - side / 2, 160 - side / 2, 160 + side / 2, 160 + side / 2]])
        want = levels(Fcos(1, Fcos.scale_of((640, 640))), 2 * box, 640)
        assert levels(Fcos(1, Fcos.scale_of((320, 320))), box, 320) == want
    assert 2 in want and 2 not in levels(Fcos(1, 1.0), box, 320)


def test_decoding():
    """What one point says is the box around the centre of its cell, clipped to the image."""
    fcos = Fcos(2, 0.25)
    output = dict(cls_logits=[torch.full((1, 2, 64 // s, 64 // s), -20.0) for s in STRIDES],
                  bbox_regression=[torch.zeros(1, 4, 64 // s, 64 // s) for s in STRIDES],
                  bbox_ctrness=[torch.full((1, 1, 64 // s, 64 // s), 20.0) for s in STRIDES])
    output['cls_logits'][1][0, 1, 2, 1] = 20
    output['bbox_regression'][1][0, :, 2, 1] = torch.tensor([1.0, 2.0, 3.0, 20.0])  # anchors of 4 pixels
    found = fcos.detections(output)[0]
    assert found['labels'].tolist() == [1] and found['boxes'].tolist() == [[20.0, 32.0, 36.0, 64.0]]


def test_loss_is_that_of_torchvision():
    """At the scale of its ranges, from the same points."""
    torch.manual_seed(0)
    fcos, sizes = Fcos(3, 1.0), [(128 // s, 128 // s) for s in STRIDES]
    output = {k: [torch.randn(2, n, *size).relu() for size in sizes]
              for k, n in (('cls_logits', 3), ('bbox_regression', 4), ('bbox_ctrness', 1))}
    targets = [dict(boxes=torch.tensor([[8.0, 8, 60, 70], [30, 30, 50, 44]]), labels=torch.tensor([2, 0])),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))]
    backbone = torch.nn.Identity()
    backbone.out_channels = 32
    anchors = [torch.cat(fcos.anchors(sizes))] * 2
    flat = {k: torch.cat([t.flatten(2).transpose(1, 2) for t in v], 1) for k, v in output.items()}
    want = FCOS(backbone, 3).compute_loss(targets, flat, anchors, [a * b for a, b in sizes])
    got = fcos.losses(output, targets)
    assert got == want and torch.equal(fcos(output, targets), sum(want.values())) and got['bbox_regression'] > 0


# Data


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp('voc'))


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('coco') / 'data')


@pytest.fixture
def copied(voc, tmp_path):
    shutil.copytree(voc, tmp_path / 'voc')
    return tmp_path / 'voc'


def test_both_layouts_are_read_alike(voc, coco):
    for name in ('train', 'val'):
        one, other = read_split(str(voc), name), read_split(str(coco), name)
        assert len(one.images) == len(other.images) and not one.notes and not other.notes
        for i, (a, b) in enumerate(zip(one.images, other.images)):
            assert torch.equal(a.boxes, b.boxes) and a.classes == b.classes and tuple(a.size) == tuple(b.size) == SIZE
        assert find_classes(one) == find_classes(other) == NAMES
    assert [len(a.classes) for a in one.images].count(0) == 1  # an image without objects stays


def test_parts_of_a_split(voc, tmp_path):
    shutil.copytree(voc, tmp_path / 'data/A')
    shutil.copytree(voc, tmp_path / 'data/B')
    split = read_split(str(tmp_path / 'data'), 'A/train+B/val')
    assert [a.file.split('/')[-3] for a in split.images] == ['A'] * 10 + ['B'] * 6


@pytest.mark.parametrize('flags', [{}, dict(hflip=1.0, vflip=1.0), dict(crop_prob=1.0, hflip=0.5)], ids=str)
def test_boxes_follow_the_pixels(voc, flags):
    """Whatever is done to an image: the box of a rectangle holds its colour, and little else."""
    config = dict(input_size=(3, 96, 64), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation='bilinear')
    transform = train_transform(config, **{**dict(hflip=0.0), **flags}) if flags else eval_transform(config)
    dataset = DetectionDataset(read_split(str(voc), 'train'), NAMES, transform, is_training=True)
    torch.manual_seed(0)
    seen = 0
    for i in range(len(dataset)):
        if len(dataset.split.images[i].classes) != 1:
            continue
        image, target = dataset[i]
        assert image.shape == (3, 96, 64) and type(image) is type(target['boxes']) is torch.Tensor
        for box, label in zip(target['boxes'].round().int().tolist(), target['labels']):
            color = torch.tensor(COLORS[NAMES[label]])[:, None, None] / 255
            near = (image - color).abs().amax(0) < 0.15
            inside = near[box[1]:box[3], box[0]:box[2]]
            assert inside.float().mean() > 0.8 and inside.sum() > 0.9 * near.sum()
            seen += 1
    assert seen >= 3


def edit(root, name, boxes):
    (root / f'Annotations/{name}.xml').write_text(xml(name, boxes))


def test_images_that_are_listed_twice_are_told(copied):
    with open(copied / 'ImageSets/Main/train.txt', 'a') as f:
        f.write('i0\ni1\n')
    assert 'train: 2 images are listed more than once (i0, i1).' in read_split(str(copied), 'train').notes


def test_ids_and_categories_of_other_tools(coco, tmp_path):
    """Numbers with a decimal point, and Roboflow's category of nothing, named as one of the classes."""
    want = read_split(str(coco), 'train')
    shutil.copytree(coco, tmp_path / 'coco')
    file = tmp_path / 'coco/annotations/instances_train.json'
    data = json.loads(file.read_text())
    data['categories'].insert(0, dict(id=0, name=data['categories'][1]['name'], supercategory='none'))
    for entry in data['images']:
        entry.update(height=float(entry['height']), width=0)
    for annotation in data['annotations']:
        annotation.update(category_id=float(annotation['category_id']), image_id=float(annotation['image_id']))
    file.write_text(json.dumps(data))
    found = read_split(str(tmp_path / 'coco'), 'train')
    assert found.declared == want.declared and [i.classes for i in found.images] == [i.classes for i in want.images]


@pytest.mark.parametrize('size', [('60.0', '80.0'), ('0', '0'), ('', ''), ('-1', 'None'), ('060', '80')])
def test_sizes_that_say_the_same_or_nothing(size, copied):
    file = copied / 'Annotations/i3.xml'
    text = file.read_text().replace('<height>60</height>', f'<height>{size[0]}</height>')
    file.write_text(text.replace('<width>80</width>', f'<width>{size[1]}</width>'))
    assert len(read_split(str(copied), 'train').images) == 10


def test_crowds_alone_are_nothing_to_learn(coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'coco')
    file = tmp_path / 'coco/annotations/instances_train.json'
    data = json.loads(file.read_text())
    for annotation in data['annotations']:
        annotation['iscrowd'] = 1
    file.write_text(json.dumps(data))
    train, val = (read_split(str(tmp_path / 'coco'), name) for name in ('train', 'val'))
    with pytest.raises(UserError, match='The split train has no boxes at all: there is nothing to learn'):
        find_classes(train, val)


def test_boxes_that_are_mended(copied):
    edit(copied, 'i0', [('red', [10, 10, 10, 30]), ('blue', [5, 5, 30, 30])])
    edit(copied, 'i1', [('red', [-5, 10, 30, 90]), ('green', [90, 10, 120, 20])])
    split = read_split(str(copied), 'train')
    assert split.images[0].classes == ('blue',) and split.images[1].boxes.tolist() == [[0, 10, 30, 60]]
    assert split.notes == ['train: 2 boxes without an area are left out (i0, i1).',
                           'train: 1 box beyond the edge of the image is clipped to it (i1).']


def test_boxes_too_small_for_a_point(copied):
    edit(copied, 'i0', [('red', [1, 1, 4, 3])])
    split = read_split(str(copied), 'train')
    red = sum(image.classes.count('red') for image in split.images)
    fcos = Fcos(3, 1.0)
    assert size_notes(split, NAMES, fcos, (64, 64)) == [
        f'train: boxes that are too small to be learned at 64 x 64, because no point of the detector is theirs:'
        f' {100 / red:.1f} % of red. A larger --img-size keeps more of them.']
    assert fcos.has_point(torch.tensor([[10.0, 10, 40, 40], [9, 9, 11, 11]]), (64, 64)).tolist() == [True, False]


def test_an_image_without_objects_is_a_negative(voc):
    """Its loss is that of the classes alone."""
    fcos, output = Fcos(3, 0.1), make().dense(images(1, 64))
    dataset = DetectionDataset(read_split(str(voc), 'train'), NAMES, eval_transform(make().config.data_config))
    _, targets = collate([dataset[4]])
    losses = fcos.losses(output, targets)
    assert not len(targets[0]['boxes']) and losses['classification'] > 0 and losses['bbox_regression'] == 0


def nan(root):
    edit(root, 'i0', [('red', [1, 1, 'nan', 30])])


def words(root):
    edit(root, 'i0', [('red', [1, 1, 'ten', 30])])


def background(root):
    edit(root, 'i0', [('background', [1, 1, 20, 30])])


def no_image(root):
    (root / 'JPEGImages/i3.png').unlink()


def no_xml(root):
    (root / 'Annotations/i3.xml').unlink()


def torn_xml(root):
    (root / 'Annotations/i3.xml').write_text('<annotation><object>')


def torn_image(root):
    (root / 'JPEGImages/i3.png').write_bytes(b'no image')


def empty_split(root):
    (root / 'ImageSets/Main/train.txt').write_text('\n')


def no_split(root):
    (root / 'ImageSets/Main/train.txt').unlink()


def unseen(root):
    edit(root, 'i11', [('zebra', [1, 1, 20, 30])])


def no_boxes(root):
    for file in (root / 'Annotations').iterdir():
        file.write_text(xml(file.stem, []))


def none_to_measure(root):
    for i in range(10, 16):
        edit(root, f'i{i}', [])


def other_format(root):
    (root / 'Annotations/i3.xml').write_text('<annotations><image/></annotations>')


def other_size_in_xml(root):
    (root / 'Annotations/i3.xml').write_text(xml('i3', [('red', [1, 1, 20, 30])], (30, 40)))


def latin_list(root):
    (root / 'ImageSets/Main/train.txt').write_bytes('caf\xe9\n'.encode('latin-1'))


WRONG = {
    other_format: 'i3.xml is not Pascal VOC XML: its root is <annotations>, not <annotation>. Convert it.',
    other_size_in_xml: 'i3.png has 60 x 80 pixels (height x width), and',
    latin_list: 'Save the file as UTF-8.',
    nan: 'i0.png has a box with NaN or infinite sides: mend it.',
    words: "i0.xml has a box whose xmax is 'ten', which is not a number: mend the file.",
    background: 'i0.png has an object of the class background, which is no class of objects',
    no_image: '(1 of 10: i3): add them, or take them out of',
    no_xml: '(1 of 10: i3): add one without objects where there are none',
    torn_xml: 'i3.xml cannot be read as Pascal VOC XML (no element found',
    torn_image: 'i3.png cannot be read as an image (cannot identify image file',
    empty_split: 'is empty: it lists no images.',
    no_split: 'There is no split train in',
    unseen: 'The split val has boxes of the classes zebra, which the split train never shows: mend the names',
    no_boxes: 'The split train has no boxes at all',
    none_to_measure: 'The split val has no boxes at all: there is nothing to measure on it.',
}


@pytest.mark.parametrize('mistake', WRONG, ids=lambda f: f.__name__)
def test_wrong_data_is_refused_in_a_sentence(mistake, copied):
    mistake(copied)
    parser = train_detection_parser()
    args = parse_args(parser, ['--data-dir', str(copied), *map(str, RUN)])
    with pytest.raises(UserError) as refused:
        Detection().set_up_model(args)
    assert WRONG[mistake] in str(refused.value) and str(refused.value).endswith('.')


def test_refusals_come_first(copied, tmp_path):
    """Before the first step, and before anything is written: one line."""
    nan(copied)
    done = run_python('train_detection.py', '--data-dir', copied, *RUN, '--output', tmp_path / 'out', check=False)
    assert done.returncode == 1 and WRONG[nan] in done.stderr and 'Traceback' not in done.stderr
    assert 'train_detection.py: error: ' in done.stderr.splitlines()[-1] and not (tmp_path / 'out').exists()


def label_beyond(data):
    data['annotations'][0]['category_id'] = 99


def other_image(data):
    data['annotations'][0]['image_id'] = 99


def not_finite(data):
    data['annotations'][0]['bbox'][0] = math.nan


def three_numbers(data):
    data['annotations'][0]['bbox'].pop()


def no_file(data):
    data['images'][3]['file_name'] = 'gone.png'


def no_name(data):
    del data['images'][3]['file_name']


def other_size(data):
    data['images'][3]['height'] = 99


def no_images(data):
    data['images'].clear()
    data['annotations'].clear()


def used_background(data):
    data['categories'].append(dict(id=0, name='background'))
    data['annotations'][0]['category_id'] = 0


def one_id(data):
    data['images'][1]['id'] = data['images'][0]['id']


def one_category_id(data):
    data['categories'][1]['id'] = data['categories'][0]['id']


def one_name(data):
    data['categories'][1]['name'] = data['categories'][0]['name']


def mixed_ids(data):
    data['categories'].append(dict(id='40', name='other'))


def no_object(data):
    data['annotations'][0] = None


def list_as_id(data):
    data['annotations'][0]['category_id'] = [10]


def endless(data):
    data['annotations'][0]['bbox'][0] = 10 ** 400


@pytest.mark.parametrize('mistake, said', [
    (one_id, 'cannot be read as COCO JSON (two of its images share an id): mend it.'),
    (one_category_id, 'cannot be read as COCO JSON (two of its categories share an id): mend it.'),
    (mixed_ids, 'cannot be read as COCO JSON (the ids of its categories are numbers and texts): mend it.'),
    (one_name, 'has two categories with the name'),
    (no_object, 'cannot be read as COCO JSON (its annotations are no list of objects): mend it.'),
    (list_as_id, 'of the category [10], and its categories are'),
    (endless, 'not four numbers: mend the file.'),
    (label_beyond, 'has an annotation (id 0) of the category 99, and its categories are 10, 20, 30: mend the file.'),
    (other_image, 'has an annotation (id 0) of the image 99, which it does not list'),
    (not_finite, 'has a box with NaN or infinite sides: mend it.'),
    (three_numbers, 'not four numbers: mend the file.'),
    (no_file, '(1 of 10: gone.png): add them.'),
    (no_name, "has an image (id 3) whose file_name is None: name its file."),
    (other_size, 'i3.png has 60 x 80 pixels (height x width), and'),
    (no_images, 'is empty'),
    (used_background, 'has an object of the class background, which is no class of objects'),
], ids=lambda v: getattr(v, '__name__', ''))
def test_wrong_json_is_refused_in_a_sentence(mistake, said, coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'coco')
    file = tmp_path / 'coco/annotations/instances_train.json'
    data = json.loads(file.read_text())
    mistake(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=re.escape(said)):
        read_split(str(tmp_path / 'coco'), 'train')


def test_errors_of_workers_are_one_sentence(copied):
    """An image whose header is intact and whose pixels are not is found when its batch is read."""
    file = copied / 'JPEGImages/i3.png'
    file.write_bytes(file.read_bytes()[:2000])
    dataset = DetectionDataset(read_split(str(copied), 'train'), NAMES, eval_transform(make().config.data_config))
    for workers in (0, 1):
        with pytest.raises(UserError) as refused:
            list(DetectionLoader(dataset, 2, num_workers=workers, collate_fn=collate))
        assert re.fullmatch(f'{re.escape(str(file))} cannot be read as an image .*: mend it, or take it out of the'
                            f' split\\.', str(refused.value))


def test_images_of_sixteen_bits(copied):
    """They are scaled to eight bits, where Pillow's conversion would make them white."""
    Image.fromarray(np.full(SIZE, 128 << 8, np.uint16)).save(copied / 'JPEGImages/i0.png')
    image = DetectionDataset(read_split(str(copied), 'train'), NAMES, None).image(0)
    assert image.getextrema() == ((128, 128),) * 3


def test_names_of_images_with_spaces(copied):
    """A line of a list is the name of an image, and in the lists of one class a mark may follow it."""
    for i, name in enumerate(('a b', 'a b 1', 'c')):
        shutil.copy(copied / f'JPEGImages/i{i}.png', copied / f'JPEGImages/{name}.png')
        shutil.copy(copied / f'Annotations/i{i}.xml', copied / f'Annotations/{name}.xml')
    (copied / 'ImageSets/Main/spaces.txt').write_text('a b\na b 1\na b  0\nc\t1\ni3 -1\ni4\n')
    files = [Path(image.file).stem for image in read_split(str(copied), 'spaces').images]
    assert files == ['a b', 'a b 1', 'a b', 'c', 'i4']


def test_names_of_classes(voc, tmp_path):
    split = read_split(str(voc), 'train')
    assert find_classes(split, class_names=['red', 'green', 'blue']) == ['red', 'green', 'blue']
    with pytest.raises(UserError, match='boxes of the classes red, which are not among the 2 of the model'):
        find_classes(split, class_names=['green', 'blue'])
    (tmp_path / 'twice.txt').write_text('a\nb\na\n')
    with pytest.raises(UserError, match='has a twice'):
        read_class_map(str(tmp_path / 'twice.txt'))


# Training


RUN = ['--model', 'test_efficientnet', '--input-size', 3, 64, 96, '-b', 5, '-j', 0, '--warmup-epochs', 0]


@pytest.fixture(scope='module')
def run_dir(voc, tmp_path_factory):
    """A short run with NetAug, the first epochs of it with augmented widths."""
    out = tmp_path_factory.mktemp('runs')
    run_python('train_detection.py', '--data-dir', voc, *RUN, '--netaug', '--epochs', 4, '--save-epochs', 2, 3,
               '--model-ema', '--model-ema-decay', 0.5, '--output', out, '--experiment', 'netaug', draw=True)
    return out / 'netaug'


@needs_metric
def test_run_folder(run_dir):
    assert {'args.yaml', 'curves.png', 'detections.jpg', 'last.pth.tar', 'model_best.pth.tar', 'summary.csv',
            'versions.json'} <= {p.name for p in run_dir.iterdir()}
    header, *rows = (run_dir / 'summary.csv').read_text().splitlines()
    assert header.split(',') == ['epoch', 'train_loss', 'train_tiny_loss', 'train_aug_loss', 'eval_loss', 'eval_AP',
                                 'eval_AP50', 'eval_AP75', 'eval_AP_small', 'eval_AP_medium', 'eval_AP_large', 'lr']
    assert len(rows) == 4
    with Image.open(run_dir / 'detections.jpg') as picture:
        assert picture.width > 600
    detector, run = load_checkpoint(str(run_dir / 'last.pth.tar'))
    assert run.netaug and run.ema and detector.config.class_names == tuple(NAMES)
    assert detector.config.img_size == (64, 96) and detector.config.scale == 0.4


@needs_metric
@pytest.mark.parametrize('epochs', [2, 3])
def test_resumed_run_is_bit_equal(epochs, run_dir, voc, tmp_path):
    """After the epochs with augmented widths, and after the one behind them."""
    run_python('train_detection.py', '--data-dir', voc, *RUN, '--netaug', '--epochs', 4, '--save-epochs', 2, 3,
               '--model-ema', '--model-ema-decay', 0.5, '--output', tmp_path, '--experiment', 'resumed',
               '--resume', run_dir / f'milestone-{epochs}.pth.tar')
    one, other = (torch.load(d / 'last.pth.tar', weights_only=False) for d in (run_dir, tmp_path / 'resumed'))
    assert one['args'].run['metrics'] == other['args'].run['metrics'] and one['epoch'] == other['epoch'] == 3
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(t, other[key][k]) for k, t in one[key].items())
    assert all(torch.equal(t, other['task_state']['supernet'][k]) for k, t in one['task_state']['supernet'].items())
    rows = [(d / 'summary.csv').read_text().splitlines()[-1] for d in (run_dir, tmp_path / 'resumed')]
    assert rows[0] == rows[1]


@pytest.mark.parametrize('flag', ['--pictures', '--results-file'])
def test_folder_in_place_of_a_file(flag, run_dir, voc, tmp_path):
    """Told before the evaluation."""
    done = run_python('validate_detection.py', '--data-dir', voc, '--checkpoint', run_dir / 'last.pth.tar', '-j', 0,
                      flag, tmp_path, check=False)
    assert done.returncode == 1 and f'{flag} {tmp_path} is a folder: name a file in it.' in done.stderr


@needs_metric
def test_validate_repeats_the_metric(run_dir, voc, tmp_path):
    done = run_python('validate_detection.py', '--data-dir', voc, '--checkpoint', run_dir / 'last.pth.tar', '-j', 0,
                      '--pictures', tmp_path / 'p.png', '--results-file', tmp_path / 'r.csv')
    result = json.loads(done.stdout.partition('--result\n')[2])
    last = dict(zip(*(line.split(',') for line in ((run_dir / 'summary.csv').read_text().splitlines())[::4])))
    assert result['AP50'] == round(float(last['eval_AP50']), 4) and set(result['AP_by_class']) == set(NAMES)
    assert (tmp_path / 'p.png').exists() and 'AP/red' in (tmp_path / 'r.csv').read_text()


@needs_metric
def test_an_epoch_is_saved_before_its_pictures(voc, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError('no picture')

    monkeypatch.setattr(Detection, 'write_pictures', fail)
    monkeypatch.setattr('sys.argv', ['train_detection.py', '--data-dir', str(voc), *map(str, RUN), '--epochs', '1',
                                     '--output', str(tmp_path), '--experiment', 'run'])
    with pytest.raises(ValueError, match='no picture'):
        train(Detection())
    assert torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)['epoch'] == 0


@needs_metric
def test_plain_training_learns(coco, tmp_path):
    """On COCO's layout, from random weights: the loss falls."""
    run_python('train_detection.py', '--data-dir', coco, *RUN, '--epochs', 15, '--crop-prob', 0, '--val-interval', 15,
               '--lr', 0.01, '--output', tmp_path, '--experiment', 'plain')
    rows = (tmp_path / 'plain/summary.csv').read_text().splitlines()[1:]
    losses = [float(row.split(',')[1]) for row in rows]
    assert len(rows) == 15 and losses[-1] < 0.8 * losses[0] and rows[0].split(',')[2] == ''


@pytest.mark.parametrize('argv, said', [
    (['--eval-metric', 'top1'], '--eval-metric must be one of AP, AP50'),
    (['--img-size', 100, '--input-size', 3, 100, 100], 'multiples of 32'),
    (['--mixup', 0.2], 'Unknown flag --mixup'),
    (['--scale', 0.5, 0.1], '--scale takes the smaller number first'),
    (['--netaug-divisor', 8], 'NetAug flags do nothing without --netaug'),
    (['-b', 500], 'fewer images than a batch'),
    (['--netaug', '--netaug-from-stage', 4], 'the network cannot branch before'),
    (['--pretrained-path', 'nowhere.pth'], 'nowhere.pth'),
    (['--device', 'cuda:99'], '--device cuda:99 cannot be used: '),
])
def test_wrong_flags_are_refused(argv, said, voc, tmp_path):
    done = run_python(
        'train_detection.py', '--data-dir', voc, *RUN, '--output', tmp_path / 'out', *argv, check=False)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists()


def test_commands_tell_checkpoints_apart(run_dir, voc, tmp_path):
    done = run_python('validate.py', '--data-dir', voc, '--checkpoint', run_dir / 'last.pth.tar', check=False)
    assert done.returncode == 1 and 'is of a detector: use validate_detection.py' in done.stderr
    torch.save(dict(state_dict={}), tmp_path / 'other.pth')
    done = run_python('validate_detection.py', '--data-dir', voc, '--checkpoint', tmp_path / 'other.pth', check=False)
    assert done.returncode == 1 and 'is not a checkpoint of train_detection.py' in done.stderr


@pytest.mark.parametrize('device', ['gpu', 'cuda:99', 'hpu'])
def test_unknown_device(device, run_dir, voc):
    done = run_python('validate_detection.py', '--data-dir', voc, '--checkpoint', run_dir / 'last.pth.tar',
                      '--device', device, check=False)
    assert done.returncode == 1 and f'error: --device {device}: ' in done.stderr and 'Traceback' not in done.stderr


# Metric and pictures


@needs_metric
def test_metric():
    true = {0: dict(boxes=torch.tensor([[0.0, 0, 50, 50], [60, 60, 70, 70]]), labels=torch.tensor([0, 1]),
                    iscrowd=torch.tensor([0, 0]))}
    found = {0: dict(boxes=torch.tensor([[0.0, 0, 50, 50]]), scores=torch.tensor([0.9]), labels=torch.tensor([0]))}
    metrics = average_precision(found, true, ['a', 'b', 'c'])
    assert metrics['AP50'] == pytest.approx(50) and metrics['AP_small'] == 0 and metrics['AP_large'] is None
    assert metrics['by_class'] == {'a': pytest.approx(100), 'b': 0, 'c': None}


def test_predict_and_draw(tmp_path):
    detector = make(classes=3, class_names=NAMES)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    found = predict(detector, image)
    assert len(found['boxes']) and len(found['classes']) == len(found['scores']) and set(found['classes']) <= set(NAMES)
    assert found['boxes'][:, 2].max() <= SIZE[1] and found['boxes'][:, 3].max() <= SIZE[0]
    assert not len(predict(detector, image, score=1.1)['boxes'])
    draw(image, found, NAMES, tmp_path / 'found.jpg', score=0.0)
    assert Image.open(tmp_path / 'found.jpg').format == 'JPEG'
    names = ['US$', r'$\frac$', '$']  # not formulas, which matplotlib would refuse
    draw_grid([image] * 2, [found] * 2, [None] * 2, names, tmp_path / 'names.png', title='$a$$', score=0.0)
    with pytest.raises(UserError, match='found.txt cannot be written as a picture: take one of the suffixes .*png'):
        check_picture('found.txt')


def test_without_the_metric(monkeypatch):
    from timm_netaug.detection import metric
    monkeypatch.setattr(metric.importlib.util, 'find_spec', lambda name: None if name == 'faster_coco_eval' else True)
    with pytest.raises(UserError, match=re.escape('needs faster-coco-eval: pip install faster-coco-eval (or'
                                                  ' timm_netaug[detection]).')):
        metric.check_metric()


# Folder, commands and Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on the loopback address, with this process's client pointed at it and logged in."""
    with serve() as server:
        for name, value in dict(
                ENDPOINT=server.url,
                HUGGINGFACE_CO_URL_TEMPLATE=server.url + '/{repo_id}/resolve/{revision}/{filename}',
                HF_HUB_CACHE=str(tmp_path / 'cache'), HF_TOKEN_PATH=str(tmp_path / 'no-token'),
                HF_HUB_DISABLE_XET=True).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', 'hf_owner')
        monkeypatch.setattr('time.sleep', lambda seconds: None)
        yield server


@needs_metric
def test_push_and_pull(run_dir, voc, hub, tmp_path):
    """Over the loopback address: what is pulled and what is loaded by name compute what the checkpoint does."""
    checkpoint = run_dir / 'last.pth.tar'
    run_command(['hub', 'push', str(checkpoint), 'owner/tiny', '--data-dir', str(voc), '--license', 'apache-2.0',
                 '--dataset-name', 'rectangles', '--about', 'Of coloured rectangles.'])
    files = hub.files('owner/tiny')
    assert set(files) == {'README.md', 'config.json', 'model.safetensors', 'backbone/config.json',
                          'backbone/model.safetensors'} and len(hub.repos['owner/tiny']['commits']) == 1
    card = ModelCard(files['README.md'].decode())
    results = {r.metric_name.split()[0]: r for r in card.data.eval_results}
    facts = json.loads(files['config.json'])['timm_netaug']
    assert '\n\nOf coloured rectangles.\n\n## Use\n' in card.text
    assert 'which also has `train_detection.py` and `validate_detection.py`' in card.text
    assert card.data.pipeline_tag == 'object-detection' and results['AP50'].dataset_split == 'val'
    assert results['AP'].metric_value == facts['metrics']['AP'] and facts['images'] == 6
    command = facts['command']
    assert '--netaug' in command and '--data-dir' not in command and 'train_detection.py' in card.text

    x, (want, _) = images(1, 64), load_checkpoint(str(checkpoint))
    run_command(['hub', 'pull', 'owner/tiny', str(tmp_path / 'pulled')])
    with torch.no_grad():
        for name in ('hf-hub:owner/tiny', f'local-dir:{tmp_path / "pulled"}'):
            assert equal(create_detector(name).dense(x), want.dense(x))
        backbone = create_detector(f'local-dir:{tmp_path / "pulled/backbone"}', 2, 64, pretrained=True).eval()
        assert all(map(torch.equal, backbone.dense.backbone(x), want.dense.backbone(x)))
    again = json.loads((tmp_path / 'pulled/config.json').read_text())
    assert again == json.loads(files['config.json'])

    # Facts of another's repository are filtered: a card and a later push read them.
    config = {**again, 'timm_netaug': dict(facts, metrics=dict(AP50=None, AP=40.0, x=1), images='many', other=[1])}
    hub.put('owner/odd', config__json=json.dumps(config).encode(), model__safetensors=files['model.safetensors'])
    run_command(['hub', 'pull', 'owner/odd', str(tmp_path / 'odd')])
    facts.pop('images')
    kept = dict(facts, metrics=dict(AP=40.0))
    assert json.loads((tmp_path / 'odd/config.json').read_text())['timm_netaug'] == kept
    (tmp_path / 'odd/config.json').write_text(json.dumps(config))
    run_command(['hub', 'push', str(tmp_path / 'odd'), 'owner/again'])
    assert json.loads(hub.files('owner/again')['config.json'])['timm_netaug'] == kept


@needs_metric
def test_a_push_with_another_metric_is_refused(run_dir, voc, hub, tmp_path):
    data = shutil.copytree(voc, tmp_path / 'other')
    for i in range(10, 16):
        (data / f'Annotations/i{i}.xml').write_text(xml(f'i{i}', [('red', [0, 0, 70, 50])]))
    checkpoint = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    torch.save({**checkpoint, 'metric': 99.0}, tmp_path / 'c.pth.tar')
    with pytest.raises(SystemExit, match='Nothing is pushed'):
        run_command(['hub', 'push', str(tmp_path / 'c.pth.tar'), 'owner/tiny', '--data-dir', str(data)])
    assert not hub.repos


def test_other_repositories_and_broken_folders(hub, tmp_path):
    export_detector(make(), tmp_path / 'folder')
    config = json.loads((tmp_path / 'folder/config.json').read_text())
    for i, (fields, said) in enumerate((
            (dict(num_classes=10 ** 9), 'no detector is built with'), (dict(img_size=[3, 5]), '32'),
            (dict(backbone_args=dict(pretrained=True)), 'they may not'),
            (dict(backbone='hf-hub:owner/other'), 'there is no architecture'),
            (dict(backbone_args=dict(stem_size=10 ** 9)), 'stem_size is'),
            (dict(backbone_args=[]), 'backbone_args are not a dictionary'),
            (dict(backbone_args=dict(name='x')), 'have name, which a detector sets itself'),
            (dict(mean=['a', 'b', 'c']), 'its mean has values that are not finite numbers'),
            (dict(std=[math.nan, 1, 1]), 'its std has values that are not finite numbers'),
            (dict(class_names='abc'), 'class_names are not a list of strings'),
            (dict(backbone='test_vit', backbone_args={}), 'needs those at 8, 16, 32'),
            (dict(backbone='regnety_2560', backbone_args={}), 'its weights have 0 bytes, and the detector that its'))):
        hub.put(f'owner/bad{i}', config__json=json.dumps({**config, **fields}).encode(), model__safetensors=b'')
        with pytest.raises(UserError, match=said):
            create_detector(f'hf-hub:owner/bad{i}')
    (tmp_path / 'large').mkdir()
    (tmp_path / 'large/config.json').write_text(json.dumps({**config, 'backbone': 'regnety_2560'}))
    shutil.copy(tmp_path / 'folder/model.safetensors', tmp_path / 'large')
    with pytest.raises(UserError, match='large cannot be used, its weights have'):
        create_detector(f'local-dir:{tmp_path / "large"}')
    with pytest.raises(UserError, match='leave the arguments out'):
        create_detector(f'local-dir:{tmp_path / "folder"}', 3, 64)
    with pytest.raises(UserError, match='There is no repository owner/none'):
        create_detector('hf-hub:owner/none')


def test_metric_of_other_weights_is_not_recorded():
    """The metric of a checkpoint goes into the record only with the weights that the run validated."""
    args = train_detection_parser().parse_args(['--data-dir', 'DATA'])
    for ema in (False, True):
        args.run = detector_run(make().config, ema=ema).to_dict()
        checkpoint = dict(args=args, metric=50.0)
        for use_ema, recorded in ((None, True), (ema, True), (not ema, False)):
            assert ('metrics' in detection_record(checkpoint, use_ema)) == recorded


def test_export_and_info_of_a_checkpoint(run_dir, tmp_path, capsys):
    run_command(['export', str(run_dir / 'last.pth.tar'), str(tmp_path / 'out')])
    x, (want, _) = images(1, 64), load_checkpoint(str(run_dir / 'last.pth.tar'))
    with torch.no_grad():
        assert equal(create_detector(f'local-dir:{tmp_path / "out"}').dense(x), want.dense(x))
    capsys.readouterr()
    run_command(['info', str(tmp_path / 'out'), '--samples', '1'])
    out = capsys.readouterr().out
    assert 'input 3 x 64 x 96, 3 classes' in out and f'{sum(p.numel() for p in want.dense.parameters()):,}' in out


def test_commands_for_detectors(hub, tmp_path, capsys):
    """`info` reads NetAug's fields of the run and names with a prefix; flags that do nothing are refused by name."""
    detector, args = make(), train_detection_parser().parse_args(['--data-dir', 'DATA'])
    config = timm_netaug.NetAugConfig(width_mults=(1.0,), expand_mults=(1.0, 3.0)).to_dict()
    args.run = detector_run(detector.config, netaug=config).to_dict()
    checkpoint, folder = tmp_path / 'c.pth.tar', tmp_path / 'folder'
    torch.save(dict(state_dict=detector.dense.state_dict(), args=args), checkpoint)
    export_detector(detector, folder)
    hub.put('owner/tiny', config__json=(folder / 'config.json').read_bytes(),
            model__safetensors=(folder / 'model.safetensors').read_bytes())
    infos = {}
    for source in (str(checkpoint), f'local-dir:{folder}', 'hf-hub:owner/tiny'):
        run_command(['info', source, '--samples', '1', '--json'])
        infos[source] = json.loads(capsys.readouterr().out)
    of_run, *others = infos.values()
    assert of_run['netaug']['config'] == config and others[0] == others[1]
    assert all(info['parameters'] == of_run['parameters'] for info in others)
    for command, flag in ((['info', checkpoint], '--model'), (['export', checkpoint, tmp_path / 'out'], '--model'),
                          *((['hub', 'push', checkpoint, 'owner/new'], f'--{name}')
                            for name in ('model', 'baseline', 'baseline-about'))):
        with pytest.raises(SystemExit, match=f'{flag}: not for a detector. Leave it out.'):
            run_command([*map(str, command), flag, 'x'])
    with pytest.raises(SystemExit, match='holds one set of weights: leave --use-ema out'):
        run_command(['export', str(folder), str(tmp_path / 'out'), '--use-ema'])
    assert not (tmp_path / 'out').exists()


@needs_metric
def test_two_processes(voc, tmp_path):
    """On five validation images: none is counted twice, and both processes' images are in the metric."""
    shutil.copytree(voc, tmp_path / 'data')
    (tmp_path / 'data/ImageSets/Main/val.txt').write_text(''.join(f'i{i}\n' for i in range(10, 15)))
    flags = [*RUN, '--data-dir', tmp_path / 'data', '--epochs', 1, '--netaug', '--output', tmp_path]
    run_ranks(2, 'train_detection.py', *flags, '-b', 4, '--experiment', 'two')
    row = dict(zip(*(line.split(',') for line in (tmp_path / 'two/summary.csv').read_text().splitlines())))
    done = run_python('validate_detection.py', '--data-dir', tmp_path / 'data', '-j', 0, '--checkpoint',
                      tmp_path / 'two/last.pth.tar')
    result = json.loads(done.stdout.partition('--result\n')[2])
    # The loss is not compared: it is weighted by the boxes of a batch, and batches are other ones in one process.
    assert result['images'] == 5 and result['AP50'] == round(float(row['eval_AP50']), 4)
    assert result['AP'] == round(float(row['eval_AP']), 4) and row['train_aug_loss']


@needs_metric
def test_sizes_against_macs(run_dir, voc, tmp_path):
    """The script of docs/detection.md: at the training's size, AP is that of the run."""
    done = run_python('experiments/detection_sizes.py', run_dir / 'last.pth.tar', '--labels', 'tiny', '--data-dir', voc,
                      '--sizes', '64x96', '96', '--output', tmp_path / 'sizes', draw=True)
    rows = json.loads((tmp_path / 'sizes.json').read_text())['tiny']
    last = dict(zip(*(line.split(',') for line in ((run_dir / 'summary.csv').read_text().splitlines())[::4])))
    assert rows[0]['AP50'] == pytest.approx(float(last['eval_AP50'])) and rows[1]['macs'] == pytest.approx(1.5 * rows[0]['macs'], rel=0.01)
    assert '| tiny | 96 x 96 |' in done.stdout and Image.open(tmp_path / 'sizes.png').width > 500
