"""Figures, drawn with matplotlib. A figure module returns a figure, and `output` writes it.

`layers_figure` draws the layers of runs: `layer_rows` holds its quantities, `layer_axes` chooses their axes, and
`layer_stages` labels deep networks. `pairs_figure` draws pairs of scores, `curves_figure` scalars over training.
`fitted_text` fits names into the space of a figure.
"""
