"""Reads logs of runs and compares runs. Imports neither Lightning nor torch.

`logs` finds the files of a run. A reader for each kind of file (`csv_file`, `event_files`, `wandb_files`,
`mlflow_stores`) returns its `scalars`. `batch_norm_runs` picks the scalars that BatchNormMonitor logged.
`finished_runs` picks final scores by seed, `arms` sorts runs by their settings, and `comparison` tests the scores.
`names` sorts and shortens the names of runs, layers and metrics.
"""
