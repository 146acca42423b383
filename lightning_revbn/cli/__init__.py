"""The command `lightning-revbn`: arguments in, text out. `main` starts `inspect`, `plot` and `compare`."""
