"""Folders of images with several labels each: a split is a folder with images and a table `labels.csv`."""
import csv
import os
from collections import Counter
from typing import Any, IO, List, Tuple

from timm.data.readers.reader import Reader

from ..errors import UserError, rewording

__all__ = ['LabelTable']

_TABLE = 'labels.csv'


class LabelTable(Reader):
    """timm's reader for a split `ROOT/SPLIT/labels.csv`.

    The header of the table is `file_name` and the names of the classes. A row has the path of an image below the
    split's folder, and for every class a number from 0 (not in the image) to 1 (in the image).

    Args:
        root: Folder around the splits.
        split: Name of the split's folder.

    Raises:
        UserError: There is no table, or a row of it is wrong; the message names the line.
    """

    def __init__(self, root: str, split: str):
        super().__init__()
        self.root = os.path.join(root, split)
        path = os.path.join(self.root, _TABLE)
        if not os.path.isfile(path):
            raise UserError(f'--task multilabel: there is no table {path}. Its header is file_name and the names of the'
                            f' classes, and a row has 0 or 1 for every class. (For other data sets see --dataset.)')
        with rewording(f'{path} cannot be read', UnicodeDecodeError, csv.Error, hint='Save the table as UTF-8.'), \
                open(path, newline='', encoding='utf-8-sig') as f:
            reader = csv.reader(f)
            rows = [(reader.line_num, row) for row in reader if row]
        header = rows[0][1] if rows else []
        names = header[1:]
        if header[:1] != ['file_name'] or not names or len(set(names)) < len(names):
            raise UserError(f'{path}: the header must be file_name and the names of the classes, each of them once.')
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        self.samples: List[Tuple[str, List[float]]] = [
            (os.path.join(self.root, row[0]), self._labels(path, number, row, names))
            for number, row in rows[1:]]
        if not self.samples:
            raise UserError(f'{path} has no rows below its header.')
        twice = [name for name, count in Counter(row[0] for _, row in rows[1:]).items() if count > 1]
        if twice:
            raise UserError(f'{path}: {", ".join(twice[:3])} {"has" if len(twice) == 1 else "have"} more than one row:'
                            f' keep one row for each file.')

    @staticmethod
    def _labels(path: str, number: int, row: List[str], names: List[str]) -> List[float]:
        try:
            labels = [float(value) for value in row[1:]]
        except ValueError:
            labels = []
        if len(labels) != len(names) or not all(0 <= value <= 1 for value in labels):
            raise UserError(f'{path}, line {number}: after the file name there must be {len(names)} numbers from 0 to'
                            f' 1.')
        if not os.path.isfile(os.path.join(os.path.dirname(path), row[0])):
            raise UserError(f'{path}, line {number}: there is no image {row[0]}.')
        return labels

    def __getitem__(self, index: int) -> Tuple[IO[bytes], List[float]]:
        path, labels = self.samples[index]
        return open(path, 'rb'), labels

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path: Any = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)
