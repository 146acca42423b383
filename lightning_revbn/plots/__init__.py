"""Figures of layers, pairs and curves, drawn with matplotlib."""
