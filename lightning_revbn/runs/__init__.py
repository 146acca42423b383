"""Reads logs of runs and compares runs. Imports neither Lightning nor torch.

`logs` finds the files of a run and reads its scalars from a `csv_file` or `event_files`; the readers return `scalars`.
`batch_norm_runs` pick the scalars that BatchNormMonitor logged; `finished_runs` pick final scores by seed, and
`comparison` tests them. `names` of runs, layers and metrics are sorted and shortened in one place.
"""
