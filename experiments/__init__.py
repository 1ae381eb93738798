"""MegDet's findings, reproduced: the runs, the driver that makes them, and the page that says what came out.

A run is a cell, one file of ``experiments/cells``, with a seed. ``make experiments`` makes all that are missing.
"""
