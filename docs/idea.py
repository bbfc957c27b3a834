#!/usr/bin/env python3
"""Draw docs/idea.png, the picture of NetAug's idea for the top of the README.

    python docs/idea.py

A column of squares is a layer, a square is a channel. Lengths are in the units of the panel.
"""
import sys
from pathlib import Path
from typing import List, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from timm_netaug.cli.style import AUGMENTED, BLACK, GREY, TINY, new_figure, style, text_colour  # noqa: E402

TINY_WIDTHS = [2, 3, 3, 4]  # channels of each layer
SUPER_WIDTHS = [6, 7, 7, 9]
SAMPLES = [[4, 7, 5, 6], [6, 4, 6, 9]]  # of two steps
SPACING, WIDTH, HEIGHT = 1.32, 0.5, 0.5  # distance of layers, size of a channel
TINTS = {TINY: '#B3D5EA', AUGMENTED: '#FAE3B3'}


def draw_network(axes: Axes, x: float, sample: Optional[List[int]]) -> None:
    """Draw the tiny network, and where there is a sample its channels on top, then the rest of the super-network."""
    for widths, colour in ((sample, AUGMENTED), (TINY_WIDTHS, TINY)):
        for i in range(len(widths) - 1) if widths else ():
            left, right = x + i * SPACING + WIDTH, x + (i + 1) * SPACING
            axes.add_patch(Polygon(
                [(left, 0), (left, widths[i] * HEIGHT), (right, widths[i + 1] * HEIGHT), (right, 0)],
                facecolor=TINTS[colour], linewidth=0))
    for i, tiny in enumerate(TINY_WIDTHS):
        for channel in range(SUPER_WIDTHS[i] if sample else tiny):
            look = dict(facecolor='white', edgecolor='#AAAAAA')
            if channel < tiny:
                look = dict(facecolor=TINY, edgecolor='white')
            elif channel < sample[i]:
                look = dict(facecolor=AUGMENTED, edgecolor='white')
            axes.add_patch(Rectangle((x + i * SPACING, channel * HEIGHT), WIDTH, HEIGHT, linewidth=1.3, **look))


def picture() -> Figure:
    figure = new_figure(13, 6.2)
    axes = figure.subplots()
    axes.set(xlim=(-4.7, 18.6), ylim=(-3.0, 7.2), aspect='equal')
    axes.axis('off')
    axes.text(-4.65, 6.7, 'NetAug trains a tiny network inside a wider one, and keeps only the tiny one', fontsize=19,
              weight='bold', va='center')

    places = (0, 6.7, 13.9)
    for x, title, sample in zip(places, ('training step 1', 'training step 2', 'after training'), (*SAMPLES, None)):
        axes.text(x + (3 * SPACING + WIDTH) / 2, 5.5, title, fontsize=17, ha='center', va='center')
        draw_network(axes, x, sample)
    for left, right, text in ((4.75, 6.4, ''), (11.45, 13.6, 'many\nsteps')):
        axes.annotate('', (right, 0.9), (left, 0.9), arrowprops=dict(arrowstyle='-|>', color=BLACK, linewidth=2,
                                                                      mutation_scale=22))
        axes.text((left + right) / 2, 1.2, text, fontsize=15, ha='center', va='bottom')

    for channels, text, colour in (
            (1, 'tiny network', TINY), (3, 'extra channels,\ndrawn for each step', text_colour(AUGMENTED)),
            (5.1, 'not in this step', text_colour(GREY))):
        axes.text(-0.3, channels * HEIGHT, text, fontsize=15, color=colour, ha='right', va='center', linespacing=1.05)

    for x, y, text, colour in (
            (0, -0.9, 'Each step minimises two losses, over shared weights:', BLACK),
            (0, -1.7, 'loss of the tiny network', TINY),
            (0, -2.5, '+ loss of the tiny network with the extra channels', text_colour(AUGMENTED)),
            (places[2], -0.9, 'The tiny network remains:', BLACK),
            (places[2], -1.7, 'a stock timm model', TINY)):
        axes.text(x, y, text, fontsize=15, va='center', color=colour, weight='normal' if colour == BLACK else 'bold')
    return figure


def main() -> None:
    with style():
        picture().savefig(HERE / 'idea.png', dpi=120, bbox_inches='tight', pad_inches=0.25)


if __name__ == '__main__':
    main()
