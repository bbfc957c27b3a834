"""Which images are read, with which labels: a class is a folder directly below the split."""
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_netaug.errors import UserError
from timm_netaug.io.data import DataSource, check_channels, check_split, class_names, open_dataset
from timm_netaug.io.image_folder import read_class_map


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images each, one of them in a sub-folder."""
    for i, name in enumerate(('cat', 'dog', 'class10', 'class9')):
        for place in ('1.png', 'session1/2.jpg'):
            file = tmp_path / 'train' / name / place
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (40 * i, 0, 0)).save(file)
    return tmp_path


def opened(folder, channels=3, **kwargs):
    return open_dataset(DataSource(str(folder), **kwargs), 'train', channels)


def labels(dataset):
    return {dataset.filename(i): dataset.reader.samples[i][1] for i in range(len(dataset))}


def test_sub_folders_are_of_their_class(folder):
    dataset = opened(folder)
    assert class_names(dataset) == ['cat', 'class9', 'class10', 'dog']  # in timm's natural order
    assert labels(dataset)['class9/session1/2.jpg'] == labels(dataset)['class9/1.png'] == 1


def test_same_as_timm_where_there_are_no_sub_folders(folder):
    for place in (folder / 'train').glob('*/session1'):
        shutil.move(place / '2.jpg', place.parent / '10.jpg')
        place.rmdir()
    reader, dataset = ReaderImageFolder(str(folder / 'train')), opened(folder)
    assert (dataset.reader.samples, dataset.reader.class_to_idx) == (reader.samples, reader.class_to_idx)


def test_hidden_files_and_folders_are_left_out(folder):
    want = labels(opened(folder))
    for place in ('.ipynb_checkpoints', 'cat/.ipynb_checkpoints'):
        (folder / 'train' / place).mkdir()
        shutil.copy(folder / 'train/cat/1.png', folder / 'train' / place / '1-checkpoint.png')
    shutil.copy(folder / 'train/cat/1.png', folder / 'train/cat/._1.png')
    assert labels(opened(folder)) == want


def test_link_to_a_folder_that_contains_it(folder):
    (folder / 'train/cat/up').symlink_to('..')
    with pytest.raises(UserError, match=r'train/cat/up is a link to a folder that contains it'):
        opened(folder)


def test_links_to_each_other(folder):
    (folder / 'train/cat/other').symlink_to('../dog')
    (folder / 'train/dog/other').symlink_to('../cat')
    with pytest.raises(UserError, match=r'other/other is a link to a folder that contains it'):
        opened(folder)


def test_several_folders_of_one_class(folder):
    names = {'cat': 0, 'dog': 1, 'class9': 1, 'class10': 2}
    dataset = opened(folder, class_map=names)
    check_split(dataset, str(folder), 'train')
    assert class_names(dataset) == ['cat', 'dog', 'class10'] and len(dataset) == 8


def test_link_to_another_folder(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp('elsewhere') / 'owls'
    shutil.copytree(folder / 'train/dog', place)
    (folder / 'train/owl').symlink_to(place)
    assert class_names(opened(folder)) == ['cat', 'class9', 'class10', 'dog', 'owl']
    assert len(opened(folder)) == 10


@pytest.mark.parametrize('content, said', [
    ('hidden', 'owl holds no images, so that class would be missing'),
    ('hidden folder', 'owl holds no images, so that class would be missing'),
    ('nothing', 'owl holds no images, so that class would be missing'),
    ('broken link', 'owl is a link that leads nowhere, so that class would be missing'),
])
def test_class_that_would_be_missing(folder, content, said):
    place = folder / 'train/owl'
    if content == 'broken link':
        place.symlink_to(folder / 'gone')
    else:
        place.mkdir()
    if content.startswith('hidden'):
        file = place / ('.1.png' if content == 'hidden' else '.x/1.png')
        file.parent.mkdir(exist_ok=True)
        shutil.copy(folder / 'train/cat/1.png', file)
    with pytest.raises(UserError, match=said):
        check_split(opened(folder), str(folder), 'train')


def test_order_of_names_that_differ_in_case(folder, monkeypatch):
    """timm's key does not tell them apart, so their order would be that in which the system lists the folders."""
    (folder / 'train/Cat').mkdir()
    shutil.copy(folder / 'train/cat/1.png', folder / 'train/Cat/1.png')
    walk = os.walk

    def backwards(*args, **kwargs):
        for place, folders, files in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield place, folders, files

    monkeypatch.setattr(os, 'walk', backwards)
    names = class_names(opened(folder))
    if names == ['cat', 'class9', 'class10', 'dog']:
        pytest.skip('this file system does not tell them apart')
    assert names == ['Cat', 'cat', 'class9', 'class10', 'dog']


def test_first_images_that_cannot_be_read(folder):
    dataset = opened(folder)
    for file in (folder / 'train').rglob('*.*'):
        file.write_bytes(b'no image')
    with pytest.raises(UserError, match=r'No image can be read \(.*1.png.*\): repair them.'):
        check_channels(dataset, 3)


def test_modes_that_images_cannot_have(folder):
    with pytest.raises(UserError, match='--input-img-mode must be one of L, LA, RGB.*, got LAB'):
        opened(folder, input_img_mode='LAB')


def test_class_map_in_another_encoding(folder):
    (folder / 'classes.txt').write_bytes('caf\xe9\n'.encode('latin-1'))
    with pytest.raises(UserError, match=r'--class-map \S+classes.txt: .*decode.* Save the file as UTF-8.'):
        opened(folder, class_map=str(folder / 'classes.txt'))


def test_images_outside_class_folders(folder):
    Image.new('RGB', (4, 4)).save(folder / 'train/stray.png')
    with pytest.raises(UserError, match=r'1 images lie directly in .*train \(stray.png\): put each one into the folder'):
        opened(folder)


def test_other_formats_are_counted(folder, caplog):
    for i in range(3):
        Image.new('RGB', (4, 4)).save(folder / f'train/cat/{i}.webp')
    (folder / 'train/cat/notes.txt').touch()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            opened(folder)
    told = [r.message for r in caplog.records if 'left out' in r.message]
    assert len(told) == 1 and '3 .webp' in told[0] and 'txt' not in told[0]


@pytest.mark.parametrize('content, want', [
    ('dog\ncat\nclass9\nclass10\n', ['dog', 'cat', 'class9', 'class10']),
    ('\ufeffdog\n\ncat\nclass9\nclass10\n\n', ['dog', 'cat', 'class9', 'class10']),
    ('0 dog\n1 cat\n2 class9\n3 class10\n', ['dog', 'cat', 'class9', 'class10']),
    ('1 dog\n2\tcat\n3 class9\n4 class10\n', ['dog', 'cat', 'class9', 'class10']),
    ('dog\ncat\nclass9\nclass10\nowl\n', ['dog', 'cat', 'class9', 'class10', 'owl']),
])
def test_class_maps(folder, content, want):
    (folder / 'map.txt').write_text(content, encoding='utf-8')
    dataset = opened(folder, class_map=str(folder / 'map.txt'))
    assert class_names(dataset) == want and labels(dataset)['dog/1.png'] == 0


@pytest.mark.parametrize('content, why', [
    ('dog\ncat\n', 'no entry for the folder class10 of .* and 1 others'),
    ('dog\ncat\ncat\n', 'the name cat is listed twice'),
    (None, 'Cannot locate specified class map file'),
])
def test_wrong_class_maps(folder, content, why):
    if content is not None:
        (folder / 'map.txt').write_text(content)
    with pytest.raises(UserError, match=why):
        opened(folder, class_map=str(folder / 'map.txt'))


def test_class_map_of_folders_that_begin_with_numbers(folder):
    for i, name in enumerate(('dog', 'cat', 'class9', 'class10')):
        (folder / 'train' / name).rename(folder / 'train' / f'{i + 1} {name}')
    (folder / 'map.txt').write_text('1 dog\n2 cat\n3 class9\n4 class10\n')
    assert class_names(opened(folder, class_map=str(folder / 'map.txt'))) == ['1 dog', '2 cat', '3 class9', '4 class10']


def test_class_map_of_numbers():
    assert read_class_map({'a': 1}, '') == {'a': 1}


@pytest.mark.parametrize('channels, mode', [(3, 'RGB'), (1, 'L')])
def test_sixteen_bits(folder, channels, mode):
    """Pillow's conversion would clip nearly all values to white."""
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(values).save(folder / 'train/cat/1.png')
    dataset = opened(folder, channels)
    image, _ = dataset[[i for i in range(len(dataset)) if dataset.filename(i) == 'cat/1.png'][0]]
    got = np.asarray(image)
    assert image.mode == mode and np.array_equal(got if channels == 1 else got[..., 0], (values >> 8).astype(np.uint8))


def test_channels():
    class Set(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return torch.zeros(1, 4, 4), 0

    check_channels(Set(), 1)
    with pytest.raises(UserError, match="The images have 1 channel, but the model's input has 3: add --in-chans 1"):
        check_channels(Set(), 3)


@pytest.mark.parametrize('name, why', [
    ('hfds/a/b', 'needs datasets: pip install datasets'), ('hfids/a', 'needs datasets: pip install datasets'),
    ('torch/mnist', 'give the folder of the data set with --data-dir'),
    ('torch/none', 'cannot be opened'), ('nothing/x', 'timm knows the types'),
])
def test_data_sets_that_cannot_be_opened(name, why, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda module: None)
    with pytest.raises(UserError, match=why):
        open_dataset(DataSource('' if 'mnist' in name else str(tmp_path), dataset=name), 'train', 3)


def test_archive(folder, caplog):
    """A .tar file is a data set, as for timm: both splits are all of its images."""
    shutil.make_archive(str(folder / 'x'), 'tar', folder, 'train')
    dataset = open_dataset(DataSource(str(folder / 'x.tar')), 'train', 3)
    with caplog.at_level(logging.WARNING):
        check_split(dataset, str(folder / 'x.tar'), 'train')
    assert 'the train split consists of all of its images' in caplog.text
    assert len(dataset) == 8 and class_names(dataset) is not None and dataset[0][0].mode == 'RGB'
