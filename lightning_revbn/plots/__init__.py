"""Figures, drawn with matplotlib. A figure module returns a figure, and `output` writes it.

`layers_figure` draws the layers of runs: `layer_rows` are its quantities, `layer_axes` their axes, `layer_stages` the
labels of deep networks. `pairs_figure` draws pairs of scores. `fitted_text` fits names into the room of a figure.
"""
