"""Reads logs of runs and pairs them: no Lightning, and no torch to read a log."""
